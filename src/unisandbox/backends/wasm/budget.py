"""What the guests of one sandbox share: bytes of linear memory, and a rate of processor time."""

from __future__ import annotations

import threading
import time
from typing import Final

_BURST_SECONDS: Final = 0.05
"""Processor time that may be saved up while a sandbox is idle."""


class Budget:
    """Bytes for the sum of all linear memories of all guests of a sandbox; exact, whatever the guests do at once.

    Args:
        limit: bytes; may be changed at any time. Below what is used nothing is taken away, but nothing more is given.
        above: what is taken here is taken there, too (a container's budget below its sandbox's).
    """

    __slots__ = ("_above", "_limit", "_lock", "_used", "peak", "refusals")

    def __init__(self, limit: int, above: Budget | None = None) -> None:
        self._above = above
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()
        self.peak: int = 0
        """The most that was ever used at once, in bytes."""
        self.refusals: int = 0
        """How often a guest asked for more than was left."""

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value

    @property
    def used(self) -> int:
        return self._used

    def take(self, size: int) -> bool:
        """Take `size` bytes; False, and nothing taken, when there is not so much left."""
        with self._lock:
            # Locks are always taken upwards.
            if self._used + size > self._limit or (self._above is not None and not self._above.take(size)):
                self.refusals += 1
                return False
            self._used += size
            self.peak = max(self.peak, self._used)
            return True

    def give_back(self, size: int) -> None:
        """The memory is unmapped."""
        with self._lock:
            self._used -= size
        if self._above is not None:
            self._above.give_back(size)


class CpuRate:
    """A rate of processor time for all guests of a sandbox together.

    Args:
        cores: seconds of processor time per second, > 0; may be changed at any time.
    """

    __slots__ = ("_at", "_lock", "_owed", "above", "cores")

    def __init__(self, cores: float) -> None:
        self.above: CpuRate | None = None
        """What is used here is used there, too (a container's rate below its sandbox's)."""
        self.cores: float = cores
        self._lock = threading.Lock()
        self._owed = -_BURST_SECONDS * cores
        self._at = time.monotonic()

    def charge(self, seconds: float) -> float:
        """Note that a guest used `seconds` of processor time; returns for how many seconds it should sleep now."""
        above = self.above
        nap = 0.0 if above is None else above.charge(seconds)
        with self._lock:
            now = time.monotonic()
            self._owed = max(self._owed - (now - self._at) * self.cores, -_BURST_SECONDS * self.cores) + seconds
            self._at = now
            return max(self._owed / self.cores, nap, 0.0)
