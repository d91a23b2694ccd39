"""Guards: how to undo what a client did, run when the client cannot do it itself.

Runs in a forked child of the keeper that has gone back to the host's mount namespace. Each kind may be repeated and may
find its work done already: missing is success. Standard library only.
"""

from __future__ import annotations

import errno
import os
import signal

from unisandbox.host import pidfd as pidfds
from unisandbox.host import syscalls
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import protocol
from unisandbox.host.removal import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    #: name, kind, paths
    Guard = tuple[str, str, list[str]]

# How long one guard may wait for the kernel to let go of a cgroup (seconds).
_CGROUP_WAIT = 2.0


def run(guards: Iterable[Guard], tell: Callable[[str, OSError | None], None]) -> None:
    """Run guards (given in the order of their registration) in reverse; `tell(name, error)` hears of each one's end.

    Every `kill_cgroup` comes first, as one: all sandboxes die at once, and nothing that runs disturbs the rest. So do
    those of single processes, which are for hosts without cgroups.
    """
    backwards = list(guards)[::-1]
    kills = [guard for guard in backwards if guard[1] == "kill_cgroup"]
    if kills:
        reached("before guard.*", "kill_cgroup")
        error = _attempt(lambda: ending.kill([path for guard in kills for path in guard[2]], _CGROUP_WAIT))
        reached("after guard.*", "kill_cgroup")
        for name, _, _ in kills:
            tell(name, error)
    rest = [guard for guard in backwards if guard[1] == "kill_process"]
    rest += [guard for guard in backwards if guard[1] not in protocol.KILLS]
    for name, kind, paths in rest:
        reached("before guard.*", kind)
        error = _attempt(lambda kind=kind, paths=paths: _undo(kind, paths))  # type: ignore[misc] # its defaults
        reached("after guard.*", kind)
        tell(name, error)


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
    if kind == "kill_process":
        _kill(paths)
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


def _kill(processes: Iterable[str]) -> None:
    for process in processes:
        _, pid, start_time = process.split("/")
        try:
            pidfd = pidfds.open_verified(int(pid), int(start_time))
        except ProcessLookupError:
            continue
        try:
            if pidfds.send_signal(pidfd, signal.SIGKILL):
                pidfds.has_ended(pidfd, _CGROUP_WAIT)
        finally:
            os.close(pidfd)


def _umount(path: str) -> None:
    """Detach everything that is mounted at `path`; mounts may lie upon each other."""
    while True:
        try:
            syscalls.umount(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EINVAL:  # no mount (any more)
                return
            raise
