"""The keeper's loop: file descriptors, times and signals, each with its action. Standard library only."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

_LOG_LIMIT = 1 << 20


class Timer:
    """Something to do later, unless it is cancelled."""

    __slots__ = ("_timers", "action", "at")

    def __init__(self, timers: set[Timer], at: float, action: Callable[[], None]) -> None:
        self._timers = timers
        self.at: float = at
        self.action: Callable[[], None] = action
        timers.add(self)

    def cancel(self) -> None:
        """Never do it; no error when it is done."""
        self._timers.discard(self)


class Loop:
    """One epoll. An action that raises is logged, and the loop goes on: one bad request harms nobody else."""

    def __init__(self) -> None:
        self._epoll = select.epoll(sizehint=64)
        self._actions: dict[int, Callable[[int], None]] = {}
        self._timers: set[Timer] = set()
        self._signals: dict[int, Callable[[], None]] = {}
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signal_pipe = reading
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.watch(reading, self._on_signals)
        # One fd in reserve, for what must not fail when the table is full: reading who died, refusing a connection.
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def watch(self, fd: int, action: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `action(events)` whenever `fd` is ready."""
        self._epoll.register(fd, events)
        self._actions[fd] = action

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a watched fd."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """No more. To be called before `fd` is closed: a copy of it elsewhere would keep it in the epoll."""
        del self._actions[fd]
        self._epoll.unregister(fd)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once after `seconds`."""
        return Timer(self._timers, time.monotonic() + seconds, action)

    def on_signal(self, number: int, action: Callable[[], None]) -> None:
        """Call `action` from the loop (not from a handler) after a signal came."""
        self._signals[number] = action
        signal.signal(number, lambda _number, _frame: None)

    def turn(self) -> None:
        """Wait for the next events and act on them."""
        timeout = -1.0
        if self._timers:
            timeout = max(0.0, min(timer.at for timer in self._timers) - time.monotonic())
        for fd, events in self._epoll.poll(timeout):
            action = self._actions.get(fd)
            if action is not None:  # an action before it may have ended the watch
                _guarded(action, events)
        if self._timers:
            now = time.monotonic()
            for timer in [timer for timer in self._timers if timer.at <= now]:
                if timer in self._timers:
                    timer.cancel()
                    _guarded(timer.action)

    def with_spare(self, action: Callable[[], T]) -> T:
        """Do something that needs one fd for a moment; when there is none left, with the one in reserve."""
        try:
            return action()
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE} or self._spare < 0:
                raise
        os.close(self._spare)
        self._spare = -1
        try:
            return action()
        finally:
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _on_signals(self, _events: int) -> None:
        try:
            numbers = set(os.read(self._signal_pipe, 4096))
        except BlockingIOError:
            return
        for number in sorted(numbers):
            action = self._signals.get(number)
            if action is not None:
                action()


def _guarded(action: Callable[..., None], *arguments: int) -> None:
    try:
        action(*arguments)
    except Exception:
        note_exception()


def note_exception() -> None:
    """The exception that is being handled, in the keeper's log. (The module `traceback` would cost a megabyte.)"""
    note("unexpected:")
    sys.excepthook(*sys.exc_info())


def note(text: str) -> None:
    """A line in the keeper's log, which never grows beyond a limit."""
    try:
        if os.fstat(2).st_size > _LOG_LIMIT:
            os.ftruncate(2, 0)
        sys.stderr.write(f"{time.time():.3f} {text.rstrip()}\n")
        sys.stderr.flush()
    except OSError:
        pass  # a full disk; there is nobody to tell
