"""A process is known by pid and start time, never by a bare pid."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from unisandbox.host import pidfd, syscalls


def _sleeper() -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", "60"], {})


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_right_process_is_opened_and_can_be_killed() -> None:
    pid = _sleeper()
    fd = pidfd.open_verified(pid, pidfd.start_time(pid))
    try:
        assert not os.get_inheritable(fd)
        assert pidfd.host_pid(fd) == pid
        assert pidfd.exit_status(fd) is None
        assert pidfd.send_signal(fd, signal.SIGTERM)
        assert select.select([fd], [], [], 10)[0]
        assert os.waitpid(pid, 0) == (pid, signal.SIGTERM)
        assert not pidfd.send_signal(fd, signal.SIGTERM)
        assert pidfd.exit_status(fd) in {signal.SIGTERM, None}  # None before Linux 6.15
        with pytest.raises(ProcessLookupError):
            pidfd.host_pid(fd)
    finally:
        os.close(fd)


def test_a_successor_with_the_same_pid_is_not_taken_for_it() -> None:
    pid = _sleeper()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError, match="another process"):
        pidfd.open_verified(pid, pidfd.start_time(pid) - 1)
    assert len(os.listdir("/proc/self/fd")) == before
    _end(pid)


def test_a_reaped_process_is_not_found() -> None:
    pid = _sleeper()
    started = pidfd.start_time(pid)
    _end(pid)
    with pytest.raises(ProcessLookupError):
        pidfd.open_verified(pid, started)
    with pytest.raises(ProcessLookupError):
        pidfd.start_time(pid)


def test_a_zombie_keeps_its_identity() -> None:
    pid = _sleeper()
    identity = pidfd.identity(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pidfd.identity(pid) == identity
    os.close(pidfd.open_verified(*(identity.pid, identity.start_time)))
    os.waitpid(pid, 0)


def test_a_hostile_name_does_not_confuse_the_start_time(tmp_path: Path) -> None:
    name = "a) S 1 1 (1) 1"
    (tmp_path / name).symlink_to("/bin/sleep")
    pid = os.posix_spawn(tmp_path / name, [name, "60"], {})
    honest = _sleeper()
    try:
        assert 0 <= pidfd.start_time(honest) - pidfd.start_time(pid) < 100 * 60
    finally:
        _end(pid)
        _end(honest)


def test_what_is_no_pidfd_is_refused() -> None:
    with Path("/dev/null").open() as file, pytest.raises(OSError, match="no pidfd"):
        pidfd.host_pid(file.fileno())


def _has_group_signals() -> bool:
    fd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(fd, 0, None, syscalls.PIDFD_SIGNAL_PROCESS_GROUP)
    except ProcessLookupError:
        return True  # this process leads no group
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.skipif(not _has_group_signals(), reason="before Linux 6.9")
def test_the_group_of_a_reaped_process_is_killed_and_no_other() -> None:
    leader = os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, setpgroup=0)
    member = os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, setpgroup=leader)
    stranger = _sleeper()
    fd = os.pidfd_open(leader)
    try:
        _end(leader)
        pidfd.kill_group(fd)
        assert os.waitpid(member, 0)[1] == signal.SIGKILL
        assert os.waitpid(stranger, os.WNOHANG) == (0, 0)
        pidfd.kill_group(fd)  # nobody is left in it
    finally:
        os.close(fd)
        _end(stranger)


def test_one_that_was_killed_is_ending_and_stays_so() -> None:
    pid = _sleeper()
    assert not pidfd.is_ending(pid)
    assert not pidfd.is_ending(os.getpid())
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert pidfd.is_ending(pid)
    os.waitpid(pid, 0)
    assert pidfd.is_ending(pid)
