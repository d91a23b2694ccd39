"""The files of a sandbox where nothing may be mounted: a copy of the user's directory, in a directory of our own.

It is counted in the sandbox's disk, as is all that guests write (`disk`). Directories of the host are places of their
own, with which guests begin; what is read-only is so by wasmtime. The copy has the times and modes of the original.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import BackendError, FailedPreconditionError, InvalidArgumentError, Mount
from unisandbox.backends.wasm.disk import INODE, Disk, Writer
from unisandbox.backends.wasm.programs import Identity, identity
from unisandbox.backends.wasm.tree import WRITABLE, Layer, Place, SandboxTree, Sources
from unisandbox.host.keeper import Guard
from unisandbox.host.removal import removing
from unisandbox.host.services import Host

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 1 << 20
# Entries between two turns of the event loop; each some 30 us.
_ENTRIES: Final = 64
# Levels of a directory that is copied, a few descriptors each.
_LEVELS: Final = 64


class CopyMaker:
    """Makes and frees the trees of one engine's sandboxes; as `TreeMaker`."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def place(self, short: str) -> str:
        """The directory of all files of a sandbox."""
        return os.path.join(self._host.disk_dir, f"unisandbox-{self._host.engine_id}-{short}.files")

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
        """See `TreeMaker.make`.

        Raises:
            InvalidArgumentError: something in the directory cannot be copied, a mount's target cannot be used.
            FailedPreconditionError: the disk limit does not hold the copy.
        """
        place = self.place(short)
        if above is None:
            await self._host.keeper.guard([Guard(f"{short}/files", "remove_tree", (place,))])
            os.mkdir(place, 0o700)
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as ended:
            top = os.open(place, _HELD)
            opened.callback(os.close, top)
            disk = Disk(os.readlink(f"/proc/self/fd/{top}"), layer.size) if above is None else above.disk
            assert disk is not None  # noqa: S101
            part = f"c-{name}" if name else "root"
            writer = Writer(disk)
            ended.callback(writer.close)
            try:
                writer.take(2 * INODE)
                os.mkdir(part, 0o755, dir_fd=top)
                root = os.open(part, _HELD, dir_fd=top)
                opened.callback(os.close, root)
                copier = _Copier(writer, label, skipped=WRITABLE if readonly else {})
                await copier.copy(sources.root, root)
                for directory, mode in WRITABLE.items():
                    _make(root, directory, mode, writer)
                places = _places(root, mounts, sources, writer, label, readonly=readonly)
            except OSError as error:
                raise _translated(error, label, layer) from error
            opened.pop_all()
        tree = SandboxTree(top, root, os.dup(sources.root), places=places, disk=disk, originals=copier.originals)
        tree.root_writable = not readonly
        return tree

    async def free(self, tree: SandboxTree) -> None:
        """Free a tree of a container; that of a sandbox goes with `remove`. Repeating is harmless."""
        if tree.root < 0:
            return
        path = os.readlink(f"/proc/self/fd/{tree.root}")
        tree.close()
        if os.path.basename(path).startswith("c-"):
            await _remove(path)

    async def remove(self, short: str) -> None:
        """Remove all files of a sandbox. Repeating is harmless."""
        await _remove(self.place(short))
        if self._host.keeper.alive:
            await self._host.keeper.unguard([f"{short}/files"])


async def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for _ in removing(parent, os.path.basename(path), path):
                await anyio.lowlevel.checkpoint()
        finally:
            os.close(parent)


class Bounds:
    """See `FileBounds`: what holds work with the files of one tree."""

    def __init__(self, tree: SandboxTree) -> None:
        assert tree.disk is not None  # noqa: S101
        self._tree, self._disk = tree, tree.disk
        self._writer = Writer(tree.disk)

    @property
    def places(self) -> Mapping[tuple[int, int], int]:
        """See `FileBounds.places`: the mounts, by what they are mounted on."""
        return {
            (status.st_dev, status.st_ino): place.fd
            for place in self._tree.places
            if place.point >= 0
            for status in (os.fstat(place.point),)
        }

    def check(self, fd: int) -> None:
        """See `FileBounds.check`."""
        self._place_of(os.readlink(f"/proc/self/fd/{fd}"))

    def take(self, fd: int, size: int) -> None:
        """See `FileBounds.take`."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        if self._place_of(path).counted:
            self._writer.take(size)

    def still(self) -> AbstractContextManager[object]:
        """See `FileBounds.still`."""
        return self._disk.lock

    def _place_of(self, path: str) -> Place:
        """The innermost one; of two that are the same directory the one that is read-only."""
        found = []
        for place in self._tree.begin:
            top = os.readlink(f"/proc/self/fd/{place.fd}")
            if f"{path}/".startswith(f"{top.rstrip('/')}/"):
                found.append((len(top), not place.writable, place))
        if found and (innermost := max(found, key=lambda each: each[:2])[2]).writable:
            return innermost
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


class _Copier:
    """Copies a directory.

    Args:
        writer: by whom it is counted.
        label: of the sandbox.
        skipped: names at the top that are not copied.
    """

    def __init__(self, writer: Writer, label: str, *, skipped: Mapping[str, object]) -> None:
        self._writer = writer
        self._label = label
        self._skipped = skipped
        self._links: dict[tuple[int, int], str] = {}
        self._top = -1
        self._entries = 0
        self.originals: dict[Identity, Identity] = {}
        """Of the modules that were copied."""

    async def copy(self, source: int, target: int, path: str = "") -> None:
        """Copy all that is in a directory."""
        self._top = self._top if path else target
        if path.count("/") > _LEVELS:
            raise InvalidArgumentError(f"root directory of {self._label!r}: {path} has more than {_LEVELS} directories")
        source = os.open(".", _DIRECTORY, dir_fd=source)
        try:
            with os.scandir(source) as entries:
                for entry in entries:
                    await self._entry(source, target, entry.name, f"{path}/{entry.name}")
        finally:
            os.close(source)

    async def _entry(self, source: int, target: int, name: str, path: str) -> None:
        self._entries += 1
        if self._entries % _ENTRIES == 0:
            await anyio.lowlevel.checkpoint()
        if path == f"/{name}" and name in self._skipped:
            return
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        self._writer.take(2 * INODE)
        if stat.S_ISDIR(status.st_mode):
            # Ours to write in, whatever the original's mode is.
            _make(target, name, stat.S_IMODE(status.st_mode) | 0o700, self._writer)
            below = os.open(name, _HELD, dir_fd=source)
            copy = os.open(name, _HELD, dir_fd=target)
            try:
                await self.copy(below, copy, path)
                os.utime(f"/proc/self/fd/{copy}", ns=(status.st_atime_ns, status.st_mtime_ns))
            finally:
                os.close(below)
                os.close(copy)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(status.st_mode):
            first = self._links.setdefault((status.st_dev, status.st_ino), path[1:]) if status.st_nlink > 1 else ""
            if first in {"", path[1:]}:
                await self._file(source, target, name)
            else:
                os.link(first, name, src_dir_fd=self._top, dst_dir_fd=target, follow_symlinks=False)
        elif stat.S_ISFIFO(status.st_mode):
            os.mkfifo(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        else:
            raise InvalidArgumentError(
                f"root directory of {self._label!r}: {path} is a device or a socket, which cannot be copied",
                hint="Nothing may be mounted here, so the directory is copied: remove it from there.",
            )

    async def _file(self, source: int, target: int, name: str) -> None:
        with contextlib.ExitStack() as opened:
            reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
            opened.callback(os.close, reader)
            status = os.fstat(reader)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            writer = os.open(name, flags, 0o600, dir_fd=target)
            opened.callback(os.close, writer)
            while piece := os.read(reader, _PIECE):
                self._writer.take(len(piece) + INODE)
                view = memoryview(piece)
                while view:
                    view = view[os.write(writer, view) :]
                if len(piece) == _PIECE:
                    await anyio.lowlevel.checkpoint()
            os.fchmod(writer, stat.S_IMODE(status.st_mode) & 0o777)
            os.utime(writer, ns=(status.st_atime_ns, status.st_mtime_ns))
            if status.st_nlink == 1:
                self.originals[identity(os.fstat(writer))] = identity(status)


def _make(parent: int, name: str, mode: int, writer: Writer) -> None:
    """A directory with exactly this mode, or the one that is there."""
    writer.take(2 * INODE)
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return
    os.chmod(name, mode & 0o1777, dir_fd=parent)


def _places(
    root: int, mounts: Sequence[Mount], sources: Sources, writer: Writer, label: str, *, readonly: bool
) -> list[Place]:
    """What guests begin with beside the root; the mount points are made in it, to be seen."""
    with contextlib.ExitStack() as opened:
        places: list[Place] = []

        def held(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        if readonly:
            own = [name for name in WRITABLE if not any(mount.target == f"/{name}" for mount in mounts)]
            places += [Place(held(os.open(name, _HELD, dir_fd=root)), f"/{name}") for name in own]
        for mount, source in zip(mounts, sources.mounts, strict=True):
            point = held(_mount_point(root, mount.target, writer, label))
            fd = held(os.dup(source))
            places.append(Place(fd, mount.target, not mount.readonly, counted=False, point=point))
        opened.pop_all()
        return places


def _mount_point(root: int, target: str, writer: Writer, label: str) -> int:
    at = os.dup(root)
    try:
        for name in target.strip("/").split("/"):
            _make(at, name, 0o755, writer)
            try:
                below = os.open(name, _HELD, dir_fd=at)
            except OSError as error:
                raise InvalidArgumentError(
                    f"mount target {target!r} of {label!r} cannot be used: {error.strerror}",
                    hint="It must be free or a directory, and no link may be on the way to it.",
                ) from error
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at


def _translated(error: OSError, label: str, layer: Layer) -> Exception:
    if error.errno == errno.ENOSPC:
        return FailedPreconditionError(
            f"the root directory of {label!r} is larger than its disk limit, {layer.size} bytes, or the disk is full",
            hint="Nothing may be mounted here, so the directory is copied: give a larger Resources(disk=).",
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return InvalidArgumentError(
            f"the root directory of {label!r} cannot be copied: {error.strerror}: {error.filename}",
            hint="Nothing may be mounted here, so the directory is copied: this user must be able to read it.",
        )
    return BackendError(f"cannot make the files of sandbox {label!r}: {error}")
