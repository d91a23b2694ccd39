"""The threads of a domain's guests: each guest has one for itself, and a few wait for the next guest.

One that waits has its stack and its kernel's and Python's state ready; and a thread that wakes up has its turn at once
on a busy machine, where a new one gets in line.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Final

from unisandbox.backends.wasm import thread

_MOST_WAITING: Final = 4

_starting = threading.Lock()


class _Seat:
    """Where a thread waits. `work` is None when it is to end."""

    __slots__ = ("call", "clock", "work")

    def __init__(self) -> None:
        self.clock: Final = thread.clock(_thread.get_native_id())
        self.work: Callable[[], None] | None = None
        self.call = _thread.allocate_lock()
        self.call.acquire()


class Threads:
    """Those of one domain.

    Args:
        stack: bytes of the stack of each.
    """

    def __init__(self, stack: int) -> None:
        self._stack = stack
        self._guard = threading.Lock()
        self._waiting: list[_Seat] = []
        self._clocks: set[int] = set()
        self._closed = False

    def run(self, work: Callable[[], None]) -> None:
        """Have `work` done in a thread that does nothing else meanwhile; it must not raise. Never waits.

        Raises:
            RuntimeError: there can be no more threads.
        """
        with self._guard:
            seat = self._waiting.pop() if self._waiting else None
        if seat is not None:
            seat.work = work
            seat.call.release()
            return
        # Not a threading.Thread: its `start` waits until the new thread has had its turn, and nothing of what it keeps
        # is needed. The size is a setting of the whole process, and Python has no other door: while this thread starts,
        # one that somebody else starts gets a stack of this size too (2 MiB instead of the usual 8).
        with _starting:
            before = _thread.stack_size(self._stack)
            try:
                _thread.start_new_thread(self._serve, (work,))
            finally:
                _thread.stack_size(before)

    def _serve(self, work: Callable[[], None] | None) -> None:
        thread.leave_signals_to_the_host()
        thread.set_name(b"wasm-guest")
        seat = _Seat()
        with self._guard:
            self._clocks.add(seat.clock)
        while work is not None:
            work()
            work = seat.work = None  # what it has held is free now
            with self._guard:
                if self._closed:
                    return
                if len(self._waiting) >= _MOST_WAITING:
                    self._clocks.discard(seat.clock)
                    return
                self._waiting.append(seat)
            seat.call.acquire()
            work = seat.work

    def close(self) -> None:
        """End them all, and see them off. Each has done its work; who calls this may be one of them."""
        with self._guard:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            others = self._clocks - {thread.clock(_thread.get_native_id())}
        for seat in waiting:
            seat.call.release()
        for clock in others:
            thread.see_off(clock)
