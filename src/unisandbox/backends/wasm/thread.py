"""What a guest's thread sets for itself: its signals, its name, its priority; and the clock of its processor time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from typing import Final

_PR_SET_NAME: Final = 15
_SIGSET_BYTES: Final = 128  # sigset_t of glibc and musl

_FIRST: Final = -20
_LAST_STEPS_SECONDS: Final = 1e-5

_libc = ctypes.CDLL(None)


def _all_but_faults() -> ctypes.Array[ctypes.c_char]:
    signals = ctypes.create_string_buffer(_SIGSET_BYTES)
    _libc.sigfillset(signals)
    for fault in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS):
        _libc.sigdelset(signals, int(fault))
    return signals


_BLOCKED: Final = _all_but_faults()


def leave_signals_to_the_host() -> None:
    """Block all but the faults of this thread itself.

    The host's handlers run elsewhere then, and a SIGPIPE, which goes to the thread that wrote, does not end a host that
    has given it its default back. (signal.pthread_sigmask makes sets of 64 enums for its answer: 70 us.)
    """
    _libc.pthread_sigmask(int(signal.SIG_BLOCK), _BLOCKED, None)


def set_name(name: bytes) -> None:
    """The kernel's name of this thread, at most 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name, 0, 0, 0)


def hurry(thread: int) -> int | None:
    """Let a thread of this process, by its kernel id, come first: it has little to do, and somebody waits for that.

    Beside as many others as want the processor a thread that wakes up waits for its turn, some 10 ms for each of them
    on a kernel whose clock ticks every 10 ms (measured with 8 on two processors: p90 30 ms; like this 0.2 ms).

    Returns:
        Its priority before, for `as_usual`; None: this process may not do that (CAP_SYS_NICE; setpriority(2)).
    """
    try:
        usual = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, _FIRST)
    except OSError:
        return None
    return usual


def as_usual(priority: int) -> None:
    """Give the current thread the priority back that it had."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, priority)


def clock(thread: int) -> int:
    """The clock of the processor time of a thread of this process, by its kernel id.

    Reading it raises OSError when the thread is gone. Source: include/linux/posix-timers.h (CPUCLOCK_SCHED, PERTHREAD).
    """
    return (~thread << 3) | 6


def see_off(clock: int) -> None:
    """Wait until the thread of this clock is gone, for the kernel too: it has nothing more to do."""
    with contextlib.suppress(OSError):
        while True:
            time.clock_gettime(clock)
            time.sleep(_LAST_STEPS_SECONDS)  # nothing tells, and it is a matter of microseconds
