"""Paths of a sandbox, looked up by the kernel inside its root, and errors that name them.

No link and no ".." leads out (openat2: RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS). What is opened is looked at first
through an O_PATH descriptor, so that no FIFO, device or socket is ever opened. All of it with the rights of an
`Identity`: what a program in the sandbox may not see is not seen for it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
    UnavailableError,
)
from unisandbox.api.sandboxer import FileBounds
from unisandbox.api.status import FileKind
from unisandbox.host import syscalls, walking
from unisandbox.host.identity import Identity

Side = Literal["sandbox", "host"]

ONE_STEP: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
"""How one name in an open directory is looked up: never through a link."""
ON_THIS_MOUNT: Final = ONE_STEP | syscalls.RESOLVE_NO_XDEV
"""The same, and EXDEV for a mount point."""
_PATH_MAX: Final = 4096  # with the NUL at the end; source: include/uapi/linux/limits.h


def checked(path: str) -> str:
    """The path, if the kernel could take it.

    Raises:
        InvalidArgumentError: it is no text, empty, too long, has a NUL, or no bytes stand for its text.
    """
    if not isinstance(path, str):
        raise InvalidArgumentError(f"a path is text, got {path!r}")
    if not path or "\0" in path:
        raise InvalidArgumentError(f"{path!r} is not a path")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{path!r} is not a path: {error.reason}") from error
    if length >= _PATH_MAX:
        raise InvalidArgumentError(f"{path[:100]!r}... is not a path: it has {length} bytes of at most {_PATH_MAX - 1}")
    return path


def absolute(path: str) -> str:
    """The path, if it is one in a sandbox: there is no directory that one of another form could begin in.

    Raises:
        InvalidArgumentError: as `checked`, or it is not absolute.
    """
    if not checked(path).startswith("/"):
        raise InvalidArgumentError(f"{path!r} is no absolute path", hint="Paths in a sandbox begin with '/'.")
    return path


class Root(NamedTuple):
    """A sandbox's root directory, who looks something up below it, and what holds him where the kernel does not."""

    fd: int
    identity: Identity
    bounds: FileBounds | None = None

    def open(self, path: str, flags: int) -> int:
        """Open a path as the sandbox's root would, with its rights. Raises OSError.

        Args:
            path: absolute; links in it are followed.
            flags: O_PATH, O_DIRECTORY, O_NOFOLLOW; what is read must be a directory, or be looked at first.
        """
        if self.bounds is None:
            return walking.open_inside(self.fd, absolute(path), flags, self.identity)
        return walking.open_inside(self.fd, absolute(path), flags, self.identity, self.bounds.places)

    def open_directory(self, path: str) -> int:
        """Open a directory to read it; links inside are followed. Raises OSError."""
        return self.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def open_regular(self, path: str) -> int:
        """Open a regular file to read it; links inside are followed. Raises OSError and InvalidArgumentError."""
        with self.identity.bare():
            probe = self.open(path, os.O_PATH)
            try:
                kind = kind_of(os.fstat(probe).st_mode)
                if kind != "file":
                    raise InvalidArgumentError(f"{path!r} is not a regular file but a {kind}")
                return self.identity.reopen(probe, 0)
            finally:
                os.close(probe)

    @contextmanager
    def parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory that holds `path` (O_PATH), and the last part of the path. Raises OSError and NotFoundError."""
        directory, name = os.path.split(absolute(path).rstrip("/"))
        if name in {"", ".", ".."}:
            raise InvalidArgumentError(f"{path!r} does not name a file in a directory")
        try:
            fd = self.open(directory, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError as error:
            raise NotFoundError(f"{directory!r}, the directory of {path!r}, does not exist") from error
        try:
            yield fd, name
        finally:
            os.close(fd)


@contextmanager
def pinned(identity: Identity, directory: int, name: str) -> Iterator[int]:
    """An O_PATH descriptor of what `name` is; the link itself for a link.

    Raises:
        OSError: EXDEV for a mount point. It must not be replaced or removed: seen from outside the kernel would do it,
            and take the mount away in the sandbox, too (fs/namei.c: detach_mounts).
    """
    with identity.over(directory):
        fd = syscalls.openat2(directory, name, os.O_PATH | os.O_NOFOLLOW, resolve=ON_THIS_MOUNT)
    try:
        yield fd
    finally:
        os.close(fd)


def look(identity: Identity, directory: int, name: str) -> os.stat_result | None:
    """The status of `name`, None where nothing is. Raises OSError as `pinned` does."""
    try:
        with pinned(identity, directory, name) as fd:
            return os.fstat(fd)
    except FileNotFoundError:
        return None


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
        case errno.EACCES | errno.EPERM:
            hint = "It, or a directory on its way, belongs to a user of the host whom the sandbox does not have."
            return FailedPreconditionError(f"{where}: {why}", hint=hint if side == "sandbox" else "")
        case errno.EROFS | errno.ENOTEMPTY | errno.EBUSY | errno.ETXTBSY | errno.EMLINK:
            return FailedPreconditionError(f"{where}: {why}")
        case errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG | errno.EINVAL | errno.EOVERFLOW:
            return InvalidArgumentError(f"{where}: {why}")
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM:
            return UnavailableError(f"{where}: {why}", hint="This host or this process is at a limit of its own.")
        case _:
            return BackendError(f"{where}: {why}")
