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
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from unisandbox.api import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from unisandbox.api.sandboxer import FileBounds
from unisandbox.host.identity import Identity
from unisandbox.sandbox.inside import ON_THIS_MOUNT, ONE_STEP, look, pinned

# File systems without O_TMPFILE (NFS, FUSE, overlayfs before Linux 6.1); source: open(2).
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
# Bytes that a new name may take, with what it stands for.
_ENTRY: Final = 16384
# How often a name may change under our hands before that is an error.
_ATTEMPTS: Final = 100


class Placer:
    """Makes things as `identity`: they belong to it and have exactly the mode given, or his umask is the caller's.

    Every method raises OSError, and errors of the tree where the kernel has no word for it. Names are one part of a
    path; `path` is what to call it in messages.
    """

    def __init__(self, identity: Identity, bounds: FileBounds | None = None) -> None:
        """Args: bounds: see `inside.Root`."""
        self.identity = identity
        self._owner = identity.owner
        self._bounds = bounds

    def room(self, fd: int, size: int = _ENTRY) -> None:
        """See that so much may be written where `fd` is, before it is."""
        if self._bounds is not None:
            self._bounds.take(fd, size)

    @contextmanager
    def file(self, directory: int, name: str, path: str, mode: int | None) -> Iterator[int]:
        """A file that becomes `name` when the block ends well, and never exists otherwise.

        In a sandbox an existing file's owner is kept if the sandbox has such a user, and its mode if none is given. A
        link, FIFO, socket or device that has the name is replaced.
        """
        with self.identity.bare():
            old = look(self.identity, directory, name)
            if old is not None and stat.S_ISDIR(old.st_mode):
                raise InvalidArgumentError(f"{path!r} is a directory")
            self.room(directory)
            kept = old if self._owner is not None and old is not None and stat.S_ISREG(old.st_mode) else None
            if mode is None:
                mode = 0o644 if kept is None else stat.S_IMODE(kept.st_mode)
            fd, temporary = self._new(directory, mode)
        try:
            yield fd
            with self.identity.bare():
                made = self._belonging(fd, kept, mode)
                if temporary:
                    self._rename(directory, temporary, made, name, old)
                    temporary = ""
                else:
                    self._name(directory, name, made, old, lambda free: _link(fd, directory, free))
        finally:
            if temporary:
                self._discard(directory, temporary, os.fstat(fd))
            os.close(fd)

    def link(self, directory: int, name: str, path: str, target: str) -> None:
        """A symbolic link; replaces all but a directory."""
        with self.identity.bare():
            old = look(self.identity, directory, name)
            if old is not None and stat.S_ISDIR(old.st_mode):
                raise InvalidArgumentError(f"{path!r} is a directory")
            self.room(directory)
            self._name(directory, name, None, old, lambda free: os.symlink(target, free, dir_fd=directory))

    def make_directory(self, directory: int, name: str, mode: int) -> int:
        """A new directory, opened to read it."""
        with self.identity.bare():
            return self._make_directory(directory, name, mode)

    def _make_directory(self, directory: int, name: str, mode: int) -> int:
        self.room(directory)
        with self.identity.over(directory):
            os.mkdir(name, mode, dir_fd=directory)
        fd = self.identity.open_directory(directory, name, ON_THIS_MOUNT)
        try:
            status = os.fstat(fd)
            if self._owner is not None and stat.S_IMODE(status.st_mode) != mode:
                # The umask or the parent's setgid bit. Only ours is changed, not what was moved to its place meanwhile.
                if status.st_uid != self._owner[0] or os.listdir(fd):
                    raise FailedPreconditionError(f"{name!r} was changed while it was made")
                with self.identity.owning(status):
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
                    return self.identity.open_directory(directory, name, ONE_STEP), False
                except FileNotFoundError:
                    return self.make_directory(directory, name, mode), True
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in {errno.ELOOP, errno.ENOTDIR, errno.EAGAIN, errno.ENOENT}:
                    raise
                old = look(self.identity, directory, name)
                if old is not None and stat.S_ISLNK(old.st_mode):
                    gone = contextlib.suppress(FileNotFoundError, IsADirectoryError)
                    with gone, self.identity.over(directory, entries=[old]):
                        os.unlink(name, dir_fd=directory)
                elif old is not None and not stat.S_ISDIR(old.st_mode):
                    raise AlreadyExistsError(f"{path!r} exists already and is not a directory") from error
        raise FailedPreconditionError(f"{path!r} is being changed all the time", hint="Try again.")

    def rename(self, from_directory: int, from_name: str, to_directory: int, to_name: str) -> None:
        """rename(2); neither may be a mount point."""
        still: AbstractContextManager[object] = contextlib.nullcontext()
        if self._bounds is not None:
            self._bounds.check(from_directory)
            still = self._bounds.still()
        self.room(to_directory)
        with still, self.identity.bare():
            with pinned(self.identity, from_directory, from_name) as moved:
                old = look(self.identity, to_directory, to_name)
                status = os.fstat(moved)
                # A directory is itself changed when it comes into another one: it has a "..".
                changed = [moved] if stat.S_ISDIR(status.st_mode) else []
                entries = [status] if old is None else [status, old]
                with self.identity.over_move(from_directory, to_directory, *changed, entries=entries):
                    os.rename(from_name, to_name, src_dir_fd=from_directory, dst_dir_fd=to_directory)

    def _new(self, directory: int, mode: int) -> tuple[int, str]:
        """A new file, and its name, which is empty where the file system can do without."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        at_first = mode if self._owner is None else 0o600
        with self.identity.over(directory):
            try:
                return os.open(".", flags | os.O_TMPFILE, at_first, dir_fd=directory), ""
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            temporary = _temporary()
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            return os.open(temporary, flags, at_first, dir_fd=directory), temporary

    def _belonging(self, fd: int, kept: os.stat_result | None, mode: int) -> os.stat_result:
        """The status of a new file that has got its owner and mode."""
        made = os.fstat(fd)
        if self._owner is None:
            return made
        uid, gid = self._owner
        if kept is not None and self.identity.may_give(kept.st_uid, kept.st_gid):
            uid, gid = kept.st_uid, kept.st_gid
        with self.identity.owning(made):
            if (made.st_uid, made.st_gid) != (uid, gid):
                os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)  # after the owner: chown takes setuid bits away
        return os.fstat(fd)

    def _name(
        self,
        directory: int,
        name: str,
        made: os.stat_result | None,
        old: os.stat_result | None,
        make: Callable[[str], None],
    ) -> None:
        """Let `make` give something the name, in the place of `old`: under another name first, if it must be.

        `made` is what gets the name; None: it does not exist before.
        """
        entries = None if made is None else [made]
        try:
            with self.identity.over(directory, entries=entries):
                make(name)
        except FileExistsError:
            temporary = _temporary()
            with self.identity.over(directory, entries=entries):
                make(temporary)
            try:
                self._rename(directory, temporary, made, name, old)
            except BaseException:
                self._discard(directory, temporary, made)
                raise

    def _rename(
        self, directory: int, temporary: str, made: os.stat_result | None, name: str, old: os.stat_result | None
    ) -> None:
        entries = [status for status in (made, old) if status is not None]
        with self.identity.over(directory, entries=entries):
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)

    def _discard(self, directory: int, temporary: str, made: os.stat_result | None) -> None:
        # The error that matters is on its way.
        entries = [] if made is None else [made]
        with contextlib.suppress(OSError), self.identity.over(directory, entries=entries):
            os.unlink(temporary, dir_fd=directory)


def _link(fd: int, directory: int, name: str) -> None:
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory)


def _temporary() -> str:
    # Nothing of the name that is wanted: it may have the greatest length already.
    return f".unisandbox-{os.urandom(8).hex()}"
