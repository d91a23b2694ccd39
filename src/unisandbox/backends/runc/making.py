"""How a sandbox of namespaces comes to be: its range of user ids, its namespaces and its root file system.

All of it is one job of the keeper, and verified before anybody is told.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import anyio

from unisandbox.api import BackendError, InvalidArgumentError, Mount, Rootfs, UnavailableError
from unisandbox.backends.runc.pidns import EMPTY_ROOT
from unisandbox.backends.runc.pod import DEVICES, HELD, IDS, LEASED_IDS, TUN, Pod, ids_of, translate_job
from unisandbox.backends.runc.rootfs import SAFE_READONLY, Op, host_tree, mount_ops, root_ops, until_served
from unisandbox.backends.runc.serving import device_of, served
from unisandbox.backends.runc.sysctls import checked_sysctls
from unisandbox.host import namespaces
from unisandbox.host.keeper import JobFailed, Keeper
from unisandbox.host.services import Host
from unisandbox.network.pasta import NAME_SERVER

_FIRST_RANGE: Final = LEASED_IDS.start // IDS
_RANGES: Final = len(LEASED_IDS) // IDS
_SHM_BYTES: Final = 64 << 20
_JOB_SECONDS: Final = 60.0


class Maker:
    """Makes the sandboxes of one engine, and has what they share: this machine's programs, and ranges of ids."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._trees: dict[bool, str] = {}
        self._preparing = anyio.Lock(fast_acquire=True)
        self._free_ranges: deque[int] = deque()

    async def host_tree(self, rootfs: Rootfs) -> str:
        """The tree of this machine's programs that all sandboxes of the engine clone; made at the first use."""
        async with self._preparing:
            if rootfs.local not in self._trees:
                path = f"/host{'-local' if rootfs.local else ''}"
                if self._host.shared:
                    await self._make_shared_tree(path, local=rootfs.local)
                else:
                    await self._make_tree(path, local=rootfs.local)
                self._trees[rootfs.local] = f"{self._host.work_dir}{path}"
            return self._trees[rootfs.local]

    async def _make_tree(self, path: str, *, local: bool) -> None:
        whole = f"{self._host.work_dir}{path}"
        await self._job(
            [
                # An attempt that was cut has left a part of it.
                {"do": "unmount", "path": whole},
                {"do": "remove_tree", "path": whole},
                {"do": "mounts", "root": self._host.work_dir, "ops": host_tree(path, local=local)},
            ]
        )

    async def _make_shared_tree(self, path: str, *, local: bool) -> None:
        """The same, unless another process of this engine has made it."""
        keeper, name = self._host.keeper, f"tree{path}"
        await keeper.locks.lock(name)
        try:
            if await keeper.notes.find(name) is None:
                await self._make_tree(path, local=local)
                await keeper.notes.write(name, "made")
        finally:
            keeper.locks.unlock(name)

    async def make(self, pod: Pod) -> None:
        """Namespaces and root file system, in one job of the keeper; verified. And what connects it."""
        with contextlib.ExitStack() as opened:
            await self._make(pod, _given(pod, opened))
        if pod.spec.network.kind == "user":
            await self._connect(pod)

    async def _connect(self, pod: Pod) -> None:
        """Start the helper of its network. That alone may open the device for it, and nothing else runs yet."""
        from unisandbox.network.user import Ends, UserNetwork  # most sandboxes have none

        dns = pod.spec.dns
        ends = Ends(
            pod.label,
            f"{pod.short}/",
            pod.pins["user"],
            pod.pins["net"],
            pod.id_maps,
            pod.cgroup,
            asks_helper=dns is None or NAME_SERVER in dns.servers,
        )
        limited = pod.spec.security.devices == "usual" and pod.keeper_ids is None
        if limited:
            pod.cgroup.allow_devices((*DEVICES, TUN))
        pod.network = await UserNetwork.connect(self._host, ends)
        if limited:
            pod.cgroup.allow_devices(DEVICES)

    async def _make(self, pod: Pod, given: Mapping[str, int]) -> None:
        spec = pod.spec
        keeper = self._host.keeper
        # A mount namespace of its own: mounts of one sandbox cost no other anything, and they end with it.
        steps: list[Mapping[str, object]] = [{"do": "mount_namespace"}]
        kinds = ["ipc", "uts"] + (["net"] if spec.network.kind in {"none", "user"} else [])
        maps: dict[str, object] = {}
        hold: dict[str, str] = {what: pod.held(what) for what in HELD}
        fds = list(pod.sources)
        if pod.mapped:
            if spec.user_ids is not None:
                pod.first_id = spec.user_ids[0]
            elif pod.keeper_ids is None:
                pod.lease = self._free_ranges.popleft() if self._free_ranges else await self._lease(pod)
                pod.first_id = pod.lease * IDS
            maps = dict(zip(("uid_map", "gid_map"), pod.id_maps, strict=True))
            if "user" in given:
                maps["user"] = len(fds) + list(given).index("user")
            else:
                kinds = ["user", *kinds]
        steps.append(
            {
                "do": "namespaces",
                "kinds": kinds,
                "hostname": pod.hostname,
                "sysctls": checked_sysctls(spec.sysctls, spec.network),
                **maps,
            }
        )
        hold |= {kind: f"{pod.short}/{kind}" for kind in kinds}
        place = pod.place()
        ops: list[Op] = pod.layer.ops("/rw", pod.image, pod.first_id)
        ops += [
            {"op": "mkdir", "path": "/shm"},
            {
                "op": "tmpfs",
                "path": "/shm",
                "size": _SHM_BYTES,
                "inodes": 8192,
                "mode": 0o1777,
                "uid": pod.first_id,
                "gid": pod.first_id,
                "attributes": ["nosuid", "nodev", "noexec"],
            },
        ]
        shared = await self.host_tree(spec.rootfs) if spec.rootfs.kind == "host" else ""
        is_served = pod.is_served(spec.rootfs)
        ops += root_ops(place, spec.rootfs, pod.identity, spec.mounts, shared, served=is_served)
        ops += mount_ops(place, spec.mounts, first_fd=int(spec.rootfs.kind == "dir"))
        if spec.share_pid:
            ops.append({"op": "mkdir", "path": EMPTY_ROOT})
            source = f"{pod.work}{EMPTY_ROOT}"
            ops.append({"op": "bind", "source": source, "path": EMPTY_ROOT, "attributes": SAFE_READONLY})
        ops, later = until_served(ops)
        steps += [
            {"do": "mounts", "root": self._host.work_dir, "ops": [{"op": "mkdir", "path": f"/{pod.short}"}]},
            {"do": "mounts", "root": pod.work, "ops": ops},
            {"do": "dirfd", "path": f"{pod.work}/rw", "name": "rw"},
        ]
        rooted: Mapping[str, object] = {"do": "dirfd", "path": f"{pod.work}{place.root}", "name": "root"}
        if is_served:
            hold["fuse"] = pod.held(device_of(""))
            del hold["root"]
        else:
            steps.append(rooted)
        if "net" in given:
            steps.append({"do": "given", "fd": len(fds), "name": "net"})
        hold |= {kind: f"{pod.short}/{kind}" for kind in given}
        fds += given.values()
        result = await self._job(
            steps, hold=hold, fds=fds, label=spec.name or "new", mounts=spec.mounts, rootfs=spec.rootfs
        )
        if is_served:
            del result[hold["fuse"]]
            later_steps = [{"do": "mounts", "root": pod.work, "ops": later}, rooted]
            result |= await self._make_served(pod, later_steps, result[pod.held("mnt")])
        pod.fds = {what: result.pop(pod.held(what)) for what in HELD}
        pod.pins = {name.rpartition("/")[2]: number for name, number in result.items()}
        for kind, number in pod.pins.items():
            pin = keeper.open_held(number, os.O_RDONLY)
            try:
                pod.inodes[kind] = namespaces.namespace_inode(pin)
            finally:
                os.close(pin)
        for kind, inode in pod.inodes.items():
            if inode == namespaces.namespace_inode(f"/proc/self/ns/{kind}"):
                raise BackendError(f"sandbox {pod.label!r}: the pinned {kind} namespace is the host's own")

    async def _make_served(self, pod: Pod, steps: Sequence[Mapping[str, object]], mnt: int) -> Mapping[str, int]:
        """Let a helper serve the root file system, and do what has waited for it."""
        fds = [*pod.sources, self._host.keeper.open_held(mnt, os.O_RDONLY)]
        try:
            steps = [{"do": "enter", "fd": len(fds) - 1}, *steps]
            return await served(self._host, pod, "", steps, {"root": pod.held("root")}, fds)
        except JobFailed as error:
            raise translate_job(error, pod.spec.name or "new", pod.spec.mounts, pod.spec.rootfs) from error
        finally:
            os.close(fds[-1])

    async def _lease(self, pod: Pod) -> int:
        """A range of user ids that no other engine of this host has."""
        directory = os.path.dirname(self._host.work_dir)
        name = ids_of(pod.short) if self._host.shared else ""
        try:
            return await self._host.keeper.lease(directory, _FIRST_RANGE, _RANGES, name=name)
        except BlockingIOError as error:
            raise UnavailableError(
                f"all {_RANGES} ranges of user ids of this host are in use", hint="Remove some sandboxes first."
            ) from error

    async def release(self, pod: Pod) -> None:
        assert pod.lease is not None  # noqa: S101 (called for one that has a range)
        if self._host.shared:
            await self._host.keeper.drop([ids_of(pod.short)])
        else:
            self._free_ranges.append(pod.lease)  # the next one of this process may have it without asking
        pod.lease = None

    async def _job(
        self,
        steps: Sequence[Mapping[str, object]],
        *,
        hold: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        label: str = "engine",
        mounts: Sequence[Mount] = (),
        rootfs: Rootfs | None = None,
    ) -> dict[str, int]:
        try:
            return dict((await self._host.keeper.job(steps, hold=hold, fds=fds, timeout=_JOB_SECONDS)).held)
        except JobFailed as error:
            raise translate_job(error, label, mounts, rootfs) from error


async def restore_network(pod: Pod, host: Host) -> None:
    """Take over the helper of its network, which another process has started."""
    if pod.spec.network.kind == "user" and pod.network is None:
        from unisandbox.network.user import UserNetwork

        pod.network = await UserNetwork.restore(host, f"{pod.short}/", pod.cgroup)


async def clear_network(pod: Pod, keeper: Keeper) -> None:
    """End the helper of its network where only the names are known."""
    if pod.spec.network.kind == "user":
        from unisandbox.network.user import UserNetwork

        await UserNetwork.clear(keeper, f"{pod.short}/")


def _given(pod: Pod, opened: contextlib.ExitStack) -> dict[str, int]:
    """The namespaces that are there already, by their kind; `opened` closes them."""
    given: dict[str, int] = {}
    spec = pod.spec
    if spec.network.kind == "namespace":
        given["net"] = _open_network(spec.network.path, pod.label)
        opened.callback(os.close, given["net"])
        if pod.mapped and spec.user_ids is not None:
            # Nobody but the network's owner could mount what belongs to it (/sys).
            owner = namespaces.owner_userns(given["net"])
            opened.callback(os.close, owner)
            if namespaces.namespace_inode(owner) != namespaces.namespace_inode("/proc/self/ns/user"):
                given["user"] = owner
    return given


def _open_network(path: str, label: str) -> int:
    """Open a given network namespace, and make sure that it is one.

    Raises:
        InvalidArgumentError: it does not exist, or is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgumentError(f"network namespace of {label!r}: {path}: {error.strerror}") from error
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode) and namespaces.kind_of(fd) == "net":
            if namespaces.namespace_inode(fd) != namespaces.namespace_inode("/proc/self/ns/net"):
                return fd
            raise InvalidArgumentError(
                f"network namespace of {label!r}: {path} is the host's own", hint="Use network='host' if that is meant."
            )
        raise InvalidArgumentError(f"network namespace of {label!r}: {path} is no network namespace")
    except OSError as error:
        os.close(fd)
        raise InvalidArgumentError(f"network namespace of {label!r}: {path} is no network namespace") from error
    except BaseException:
        os.close(fd)
        raise
