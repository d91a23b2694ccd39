"""What a process inherits of how its parent runs, and its end. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os

from unisandbox.host import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

_NR_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_NR_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
_PR_SET_TIMERSLACK: Final = 29
_PR_SET_THP_DISABLE: Final = 41
_IOPRIO_WHO_PROCESS: Final = 1
# What init has. 0 would be that of the parent. Source: prctl(2), PR_SET_TIMERSLACK.
_TIMER_SLACK: Final = 50_000

_libc = ctypes.CDLL(None, use_errno=True)


def reset_attributes() -> None:
    """Ordinary scheduling on all CPUs, priority, memory policy, timers and addresses.

    All of it outlives fork and exec: what the starting process happens to run under is not for its sandboxes. What may
    not be changed stays, each for itself: a higher nice value and SCHED_IDLE without CAP_SYS_NICE, a cpuset that allows
    no CPU of these, a seccomp filter of the starting process (LockPersonality= of systemd).
    """
    changes: tuple[Callable[[], object], ...] = (
        lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        lambda: _call(_NR_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, 0),
        lambda: _call(_NR_SET_MEMPOLICY, 0, 0, 0),
        lambda: syscalls.prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK),
        lambda: syscalls.prctl(_PR_SET_THP_DISABLE),
        # Else addresses are not random in sandboxes of a host program that a debugger has started, say.
        lambda: _libc.personality(ctypes.c_ulong(0)),
    )
    for change in changes:
        with contextlib.suppress(OSError):
            change()


def _call(numbers: dict[str, int], *arguments: int) -> None:
    """A system call that libc has no function for; not made where its number is not known."""
    if number := numbers.get(os.uname().machine):
        _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
