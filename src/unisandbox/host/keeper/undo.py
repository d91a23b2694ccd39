"""Guards: how to undo what a client did, run when the client cannot do it itself.

Runs in a forked child of the keeper that has gone back to the host's mount namespace. Each kind may be repeated and may
find its work done already: missing is success. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from unisandbox.host import syscalls
from unisandbox.host.cgroups import ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    #: name, kind, paths
    Guard = tuple[str, str, list[str]]

# How long one guard may wait for the kernel to let go of a cgroup (seconds).
_CGROUP_WAIT = 2.0
# How deep `remove_tree` goes before it moves what is deeper up to the top: bounds the fds that it needs.
_DEPTH = 64

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS


def run(guards: Iterable[Guard], tell: Callable[[str, OSError | None], None]) -> None:
    """Run guards (given in the order of their registration) in reverse; `tell(name, error)` hears of each one's end.

    Every `kill_cgroup` comes first, as one: all sandboxes die at once, and nothing that runs disturbs the rest.
    """
    backwards = list(guards)[::-1]
    kills = [guard for guard in backwards if guard[1] == "kill_cgroup"]
    if kills:
        error = _attempt(lambda: ending.kill([path for guard in kills for path in guard[2]], _CGROUP_WAIT))
        for name, _, _ in kills:
            tell(name, error)
    for name, kind, paths in backwards:
        if kind != "kill_cgroup":
            tell(name, _attempt(lambda kind=kind, paths=paths: _undo(kind, paths)))  # type: ignore[misc]


def _attempt(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _undo(kind: str, paths: list[str]) -> None:
    if kind == "rmdir_cgroup":
        if not ending.remove(paths, _CGROUP_WAIT):
            raise OSError(errno.EBUSY, f"cgroup {paths[0]} is still in use")
        return
    actions: dict[str, Callable[[str], None]] = {
        "remove_tree": remove_tree,
        "unlink": os.unlink,
        "rmdir": os.rmdir,
        "umount": _umount,
    }
    first: OSError | None = None
    for path in paths:
        try:
            actions[kind](path)
        except FileNotFoundError:
            continue
        except OSError as error:  # the other paths deserve their try
            first = first or error
    if first is not None:
        raise first


def _umount(path: str) -> None:
    """Detach everything that is mounted at `path`; mounts may lie upon each other."""
    while True:
        try:
            syscalls.umount(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EINVAL:  # no mount (any more)
                return
            raise


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
    try:
        _remove_at(parent, name, path)
    finally:
        os.close(parent)


def _remove_at(parent: int, name: str, path: str) -> None:
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=parent)
            return
        top = syscalls.openat2(parent, name, _DIRECTORY, resolve=_BENEATH)
    except FileNotFoundError:
        return
    try:
        error = _Emptying(top, path).run()
    finally:
        os.close(top)
    if error is not None:
        raise error
    with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
        os.rmdir(name, dir_fd=parent)


class _Emptying:
    """Empties one directory, without recursion: a hostile tree may be deeper than any stack."""

    def __init__(self, top: int, path: str) -> None:
        self._top = top
        self._path = path
        self._error: OSError | None = None
        self._moved = 0
        # Not to be guessed: a hostile tree would have that name already.
        self._token = os.urandom(8).hex()

    def run(self) -> OSError | None:
        """The first error, None when the directory is empty now."""
        # What lay too deep was moved to the top: look again until nothing more was moved.
        while True:
            moved = self._moved
            self._empty()
            if self._moved == moved:
                return self._error

    def _empty(self) -> None:
        # Each level: fd, its name in the level above, the names still to do.
        levels: list[tuple[int, str, list[str]]] = [(self._top, "", os.listdir(self._top))]
        try:
            while levels:
                directory, name, names = levels[-1]
                if not names:
                    levels.pop()
                    if levels:
                        os.close(directory)
                        self._rmdir(levels[-1][0], name)
                    continue
                below = self._remove(directory, names.pop(), len(levels))
                if below is not None:
                    levels.append(below)
        finally:
            for directory, _, _ in levels[1:]:
                os.close(directory)

    def _remove(self, directory: int, name: str, depth: int) -> tuple[int, str, list[str]] | None:
        """Remove one entry; for a directory that is not empty its own level, to be done first."""
        try:
            try:
                os.unlink(name, dir_fd=directory)
                return None
            except (IsADirectoryError, PermissionError):  # EPERM: what POSIX says for a directory
                pass
            if depth >= _DEPTH:
                self._moved += 1
                os.rename(name, f".removing-{self._token}-{self._moved}", src_dir_fd=directory, dst_dir_fd=self._top)
                return None
            below = syscalls.openat2(directory, name, _DIRECTORY, resolve=_BENEATH)
            try:
                return below, name, os.listdir(below)
            except BaseException:
                os.close(below)
                raise
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(error, name)
            return None

    def _rmdir(self, directory: int, name: str) -> None:
        try:
            os.rmdir(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._note(error, name)

    def _note(self, error: OSError, name: str) -> None:
        if self._error is None:
            self._error = OSError(error.errno, f"{name!r} below {self._path}: {error.strerror}", self._path)
