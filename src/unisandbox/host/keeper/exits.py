"""The keeper's memory of exits: numbered, exact, bounded. Standard library only.

In memory alone, since nobody could use more: what an exit belongs to is known to the keeper only, too, and all that it
is the parent of dies with it.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    #: seq, pid, start time in clock ticks, wait(2) status word, Unix time in seconds
    Record = tuple[int, int, int, int, float]

# So many stay known. A client that did not read for longer is told that there is a gap.
KEPT = 16384


class Exits:
    """Exits of one keeper. Sequence numbers begin at 1 and have no holes."""

    def __init__(self) -> None:
        self.last: int = 0
        self._records: deque[Record] = deque(maxlen=KEPT)

    @property
    def first(self) -> int:
        """The oldest number that is known; `last + 1` when there is none."""
        return self.last + 1 - len(self._records)

    def add(self, pid: int, start_time: int, status: int, at: float) -> None:
        """Note an exit."""
        self.last += 1
        self._records.append((self.last, pid, start_time, status, at))

    def after(self, seq: int, limit: int) -> list[Record]:
        """Up to `limit` records after number `seq`, in order."""
        begin = max(seq + 1 - self.first, 0)
        return list(islice(self._records, begin, begin + limit))

    def find(self, pid: int, start_time: int) -> Record | None:
        """The exit of this process, if it is still known; of those with the same pid and clock tick the youngest."""
        return next((record for record in reversed(self._records) if record[1:3] == (pid, start_time)), None)
