"""The three standard streams of a guest: descriptors that are its own, read and written so that a kill ends it.

No descriptor's O_NONBLOCK is touched: it belongs to the open file, which others share. Pipes and sockets are asked not
to wait for this once (RWF_NOWAIT). Where a file cannot do that it is polled first; then at most PIPE_BUF bytes are
written, for which a pipe that is writable has room, unless somebody else writes to it at the same moment.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import termios
from collections.abc import Callable
from typing import Final

from unisandbox.backends.wasm.waiting import Waiter, Watch

_PIPE_BUF: Final = select.PIPE_BUF
_AT_ONCE: Final = 1 << 20
"""Bytes that one system call moves at most: a guest's buffers are not all touched for one byte of input."""


class Stream:
    """One standard stream.

    Args:
        fd: its descriptor, from now on this object's to close; None: an empty input, an output that is thrown away.
        number: the guest's descriptor number of it.
        output: it is written to.
        watch: wakes `waiter` when the descriptor is ready.
        waiter: what its guest waits on.
    """

    __slots__ = ("_can_nowait", "_fd", "_output", "_waiter", "_watch", "flags", "number")

    def __init__(self, fd: int | None, number: int, *, output: bool, watch: Watch, waiter: Waiter) -> None:
        self._fd = fd
        self._output = output
        self._watch = watch
        self._waiter = waiter
        self._can_nowait = True
        self.number: int = number
        """No descriptor's (2**32 - 1) when the guest has closed it."""
        self.flags: int = 0
        """fdflags of preview 1 that the guest has set; 4 is nonblock."""

    @property
    def _nonblocking(self) -> bool:
        return bool(self.flags & 4)

    def read(self, buffers: list[memoryview]) -> int:
        """Read once what is there, waiting for the first byte; 0 at the end.

        Raises:
            BlockingIOError: nothing is there, and the guest asked not to wait or is to end.
            OSError: as the descriptor says.
        """
        if self._fd is None or not buffers:
            return 0
        while True:
            try:
                return self._try(buffers, os.preadv)
            except BlockingIOError:
                if self._nonblocking:
                    raise
                self._wait(select.EPOLLIN)

    def write(self, buffers: list[memoryview]) -> int:
        """Write all of it, waiting for room; less when the guest asked not to wait, or is to end.

        Raises:
            BlockingIOError: no byte fits, and the guest asked not to wait or is to end.
            OSError: as the descriptor says.
        """
        if self._fd is None:
            return sum(map(len, buffers))
        written = 0
        for buffer in buffers:
            rest = buffer
            while rest:
                if self._waiter.ending:
                    return written
                try:
                    done = self._try([rest[:_AT_ONCE]], os.pwritev)
                except BlockingIOError:
                    if self._nonblocking and written:
                        return written
                    if self._nonblocking:
                        raise
                    self._wait(select.EPOLLOUT)
                    continue
                written += done
                rest = rest[done:]
        return written

    @property
    def _events(self) -> int:
        return select.POLLOUT if self._output else select.POLLIN

    def readiness(self) -> tuple[bool, int, bool]:
        """Whether a call would not wait; how many bytes there are; whether the other end is gone."""
        if self._fd is None:
            return True, 0 if not self._output else 1, not self._output
        poll = select.poll()
        poll.register(self._fd, self._events)
        ready = poll.poll(0)
        if not ready:
            return False, 0, False
        gone = bool(ready[0][1] & (select.POLLHUP | select.POLLERR))
        if self._output:
            return True, _PIPE_BUF, gone
        there = array.array("i", [0])
        try:
            fcntl.ioctl(self._fd, termios.FIONREAD, there)
        except OSError:
            return True, 0 if gone else 1, gone
        return True, there[0], gone

    def expect(self) -> None:
        """Have the guest woken when it becomes ready."""
        if self._fd is not None and not self._watch.expect(self._fd, self._events, self._waiter):
            self._waiter.wake()

    def close(self) -> None:
        """Close the descriptor; repeating is harmless."""
        fd, self._fd = self._fd, None
        if fd is not None:
            self._watch.forget(fd)
            with contextlib.suppress(OSError):
                os.close(fd)

    def _wait(self, events: int) -> None:
        self._waiter.clear()
        if self._waiter.ending:
            raise BlockingIOError(errno.EAGAIN, "the guest is to end")
        assert self._fd is not None  # noqa: S101 - only its own guest closes it
        if self._watch.expect(self._fd, events, self._waiter):
            self._waiter.wait()
        if self._waiter.ending:
            raise BlockingIOError(errno.EAGAIN, "the guest is to end")

    def _try(self, buffers: list[memoryview], call: Callable[[int, list[memoryview], int, int], int]) -> int:
        assert self._fd is not None  # noqa: S101
        if self._can_nowait:
            try:
                return call(self._fd, buffers, -1, os.RWF_NOWAIT)
            except BlockingIOError:
                if self._blocks_only_now():
                    raise
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                    raise
            self._can_nowait = False
        if not self._blocks_only_now():
            return call(self._fd, [buffers[0][:_AT_ONCE]], -1, 0)
        poll = select.poll()
        poll.register(self._fd, self._events)
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "not ready")
        limit = _PIPE_BUF if self._output else _AT_ONCE
        return call(self._fd, [buffers[0][:limit]], -1, 0)

    def _blocks_only_now(self) -> bool:
        """False for a regular file: it is always ready, and only the disk is waited for."""
        assert self._fd is not None  # noqa: S101
        return not os.path.isfile(f"/proc/self/fd/{self._fd}")
