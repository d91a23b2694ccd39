"""Putting files, directories and links into an open directory: whole or not at all, and never through a link.

The directory may be a sandbox's, where others change things at the same moment, or one of the host's. A file has no
name until it is complete (O_TMPFILE), so nothing is left over whatever happens meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from unisandbox.api import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from unisandbox.host import syscalls
from unisandbox.sandbox.inside import ON_THIS_MOUNT, ONE_STEP, look

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# File systems without O_TMPFILE (NFS, FUSE, overlayfs before Linux 6.1); source: open(2).
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
# How often a name may change under our hands before that is an error.
_ATTEMPTS: Final = 100


class Placer:
    """Makes things that belong to `owner` and have exactly the mode given; None: to the caller, under his umask.

    Every method raises OSError, and errors of the tree where the kernel has no word for it. Names are one part of a
    path; `path` is what to call it in messages.
    """

    def __init__(self, owner: tuple[int, int] | None) -> None:
        self._owner = owner

    @contextmanager
    def file(self, directory: int, name: str, path: str, mode: int | None) -> Iterator[int]:
        """A file that becomes `name` when the block ends well, and never exists otherwise.

        In a sandbox an existing file's owner is kept, and its mode if none is given. A link, FIFO, socket or device
        that has the name is replaced.
        """
        old = look(directory, name)
        if old is not None and stat.S_ISDIR(old.st_mode):
            raise InvalidArgumentError(f"{path!r} is a directory")
        kept = old if self._owner is not None and old is not None and stat.S_ISREG(old.st_mode) else None
        if mode is None:
            mode = 0o644 if kept is None else stat.S_IMODE(kept.st_mode)
        fd, temporary = self._new(directory, mode)
        try:
            yield fd
            if self._owner is not None:
                uid, gid = self._owner if kept is None else (kept.st_uid, kept.st_gid)
                made = os.fstat(fd)
                if (made.st_uid, made.st_gid) != (uid, gid):
                    os.fchown(fd, uid, gid)
                os.fchmod(fd, mode)  # after the owner: chown takes setuid bits away
            with self._identity():
                if temporary:
                    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                    temporary = ""
                else:
                    _name(directory, name, lambda free: os.link(f"/proc/self/fd/{fd}", free, dst_dir_fd=directory))
        finally:
            os.close(fd)
            if temporary:
                with contextlib.suppress(OSError):  # the error that matters is on its way
                    os.unlink(temporary, dir_fd=directory)

    def link(self, directory: int, name: str, path: str, target: str) -> None:
        """A symbolic link; replaces all but a directory."""
        old = look(directory, name)
        if old is not None and stat.S_ISDIR(old.st_mode):
            raise InvalidArgumentError(f"{path!r} is a directory")
        with self._identity():
            _name(directory, name, lambda free: os.symlink(target, free, dir_fd=directory))

    def make_directory(self, directory: int, name: str, mode: int) -> int:
        """A new directory, opened to read it."""
        with self._identity():
            os.mkdir(name, mode, dir_fd=directory)
        fd = syscalls.openat2(directory, name, _DIRECTORY, resolve=ON_THIS_MOUNT)
        try:
            status = os.fstat(fd)
            if self._owner is not None and stat.S_IMODE(status.st_mode) != mode:
                # The umask or the parent's setgid bit. Only ours is changed, not what was moved to its place meanwhile.
                if status.st_uid != self._owner[0] or os.listdir(fd):
                    raise FailedPreconditionError(f"{name!r} was changed while it was made")
                os.fchown(fd, *self._owner)
                os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def directory(self, directory: int, name: str, path: str, mode: int) -> tuple[int, bool]:
        """The directory `name`, opened to read it, and whether it was made; a link with that name is replaced."""
        for _ in range(_ATTEMPTS):
            try:
                try:
                    return syscalls.openat2(directory, name, _DIRECTORY, resolve=ONE_STEP), False
                except FileNotFoundError:
                    return self.make_directory(directory, name, mode), True
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in {errno.ELOOP, errno.ENOTDIR, errno.EAGAIN, errno.ENOENT}:
                    raise
                old = look(directory, name)
                if old is not None and stat.S_ISLNK(old.st_mode):
                    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                        os.unlink(name, dir_fd=directory)
                elif old is not None and not stat.S_ISDIR(old.st_mode):
                    raise AlreadyExistsError(f"{path!r} exists already and is not a directory") from error
        raise FailedPreconditionError(f"{path!r} is being changed all the time", hint="Try again.")

    def rename(self, from_directory: int, from_name: str, to_directory: int, to_name: str) -> None:
        """rename(2); neither may be a mount point."""
        look(from_directory, from_name)
        look(to_directory, to_name)
        with self._identity():
            os.rename(from_name, to_name, src_dir_fd=from_directory, dst_dir_fd=to_directory)

    def _new(self, directory: int, mode: int) -> tuple[int, str]:
        """A new file, and its name, which is empty where the file system can do without."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        at_first = mode if self._owner is None else 0o600
        with self._identity():
            try:
                return os.open(".", flags | os.O_TMPFILE, at_first, dir_fd=directory), ""
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            temporary = _temporary()
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            return os.open(temporary, flags, at_first, dir_fd=directory), temporary

    def _identity(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._owner is None else syscalls.filesystem_ids(*self._owner)


def _temporary() -> str:
    # Nothing of the name that is wanted: it may have the greatest length already.
    return f".unisandbox-{os.urandom(8).hex()}"


def _name(directory: int, name: str, make: Callable[[str], None]) -> None:
    """Let `make` give something the name, in the place of what has it now: under another name first, if it must be."""
    try:
        make(name)
    except FileExistsError:
        temporary = _temporary()
        make(temporary)
        try:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that matters is on its way
                os.unlink(temporary, dir_fd=directory)
            raise
