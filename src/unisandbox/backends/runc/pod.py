"""One sandbox of namespaces: what it holds on the host, and what is said when that cannot be had."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import attrs

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Rootfs,
    SandboxSpec,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.backends.runc import overlays
from unisandbox.backends.runc.rootfs import Identity, Layer, Place
from unisandbox.host import subordinate
from unisandbox.host.cgroups import Cgroup, DeviceRule
from unisandbox.host.helper import Helper
from unisandbox.host.keeper import JobFailed, Keeper
from unisandbox.host.subordinate import Rows

if TYPE_CHECKING:
    from unisandbox.network.user import UserNetwork

IDS: Final = 65536
"""How many user ids a sandbox has unless it is said, as every image may use 0 to 65535."""

LEASED_IDS: Final = range(0x7000_0000, 0x7FFF_0000)
"""The host's ids that engines lease to such sandboxes: above what systemd-nspawn takes (to 0x6FFF_FFFF), below 2**31.

Source: systemd's UIDS-GIDS.md.
"""

HELD: Final = ("root", "rw", "mnt")
"""What the keeper holds of every sandbox beside its namespaces; see `Pod.fds`."""

MOST_SOURCES: Final = 60
"""What of the host can be mounted in one root: each is a descriptor of one message to the keeper, among a few others.

Source: `FDS_LIMIT` of the keeper's protocol.
"""

_PINNED: Final = ("user", "net", "ipc", "uts", "pid")
# What the kernel answers when a mount point does not fit.
_MISTAKES: Final = frozenset(
    {
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.EINVAL,
        errno.EACCES,
    }
)


# The devices that every container has by the OCI specification, and terminals. Source: config-linux.md, devices.
DEVICES: Final = (
    DeviceRule("c", 1, 3, "rwm"),  # null
    DeviceRule("c", 1, 5, "rwm"),  # zero
    DeviceRule("c", 1, 7, "rwm"),  # full
    DeviceRule("c", 1, 8, "rwm"),  # random
    DeviceRule("c", 1, 9, "rwm"),  # urandom
    DeviceRule("c", 5, 0, "rwm"),  # tty
    DeviceRule("c", 5, 2, "rwm"),  # ptmx
    DeviceRule("c", 136, None, "rwm"),  # pts
)

TUN: Final = DeviceRule("c", 10, 200, "rw")
"""What the helper of a network opens, and nobody else. Source: Documentation/admin-guide/devices.txt."""


def ids_of(short: str) -> str:
    """The name of a sandbox's lease; it is not given back before everything that has these ids is gone."""
    return f"ids/{short}"


@attrs.define(eq=False, repr=False)
class Pod:
    """What one sandbox holds.

    Attributes:
        sandbox_id, spec: as created.
        short: its short name, for cgroups and directories.
        work: its directory in the keeper's file system.
        cgroup: its own, with the limits of the whole sandbox.
        layer: the bounded place for its writes.
        image: path of the disk image of its layer, when it is not in memory.
        first_id: the host's id of root inside.
        lease: number of its range of ids; None without a user namespace, and where all sandboxes have the same ids.
        keeper_ids: the user and group ids of a keeper that is root of a user namespace only; the sandbox has the same.
        pins: number in the keeper of each namespace, by kind.
        inodes: inode number of each pinned namespace.
        fds: numbers in the keeper of what is held beside the namespaces: "root", its root directory, "rw", that of its
            writable layer, "mnt", the mount namespace in which all its mounts are, "root-NAME" of a container's own.
        sources: descriptors of the sources of `spec.mounts`, opened once; of the root directory first, for kind "dir".
        network: the helper of a network of kind "user", from the start on.
        layers: the helpers that serve the writable layers, by the name of the container whose root file system it is;
            "" for the sandbox's own. See `serving`.
    """

    sandbox_id: str
    spec: SandboxSpec
    short: str
    work: str
    layer: Layer
    image: str
    cgroup: Cgroup = attrs.field(init=False)
    first_id: int = 0
    lease: int | None = None
    keeper_ids: tuple[Rows, Rows] | None = None
    pins: dict[str, int] = attrs.field(factory=dict)
    inodes: dict[str, int] = attrs.field(factory=dict)
    fds: dict[str, int] = attrs.field(factory=dict)
    sources: list[int] = attrs.field(factory=list)
    network: UserNetwork | None = None
    layers: dict[str, Helper] = attrs.field(factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """See `SandboxStatus.warnings`."""
        said = [] if self.network is None else [self.network.warning]
        for container, helper in self.layers.items():
            if helper.has_ended:
                whose = f"the files of container {container!r}" if container else "its files"
                said.append(
                    f"{whose} cannot be reached any more: the program that serves them, {overlays.PROGRAM} (process"
                    f" {helper.pid}), has ended; remedy: create it anew"
                )
        return tuple(words for words in said if words)

    def is_served(self, rootfs: Rootfs) -> bool:
        """Whether a program has to lay the writable layer over this root file system."""
        is_written = rootfs.kind == "dir" and not rootfs.readonly
        return is_written and self.keeper_ids is not None and not overlays.by_kernel()

    def wake(self) -> None:
        """Let the helpers of its layers go on, if somebody has stopped them: everybody would wait for them."""
        for helper in self.layers.values():
            helper.wake()

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.spec.name or self.sandbox_id

    def facts(self, created_at: float, started_at: float) -> str:
        """What another process needs to know of it beside the names that the keeper holds."""
        return json.dumps(
            {
                "first_id": self.first_id,
                "lease": self.lease,
                "inodes": self.inodes,
                "created_at": created_at,
                "started_at": started_at,
            }
        )

    def restore(self, facts: str, held: Mapping[str, int]) -> tuple[float, float]:
        """Take over what another process has made: `created_at` and `started_at`.

        Args:
            facts: what `facts` gave there.
            held: names below its prefix that the keeper holds, with their numbers.
        """
        known = json.loads(facts)
        self.first_id, self.lease, self.inodes = known["first_id"], known["lease"], dict(known["inodes"])
        names = {name.removeprefix(f"{self.short}/"): number for name, number in held.items()}
        self.pins = {kind: names[kind] for kind in _PINNED if kind in names}
        self.fds = {name: number for name, number in names.items() if name in HELD or name.startswith("root-")}
        return known["created_at"], known["started_at"]

    def held(self, what: str) -> str:
        """The name under which the keeper holds something of it."""
        return f"{self.short}/{what}"

    @property
    def mapped(self) -> bool:
        """It has a user namespace of its own."""
        return self.spec.userns == "private"

    @property
    def is_single(self) -> bool:
        """It has one id only, that of the user: no other user inside, and nobody changes groups."""
        return self.keeper_ids is not None and subordinate.are_single(self.keeper_ids)

    @property
    def ids(self) -> int:
        """How many user ids it has, with a user namespace of its own."""
        if self.keeper_ids is not None:
            return min(subordinate.count(subordinate.below(rows)) for rows in self.keeper_ids)
        return IDS if self.spec.user_ids is None else self.spec.user_ids[1]

    @property
    def host_ids(self) -> tuple[int, int]:
        """See `Sandboxer.host_ids`."""
        if self.keeper_ids is not None:
            return self.keeper_ids[0][0][1], self.keeper_ids[0][0][2]
        return (self.first_id, self.ids) if self.mapped else (0, 2**32 - 1)

    @property
    def id_maps(self) -> tuple[Rows, Rows]:
        """Its user map and its group map: rows of inside, outside (as the keeper sees it), count."""
        if self.keeper_ids is not None:
            return subordinate.below(self.keeper_ids[0]), subordinate.below(self.keeper_ids[1])
        return [[0, self.first_id, self.ids]], [[0, self.first_id, self.ids]]

    @property
    def identity(self) -> Identity:
        """What its /etc says."""
        return Identity.of(self.spec, self.hostname)

    @property
    def hostname(self) -> str:
        """The asked one, or the first 12 characters of the id."""
        return self.spec.hostname or self.sandbox_id[:12]

    @property
    def etc(self) -> str:
        """The directory, in its mount namespace, of its own hosts, hostname and resolv.conf."""
        rootfs = self.spec.rootfs
        return f"{self.work}{'/root/etc' if rootfs.kind == 'dir' and not rootfs.readonly else '/rw/run/etc'}"

    def place(self, container: str = "") -> Place:
        """Where a root file system is built: the sandbox's own, or that of one container."""
        return Place(
            work=self.work,
            root=f"/c/{container}/root" if container else "/root",
            layer=f"/rw/c/{container}" if container else "/rw",
            base=f"/c/{container}/base" if container else "/base",
            first_id=self.first_id,
            mapped=self.mapped and self.keeper_ids is None,
            others=not self.is_single,
        )

    def root_fd(self, keeper: Keeper, container: str = "") -> int:
        """An O_PATH descriptor of its root directory, or of that of one container, the caller's to close.

        Raises:
            NotFoundError: there is none, or it is gone.
        """
        name = f"root-{container}" if container else "root"
        what = f"container {container!r} of sandbox {self.label!r}" if container else f"sandbox {self.label!r}"
        if name not in self.fds:
            raise NotFoundError(f"{what} has no files{'' if container else ' before it is started'}")
        fd = keeper.open_held(self.fds[name], os.O_PATH | os.O_DIRECTORY)
        # Another process (or its ttl) may have removed the sandbox, and the keeper hold another one's root as this one.
        if f"/{self.short}/" not in os.readlink(f"/proc/self/fd/{fd}"):
            os.close(fd)
            raise NotFoundError(f"{what} was removed")
        return fd

    def close(self) -> None:
        """Close what is open here for it."""
        if self.network is not None:
            self.network.close()
        for helper in self.layers.values():
            helper.close()
        for fd in self.sources:
            os.close(fd)
        self.sources.clear()


def open_sources(rootfs: Rootfs, mounts: Sequence[Mount], label: str) -> list[int]:
    """Open what will be mounted, once: what is mounted later is what was looked at now.

    Raises:
        InvalidArgumentError: a source does not exist, or the root or its /etc is no directory.
        UnsupportedError: they are too many.
    """
    fds: list[int] = []
    if sum(bool(mount.source) for mount in mounts) > MOST_SOURCES:
        raise too_many_sources()
    try:
        if rootfs.kind == "dir":
            fds.append(_open_source(rootfs.path, os.O_DIRECTORY, f"root directory of {label!r}"))
            _check_etc(fds[0], rootfs.path, label)
        fds += [_open_source(mount.source, 0, f"mount source of {label!r}") for mount in mounts if mount.source]
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def too_many_sources() -> UnsupportedError:
    """The error for more than `MOST_SOURCES`."""
    return UnsupportedError(
        f"more than {MOST_SOURCES} mounts of the host",
        "runc",
        hint="Mount a directory that has several of them in it.",
    )


def _check_etc(root: int, path: str, label: str) -> None:
    """A directory of ours is put over it, with what differs from sandbox to sandbox: through that no link is seen."""
    try:
        mode = os.stat("etc", dir_fd=root, follow_symlinks=False).st_mode
    except OSError:
        return
    if not stat.S_ISDIR(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a directory"
        raise InvalidArgumentError(
            f"rootfs {path!r} of {label!r} cannot be used: its /etc is {what}",
            hint="Make it a directory: a sandbox has files of its own there.",
        )


def _open_source(path: str, flags: int, what: str) -> int:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    except OSError as error:
        raise InvalidArgumentError(f"{what} cannot be used: {path}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        os.close(fd)
        raise InvalidArgumentError(f"{what} cannot be used: {path} is a device, and mounts are always nodev")
    return fd


def translate_job(
    error: JobFailed, label: str, mounts: Sequence[Mount] = (), rootfs: Rootfs | None = None
) -> Exception:
    """A job's failure in the words of whoever asked for the sandbox."""
    text = error.strerror or str(error)
    if "mapping the ids" in text:
        by_target = {mount.target: mount.source for mount in mounts if f"/root{mount.target} (operation" in text}
        target = max(by_target, key=len, default="")
        what = f"mount source {by_target[target]!r}" if target else "a mount"
        if not target and rootfs is not None and rootfs.kind == "dir":
            what = f"rootfs {rootfs.path!r}"
        return UnavailableError(
            f"cannot make sandbox {label!r}: the ids of {what} cannot be mapped: its file system cannot do that, or "
            "they are mapped already",
            hint="Keep the directory on ext4, xfs, btrfs or tmpfs, or use userns='host' or Mount(idmap=False).",
        )
    if rootfs is not None and rootfs.kind == "dir" and error.errno in {errno.ELOOP, errno.ENOTDIR}:
        for name in ("dev", "proc", "sys", "tmp", "run"):
            if text.startswith("mkdir ") and f"/{name} (operation" in text:
                what = "a symbolic link" if error.errno == errno.ELOOP else "not a directory"
                return InvalidArgumentError(
                    f"rootfs {rootfs.path!r} of {label!r} cannot be used: its /{name} is {what}",
                    hint="Make it a directory, or take it read-only, with Rootfs.dir(path, readonly=True).",
                )
    for mount in mounts:
        # Operations say their path; a mount point's ends with the target, or with the directory that it needs.
        targets = {mount.target, os.path.dirname(mount.target)} - {"/"}
        if not any(f"{target} (operation" in text for target in targets):
            continue
        if error.errno == errno.EOVERFLOW:  # root of the host has no id where the mount maps them, to make it there
            return InvalidArgumentError(
                f"mount target {mount.target!r} of {label!r} is not there in the mount that it lies in",
                hint="Make it in that one's source, as a file or directory like what is mounted on it.",
            )
        if error.errno in _MISTAKES:
            return InvalidArgumentError(
                f"mount target {mount.target!r} of {label!r} cannot be used: {os.strerror(error.errno or 0)}",
                hint="It must be free, or of the same kind (file or directory), and in a place that can be written.",
            )
    if text.startswith("sysctl ") and error.errno in {errno.EINVAL, errno.ENOENT, errno.ERANGE}:
        return InvalidArgumentError(f"sandbox {label!r}: {text}")
    if error.errno == errno.EFBIG:
        return InvalidArgumentError(f"sandbox {label!r}: the disk limit is above what the file system can hold")
    # What is written of a container is in the sandbox's own writable layer, which its programs can fill.
    if error.errno in {errno.ENOSPC, errno.EDQUOT} and " /rw/c/" in text:
        return FailedPreconditionError(
            f"cannot make container {label!r}: the sandbox's disk limit is reached",
            hint="Remove some of its files, or create it with a larger Resources(disk=).",
        )
    if "of the given user namespace" in text:
        return InvalidArgumentError(f"cannot make sandbox {label!r}: {text}")
    if error.do == "namespaces":
        return UnsupportedError(
            "a user namespace of its own",
            "runc",
            reason=text,
            hint="Look at /proc/sys/user/max_user_namespaces, or use userns='host' if you trust what runs.",
        )
    return BackendError(f"cannot make sandbox {label!r}: {error.do or 'job'}: {text}")
