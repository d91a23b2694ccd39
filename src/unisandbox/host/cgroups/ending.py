"""Ending every process of a cgroup and removing its directories, whatever the hierarchy.

Standard library only: the keeper runs this for a client that is gone. It works from directories alone, needs no
record, and may be repeated at any time, also while somebody else does the same.
Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.kill, cgroup.events), cgroup-v1/freezer-subsystem.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import time

from unisandbox.host.boundary import reached

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A kill is over in about 1 ms; what takes longer deserves fewer looks.
_POLL_FIRST = 0.0002
_POLL_LAST = 0.01
# How long one round waits for the v1 freezer while somebody runs. A task in an uninterruptible sleep does not freeze,
# and nobody waits for it: then we kill what is there without it, round after round.
_FREEZE_WAIT = 0.1
# Who sleeps in the kernel, stopped or dead cannot fork before he meets the freezer (proc_pid_stat(5); the flag of those
# that exit is of include/linux/sched.h).
_CANNOT_FORK = (b"D", b"T", b"t", b"Z", b"X")
_PF_EXITING = 0x4
# The directory (or its file) has gone meanwhile.
_GONE = (errno.ENOENT, errno.ENODEV, errno.ENOTDIR)


def kill(dirs: Sequence[str], timeout: float = 2.0) -> None:
    """Send SIGKILL to every process in and below `dirs`, then wait up to `timeout` seconds until they are gone.

    Where `cgroup.kill` exists (Linux 5.14: cgroup v2, and the controller-less unified tree of a hybrid host) the kernel
    does it at once for the whole tree, however fast it forks. Processes that are found in v1 directories are ended one
    by one, held by the freezer if one of `dirs` has it. `timeout=0` makes one pass and does not wait for the deaths
    (it holds its caller up until those that run have stopped, at most 0.1 s). A missing directory has no processes.
    What outlives the timeout sleeps in the kernel, its SIGKILL pending: `remove` will say False.

    Raises:
        OSError: the processes of an existing directory cannot be ended (no permission).
    """
    deadline = time.monotonic() + timeout
    others = [directory for directory in dirs if not _kill_at_once(directory)]
    at_once = [directory for directory in dirs if directory not in others]
    freezers = [directory for directory in others if os.path.exists(f"{directory}/freezer.state")]
    pause = _POLL_FIRST
    while True:
        left = _kill_one_by_one(others, freezers)
        if timeout <= 0 or not (left or any(populated(directory) for directory in at_once)):
            return
        if time.monotonic() >= deadline:
            return
        time.sleep(pause)
        pause = min(pause * 2, _POLL_LAST)


def remove(dirs: Sequence[str], timeout: float = 0.0) -> bool:
    """Remove the cgroup directories `dirs` with all that is below them, deepest first, the last of `dirs` first.

    The kernel refuses while a process is in them, also one that is just dying: tried again for `timeout` seconds, at
    least once. Never follows a link, and touches nothing that is not a cgroup. A directory that is missing is fine.

    Returns:
        Whether all of them are gone.

    Raises:
        OSError: a directory cannot be removed for another reason than its processes (no permission, not a cgroup).
    """
    deadline = time.monotonic() + timeout
    left = list(reversed(dirs))
    pause = _POLL_FIRST
    while True:
        left = [directory for directory in left if not _remove_tree(directory)]
        if not left:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, _POLL_LAST)


def tree(directory: str) -> Iterator[str]:
    """The cgroups of a tree, deepest first, `directory` itself last; nothing when it is missing."""
    try:
        info = os.lstat(directory)
        if not stat.S_ISDIR(info.st_mode):
            return
        # kernfs counts sub-directories in the link count: most cgroups have none and need not be read.
        children = []
        if info.st_nlink > 2:
            with os.scandir(directory) as entries:
                children = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    for child in children:
        yield from tree(child)
    yield directory


def pids(directory: str) -> set[int]:
    """The processes in and below a cgroup; empty when it is missing. Processes outside our pid namespace are 0."""
    found: set[int] = set()
    for cgroup in tree(directory):
        found.update(int(pid) for pid in _read(f"{cgroup}/cgroup.procs").split())
    return found


def populated(directory: str) -> bool:
    """Whether any process is in or below a cgroup; a zombie no longer is."""
    events = _read(f"{directory}/cgroup.events")  # v2; the root has none
    if events:
        return b"populated 1" in events
    return bool(pids(directory))


def remove_leaf(directory: str) -> bool:
    """One rmdir; False when somebody is in it or below it. Missing is fine."""
    return _rmdir(directory)


def _kill_at_once(directory: str) -> bool:
    """cgroup.kill; False when this directory has none (v1, or before Linux 5.14)."""
    try:
        fd = os.open(f"{directory}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise
    reached("before cgroup.kill", directory)
    try:
        os.write(fd, b"1")
        reached("after cgroup.kill", directory)
    except OSError as error:
        if error.errno not in _GONE:
            raise OSError(error.errno, f"cannot end the processes of {directory}: {error.strerror}") from None
    finally:
        os.close(fd)
    return True


def _kill_one_by_one(dirs: Sequence[str], freezers: Sequence[str]) -> int:
    """One round over v1 directories. Returns how many processes were still there."""
    if not any(pids(directory) for directory in dirs):
        return 0
    for directory in freezers:
        _freeze(directory)
    try:
        # Frozen processes neither fork nor end: the list is complete, and no pid in it can have become another's.
        found: set[int] = set()
        for directory in dirs:
            found |= pids(directory)
        for pid in found:
            _kill_member(pid, dirs)
    finally:
        for directory in freezers:
            for cgroup in tree(directory):
                _write(f"{cgroup}/freezer.state", b"THAWED")
    let_die(freezers)
    return len(found)


def let_die(dirs: Sequence[str], only: int | None = None) -> None:
    """Move what was killed, and is held by a freezer of v1, to where nothing holds it: there it takes its SIGKILL.

    Where no freezer of v1 holds it there is nothing to do: that of v2 lets a SIGKILL pass.
    Source: freezer_attach(), kernel/cgroup/legacy_freezer.c.

    Args:
        dirs: of a cgroup; all in and below it were killed.
        only: but this one alone.
    """
    for directory in dirs:
        if _is_held(directory):
            _move_out(directory, pids(directory) if only is None else pids(directory) & {only})


def _move_out(directory: str, found: set[int]) -> None:
    above = os.path.dirname(directory)
    while _is_held(above):
        above = os.path.dirname(above)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # it was let go meanwhile
            _write(f"{above}/cgroup.procs", str(pid).encode())


def _is_held(directory: str) -> bool:
    return b"1" in _read(f"{directory}/freezer.self_freezing") + _read(f"{directory}/freezer.parent_freezing")


def _kill_member(pid: int, dirs: Sequence[str]) -> None:
    if pid <= 0:
        return  # not in our pid namespace: it cannot be named, the caller learns it from `remove`
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The pid may have passed to a stranger between the listing and pidfd_open: only a process that is a member
        # now, while the pidfd holds its pid, is ours.
        if any(pid in pids(directory) for directory in dirs):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # ended meanwhile
    finally:
        os.close(fd)


def _freeze(directory: str) -> None:
    deadline = time.monotonic() + _FREEZE_WAIT
    while _write(f"{directory}/freezer.state", b"FROZEN"):
        if _read(f"{directory}/freezer.state").strip() == b"FROZEN" or not any(map(_may_fork, pids(directory))):
            return
        if time.monotonic() >= deadline:
            return
        time.sleep(_POLL_FIRST)


def _may_fork(pid: int) -> bool:
    """Whether a thread of this process runs, or does so before it is stopped."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            fields = _read(f"/proc/{pid}/task/{thread}/stat").rpartition(b")")[2].split()
            if fields and fields[0] not in _CANNOT_FORK and not int(fields[6]) & _PF_EXITING:
                return True
    return False


def _remove_tree(directory: str) -> bool:
    """One try; whether it is gone."""
    if _rmdir(directory):
        return True
    for cgroup in tree(directory):
        if not os.path.lexists(f"{cgroup}/cgroup.procs") and os.path.lexists(cgroup):
            raise OSError(errno.EINVAL, f"{cgroup} is not a cgroup: not removed", cgroup)
        _rmdir(cgroup)
    return not os.path.lexists(directory)


def _rmdir(directory: str) -> bool:
    reached("before cgroup.rmdir", directory)
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise OSError(error.errno, f"cannot remove cgroup {directory}: {error.strerror}", directory) from None
    reached("after cgroup.rmdir", directory)
    return True


def _read(path: str) -> bytes:
    """A whole cgroup file; empty when it has gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in _GONE:
            return b""
        raise
    chunks = []
    try:
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
    except OSError as error:
        # EOPNOTSUPP: the cgroup.procs of a threaded cgroup; its processes are listed at the root of that domain.
        if error.errno not in (*_GONE, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
    return b"".join(chunks)


def _write(path: str, value: bytes) -> bool:
    """Write a cgroup file; False when it has gone."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, value)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise OSError(error.errno, f"cannot write {value.decode()} to {path}: {error.strerror}", path) from None
    return True
