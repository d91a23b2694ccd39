"""Waiting for descriptors that others wait for too, or may close meanwhile.

An event loop knows descriptors by their numbers. One number can be waited for by one task only; and one that is closed
and given out again before its former waiter has run is taken from its new one: anyio's asyncio side unregisters by
number when a wait ends, so that the new waiter is never woken. Hence the rule: a number that is waited for is closed
only by the waiter.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Awaitable, Callable

import anyio


async def readable(fd: int) -> None:
    """Wait until `fd` can be read, on a copy: its owner may close it. That alone does not end the wait."""
    await _wait(fd, anyio.wait_readable)


async def writable(fd: int) -> None:
    """The same for writing."""
    await _wait(fd, anyio.wait_writable)


async def _wait(fd: int, until: Callable[[int], Awaitable[None]]) -> None:
    copy = os.dup(fd)
    try:
        await until(copy)
    finally:
        os.close(copy)


class Descriptor:
    """A non-blocking file descriptor with one owner; closing it wakes whoever waits for it.

    Args:
        fd: from now on this object's to close.
        close: how to; for a number that belongs to another object, such as a socket.
    """

    __slots__ = ("_close", "_fd", "_waiting")

    def __init__(self, fd: int, close: Callable[[int], None] = os.close) -> None:
        os.set_blocking(fd, False)
        self._fd: int | None = fd
        self._close = close
        self._waiting = 0

    @property
    def closed(self) -> bool:
        return self._fd is None

    def fileno(self) -> int:
        """The number; raises anyio.ClosedResourceError after close."""
        if self._fd is None:
            raise anyio.ClosedResourceError
        return self._fd

    def close(self) -> None:
        """Close it; repeating is harmless."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if not self._waiting:
            self._close(fd)
            return
        try:
            anyio.notify_closing(fd)  # and the last of the waiters closes it
        except RuntimeError:
            return  # outside of their event loop; they close it when they end with it

    def hung_up(self) -> bool:
        """Whether nobody has the other end: who wrote to a pipe that we read, or the slave of a terminal."""
        poll = select.poll()
        poll.register(self.fileno(), 0)  # POLLHUP is told unasked
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def read(self, limit: int) -> bytes | None:
        """What is there, b"" at the end, None when nothing is there yet."""
        try:
            return os.read(self.fileno(), limit)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:
                return b""  # how the master of a terminal says that its last slave was closed; source: pty(7)
            raise

    async def readable(self) -> None:
        """Wait until it can be read; raises anyio.ClosedResourceError when it is closed meanwhile."""
        await self._until(anyio.wait_readable)

    async def writable(self) -> None:
        """The same for writing."""
        await self._until(anyio.wait_writable)

    async def _until(self, ready: Callable[[int], Awaitable[None]]) -> None:
        fd = self.fileno()
        self._waiting += 1
        try:
            await ready(fd)
        finally:
            self._waiting -= 1
            if self._fd is None and not self._waiting:
                self._close(fd)
