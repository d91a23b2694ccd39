"""Process identity: pid plus start time, and a pidfd while it is held. Standard library only.

A bare pid is never an identity: the kernel gives it to another process as soon as its owner was reaped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal

from unisandbox.host import syscalls

_EXITING = 0x4
_KILL = 1 << (signal.SIGKILL - 1)


class Identity:
    """Which process: comparable also after a restart of everything but the kernel.

    Attributes:
        pid: as the mounted /proc says.
        start_time: clock ticks after boot (field 22 of /proc/PID/stat).
    """

    __slots__ = ("pid", "start_time")

    def __init__(self, pid: int, start_time: int) -> None:
        self.pid: int = pid
        self.start_time: int = start_time

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        return (self.pid, self.start_time) == (other.pid, other.start_time)

    def __hash__(self) -> int:
        return hash((self.pid, self.start_time))

    def __repr__(self) -> str:
        return f"Identity(pid={self.pid}, start_time={self.start_time})"


def start_time(pid: int) -> int:
    """When process `pid` started, in clock ticks after boot.

    Raises:
        ProcessLookupError: there is no such process.

    Source: proc_pid_stat(5). The name in field 2 may hold spaces and brackets: fields are counted after the last ")".
    """
    return int(_stat(pid)[19])


def is_ending(pid: int) -> bool:
    """Whether the process is about to end, or has: killed, or in the middle of its exit, which nobody is told of yet.

    Source: SigPnd and ShdPnd of proc_pid_status(5), of which the kernel takes SIGKILL only to begin the exit; flags of
    proc_pid_stat(5) with PF_EXITING (include/linux/sched.h).
    """
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            pending = [int(line.split()[1], 16) for line in file.read(1 << 16).splitlines() if line[3:5] == b"Pn"]
        return bool(int(_stat(pid)[6]) & _EXITING) or any(mask & _KILL for mask in pending)
    except (FileNotFoundError, ProcessLookupError):
        return True


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} does not exist") from None
    return text[text.rindex(b")") + 2 :].split(maxsplit=20)


def identity(pid: int) -> Identity:
    """The identity of the process which has this pid now."""
    return Identity(pid, start_time(pid))


def lives(pid: int, start_time: int) -> bool:
    """Whether that process lives; one that has ended and that nobody has reaped does not."""
    if pid <= 0:
        return False
    try:
        fd = open_verified(pid, start_time)
    except ProcessLookupError:
        return False
    try:
        return not has_ended(fd)
    finally:
        os.close(fd)


def has_ended(pidfd: int, wait: float = 0.0) -> bool:
    """Whether the process has ended, reaped or not; blocks up to `wait` seconds for it.

    Source: pidfd_open(2): readable from the moment of its death, before anybody has reaped it.
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait * 1000))


def open_verified(pid: int, start_time: int) -> int:
    """A pidfd of exactly the process `pid` that started at `start_time`; close-on-exec.

    The start time is read after the pidfd was opened and the process is seen alive (or a zombie) after that, so a pid
    that was given to another process in between is noticed.

    Raises:
        ProcessLookupError: it has ended and was reaped, or its pid belongs to another process now.
    """
    fd = os.pidfd_open(pid)
    try:
        found = identity(pid).start_time
        if found != start_time:
            message = f"pid {pid} is another process now (started at tick {found}, not {start_time})"
            raise ProcessLookupError(errno.ESRCH, message)
        signal.pidfd_send_signal(fd, 0)  # ESRCH: reaped meanwhile, and what was read may be a successor's
    except BaseException:
        os.close(fd)
        raise
    return fd


def send_signal(pidfd: int, number: int) -> bool:
    """Send a signal; False when the process was reaped before (a zombie takes any signal)."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(pidfd: int) -> None:
    """Kill what is left of the process group that the process behind `pidfd` led, also when that was reaped.

    Source: PIDFD_SIGNAL_PROCESS_GROUP, pidfd_send_signal(2). Before Linux 6.9 nothing is done: by its number a group of
    strangers might be killed.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, syscalls.PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


def host_pid(pidfd: int) -> int:
    """The pid of the process behind `pidfd`, as seen from the /proc that is mounted here.

    Raises:
        ProcessLookupError: it was reaped (the kernel says -1), or is in no pid namespace that we see (0).
        OSError: EINVAL: this is no pidfd.

    Source: "Pid:" in /proc/self/fdinfo, pidfd_open(2).
    """
    with open(f"/proc/self/fdinfo/{pidfd}", "rb", buffering=0) as file:
        for line in file.read(4096).splitlines():
            if line.startswith(b"Pid:"):
                pid = int(line[4:])
                if pid > 0:
                    return pid
                raise ProcessLookupError(errno.ESRCH, f"the process of pidfd {pidfd} is gone or out of sight ({pid})")
    raise OSError(errno.EINVAL, f"file descriptor {pidfd} is no pidfd")


def shares_namespace(pid: int) -> bool:
    """Whether this process is in our own pid namespace, not in one below it; True where it cannot be told.

    Source: NSpid, proc_pid_status(5).
    """

    def depth(process: str) -> int:
        with open(f"/proc/{process}/status", "rb") as file:
            return next((len(line.split()) - 1 for line in file if line.startswith(b"NSpid:")), 1)

    try:
        return depth(str(pid)) == depth("self")
    except OSError:  # it has ended, or /proc hides what others run
        return True


def zombie_status(pidfd: int) -> int | None:
    """The wait status of a process that has ended and was not reaped. None: it lives, or is gone.

    Source: field 52 of proc_pid_stat(5), counted after the last ")" since a name may hold anything.
    """
    try:
        with open(f"/proc/{host_pid(pidfd)}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
        host_pid(pidfd)  # it has not been reaped meanwhile: what was read is its own
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[49]) if fields[0] == b"Z" else None


def exit_status(pidfd: int) -> int | None:
    """The wait status of an ended and reaped process, also a stranger's child. None: alive, or not to be known."""
    return syscalls.pidfd_exit_status(pidfd)
