"""Removing what is left over, if it still is when no engine can begin with it any more."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from unisandbox.api import BackendError, FailedPreconditionError
from unisandbox.engine.leftovers.finding import Kind, Leftover
from unisandbox.engine.leftovers.traces import HostTraces, Traces, homeless
from unisandbox.engine.leftovers.verdicts import verdict_of
from unisandbox.engine.runtime_directory import end_leases, remove_if_empty, runtime_directory
from unisandbox.engine.state import unlocked
from unisandbox.engine.state_files import known_id
from unisandbox.host import loop, syscalls
from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import ending
from unisandbox.host.removal import remove_tree

_KILL_TIME: Final = 5.0
# A keeper undoes what was done (10 s) and waits for deaths (2 s).
_END_TIME: Final = 15.0


def remove(leftover: Leftover) -> None:
    """Remove it, if it still is one: that is looked at again, and no engine can begin with it meanwhile.

    What is gone already is fine.

    Raises:
        FailedPreconditionError: it is not to be removed here, or is in use by now.
        BackendError: it cannot be removed.
    """
    if not leftover.removable:
        raise FailedPreconditionError(f"{leftover.kind} {leftover.what} is not removed: {leftover.why}")
    try:
        with _without_engine(leftover):
            _REMOVE[leftover.kind](leftover)
    except OSError as error:
        raise BackendError(
            f"cannot remove {leftover.kind} {leftover.what} of engine {leftover.engine_id or 'unknown'}:"
            f" {error.strerror or error}"
        ) from error
    remove_if_empty(runtime_directory())


@contextlib.contextmanager
def _without_engine(leftover: Leftover) -> Iterator[None]:
    """Nobody has it, and no engine can be opened with it while this lasts.

    Raises:
        FailedPreconditionError: an engine has it.
    """
    if leftover.kind == "file":
        yield  # what removes it asks for the locks itself
        return
    host = HostTraces.look(only_engines=True)
    in_use = FailedPreconditionError(
        f"{leftover.kind} {leftover.what} is not removed: its engine has begun to live, or may have", hint="Look again."
    )
    if leftover.kind == "keeper":
        if homeless(host.keepers.get(leftover.engine_id, ())) not in {None, leftover.process}:
            raise in_use
        yield  # nobody can come to it
        return
    if leftover.engine_id:
        state_dir = host.engines.get(leftover.engine_id, Traces()).state_dir
        # Without a state directory nothing but the keeper's absence has told that it is dead, and then it was old.
        dead = (
            verdict_of(host, leftover.engine_id).state == "dead"
            if state_dir
            else leftover.engine_id not in host.keepers
        )
    else:
        state_dir = leftover.what
        dead = not known_id(state_dir)
    if not dead:
        raise in_use
    if not state_dir:
        yield
        return
    with unlocked(state_dir, wait=0.0) as unused:
        if not unused:
            raise in_use
        yield


def _end_keeper(leftover: Leftover) -> None:
    try:
        fd = pidfds.open_verified(*leftover.process)
    except ProcessLookupError:
        return
    try:
        pidfds.send_signal(fd, signal.SIGTERM)  # it frees everything that it has
        if not pidfds.has_ended(fd, _END_TIME):
            raise OSError(errno.ETIMEDOUT, f"it did not end within {_END_TIME:g} s")
    finally:
        os.close(fd)


def _end_process(leftover: Leftover) -> None:
    pid, start_time = leftover.process
    try:
        fd = pidfds.open_verified(pid, start_time)
    except ProcessLookupError:
        return
    try:
        # While the pidfd is held its pid is nobody else's: only one that is in the cgroup now is ours.
        if not any(pid in ending.pids(path) for path in leftover.paths):
            return
        pidfds.send_signal(fd, signal.SIGKILL)
        if not pidfds.has_ended(fd, _KILL_TIME):
            raise OSError(errno.ETIMEDOUT, f"it did not end within {_KILL_TIME:g} s")
    finally:
        os.close(fd)


def _end_cgroup(leftover: Leftover) -> None:
    ending.kill(leftover.paths, _KILL_TIME)
    if not ending.remove(leftover.paths, _KILL_TIME):
        raise OSError(errno.EBUSY, f"its processes did not end within {_KILL_TIME:g} s")


def _detach_loop(leftover: Leftover) -> None:
    device, _, path = leftover.what.partition(" on ")
    number = int(device.removeprefix("/dev/loop"))
    if (number, path) in set(loop.attached()):
        loop.detach(number, path)


def _unmount(leftover: Leftover) -> None:
    try:
        syscalls.umount(leftover.what, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:  # no mount (any more)
            raise


def _unlink(leftover: Leftover) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(leftover.what)


_REMOVE: Final[Mapping[Kind, Callable[[Leftover], None]]] = {
    "keeper": _end_keeper,
    "process": _end_process,
    "cgroup": _end_cgroup,
    "loop": _detach_loop,
    "mount": _unmount,
    "image": lambda leftover: remove_tree(leftover.what) if os.path.isdir(leftover.what) else _unlink(leftover),
    "directory": lambda leftover: remove_tree(leftover.what),
    "file": lambda leftover: end_leases(os.path.dirname(leftover.what)),
    "link": _unlink,
}
