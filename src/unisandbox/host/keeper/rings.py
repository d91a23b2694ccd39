"""Bounded memory for output that nobody reads now: the keeper drains an fd and keeps its last bytes."""

from __future__ import annotations

import errno
import os

DEFAULT_LIMIT = 1 << 20
# Of all rings of a keeper together: what they hold counts, not what they may grow to.
TOTAL_LIMIT = 256 << 20
_READ = 1 << 16


class Memory:
    """What rings hold together: when that is more than `limit`, the largest ring drops its oldest bytes."""

    __slots__ = ("_rings", "limit", "used")

    def __init__(self, limit: int = TOTAL_LIMIT) -> None:
        self.limit: int = limit
        self.used: int = 0
        self._rings: set[Ring] = set()

    def add(self, ring: Ring) -> None:
        """Count this one, too."""
        self._rings.add(ring)

    def remove(self, ring: Ring) -> None:
        """Count this one no more. Repeating is harmless."""
        if ring in self._rings:
            self._rings.remove(ring)
            self.used -= ring.size

    def trim(self) -> None:
        """Drop what is over the limit, so that a ring that holds little loses nothing to those that hold much."""
        while self.used > self.limit:
            largest = max(self._rings, key=lambda ring: ring.size)
            largest.drop(min(self.used - self.limit, largest.size))


class Ring:
    """The last `limit` bytes that came from `fd`. Offsets count all bytes since the ring began."""

    __slots__ = ("_bytes", "_given", "_lost", "_memory", "_offered", "end", "eof", "fd", "limit")

    def __init__(self, fd: int, limit: int, memory: Memory) -> None:
        self.fd: int = fd
        self.limit: int = limit
        self._memory = memory
        self.end: int = 0
        self.eof: bool = False
        self._bytes = bytearray()
        #: Everything before it is in other hands, or lost for good: that is how many bytes.
        self._given = 0
        self._lost = 0
        #: Where what was last offered begins.
        self._offered = 0
        os.set_blocking(fd, False)
        memory.add(self)

    @property
    def first(self) -> int:
        """The oldest offset that is still there."""
        return self.end - len(self._bytes)

    @property
    def size(self) -> int:
        """How many bytes are there."""
        return len(self._bytes)

    @property
    def lost(self) -> int:
        """How many bytes were dropped, because they were over a limit, and never given away."""
        return self._lost + self.first - self._given

    def offer(self) -> bytes:
        """All that is there, for somebody who will say by `give` how much of it he has taken."""
        self._offered = self.first
        return bytes(self._bytes)

    def give(self, offset: int) -> None:
        """What was offered is in other hands up to `offset`: it need not be kept, and is not lost if it was dropped."""
        if self._given < offset <= self.end:
            self._lost += max(0, min(self._offered, offset) - self._given)
            self._given = offset
            self.drop(max(0, offset - self.first))

    def drain(self) -> bool:
        """Take one read's worth; False when there was nothing."""
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the other end of a terminal was closed, its way to say EOF
                raise
            data = b""
        if not data:
            self.eof = True
            return True
        self.end += len(data)
        self._bytes += data
        self._memory.used += len(data)
        self.trim()
        self._memory.trim()
        return True

    def drop(self, count: int) -> None:
        """Drop so many of the oldest bytes."""
        del self._bytes[:count]
        self._memory.used -= count

    def trim(self) -> None:
        """Drop the oldest bytes that are over the limit."""
        if len(self._bytes) > self.limit:
            self.drop(len(self._bytes) - self.limit)

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes from `offset` on, or from the oldest there is: where they begin, and they."""
        begin = min(max(offset, self.first), self.end)
        index = begin - self.first
        return begin, bytes(self._bytes[index : index + limit])
