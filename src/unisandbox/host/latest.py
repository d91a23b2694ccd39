"""A dictionary that remembers the last so many: what is kept for those who ask late, and must not grow."""

from __future__ import annotations

from typing import Final, TypeVar

K = TypeVar("K")
V = TypeVar("V")

EXITS_KEPT: Final = 4096
"""So many ends of processes are kept for those who ask only when all else of them is gone."""


class Latest(dict[K, V]):
    """The last `most` that were put in, or put in anew; the oldest is forgotten for one more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)  # so that it counts as the last
        super().__setitem__(key, value)
        if len(self) > self._most:
            del self[next(iter(self))]
