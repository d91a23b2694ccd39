"""How the keeper runs, and its children: as any process does, whatever started it. Standard library only."""

from __future__ import annotations

import contextlib
import os

from unisandbox.host import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

# What init has. 0 would be that of the parent. Source: prctl(2), PR_SET_TIMERSLACK.
_TIMER_SLACK: Final = 50_000


def reset_attributes() -> None:
    """Ordinary scheduling on all CPUs, priority, memory policy, timers and addresses.

    All of it outlives fork and exec: what the starting process happens to run under is not for its sandboxes. What may
    not be changed stays, each for itself: a higher nice value and SCHED_IDLE without CAP_SYS_NICE, a cpuset that allows
    no CPU of these, a seccomp filter of the starting process (LockPersonality= of systemd).
    """
    changes: tuple[Callable[[], object], ...] = (
        # First: under another one uname(2) may name another machine. Else addresses are not random in sandboxes of a
        # host program that a debugger has started, say.
        lambda: syscalls.personality(0),
        lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        syscalls.default_ioprio,
        syscalls.default_mempolicy,
        lambda: syscalls.prctl(syscalls.PR_SET_TIMERSLACK, _TIMER_SLACK),
        lambda: syscalls.prctl(syscalls.PR_SET_THP_DISABLE),
    )
    for change in changes:
        with contextlib.suppress(OSError):
            change()
