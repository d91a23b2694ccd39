"""Waiting that a kill ends, without a descriptor or a thread for each who waits.

A guest waits on a lock of its own (`Waiter`). Who wakes it: a kill, and the one watch thread of its domain, which has
all descriptors that guests wait for in one epoll (one shot each). Wake-ups may be false; who waits looks again.

The watch thread also counts the epochs up while some guest needs to be asked regularly.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Final

from unisandbox.backends.wasm import thread

TICK_SECONDS: Final = 0.005
"""How often a guest is asked while some guest of its domain has a limit of processor time."""

# lock.acquire raises OverflowError beyond threading.TIMEOUT_MAX; and a sleeper looks at the clock again now and then,
# since the time of day may be set.
_LONGEST_SECONDS: Final = 60.0


class Waiter:
    """What one guest waits on. `wake` may come at any time, from any thread, any number of times."""

    __slots__ = ("_lock", "ending")

    def __init__(self) -> None:
        self.ending: bool = False
        """Its guest is to end: set before the `wake` that is for it, looked at after `clear`."""
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def clear(self) -> None:
        """Forget wake-ups; what they were for has to be looked at after this, before `wait`."""
        self._lock.acquire(False)

    def wait(self, timeout: float | None = None) -> None:
        """Until the next `wake`, for `timeout` seconds at most, or for a shorter time."""
        self._lock.acquire(True, _LONGEST_SECONDS if timeout is None else min(max(timeout, 0.0), _LONGEST_SECONDS))

    def wake(self) -> None:
        """End the wait, or the next one."""
        if self._lock.locked():
            with contextlib.suppress(RuntimeError):  # another one was faster
                self._lock.release()


class Watch:
    """The watch thread of a domain and its epoll; the thread begins when first needed.

    Args:
        tick: called every TICK_SECONDS while ticks are wanted.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._guard = threading.Lock()
        self._wants_ticks = 0
        self._closed = False
        self._begun = False
        #: Held by the thread.
        self._at_work = _thread.allocate_lock()
        self._clock = 0
        self._waiters: dict[int, Waiter] = {}
        self._known: set[int] = set()
        self._epoll: select.epoll | None = None
        self._bell = -1

    def expect(self, fd: int, events: int, waiter: Waiter) -> bool:
        """Wake `waiter` when `fd` is ready; False: descriptors of this kind always are (a regular file)."""
        with self._guard:
            epoll = self._running()
            self._waiters[fd] = waiter
            try:
                if fd in self._known:
                    epoll.modify(fd, events | select.EPOLLONESHOT)
                else:
                    epoll.register(fd, events | select.EPOLLONESHOT)
                    self._known.add(fd)
            except PermissionError:  # epoll_ctl(2): the target file does not support epoll
                del self._waiters[fd]
                return False
            return True

    def forget(self, fd: int) -> None:
        """The descriptor is about to be closed. Others may hold the same file: epoll would keep it."""
        with self._guard:
            self._waiters.pop(fd, None)
            if fd in self._known:
                self._known.discard(fd)
                if self._epoll is not None:
                    with contextlib.suppress(OSError):
                        self._epoll.unregister(fd)

    def want_ticks(self) -> None:
        """Begin to tick; each call needs its `need_no_ticks`."""
        with self._guard:
            self._running()
            self._wants_ticks += 1
            if self._wants_ticks == 1:
                os.eventfd_write(self._bell, 1)

    def need_no_ticks(self) -> None:
        """The guest that wanted them has ended."""
        with self._guard:
            self._wants_ticks -= 1

    def close(self) -> None:
        """End the thread; nobody waits any more."""
        with self._guard:
            self._closed = True
            begun, self._begun = self._begun, False
            if begun:
                os.eventfd_write(self._bell, 1)
        if begun:
            with self._at_work:
                thread.see_off(self._clock)
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._bell)
            self._epoll = None

    def _running(self) -> select.epoll:
        if self._closed:
            raise RuntimeError("the watch is closed")
        if self._epoll is None:
            epoll = select.epoll()
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            epoll.register(self._bell, select.EPOLLIN)
            self._epoll = epoll
        if not self._begun:
            # Not a threading.Thread: a guest's thread, which may begin and end this one, is none either, and Python
            # would make up an object for it and keep that.
            self._at_work.acquire()
            try:
                _thread.start_new_thread(self._main, (self._epoll,))
            except BaseException:
                self._at_work.release()
                raise
            self._begun = True
        return self._epoll

    def _main(self, epoll: select.epoll) -> None:
        self._clock = thread.clock(_thread.get_native_id())
        thread.leave_signals_to_the_host()
        thread.set_name(b"wasm-watch")
        try:
            self._watch(epoll)
        finally:
            self._at_work.release()

    def _watch(self, epoll: select.epoll) -> None:
        # Looked at after the bell was taken note of: one sound of it may be for a wish for ticks and for the end.
        while not self._closed:
            ready = epoll.poll(TICK_SECONDS if self._wants_ticks else None)
            if self._wants_ticks and not self._closed:
                self._tick()
            for fd, _events in ready:
                if fd == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                    continue
                waiter = self._waiters.pop(fd, None)
                if waiter is not None:
                    waiter.wake()
