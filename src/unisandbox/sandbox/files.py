"""The files of a sandbox, reached from outside: nothing needs to run in it, and no link leads out of it.

Every path is resolved by the kernel inside the sandbox's root (openat2: RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS). What
is opened is looked at first through an O_PATH descriptor, so that no FIFO, device or socket is ever opened.
The calls do not wait for a process; they work in pieces of 1 MiB and let the event loop run in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    FailedPreconditionError,
    FileInfo,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
)
from unisandbox.api.status import FileKind
from unisandbox.engine.entry import Entry
from unisandbox.host import syscalls

_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_PIECE: Final = 1 << 20
_OVERFLOW_ID: Final = 65534  # what the kernel shows for an id without a mapping; source: user_namespaces(7)
DEFAULT_READ_LIMIT: Final = 256 << 20


class Files:
    """The files of one sandbox, as its root user would see them."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    async def read(self, path: str, *, limit: int = DEFAULT_READ_LIMIT) -> bytes:
        """The content of a regular file; links inside the sandbox are followed.

        Args:
            path: absolute path inside.
            limit: bytes; a larger file is refused, never cut.

        Raises:
            NotFoundError: it does not exist.
            InvalidArgumentError: it is not a regular file, or larger than `limit`.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root, _named(path):
            fd = _open_regular(root, path)
            try:
                pieces = bytearray()
                while piece := os.read(fd, min(_PIECE, limit + 1 - len(pieces))):
                    pieces += piece
                    if len(pieces) > limit:
                        raise InvalidArgumentError(
                            f"{path!r} is larger than {limit} bytes", hint="Give a larger limit=, or use download()."
                        )
                    if len(piece) == _PIECE:
                        await anyio.lowlevel.checkpoint()
                return bytes(pieces)
            finally:
                os.close(fd)

    async def write(self, path: str, data: bytes | str, *, mode: int | None = None) -> None:
        """Put a file there, all of it or nothing: readers see the old or the new content.

        An existing file's owner and mode are kept, a new one belongs to the sandbox's root. A link at `path` is
        replaced, not followed.

        Args:
            path: absolute path inside; its directory must exist.
            data: the content; text is written as UTF-8.
            mode: permission bits; None: those of the existing file, or 0o644.

        Raises:
            NotFoundError: the directory does not exist.
            FailedPreconditionError: the place is read-only, or the disk limit is reached.
        """
        await anyio.lowlevel.checkpoint()
        content = data.encode() if isinstance(data, str) else data
        with self._root() as root, _named(path), self._new_file(root, path, mode) as fd:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view[:_PIECE]) :]
                if view:
                    await anyio.lowlevel.checkpoint()

    async def list(self, path: str = "/") -> list[FileInfo]:
        """What is in a directory, sorted by name.

        Raises:
            NotFoundError: it does not exist.
            InvalidArgumentError: it is not a directory.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root, _named(path):
            directory = _open_directory(root, path)
            try:
                return [self._info(directory, name) for name in sorted(os.listdir(directory))]
            finally:
                os.close(directory)

    async def stat(self, path: str) -> FileInfo:
        """What is at `path`; a link in the last place is not followed.

        Raises:
            NotFoundError: nothing is there.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root, _named(path):
            fd = syscalls.openat2(root, _checked(path), os.O_PATH | os.O_NOFOLLOW, resolve=_INSIDE)
            try:
                return self._describe(os.path.basename(path.rstrip("/")) or "/", os.fstat(fd), lambda: _link(fd))
            finally:
                os.close(fd)

    async def exists(self, path: str) -> bool:
        """Whether something is at `path`."""
        try:
            await self.stat(path)
        except NotFoundError:
            return False
        return True

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = True) -> None:
        """Make a directory that belongs to the sandbox's root; one that is there already is fine.

        Args:
            path: absolute path inside.
            mode: permission bits of what is made.
            parents: make missing parents too.
        """
        await anyio.lowlevel.checkpoint()
        parts = [part for part in _checked(path).split("/") if part not in {"", "."}]
        with self._root() as root, _named(path):
            for depth in range(1 if parents else len(parts), len(parts) + 1):
                self._make_directory(root, "/" + "/".join(parts[:depth]), mode)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link (not what it points to) or a directory.

        Args:
            path: absolute path inside.
            recursive: also a directory that is not empty.

        Raises:
            NotFoundError: nothing is there.
            FailedPreconditionError: the directory is not empty, or the place is read-only.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root, _named(path), _parent(root, path) as (parent, name):
            await _remove(parent, name, recursive=recursive)

    async def rename(self, source: str, target: str) -> None:
        """Move a file or directory within one file system of the sandbox; an existing file at `target` is replaced."""
        await anyio.lowlevel.checkpoint()
        with (
            self._root() as root,
            _named(source),
            _parent(root, source) as (from_directory, from_name),
            _parent(root, target) as (to_directory, to_name),
        ):
            os.rename(from_name, to_name, src_dir_fd=from_directory, dst_dir_fd=to_directory)

    async def upload(self, local: str | os.PathLike[str], path: str) -> None:
        """Copy a file or a directory tree of the host to `path`; links are copied as links.

        Raises:
            InvalidArgumentError: the host's path holds something that is no file, directory or link.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root:
            await self._upload(root, os.fspath(local), path)

    async def download(self, path: str, local: str | os.PathLike[str]) -> None:
        """Copy a file or a directory tree to the host; links are copied as links and never followed below `path`.

        Devices, FIFOs and sockets are refused. An existing file at `local` is replaced, a directory is merged into.
        """
        await anyio.lowlevel.checkpoint()
        with self._root() as root:
            await self._download(root, path, os.fspath(local))

    async def _upload(self, root: int, local: str, path: str) -> None:
        with _named(local):
            status = os.lstat(local)
        if stat.S_ISLNK(status.st_mode):
            with _named(path), _parent(root, path) as (parent, name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent)
                os.symlink(os.readlink(local), name, dir_fd=parent)
                self._give(parent, name)
        elif stat.S_ISDIR(status.st_mode):
            with _named(path):
                self._make_directory(root, path, stat.S_IMODE(status.st_mode))
            for name in sorted(os.listdir(local)):
                await self._upload(root, os.path.join(local, name), f"{path.rstrip('/')}/{name}")
        elif stat.S_ISREG(status.st_mode):
            mode = stat.S_IMODE(status.st_mode) & 0o777
            with open(local, "rb") as source, _named(path), self._new_file(root, path, mode) as fd:
                while piece := source.read(_PIECE):
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(fd, view) :]
                    await anyio.lowlevel.checkpoint()
        else:
            raise InvalidArgumentError(f"{local!r} is neither a file, a directory nor a link")

    async def _download(self, root: int, path: str, local: str) -> None:
        with _named(path):
            fd = syscalls.openat2(root, _checked(path), os.O_PATH | os.O_NOFOLLOW, resolve=_INSIDE)
        try:
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                with _named(local):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(local)
                    os.symlink(_link(fd), local)
            elif stat.S_ISDIR(status.st_mode):
                with _named(local):
                    os.makedirs(local, exist_ok=True)
                names = sorted(os.listdir(f"/proc/self/fd/{fd}"))
                for name in names:
                    await self._download(fd, name, os.path.join(local, name))
            elif stat.S_ISREG(status.st_mode):
                source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    await _save(source, local, stat.S_IMODE(status.st_mode) & 0o777)
                finally:
                    os.close(source)
            else:
                raise InvalidArgumentError(f"{path!r} is neither a file, a directory nor a link")
        finally:
            os.close(fd)

    @contextmanager
    def _root(self) -> Iterator[int]:
        fd = self._entry.sandboxer.root_fd(self._entry.sandbox_id)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _new_file(self, root: int, path: str, mode: int | None) -> Iterator[int]:
        """A file under another name that becomes `path` when the block ends well, and vanishes otherwise."""
        with _parent(root, path) as (parent, name):
            uid, gid = self._owner()
            try:
                old = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                old = None
            if old is not None and stat.S_ISDIR(old.st_mode):
                raise InvalidArgumentError(f"{path!r} is a directory")
            if old is not None and stat.S_ISREG(old.st_mode):
                uid, gid = old.st_uid, old.st_gid
                mode = stat.S_IMODE(old.st_mode) if mode is None else mode
            temporary = f".{name[:200]}.{secrets.token_hex(6)}"
            fd = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=parent,
            )
            try:
                yield fd
                os.fchown(fd, uid, gid)
                os.fchmod(fd, 0o644 if mode is None else mode)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(OSError):  # the error that matters is on its way
                    os.unlink(temporary, dir_fd=parent)
                raise
            finally:
                os.close(fd)

    def _make_directory(self, root: int, path: str, mode: int) -> None:
        try:
            os.close(_open_directory(root, path))
        except FileNotFoundError:
            with _parent(root, path) as (parent, name):
                os.mkdir(name, mode, dir_fd=parent)
                os.chmod(name, mode, dir_fd=parent)
                self._give(parent, name)

    def _owner(self) -> tuple[int, int]:
        first, _ = self._entry.sandboxer.host_ids(self._entry.sandbox_id)
        return first, first

    def _give(self, parent: int, name: str) -> None:
        uid, gid = self._owner()
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    def _info(self, directory: int, name: str) -> FileInfo:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return self._describe(name, status, lambda: os.readlink(name, dir_fd=directory))

    def _describe(self, name: str, status: os.stat_result, target: Callable[[], str]) -> FileInfo:
        kind = _kind(status.st_mode)
        return FileInfo(
            name=name,
            kind=kind,
            size=status.st_size,
            mode=stat.S_IMODE(status.st_mode),
            mtime=status.st_mtime,
            uid=self._inside(status.st_uid),
            gid=self._inside(status.st_gid),
            target=target() if kind == "symlink" else "",
        )

    def _inside(self, host_id: int) -> int:
        first, count = self._entry.sandboxer.host_ids(self._entry.sandbox_id)
        return host_id - first if first <= host_id < first + count else _OVERFLOW_ID


def _checked(path: str) -> str:
    if not path or "\0" in path:
        raise InvalidArgumentError(f"{path!r} is not a path")
    return path


def _open_directory(root: int, path: str) -> int:
    return syscalls.openat2(root, _checked(path), os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)


def _open_regular(root: int, path: str) -> int:
    probe = syscalls.openat2(root, _checked(path), os.O_PATH, resolve=_INSIDE)
    try:
        kind = _kind(os.fstat(probe).st_mode)
        if kind != "file":
            raise InvalidArgumentError(f"{path!r} is not a regular file but a {kind}")
        # The inode is pinned by the O_PATH descriptor: what is opened is what was looked at.
        return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(probe)


@contextmanager
def _parent(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The directory that holds `path`, and the last part of it."""
    directory, name = os.path.split(_checked(path).rstrip("/"))
    if name in {"", ".", ".."}:
        raise InvalidArgumentError(f"{path!r} does not name a file in a directory")
    fd = syscalls.openat2(root, directory or ".", os.O_PATH | os.O_DIRECTORY, resolve=_INSIDE)
    try:
        yield fd, name
    finally:
        os.close(fd)


async def _remove(parent: int, name: str, *, recursive: bool) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if recursive:
        # Depth first with descriptors only: a directory swapped for a link meanwhile fails instead of leading away.
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for inner in os.listdir(fd):
                await _remove(fd, inner, recursive=True)
        finally:
            os.close(fd)
        await anyio.lowlevel.checkpoint()
    os.rmdir(name, dir_fd=parent)


async def _save(source: int, local: str, mode: int) -> None:
    temporary = f"{local}.{secrets.token_hex(6)}"
    with _named(local):
        target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            while piece := os.read(source, _PIECE):
                view = memoryview(piece)
                while view:
                    view = view[os.write(target, view) :]
                await anyio.lowlevel.checkpoint()
            os.rename(temporary, local)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(target)


def _link(fd: int) -> str:
    return os.readlink("", dir_fd=fd)


def _kind(mode: int) -> FileKind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return "symlink"
    if stat.S_ISFIFO(mode):
        return "fifo"
    return "socket" if stat.S_ISSOCK(mode) else "device"


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Translate the kernel's answers into errors that name the path."""
    try:
        yield
    except SandboxError:
        raise
    except OSError as error:
        raise _translate(error, path) from error


def _translate(error: OSError, path: str) -> SandboxError:
    number = error.errno
    why = os.strerror(number or 0)
    if number == errno.ENOENT:
        return NotFoundError(f"{path!r} does not exist")
    if number == errno.EEXIST:
        return AlreadyExistsError(f"{path!r} exists already")
    if number in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV}:
        return FailedPreconditionError(f"{path!r}: {why}")
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return FailedPreconditionError(
            f"{path!r}: {why}", hint="The sandbox's disk limit is reached: create it with a larger Resources(disk=)."
        )
    if number in {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}:
        return InvalidArgumentError(f"{path!r}: {why}")
    return BackendError(f"{path!r}: {why}")
