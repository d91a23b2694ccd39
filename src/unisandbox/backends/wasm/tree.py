"""The files of a sandbox: the user's directory under a private, bounded layer, as real mounts of the kernel.

So whatever a guest, `files` or a bug of a runtime does, read-only is read-only and "/" is the end. One tree serves
every guest as its preopened "/".

Since Linux 6.15 the whole tree is built detached: mounted nowhere, seen by nobody else, made here in 0.3 ms, and gone
with our descriptor of it, however this process ends. Before, and for a layer on a disk (a loop device), the keeper
makes it in a mount namespace of its own, which ends with the keeper's descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import attrs

from unisandbox.api import BackendError, InvalidArgumentError, Mount, Resources
from unisandbox.api.resources import LEAST_DISK
from unisandbox.api.units import GIB
from unisandbox.backends.wasm.disk import Disk
from unisandbox.backends.wasm.programs import Identity
from unisandbox.host import jobs
from unisandbox.host.keeper import JobFailed
from unisandbox.host.power import standing
from unisandbox.host.removal import remove_tree
from unisandbox.host.services import Host

Op = dict[str, object]

_DETACHED_SINCE: Final = (6, 15)
_JOB_SECONDS: Final = 60.0
_SAFE: Final = ["nosuid", "nodev"]
_SAFE_READONLY: Final = ["readonly", "nosuid", "nodev"]
WRITABLE: Final = {"tmp": 0o1777, "run": 0o755, "home": 0o755}
# A tmpfs inode costs about 1 KiB, so small files fit.
_BYTES_PER_INODE: Final = 8192
_LARGEST_TMPFS: Final = GIB
# What the kernel says to a mount point that cannot be one.
_MISTAKES: Final = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.EROFS, errno.EEXIST})


def detached_trees() -> bool:
    """Whether this kernel mounts in what is mounted nowhere."""
    return standing.kernel() >= _DETACHED_SINCE


@attrs.frozen
class Layer:
    """The bounded place for what a sandbox writes.

    Attributes:
        size: bytes; None: not bounded.
        in_memory: a tmpfs; otherwise a sparse file system image on a disk.
    """

    size: int | None
    in_memory: bool

    @classmethod
    def of(cls, resources: Resources) -> Layer:
        """In memory up to half of the sandbox's memory, as `Resources.disk` says."""
        size = resources.disk_limit
        room = _LARGEST_TMPFS if resources.memory is None else resources.memory // 2
        return cls(size, in_memory=size is None or size <= max(room, LEAST_DISK))


# Directories and mount points of a container, never a file's content.
_NOTHING: Final = Layer(1 << 20, in_memory=True)


@attrs.define(eq=False)
class Sources:
    """What is mounted, opened once: what is mounted later is what was looked at when it was asked for.

    Attributes:
        root: of the directory that is the root.
        mounts: of the mounts that have a source, in their order.
    """

    root: int
    mounts: list[int] = attrs.field(factory=list)

    @classmethod
    def open(cls, path: str, mounts: Sequence[Mount], label: str) -> Sources:
        """Raises InvalidArgumentError: one does not exist, is a device, or the root is no directory."""
        sources = cls(_open(path, os.O_DIRECTORY, f"root directory of {label!r}"))
        try:
            for mount in mounts:
                if mount.source:
                    sources.mounts.append(_open(mount.source, 0, f"mount source of {label!r}"))
        except BaseException:
            sources.close()
            raise
        return sources

    def close(self) -> None:
        """Close them; once is enough, twice is no error."""
        for fd in (self.root, *self.mounts):
            if fd >= 0:
                os.close(fd)
        self.root, self.mounts = -1, []


def _open(path: str, flags: int, what: str) -> int:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    except OSError as error:
        raise InvalidArgumentError(f"{what} cannot be used: {path}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        os.close(fd)
        raise InvalidArgumentError(f"{what} cannot be used: {path} is neither a directory nor a regular file")
    return fd


class Place(NamedTuple):
    """A directory that guests begin with.

    Attributes:
        fd: O_PATH descriptor of it.
        target: the guest's path of it.
        writable: False: wasmtime lets no guest change anything in it.
        counted: what is written in it is counted in the tree's `disk`.
        point: O_PATH descriptor of what it is seen in the place of, in the root; -1: it lies there itself.
    """

    fd: int
    target: str
    writable: bool = True
    counted: bool = True
    point: int = -1


@attrs.define(eq=False)
class SandboxTree:
    """A made tree. Attributes are O_PATH descriptors of ours.

    Attributes:
        top: of the private layer, with everything mounted in it; a detached tree lives as long as this.
        root: what guests see as "/".
        lower: the user's directory below it.
        short: under which the keeper holds it; empty when it is detached.
        places: what guests begin with beside the root; without mounts these are no places in the root.
        root_writable: guests may change what is in the root, as far as the kernel lets them.
        disk: what is written is counted there; None: the kernel bounds it.
        originals: identities of the user's files by those of their copies.
    """

    top: int
    root: int
    lower: int
    short: str = ""
    places: Sequence[Place] = ()
    root_writable: bool = True
    disk: Disk | None = None
    originals: dict[Identity, Identity] | None = None

    @property
    def begin(self) -> tuple[Place, ...]:
        """All that guests begin with."""
        return Place(self.root, "/", self.root_writable), *self.places

    def usage(self) -> int:
        """Bytes that are written in the private layer."""
        if self.disk is not None:
            return self.disk.used()
        layer = os.statvfs(self.top)
        return (layer.f_blocks - layer.f_bfree) * layer.f_frsize

    def close(self) -> None:
        """Close what is ours. Repeating is harmless."""
        places = [fd for place in self.places for fd in (place.fd, place.point)]
        for fd in (self.root, self.lower, self.top, *places):
            if fd >= 0:
                os.close(fd)
        self.root = self.lower = self.top = -1
        self.places = ()


class TreeMaker:
    """Makes and frees the trees of one engine's sandboxes."""

    def __init__(self, host: Host, *, detached: bool | None = None) -> None:
        """Args: detached: False builds in the keeper also where the kernel could do without."""
        self._host = host
        self._detached = detached_trees() if detached is None else detached

    async def make(
        self,
        short: str,
        label: str,
        layer: Layer,
        image: str,
        sources: Sources,
        *,
        mounts: Sequence[Mount],
        readonly: bool,
        above: SandboxTree | None = None,
        name: str = "",
    ) -> SandboxTree:
        """Build a tree.

        Args:
            short: what the sandbox's names begin with.
            label: of the sandbox, for messages.
            layer: of the sandbox.
            image: where the file of a layer on a disk is made.
            sources: stay the caller's.
            mounts: to which `sources.mounts` belong.
            readonly: only /tmp, /run, /home and mounts can be written.
            above: the sandbox's tree, for that of a container `name` in it: they share the layer.
            name: of the container.

        Raises:
            InvalidArgumentError: a mount's target cannot be used.
            BackendError: the kernel refuses.
        """
        here = self._detached and (layer.in_memory if above is None else not above.short)
        fds = [sources.root, *sources.mounts]
        rw, part = ("top", "") if above is None else ("above", f"/c/{name}")
        missing = [name for name in WRITABLE if not _has(sources.root, name)]
        own = _directories(missing, readonly=readonly)
        directories = {"root": 0o755, **(own if above is None else {})}
        with contextlib.ExitStack() as opened:
            if here:
                steps = _steps_here(layer if above is None else _NOTHING, directories)
            else:
                place = f"/{short}/c-{name}" if name else f"/{short}/tree"
                if above is not None:
                    number = (await self._host.keeper.held(f"{above.short}/mnt"))[f"{above.short}/mnt"]
                    fds.append(self._host.keeper.open_held(number, os.O_RDONLY))
                    opened.callback(os.close, fds[-1])
                first = {"do": "mount_namespace"} if above is None else {"do": "enter", "fd": len(fds) - 1}
                steps = [
                    first,
                    *_steps_in_keeper(
                        self._host.work_dir, place, layer if above is None else _NOTHING, image, directories
                    ),
                ]
            if above is not None:
                steps.append({"do": "given", "fd": len(fds), "name": "above"})
                fds.append(above.top)
                made = _mkdir_ops("", {"c": 0o755}) + _mkdir_ops("/c", {name: 0o755}) + _mkdir_ops(part, own)
                steps.append({"do": "mounts", "root": {"name": "above"}, "ops": made})
            plan = _root_ops(rw, part, mounts, missing, readonly=readonly, in_keeper=not here) + _mount_ops(mounts)
            steps.append({"do": "mounts", "root": {"name": "top"}, "ops": plan})
            steps.append({"do": "dirfd", "path": {"name": "top", "path": "/root"}, "name": "root"})
            try:
                top, root = self._build(steps, fds) if here else await self._build_in_keeper(steps, fds, short, name)
            except JobFailed as error:
                raise _translated(error.errno or 0, error.strerror or str(error), label, mounts) from error
            except jobs.StepError as error:
                raise _translated(error.errno, error.message, label, mounts) from error
        held = "" if here else _held(short, name)
        return SandboxTree(top, root, os.dup(sources.root), held)

    @staticmethod
    def _build(steps: Sequence[Mapping[str, object]], fds: list[int]) -> tuple[int, int]:
        """Here and now, most of it system calls: nothing of this process changes but its descriptors."""
        _, named = jobs.run([dict(step) for step in steps], fds)
        if "above" in named:
            os.close(named.pop("above"))
        return named["top"], named["root"]

    async def _build_in_keeper(
        self, steps: Sequence[Mapping[str, object]], fds: list[int], short: str, name: str
    ) -> tuple[int, int]:
        keeper, prefix = self._host.keeper, _held(short, name)
        hold = {what: f"{prefix}/{what}" for what in ("top", "root", *(() if name else ("mnt",)))}
        held = (await keeper.job(steps, hold=hold, fds=fds, timeout=_JOB_SECONDS)).held
        flags = os.O_PATH | os.O_DIRECTORY
        top = keeper.open_held(held[hold["top"]], flags)
        try:
            return top, keeper.open_held(held[hold["root"]], flags)
        except BaseException:
            os.close(top)
            raise

    async def free(self, tree: SandboxTree) -> None:
        """Free a tree. Repeating is harmless."""
        tree.close()
        if tree.short and self._host.keeper.alive:
            await self._host.keeper.drop(prefix=f"{tree.short}/")

    def sweep(self, short: str) -> None:
        """Remove the empty directory that a tree of this sandbox was mounted on in the keeper."""
        remove_tree(self._host.keeper.outside(f"{self._host.work_dir}/{short}"))


def _held(short: str, name: str) -> str:
    return f"{short}/tree-{name}" if name else f"{short}/tree"


def _size(layer: Layer) -> dict[str, object]:
    size = layer.size or 0  # 0 is "not bounded" for a tmpfs; source: tmpfs(5)
    return {"size": size, "inodes": size and max(size // _BYTES_PER_INODE, 1024)}


def _steps_here(layer: Layer, directories: Mapping[str, int]) -> list[Mapping[str, object]]:
    """Make the layer with these directories, detached, and name it "top".

    What an overlay is made of must be the root of such a tree.
    Source: clone_private_mount, fs/namespace.c (anon_ns_root).
    """
    return [{"do": "detached", "name": "top", **_size(layer), "directories": directories}]


def _steps_in_keeper(
    work_dir: str, place: str, layer: Layer, image: str, directories: Mapping[str, int]
) -> list[Mapping[str, object]]:
    """The same, mounted in the keeper at `place` below its directory."""
    op: Op = {"op": "tmpfs", "path": "/", "attributes": _SAFE, **_size(layer)}
    if not layer.in_memory:
        op = {"op": "image", "path": "/", "image": image, "size": layer.size, "unlink": True, "attributes": _SAFE}
    made: list[Op] = [{"op": "mkdir", "path": path} for path in (os.path.dirname(place), place)]
    return [
        {"do": "mounts", "root": work_dir, "ops": made},
        {"do": "mounts", "root": f"{work_dir}{place}", "ops": [op, *_mkdir_ops("", directories)]},
        {"do": "dirfd", "path": f"{work_dir}{place}", "name": "top"},
    ]


def _has(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _directories(missing: Sequence[str], *, readonly: bool) -> dict[str, int]:
    """Those of a root in its layer, and their modes.

    Args:
        missing: those of `WRITABLE` that the user's directory lacks.
        readonly: see `TreeMaker.make`.
    """
    if readonly:
        return WRITABLE
    # Through the overlay each of the missing ones takes three times as long.
    return {"upper": 0o755, "work": 0o755, **{f"upper/{name}": WRITABLE[name] for name in missing}}


def _mkdir_ops(above: str, directories: Mapping[str, int]) -> list[Op]:
    return [{"op": "mkdir", "path": f"{above}/{path}", "mode": mode} for path, mode in directories.items()]


def _root_ops(
    rw: str, part: str, mounts: Sequence[Mount], missing: Sequence[str], *, readonly: bool, in_keeper: bool
) -> list[Op]:
    """Mount the root at /root, over the first descriptor of the request; its directories in the layer are `part`."""
    ops: list[Op] = []
    lower: object = {"fd": 0}
    if in_keeper:
        # What an overlay is made of must be mounted in the namespace of whoever makes it.
        source: Op = {"source": lower, "recursive": False, "create": True, "attributes": _SAFE_READONLY}
        ops.append({"op": "bind", "path": "/lower", **source})
        lower = {"name": "top", "path": "/lower"}
    overlay: Op = {"op": "overlay", "path": "/root", "lower": [lower], "attributes": _SAFE}
    if readonly:
        # In front of the user's directory lies one that holds the mount points, so that nothing is made in his.
        ops += [{"op": "mkdir", "path": f"/front/{name}", "parents": True} for name in WRITABLE]
        for mount in mounts:
            ops += _mount_point(f"/front{mount.target}", mount)
        ops.append({**overlay, "front": [{"name": "top", "path": "/front"}]})
        for name in WRITABLE:
            own: Op = {"source": {"name": rw, "path": f"{part}/{name}"}, "recursive": False, "attributes": _SAFE}
            ops.append({"op": "bind", "path": f"/root/{name}", **own})
        return ops
    upper, work = ({"name": rw, "path": f"{part}/{name}"} for name in ("upper", "work"))
    ops.append({**overlay, "upper": upper, "work": work})
    there = [(name, mode) for name, mode in WRITABLE.items() if name not in missing]
    return ops + [{"op": "mkdir", "path": f"/root/{name}", "mode": mode} for name, mode in there]


def _mount_point(path: str, mount: Mount) -> list[Op]:
    """What a mount is mounted on; a directory for a directory, a file for a file."""
    if mount.source and not os.path.isdir(mount.source):
        return [{"op": "mkdir", "path": os.path.dirname(path), "parents": True}, {"op": "file", "path": path}]
    return [{"op": "mkdir", "path": path, "parents": True}]


def _mount_ops(mounts: Sequence[Mount]) -> list[Op]:
    """What the user asked for, in this order; sources are descriptors of the request from 1 on."""
    ops: list[Op] = []
    fd = 1
    for mount in mounts:
        path = f"/root{mount.target}"
        attributes = _SAFE_READONLY if mount.readonly else _SAFE
        if mount.source:
            ops.append({"op": "bind", "source": {"fd": fd}, "path": path, "create": True, "attributes": attributes})
            fd += 1
            continue
        size = mount.size or 0
        inodes = max(size // _BYTES_PER_INODE, 1024)
        ops.append({"op": "mkdir", "path": path, "parents": True})
        tmpfs: Op = {"op": "tmpfs", "path": path, "size": size, "inodes": inodes, "mode": 0o1777}
        ops.append({**tmpfs, "attributes": attributes})
    return ops


def _translated(number: int, text: str, label: str, mounts: Sequence[Mount]) -> Exception:
    """A failure in the words of whoever asked for the sandbox."""
    for mount in mounts:
        targets = {mount.target, os.path.dirname(mount.target)} - {"/"}
        if number in _MISTAKES and any(f"{target} (operation" in text for target in targets):
            return InvalidArgumentError(
                f"mount target {mount.target!r} of {label!r} cannot be used: {os.strerror(number)}",
                hint="It must be free, or of the same kind (file or directory), and in a place that can be written.",
            )
    if number == errno.EFBIG:
        return InvalidArgumentError(f"sandbox {label!r}: the disk limit is above what the file system can hold")
    return BackendError(f"cannot make the files of sandbox {label!r}: {text}")
