"""The sandboxer of namespaces: an idle sandbox is a few pins in the keeper and no process at all."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    ContainerStatus,
    CreateSandbox,
    Exit,
    InvalidArgumentError,
    Metrics,
    Mount,
    NotFoundError,
    RecoverSandbox,
    Resources,
    Rootfs,
    SandboxSpec,
    SandboxStatus,
    StartedSandbox,
    UnavailableError,
    UnsupportedError,
    short_name,
)
from unisandbox.backends.runc.capabilities import CAPABILITIES
from unisandbox.backends.runc.pidns import EMPTY_ROOT, SharedPids
from unisandbox.backends.runc.pod import HELD, IDS, Pod, PodPlanner, open_sources, translate_job
from unisandbox.backends.runc.rootfs import Layer, Op, host_tree, mount_ops, root_ops
from unisandbox.backends.runc.sysctls import checked_sysctls
from unisandbox.host import namespaces
from unisandbox.host.cgroups import DeviceRule, ending
from unisandbox.host.init import open_binary
from unisandbox.host.keeper import Guard, JobFailed
from unisandbox.host.removal import remove_tree
from unisandbox.host.services import Host
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.plan import limits_of, metrics_of
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.task import OciTaskService

# Ranges of 65,536 user ids, above what systemd-nspawn takes (to 0x6FFF_FFFF) and below 2**31.
# Source: systemd's UIDS-GIDS.md.
_FIRST_RANGE: Final = 0x7000_0000 // IDS
_RANGES: Final = (0x7FFF_0000 - 0x7000_0000) // IDS
_SHM_BYTES: Final = 64 << 20
# The devices that every container has by the OCI specification, and terminals. Source: config-linux.md, devices.
_DEVICES: Final = (
    DeviceRule("c", 1, 3, "rwm"),  # null
    DeviceRule("c", 1, 5, "rwm"),  # zero
    DeviceRule("c", 1, 7, "rwm"),  # full
    DeviceRule("c", 1, 8, "rwm"),  # random
    DeviceRule("c", 1, 9, "rwm"),  # urandom
    DeviceRule("c", 5, 0, "rwm"),  # tty
    DeviceRule("c", 5, 2, "rwm"),  # ptmx
    DeviceRule("c", 136, None, "rwm"),  # pts
)
_JOB_SECONDS: Final = 60.0
_LEAST_PIDS: Final = 3
_SAFE: Final = ["readonly", "nosuid", "nodev"]


@attrs.define
class _Sandbox:
    pod: Pod
    created_at: float
    task: OciTaskService | None = None
    planner: PodPlanner | None = None
    pids: SharedPids | None = None
    # It cannot be used; what is left of it is freed by name.
    remains: bool = False
    started_at: float | None = None
    stopped_at: float | None = None
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class RuncSandboxer:
    """See `Sandboxer`. One object per engine."""

    def __init__(self, host: Host, runtime: Runtime) -> None:
        self._host = host
        self._runtime = runtime
        self._sandboxes: dict[str, _Sandbox] = {}
        self._trees: dict[bool, str] = {}
        self._preparing = anyio.Lock()
        self._init_fd = -1
        self._free_ranges: deque[int] = deque()

    async def create(self, request: CreateSandbox) -> None:
        """See `Sandboxer.create`."""
        spec = request.spec
        if request.sandbox_id in self._sandboxes:
            raise AlreadyExistsError(f"sandbox {request.sandbox_id!r} exists already")
        _check(spec)
        host = self._host
        short = short_name(host.engine_id, request.sandbox_id)
        root = host.cgroups.root()
        dirs = root.predict(short, limits=limits_of(spec.resources))
        image = self._image(short)
        sources = open_sources(spec.rootfs, spec.mounts, spec.name or "new")
        undo = [
            Guard(f"{short}/cgroup-directories", "rmdir_cgroup", dirs),
            Guard(f"{short}/processes", "kill_cgroup", dirs),
        ]
        if not Layer.of(spec.resources).in_memory:
            undo.append(Guard(f"{short}/image", "unlink", (image,)))
        try:
            await host.keeper.guard(undo)
            cgroup = root.child(short, limits=limits_of(spec.resources))
        except BaseException:
            for fd in sources:
                os.close(fd)
            ending.remove(dirs, 1.0)
            with anyio.CancelScope(shield=True):
                await host.keeper.unguard([guard.name for guard in undo])
            raise
        pod = self._pod_of(request.sandbox_id, spec)
        pod.cgroup, pod.sources = cgroup, sources
        self._sandboxes[request.sandbox_id] = _Sandbox(pod, time.time())
        cgroup.allow_devices(_DEVICES)

    def _pod_of(self, sandbox_id: str, spec: SandboxSpec) -> Pod:
        host = self._host
        short = short_name(host.engine_id, sandbox_id)
        return Pod(sandbox_id, spec, short, f"{host.work_dir}/{short}", Layer.of(spec.resources), self._image(short))

    def _image(self, short: str) -> str:
        return os.path.join(self._host.disk_dir, f"unisandbox-{self._host.engine_id}-{short}.img")

    async def start(self, sandbox_id: str) -> StartedSandbox:
        """See `Sandboxer.start`."""
        sandbox = self._get(sandbox_id)
        pod = sandbox.pod
        if sandbox.task is None:
            await self._make(pod)
            sandbox.planner = self._planner_of(pod)
            sandbox.task = self._task_of(pod, sandbox.planner)
            sandbox.started_at = time.time()
            if self._host.shared:
                await self._host.keeper.note(f"{pod.short}/pod", pod.facts(sandbox.created_at, sandbox.started_at))
        if pod.spec.share_pid and sandbox.pids is None:
            assert sandbox.planner is not None  # noqa: S101 (made with the task service)
            sandbox.pids = await SharedPids.make(self._host, self._runtime, pod, sandbox.planner, self._init())
        sandbox.stopped_at = None
        sandbox.ended = anyio.Event()
        return StartedSandbox(sandbox.task)

    def _init(self) -> int:
        if self._init_fd < 0:
            self._init_fd = open_binary()
        return self._init_fd

    def _planner_of(self, pod: Pod) -> PodPlanner:
        return PodPlanner(self._host, self._runtime, pod, host_tree=self._host_tree, init_fd=self._init())

    def _task_of(self, pod: Pod, planner: PodPlanner) -> OciTaskService:
        ledger = Ledger(self._host.keeper, f"{pod.short}/", kept=self._host.shared)
        return OciTaskService(pod.label, self._host.keeper, self._runtime, planner, ledger)

    async def recover(self, request: RecoverSandbox) -> StartedSandbox | None:
        """See `Sandboxer.recover`."""
        sandbox_id, keeper = request.sandbox_id, self._host.keeper
        sandbox = self._sandboxes.get(sandbox_id)
        short = short_name(self._host.engine_id, sandbox_id)
        note = (await keeper.notes(f"{short}/pod")).get(f"{short}/pod") if request.lived else None
        if sandbox is None:
            sandbox = _Sandbox(self._pod_of(sandbox_id, request.spec), time.time())
        if note is None:
            if sandbox_id in self._sandboxes:
                self._let_go(sandbox)
            self._sandboxes[sandbox_id] = sandbox
            sandbox.remains = True
            return None
        pod = sandbox.pod
        sandbox.created_at, sandbox.started_at = pod.restore(note, await keeper.held(f"{short}/"))
        try:
            pod.cgroup = self._host.cgroups.find(short)
        except FileNotFoundError:
            sandbox.remains = True
        self._sandboxes[sandbox_id] = sandbox
        if sandbox.remains or "root" not in pod.fds:
            sandbox.remains = True
            return None
        sandbox.stopped_at = None if request.started else sandbox.stopped_at or time.time()
        if sandbox.planner is None:
            sandbox.planner = self._planner_of(pod)
        if sandbox.task is None:
            sandbox.task = self._task_of(pod, sandbox.planner)
        if sandbox.pids is not None:
            sandbox.pids.close()
        sandbox.pids = await SharedPids.restore(self._host, pod) if pod.spec.share_pid else None
        await sandbox.task.restore(exclusive=request.exclusive)
        return StartedSandbox(sandbox.task)

    async def stop(self, sandbox_id: str, *, grace: float) -> None:
        """See `Sandboxer.stop`."""
        sandbox = self._get(sandbox_id)
        task = sandbox.task
        if task is not None:
            if grace > 0:
                await _ask_to_end(task, grace)
            for container_id in task.container_ids:
                task.kill_now(container_id)
        try:
            if task is not None:
                for container_id in task.container_ids:
                    await task.delete(container_id)
            if sandbox.pids is not None:
                await sandbox.pids.end(self._host, self._runtime, sandbox.pod)
                sandbox.pids = None
        except UnavailableError:
            self._end_without_keeper(sandbox)
        sandbox.stopped_at = time.time()
        sandbox.ended.set()

    def kill_now(self, sandbox_id: str) -> None:
        """See `Sandboxer.kill_now`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.task is not None:
            for container_id in sandbox.task.container_ids:
                sandbox.task.kill_now(container_id)

    async def wait(self, sandbox_id: str) -> Exit:
        """See `Sandboxer.wait`."""
        sandbox = self._get(sandbox_id)
        await sandbox.ended.wait()
        return Exit(code=0, exited_at=sandbox.stopped_at or time.time())

    async def status(self, sandbox_id: str) -> SandboxStatus:
        """See `Sandboxer.status`."""
        sandbox = self._get(sandbox_id)
        pod, task = sandbox.pod, sandbox.task
        containers: list[ContainerStatus] = []
        if task is not None:
            for container_id in task.container_ids:
                state = await task.state(container_id)
                containers.append(ContainerStatus(container_id, state.state, state.pid, state.exit))
        await anyio.lowlevel.checkpoint_if_cancelled()
        return SandboxStatus(
            id=sandbox_id,
            name=pod.spec.name,
            backend="runc",
            state="created" if sandbox.task is None else "stopped" if sandbox.stopped_at else "ready",
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            stopped_at=sandbox.stopped_at,
            containers=tuple(containers),
            labels=pod.spec.labels,
            annotations=pod.spec.annotations,
            namespaces=dict(pod.inodes),
            netns_path=f"/proc/{self._host.keeper.pid}/fd/{pod.pins['net']}" if "net" in pod.pins else "",
        )

    async def update(self, sandbox_id: str, resources: Resources) -> None:
        """See `Sandboxer.update`."""
        pod = self._get(sandbox_id).pod
        if not isinstance(resources, Resources):
            raise InvalidArgumentError(f"resources must be Resources, got {resources!r}")
        if resources.disk not in {0, pod.layer.size}:
            raise UnsupportedError(
                "a change of the disk limit of a living sandbox", "runc", hint="Leave disk= out: it stays as it is."
            )
        _check_resources(resources)
        pod.cgroup.set_limits(limits_of(resources))
        pod.spec = attrs.evolve(pod.spec, resources=resources)
        await anyio.lowlevel.checkpoint()

    async def metrics(self, sandbox_id: str) -> Metrics:
        """See `Sandboxer.metrics`."""
        pod = self._get(sandbox_id).pod
        await anyio.lowlevel.checkpoint_if_cancelled()
        task = self._get(sandbox_id).task
        metrics = metrics_of(pod.cgroup)
        if task is not None:
            metrics = attrs.evolve(metrics, oom_kills=task.oom_kills())
        if "rw" not in pod.fds:
            return metrics
        layer = os.statvfs(f"/proc/{self._host.keeper.pid}/fd/{pod.fds['rw']}")
        return attrs.evolve(
            metrics,
            disk_bytes=(layer.f_blocks - layer.f_bfree) * layer.f_frsize,
            disk_limit_bytes=pod.layer.size,
        )

    async def remove(self, sandbox_id: str) -> None:
        """See `Sandboxer.remove`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        pod, keeper = sandbox.pod, self._host.keeper
        if sandbox.remains:
            await self._remove_remains(pod)
            self._sandboxes.pop(sandbox_id, None)
            return
        await self.stop(sandbox_id, grace=0)
        pod.cgroup.kill()
        if not keeper.alive:
            self._end_without_keeper(sandbox)
            self._sandboxes.pop(sandbox_id, None)
            return
        await keeper.drop(prefix=f"{pod.short}/")
        # With the last descriptor its mount namespace is gone, and all its mounts; what is left are bundles.
        remove_tree(self._host.outside(pod.work))
        pod.close()
        if not pod.cgroup.remove(timeout=5.0):
            raise BackendError(f"sandbox {pod.label!r}: its cgroups {pod.cgroup.dirs} cannot be removed")
        if pod.lease is not None:
            # Everything that had these ids is gone: the next sandbox may have them.
            await self._release(pod)
        await keeper.unguard(_guards_of(pod.short))
        self._sandboxes.pop(sandbox_id, None)

    async def _remove_remains(self, pod: Pod) -> None:
        """Free what is left of a sandbox of which only the names are known."""
        keeper = self._host.keeper
        dirs = self._host.cgroups.root().predict(pod.short)
        ending.kill(dirs, 1.0)
        if keeper.alive:
            await keeper.drop(prefix=f"{pod.short}/")
            remove_tree(self._host.outside(pod.work))
        if not ending.remove(dirs, 5.0):
            raise BackendError(f"sandbox {pod.label!r}: its cgroups {dirs} cannot be removed")
        with contextlib.suppress(FileNotFoundError):  # it had none, or its guard was quicker
            os.unlink(pod.image)
        if keeper.alive:
            await keeper.drop([_ids_of(pod.short)])
            await keeper.unguard(_guards_of(pod.short))

    def _let_go(self, sandbox: _Sandbox) -> None:
        """Close what this process holds of a sandbox; ends nothing."""
        if sandbox.task is not None:
            sandbox.task.abandon()
        if sandbox.pids is not None:
            sandbox.pids.close()
            sandbox.pids = None
        sandbox.pod.close()

    def _end_without_keeper(self, sandbox: _Sandbox) -> None:
        """The keeper is dead, and with it mounts, pins and every init; what is left are cgroups and descriptors."""
        if self._host.keeper.alive:
            raise BackendError(f"the keeper does not answer for sandbox {sandbox.pod.label!r}")
        sandbox.pod.cgroup.kill()
        self._let_go(sandbox)
        sandbox.pod.cgroup.remove(timeout=5.0)

    async def list(self) -> Sequence[SandboxStatus]:
        """See `Sandboxer.list`."""
        return [await self.status(sandbox_id) for sandbox_id in list(self._sandboxes)]

    def root_fd(self, sandbox_id: str) -> int:
        """See `Sandboxer.root_fd`."""
        pod = self._get(sandbox_id).pod
        if "root" not in pod.fds:
            raise NotFoundError(f"sandbox {pod.label!r} has no files before it is started")
        path = f"/proc/{self._host.keeper.pid}/fd/{pod.fds['root']}"
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Another process may have removed the sandbox, and the keeper may hold another one's root by this number.
        if self._host.shared and f"/{pod.short}/" not in os.readlink(f"/proc/self/fd/{fd}"):
            os.close(fd)
            raise NotFoundError(f"sandbox {pod.label!r} was removed")
        return fd

    def host_ids(self, sandbox_id: str) -> tuple[int, int]:
        """See `Sandboxer.host_ids`."""
        pod = self._get(sandbox_id).pod
        return (pod.first_id, IDS) if pod.mapped else (0, 2**32 - 1)

    def abandon(self) -> None:
        """See `Sandboxer.abandon`."""
        for sandbox in self._sandboxes.values():
            self._let_go(sandbox)
        self._sandboxes.clear()
        if self._init_fd >= 0:
            os.close(self._init_fd)
            self._init_fd = -1

    async def _host_tree(self, rootfs: Rootfs) -> str:
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
        await self._job([{"do": "mounts", "root": self._host.work_dir, "ops": host_tree(path, local=local)}])

    async def _make_shared_tree(self, path: str, *, local: bool) -> None:
        """The same, unless another process of this engine has made it."""
        keeper, name = self._host.keeper, f"tree{path}"
        await keeper.lock(name)
        try:
            if name not in await keeper.notes(name):
                await self._make_tree(path, local=local)
                await keeper.note(name, "made")
        finally:
            keeper.unlock(name)

    async def _make(self, pod: Pod) -> None:
        """Namespaces and root file system, in one job of the keeper; verified."""
        spec = pod.spec
        keeper = self._host.keeper
        # A mount namespace of its own: mounts of one sandbox cost no other anything, and they end with it.
        steps: list[Mapping[str, object]] = [{"do": "mount_namespace"}]
        kinds = ["ipc", "uts"] + (["net"] if spec.network.kind == "none" else [])
        maps: dict[str, object] = {}
        hold: dict[str, str] = {what: pod.held(what) for what in HELD}
        fds = list(pod.sources)
        if pod.mapped:
            pod.lease = self._free_ranges.popleft() if self._free_ranges else await self._lease(pod)
            pod.first_id = pod.lease * IDS
            rows = [[0, pod.first_id, IDS]]
            kinds = ["user", *kinds]
            maps = {"uid_map": rows, "gid_map": rows}
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
        empty: list[Op] = [{"op": "mkdir", "path": f"{EMPTY_ROOT}{name}"} for name in ("", "/proc", "/dev", "/sys")]
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
        shared = await self._host_tree(spec.rootfs) if spec.rootfs.kind == "host" else ""
        ops += root_ops(place, spec.rootfs, pod.identity, spec.mounts, shared)
        ops += mount_ops(place, spec.mounts, first_fd=int(spec.rootfs.kind == "dir"))
        if spec.share_pid:
            ops += empty
            ops.append({"op": "bind", "source": f"{pod.work}{EMPTY_ROOT}", "path": EMPTY_ROOT, "attributes": _SAFE})
        steps += [
            {"do": "mounts", "root": self._host.work_dir, "ops": [{"op": "mkdir", "path": f"/{pod.short}"}]},
            {"do": "mounts", "root": pod.work, "ops": ops},
            {"do": "dirfd", "path": f"{pod.work}{place.root}", "name": "root"},
            {"do": "dirfd", "path": f"{pod.work}/rw", "name": "rw"},
        ]
        given = -1
        try:
            if spec.network.kind == "namespace":
                given = _open_network(spec.network.path, pod.label)
                steps.append({"do": "given", "fd": len(fds), "name": "net"})
                fds.append(given)
                hold["net"] = f"{pod.short}/net"
            result = await self._job(steps, hold=hold, fds=fds, label=spec.name or "new", mounts=spec.mounts)
        finally:
            if given >= 0:
                os.close(given)
        pod.fds = {what: result.pop(pod.held(what)) for what in HELD}
        pod.pins = {name.rpartition("/")[2]: number for name, number in result.items()}
        pod.inodes = {
            kind: namespaces.namespace_inode(f"/proc/{keeper.pid}/fd/{number}") for kind, number in pod.pins.items()
        }
        for kind, inode in pod.inodes.items():
            if inode == namespaces.namespace_inode(f"/proc/self/ns/{kind}"):
                raise BackendError(f"sandbox {pod.label!r}: the pinned {kind} namespace is the host's own")

    async def _lease(self, pod: Pod) -> int:
        """A range of user ids that no other engine of this host has."""
        directory = os.path.dirname(self._host.work_dir)
        name = _ids_of(pod.short) if self._host.shared else ""
        try:
            return await self._host.keeper.lease(directory, _FIRST_RANGE, _RANGES, name=name)
        except BlockingIOError as error:
            raise UnavailableError(
                f"all {_RANGES} ranges of user ids of this host are in use", hint="Remove some sandboxes first."
            ) from error

    async def _release(self, pod: Pod) -> None:
        assert pod.lease is not None  # noqa: S101 (called for one that has a range)
        if self._host.shared:
            await self._host.keeper.drop([_ids_of(pod.short)])
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
    ) -> dict[str, int]:
        try:
            return dict((await self._host.keeper.job(steps, hold=hold, fds=fds, timeout=_JOB_SECONDS)).held)
        except JobFailed as error:
            raise translate_job(error, label, mounts) from error

    def _get(self, sandbox_id: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"no sandbox {sandbox_id!r}")
        return sandbox


def _guards_of(short: str) -> list[str]:
    return [f"{short}/{name}" for name in ("cgroup-directories", "processes", "image")]


def _ids_of(short: str) -> str:
    """The name of a sandbox's lease; it is not given back before everything that has these ids is gone."""
    return f"ids/{short}"


def _check(spec: SandboxSpec) -> None:
    """Refuse what cannot be done, before anything is."""
    if spec.rootfs.kind not in CAPABILITIES.rootfs:
        raise UnsupportedError(
            f"rootfs kind {spec.rootfs.kind!r} ({spec.rootfs.ref!r})",
            "runc",
            hint="Use 'host', or unpack the image and give the directory's path (with a '/' in it).",
        )
    if spec.network.kind not in CAPABILITIES.networks:
        raise UnsupportedError(f"network {spec.network.kind!r}", "runc")
    if spec.annotations:
        raise UnsupportedError("annotations", "runc", reason=f"it knows none, got {sorted(spec.annotations)}")
    if spec.userns == "private" and (why := _no_user_namespaces()):
        raise UnsupportedError(
            "a user namespace of its own", "runc", reason=why, hint="Use userns='host' if you trust what runs in it."
        )
    _check_resources(spec.resources)
    checked_sysctls(spec.sysctls, spec.network)


def _no_user_namespaces() -> str:
    """Why this host makes no user namespaces; empty when nothing forbids it."""
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
            return "" if int(file.read()) > 0 else "user.max_user_namespaces is 0"
    except FileNotFoundError:
        return "this kernel has none"


def _check_resources(resources: Resources) -> None:
    if resources.pids is not None and resources.pids < _LEAST_PIDS:
        raise InvalidArgumentError(
            f"pids must be at least {_LEAST_PIDS} (init, the runtime and a program), got {resources.pids}"
        )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if resources.nofile is not None and most != resource.RLIM_INFINITY and resources.nofile > most:
        raise InvalidArgumentError(
            f"nofile must be at most {most}, this process's own hard limit (ulimit -Hn), got {resources.nofile}"
        )


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


async def _ask_to_end(task: OciTaskService, grace: float) -> None:
    """SIGTERM to every process that was asked for, and wait a while for their ends."""
    running = await task.running()
    for container_id, exec_id in running:
        with contextlib.suppress(NotFoundError):  # it has ended, and whoever waited for it has deleted it
            await task.kill(container_id, exec_id, signal=signal.SIGTERM)
    with anyio.move_on_after(grace):
        for container_id, exec_id in running:
            with contextlib.suppress(NotFoundError):
                await task.wait(container_id, exec_id)
