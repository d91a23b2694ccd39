"""Bounded memory for output that nobody reads now: the keeper drains an fd and keeps its last bytes."""

from __future__ import annotations

import errno
import os

DEFAULT_LIMIT = 1 << 20
# Of all rings of a keeper together; what a ring may grow to counts, not what it holds.
TOTAL_LIMIT = 256 << 20
_READ = 1 << 16


class Ring:
    """The last `limit` bytes that came from `fd`. Offsets count all bytes since the ring began."""

    __slots__ = ("_bytes", "_given", "end", "eof", "fd", "limit")

    def __init__(self, fd: int, limit: int) -> None:
        self.fd: int = fd
        self.limit: int = limit
        self.end: int = 0
        self.eof: bool = False
        self._bytes = bytearray()
        self._given = 0
        os.set_blocking(fd, False)

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
        """How many bytes were dropped, because they were over the limit, since the last that were given away."""
        return self.first - self._given

    def give(self, offset: int) -> None:
        """Everything before `offset` is in other hands: it need not be kept, and is not lost."""
        count = offset - self.first
        if 0 <= count <= self.size:
            del self._bytes[:count]
            self._given = offset

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
        self.trim()
        return True

    def trim(self) -> None:
        """Drop the oldest bytes that are over the limit."""
        if len(self._bytes) > self.limit:
            del self._bytes[: len(self._bytes) - self.limit]

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes from `offset` on, or from the oldest there is: where they begin, and they."""
        begin = min(max(offset, self.first), self.end)
        index = begin - self.first
        return begin, bytes(self._bytes[index : index + limit])
