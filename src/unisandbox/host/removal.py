"""Removing a directory tree that a stranger has made: any depth, any width, no link followed, no mount entered.

Works on descriptors only, in steps, so that whoever has an event loop can let it run in between. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat

from unisandbox.host import syscalls
from unisandbox.host.boundary import reached
from unisandbox.host.entries import open_entry
from unisandbox.host.identity import CALLER

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import Final

    from unisandbox.host.identity import Identity

# How deep it goes before it moves what is deeper up to the top: bounds the descriptors (two for each level).
_DEPTH: Final = 32
# Entries per step; some 10 us each.
_STEP: Final = 256
# How often a directory is read again that is not empty although nothing in it has failed: somebody fills it meanwhile.
_PASSES: Final = 16

_BENEATH: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS
# Somebody was quicker than we: read the directory again to see what is there now.
_CHANGED: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def remove_tree(path: str) -> None:
    """Remove a directory (or file) with all that is below it; missing is fine.

    Never follows a link, never enters another mount (also not a bind mount of the same file system), goes on where it
    can and then raises the first error. Depth is no limit, and at most some 70 fds are open at a time.

    Raises:
        OSError: EINVAL for "/" and for what is not absolute; EBUSY or EXDEV when a mount lies in the tree.
    """
    if not path.startswith("/") or ".." in path.split("/"):
        raise OSError(errno.EINVAL, f"remove_tree: {path!r} must be absolute, without '..'", path)
    parent_path, name = os.path.split(path.rstrip("/"))
    if name in {"", "."}:
        raise OSError(errno.EINVAL, f"remove_tree refuses {path!r}", path)
    try:
        parent = os.open(parent_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    reached("before tree.remove", path)
    try:
        with contextlib.suppress(FileNotFoundError):
            for _ in removing(parent, name, path):
                pass
    finally:
        os.close(parent)
    reached("after tree.remove", path)


def removing(parent: int, name: str, path: str, identity: Identity = CALLER) -> Generator[None, None, None]:
    """Remove `name` in the directory `parent` with all below it, in steps: run the iterator to its end, or close it.

    Args:
        parent: descriptor of the directory, also O_PATH.
        name: one part of a path.
        path: what to call it in messages.
        identity: as whom.

    Raises:
        OSError: ENOENT: it does not exist; EXDEV: it is a mount point, or one lies below; otherwise the first error
            after everything that could be removed has been.
    """
    status = _look(identity, parent, name)
    if not stat.S_ISDIR(status.st_mode):
        with identity.over(parent, entries=[status]):
            os.unlink(name, dir_fd=parent)
        return
    top = identity.open_directory(parent, name, _BENEATH)
    try:
        emptying = _Emptying(top, path, identity)
        yield from emptying.steps()
        status = os.fstat(top)
    finally:
        os.close(top)
    if emptying.error is not None:
        raise emptying.error
    # It may have gone meanwhile: somebody else was quicker.
    with contextlib.suppress(FileNotFoundError), identity.over(parent, entries=[status]):
        os.rmdir(name, dir_fd=parent)


def _look(identity: Identity, directory: int, name: str, status: os.stat_result | None = None) -> os.stat_result:
    """Refuses a mount point: unlink(2) removes one that is mounted in another mount namespace, and the mount with it.

    Source: fs/namei.c, vfs_unlink: is_local_mountpoint() looks at the caller's namespace, detach_mounts() at all.
    """
    with identity.over(directory if status is None else status):
        probe = open_entry(directory, name, os.O_PATH, resolve=_BENEATH)
    try:
        return os.fstat(probe)
    finally:
        os.close(probe)


class _Level:
    """A directory on the way down."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        # Whom it belongs to does not change but within the sandbox.
        self.status = os.fstat(fd)
        self.passes = 0
        # Whether this pass has found anything, and whether something in it could not be removed.
        self.found = False
        self.failed = False
        self._names: list[str] = []
        self._scan = os.scandir(fd)

    def next(self) -> str | None:
        """The next name; None at the end of a pass."""
        if not self._names:
            self._names = [entry.name for entry in itertools.islice(self._scan, _STEP)]
            self._names.reverse()
            self.found = self.found or bool(self._names)
        return self._names.pop() if self._names else None

    def again(self) -> bool:
        """Start another pass where that may help."""
        if self.failed or self.passes == _PASSES:
            return False
        self.passes += 1
        self.found = False
        self._scan.close()
        self._scan = os.scandir(self.fd)
        return True

    def close(self) -> None:
        self._scan.close()


class _Emptying:
    """Empties one directory, without recursion: a hostile tree may be deeper than any stack."""

    def __init__(self, top: int, path: str, identity: Identity) -> None:
        self._top = top
        self._identity = identity
        self._path = path
        self._moved = 0
        # Not to be guessed: a hostile tree would have that name already.
        self._token = os.urandom(8).hex()
        self.error: OSError | None = None

    def steps(self) -> Iterator[None]:
        """Run it; afterwards `error` is the first error, or None when the directory is empty."""
        # What lay too deep was moved to the top: look again until nothing more was moved.
        while True:
            moved = self._moved
            yield from self._empty()
            if self._moved == moved:
                return

    def _empty(self) -> Iterator[None]:
        levels = [_Level(self._top, "")]
        try:
            while True:
                with self._identity.bare():
                    if not all(self._step(levels) for _ in range(_STEP)):
                        return
                yield
        finally:
            for level in levels:
                level.close()
            for level in levels[1:]:
                os.close(level.fd)

    def _step(self, levels: list[_Level]) -> bool:
        """Deal with one entry or level; False: that was the end."""
        level = levels[-1]
        name = level.next()
        if name is not None:
            below = self._remove(level, name, len(levels))
            if below is not None:
                levels.append(below)
        elif len(levels) == 1:
            # A pass that finds nothing is the proof. Moved directories are the next round's.
            return level.found and level.again()
        elif self._leave(levels[-2], level):
            levels.pop()
            level.close()
            os.close(level.fd)
        return True

    def _remove(self, level: _Level, name: str, depth: int) -> _Level | None:
        """Remove one entry; for a directory its own level, to be done first."""
        try:
            status = _look(self._identity, level.fd, name, level.status)
            if not stat.S_ISDIR(status.st_mode):
                with contextlib.suppress(IsADirectoryError), self._identity.over(level.status, entries=[status]):
                    os.unlink(name, dir_fd=level.fd)
                    return None
            if depth >= _DEPTH:
                self._moved += 1
                aside = f".removing-{self._token}-{self._moved}"
                with self._identity.over(level.status, self._top, status, entries=[status]):
                    os.rename(name, aside, src_dir_fd=level.fd, dst_dir_fd=self._top)
                return None
            below = self._identity.open_directory(level.fd, name, _BENEATH)
            try:
                return _Level(below, name)
            except BaseException:
                os.close(below)
                raise
        except OSError as error:
            if error.errno not in _CHANGED:
                self._note(level, error, name)
            return None

    def _leave(self, above: _Level, level: _Level) -> bool:
        """Remove a directory that has been emptied; False: it has been filled meanwhile and is done once more."""
        try:
            with self._identity.over(above.status, entries=[level.status]):
                os.rmdir(level.name, dir_fd=above.fd)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY and level.again():
                return False
            if error.errno not in _CHANGED:
                self._note(above, error, level.name)
        return True

    def _note(self, level: _Level, error: OSError, name: str) -> None:
        level.failed = True
        if self.error is None:
            self.error = OSError(error.errno, f"{name!r} below {self._path}: {error.strerror}", self._path)
