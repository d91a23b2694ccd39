"""Paths of a sandbox, looked up by the kernel inside its root, and errors that name them.

No link and no ".." leads out (openat2: RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS). What is opened is looked at first
through an O_PATH descriptor, so that no FIFO, device or socket is ever opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
    UnavailableError,
)
from unisandbox.api.status import FileKind
from unisandbox.host import syscalls

Side = Literal["sandbox", "host"]

_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
ONE_STEP: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
"""How one name in an open directory is looked up: never through a link."""
ON_THIS_MOUNT: Final = ONE_STEP | syscalls.RESOLVE_NO_XDEV
"""The same, and EXDEV for a mount point."""
# openat2 answers EAGAIN when anything on the host was renamed or mounted while it followed a ".."; source: openat2(2).
_ATTEMPTS: Final = 1000
_PATH_MAX: Final = 4096  # with the NUL at the end; source: include/uapi/linux/limits.h


def checked(path: str) -> str:
    """The path, if the kernel could take it.

    Raises:
        InvalidArgumentError: it is empty, too long, has a NUL, or no bytes stand for its text.
    """
    if not path or "\0" in path:
        raise InvalidArgumentError(f"{path!r} is not a path")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{path!r} is not a path: {error.reason}") from error
    if length >= _PATH_MAX:
        raise InvalidArgumentError(f"{path[:100]!r}... is not a path: it has {length} bytes of at most {_PATH_MAX - 1}")
    return path


def open_inside(root: int, path: str, flags: int) -> int:
    """Open a path as the sandbox would see it. Raises OSError."""
    checked(path)
    for _ in range(_ATTEMPTS):
        try:
            return syscalls.openat2(root, path, flags, resolve=_INSIDE)
        except BlockingIOError:
            continue
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def open_directory(root: int, path: str) -> int:
    """Open a directory to read it; links inside are followed. Raises OSError."""
    return open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)


def open_regular(root: int, path: str) -> int:
    """Open a regular file to read it; links inside are followed. Raises OSError and InvalidArgumentError."""
    probe = open_inside(root, path, os.O_PATH)
    try:
        kind = kind_of(os.fstat(probe).st_mode)
        if kind != "file":
            raise InvalidArgumentError(f"{path!r} is not a regular file but a {kind}")
        return reopen(probe, 0)
    finally:
        os.close(probe)


def reopen(probe: int, flags: int) -> int:
    """Open for reading what an O_PATH descriptor has pinned: what is opened is what was looked at."""
    return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)


@contextmanager
def parent(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The directory that holds `path` (O_PATH), and the last part of the path."""
    directory, name = os.path.split(checked(path).rstrip("/"))
    if name in {"", ".", ".."}:
        raise InvalidArgumentError(f"{path!r} does not name a file in a directory")
    fd = open_inside(root, directory or "/", os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd, name
    finally:
        os.close(fd)


def look(directory: int, name: str) -> os.stat_result | None:
    """What `name` is, None where nothing is; the link itself for a link.

    Raises:
        OSError: EXDEV for a mount point. It must not be replaced or removed: seen from outside the kernel would do it,
            and take the mount away in the sandbox, too (fs/namei.c: detach_mounts).
    """
    try:
        fd = syscalls.openat2(directory, name, os.O_PATH | os.O_NOFOLLOW, resolve=ON_THIS_MOUNT)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def link_target(fd: int) -> str:
    """Where the link behind an O_PATH descriptor points to."""
    return os.readlink("", dir_fd=fd)


def kind_of(mode: int) -> FileKind:
    """The kind of file by its st_mode."""
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
def named(path: str, side: Side = "sandbox") -> Iterator[None]:
    """Translate the kernel's answers into errors that name the path."""
    try:
        yield
    except SandboxError:
        raise
    except OSError as error:
        raise translate(error, path, side) from error


def translate(error: OSError, path: str, side: Side = "sandbox") -> SandboxError:
    """The error of the tree for what the kernel said about a path."""
    number = error.errno or 0
    why = os.strerror(number)
    where = f"{path!r}" if side == "sandbox" else f"{path!r} on this host"
    match number:
        case errno.ENOENT:
            return NotFoundError(f"{where} does not exist")
        case errno.EEXIST:
            return AlreadyExistsError(f"{where} exists already")
        case errno.EXDEV:
            return FailedPreconditionError(
                f"{where}: it is a mount point or on another file system",
                hint="Mount points stay, and a rename stays on one file system: copy what is in it instead.",
            )
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            hint = "The sandbox's disk limit is reached: create it with a larger Resources(disk=)."
            return FailedPreconditionError(f"{where}: {why}", hint=hint if side == "sandbox" else "")
        case errno.EAGAIN | errno.ESTALE:
            return FailedPreconditionError(f"{where}: it is being changed all the time", hint="Try again.")
        case errno.EROFS | errno.EACCES | errno.EPERM | errno.ENOTEMPTY | errno.EBUSY | errno.ETXTBSY | errno.EMLINK:
            return FailedPreconditionError(f"{where}: {why}")
        case errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG | errno.EINVAL | errno.EOVERFLOW:
            return InvalidArgumentError(f"{where}: {why}")
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM:
            return UnavailableError(f"{where}: {why}", hint="This host or this process is at a limit of its own.")
        case _:
            return BackendError(f"{where}: {why}")
