"""How much is written in a directory whose file system nobody can bound: it is counted before it is written.

Whoever writes asks first (`Disk.take`), and is counted with all that he asked for, as if each piece had a block and
each name an inode of its own. When that comes to the limit, what is really there is counted anew: all below the
directory, what has no name any more but is open in this process, and what others have taken and may not have written.
So there is never more than the limit, and what was overwritten or removed can be written again. Meanwhile nobody moves
a file or gives it a second name (`Disk.lock`): the count would miss it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

INODE: Final = 8192
"""Bytes that each file, directory and link counts for, at least."""

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK: Final = 512  # of st_blocks; source: stat(2)
_LEAST_PIECE: Final = 16 << 10
_MOST_PIECE: Final = 1 << 20
# Of the time, in which a count may go on: a guest that fills its disk without end is not to keep a processor busy.
_REST: Final = 9.0


class Disk:
    """The account of one directory.

    Args:
        path: of the directory, as the kernel names it.
        limit: bytes; None: not bounded.
    """

    def __init__(self, path: str, limit: int | None) -> None:
        self.path: Final = path
        self.limit: Final = limit
        self.lock: Final = threading.Lock()
        """Held while there is a count; hold it to move or link a file."""
        self._spent = limit or 0  # nobody knows: who comes first has it counted
        self._taken: dict[Hashable, int] = {}
        self._rests_until = 0.0

    def take(self, who: Hashable, size: int, nap: Callable[[float], None] | None = None) -> int:
        """Bytes that `who` may write from now on: what he had taken before counts as written. Refused, he keeps that.

        Args:
            who: writes; nobody else does with the same word.
            size: bytes that are needed.
            nap: waits for so many seconds, when it is to be counted too often; None: whoever asks may do so.

        Raises:
            OSError: ENOSPC: there is no room for `size`.
        """
        if self.limit is None:
            return max(size, _MOST_PIECE)
        counted = False
        while True:
            with self.lock:
                granted = self._grant(who, size)
                if granted:
                    return granted
                if counted:
                    # The count has taken from him what he was given before, and may not have written.
                    self._spent += self._taken.get(who, 0)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                rest = self._rests_until - time.monotonic()
                if nap is None or rest <= 0:
                    self._count(who)
                    counted = True
                    continue
            nap(rest)

    def forget(self, who: Hashable) -> None:
        """He writes no more."""
        with self.lock:
            self._taken.pop(who, None)

    def used(self) -> int:
        """Bytes that are there now."""
        with self.lock:
            return self._measured()

    def _grant(self, who: Hashable, size: int) -> int:
        assert self.limit is not None  # noqa: S101
        piece = min(max(self.limit // 256, _LEAST_PIECE), _MOST_PIECE)
        for wanted in (max(size, piece), size):
            if self._spent + wanted <= self.limit:
                self._spent += wanted
                self._taken[who] = wanted
                return wanted
        return 0

    def _count(self, who: Hashable) -> None:
        begun = time.monotonic()
        self._spent = self._measured() + sum(taken for each, taken in self._taken.items() if each != who)
        ended = time.monotonic()
        self._rests_until = ended + _REST * (ended - begun)

    def _measured(self) -> int:
        return self._named() + self._nameless()

    def _named(self) -> int:
        """All below the directory; one descriptor at a time, since a hostile tree is deeper than there are any."""
        total, seen = 0, set[tuple[int, int]]()
        levels: list[list[str]] = []  # of each level the directories that are still to be entered
        fd = os.open(self.path, _FLAGS)
        try:
            while True:
                levels.append([])
                with os.scandir(fd) as entries:
                    for entry in entries:
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # if it is open, it is counted there
                            continue
                        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                            if (status.st_dev, status.st_ino) in seen:
                                continue
                            seen.add((status.st_dev, status.st_ino))
                        total += _size(status)
                        if stat.S_ISDIR(status.st_mode):
                            levels[-1].append(entry.name)
                below = -1
                while below < 0:
                    while not levels[-1]:
                        levels.pop()
                        if not levels:
                            return total
                        fd = _instead(fd, os.open("..", _FLAGS, dir_fd=fd))
                    # It may be gone, or something else: who made that has taken room for it before.
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        below = os.open(levels[-1].pop(), _FLAGS, dir_fd=fd)
                fd = _instead(fd, below)
        finally:
            os.close(fd)

    def _nameless(self) -> int:
        """What was removed while it is open: its blocks are still there."""
        total = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                status = os.fstat(int(name))
                if not status.st_nlink and os.readlink(f"/proc/self/fd/{name}").startswith(f"{self.path}/"):
                    total += _size(status)
        return total


class Writer:
    """Somebody who writes into a disk from this process, and asks for more than he needs, so that he seldom asks."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._left = 0

    def take(self, size: int) -> None:
        """He is about to write so many bytes. Raises OSError: ENOSPC."""
        if size > self._left:
            self._left = self._disk.take(self, size)
        self._left -= size

    def close(self) -> None:
        """He writes no more."""
        self._disk.forget(self)


def _size(status: os.stat_result) -> int:
    return max(status.st_blocks * _BLOCK, INODE)


def _instead(old: int, new: int) -> int:
    os.close(old)
    return new
