"""The keeper's memory of exits: numbered, exact, bounded; a copy of what nobody has acknowledged yet in a file.

The file (one line `seq pid start_time status at` per exit, after a line with the boot id) is for whoever comes after
the keeper's own death. It is written, not synced: after a crash of the kernel no process of it lives anyway.
"""

from __future__ import annotations

import contextlib
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    #: seq, pid, start time in clock ticks, wait(2) status word, Unix time in seconds
    Record = tuple[int, int, int, int, float]

# So many exits stay findable in memory, acknowledged or not. Unacknowledged ones are kept up to the second limit; then
# the oldest go, and a client that had not seen them is told that there is a gap.
KEPT = 4096
UNACKNOWLEDGED_LIMIT = 16384
# The file is written anew when so many of its lines are acknowledged or over the limit.
_STALE_LINES = 1024


class Journal:
    """Exits of one keeper. Sequence numbers begin at 1 and have no holes."""

    def __init__(self, dirfd: int, name: str, boot: str) -> None:
        self.last: int = 0
        self.acknowledged: int = 0
        self._records: dict[int, Record] = {}
        self._by_process: dict[tuple[int, int], int] = {}
        self._dirfd = dirfd
        self._name = name
        self._head = f"boot {boot} keeper {os.getpid()}\n"
        self._lines = 0
        self._file = self._write_anew()
        #: Why the file could not be written the last time; memory is right all the same.
        self.file_error: OSError | None = None

    @property
    def first(self) -> int:
        """The oldest number still in memory; `last + 1` when there is none."""
        return next(iter(self._records), self.last + 1)

    def add(self, pid: int, start_time: int, status: int, at: float) -> Record:
        """Note an exit."""
        self.last += 1
        record = (self.last, pid, start_time, status, at)
        self._records[self.last] = record
        self._by_process[pid, start_time] = self.last
        self._trim()
        self._write(record)
        return record

    def after(self, seq: int, limit: int) -> list[Record]:
        """Up to `limit` records after number `seq`, in order."""
        begin = max(seq + 1, self.first)
        return [self._records[number] for number in range(begin, min(self.last, begin + limit - 1) + 1)]

    def find(self, pid: int, start_time: int) -> Record | None:
        """The exit of this process, if it is still remembered."""
        number = self._by_process.get((pid, start_time))
        return None if number is None else self._records[number]

    def acknowledge(self, seq: int) -> None:
        """The owner has everything up to `seq` in safety."""
        self.acknowledged = max(self.acknowledged, min(seq, self.last))
        self._trim()
        if self._lines - (self.last - self.acknowledged) > _STALE_LINES:
            self._rewrite()

    def remove_file(self) -> None:
        """All is over and told: no file is needed."""
        with contextlib.suppress(FileNotFoundError):  # the state directory may be gone already
            os.unlink(self._name, dir_fd=self._dirfd)

    def _trim(self) -> None:
        while len(self._records) > KEPT:
            oldest = self.first
            if oldest > self.acknowledged and len(self._records) <= UNACKNOWLEDGED_LIMIT:
                return
            _, pid, start_time, _, _ = self._records.pop(oldest)
            # A pid may come round within one clock tick: then the entry is a younger one's.
            if self._by_process.get((pid, start_time)) == oldest:
                del self._by_process[pid, start_time]

    def _write(self, record: Record) -> None:
        if self._lines - min(self.last - self.acknowledged, UNACKNOWLEDGED_LIMIT) > _STALE_LINES:
            self._rewrite()
            return
        try:
            os.write(self._file, _line(record))
            self._lines += 1
            self.file_error = None
        except OSError as error:  # full disk: memory is the truth while the keeper lives
            self.file_error = error

    def _rewrite(self) -> None:
        try:
            fresh = self._write_anew()
        except OSError as error:
            self.file_error = error
            return
        os.close(self._file)
        self._file = fresh
        self.file_error = None

    def _write_anew(self) -> int:
        temporary = self._name + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=self._dirfd)
        try:
            records = [self._records[n] for n in range(max(self.first, self.acknowledged + 1), self.last + 1)]
            content = self._head.encode() + b"".join(_line(record) for record in records)
            if os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, f"no space to write {temporary}")
            os.rename(temporary, self._name, src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
        except BaseException:
            os.close(fd)
            raise
        self._lines = len(records)
        return fd


def _line(record: Record) -> bytes:
    seq, pid, start_time, status, at = record
    return b"%d %d %d %d %.6f\n" % (seq, pid, start_time, status, at)
