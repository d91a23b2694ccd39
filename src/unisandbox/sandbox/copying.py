"""Copying a file or tree between host and sandbox: by descriptors on both sides, so that no link is ever followed.

Trees may be deeper than any stack and wider than memory: a few levels are open at a time, and a level that was closed
is opened again as ".." of the one below, if that is still the same directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

import anyio.lowlevel

from unisandbox.api import FailedPreconditionError, InvalidArgumentError
from unisandbox.host.identity import Identity
from unisandbox.sandbox.inside import Side, kind_of, link_target, named
from unisandbox.sandbox.placing import Placer

PIECE: Final = 1 << 20
"""Bytes that are read or written without letting the event loop run."""
ENTRY: Final = 4096
"""Bytes that every file, directory and link counts for, at least: what it takes on a usual disk."""
# Levels that are open at a time, two descriptors each.
_OPEN_LEVELS: Final = 32
# Entries between two turns of the event loop; each some 50 us.
_ENTRIES: Final = 64
# How many levels of a deep tree an error shows.
_SHOWN_LEVELS: Final = 16

Inode = tuple[int, int]


class _Level:
    """A directory and its copy."""

    def __init__(self, name: str, source: int, target: int, mode: int | None) -> None:
        self.name = name
        self.source = source
        self.target = target
        # The permission bits that a copy made by us has at the end.
        self.mode = mode
        self.scanned = False
        self.below: list[str] = []
        self.status = os.fstat(source)
        self.source_id = _identity(source)
        self.target_id = _identity(target)

    def close(self) -> None:
        for fd in (self.source, self.target):
            if fd >= 0:
                os.close(fd)
        self.source = self.target = -1

    def open_above(self, below: _Level, reader: Identity, writer: Identity, where: Callable[[], str]) -> None:
        """Open it again, as what `below` is in now."""
        if self.source >= 0:
            return
        self.source = _above(below.source, self.source_id, reader, where)
        self.target = _above(below.target, self.target_id, writer, where)


class Copy:
    """One copy, of a thing and all that is below it.

    Args:
        reader: as whom the source is read.
        placer: makes what is made.
        source, source_side: what is copied, to be named in errors.
        target, target_side: the same for where it goes.
        limit: bytes in all, each entry counted with `ENTRY` at least; None: no limit.
    """

    def __init__(
        self,
        reader: Identity,
        placer: Placer,
        source: str,
        source_side: Side,
        target: str,
        target_side: Side,
        limit: int | None,
    ) -> None:
        self._reader = reader
        self._placer = placer
        self._source, self._source_side = source, source_side
        self._target, self._target_side = target, target_side
        self._limit = limit
        self._bytes = 0
        self._entries = 0
        self._levels: list[_Level] = []

    async def entry(self, probe: int, directory: int, name: str) -> None:
        """Copy a file or link, pinned by the O_PATH descriptor `probe`, to `name` in `directory`."""
        await self._entry(probe, os.fstat(probe), directory, name, "")

    async def tree(self, source: int, target: int, mode: int | None) -> None:
        """Copy all that is in the directory `source` (opened to be read) into `target`; both are closed at the end.

        Args:
            source: descriptor of the directory.
            target: descriptor of its copy, which may have something in it: that is merged.
            mode: permission bits to give to `target` at the end; None: leave them.
        """
        try:
            self._levels.append(_Level("", source, target, mode))
        except BaseException:
            os.close(source)
            os.close(target)
            raise
        try:
            while self._levels:
                await self._step(self._levels[-1])
        finally:
            for level in self._levels:
                level.close()

    async def _step(self, level: _Level) -> None:
        if not level.scanned:
            level.scanned = True
            await self._scan(level)
        elif level.below:
            below = self._enter(level, level.below.pop())
            if below is not None:
                self._levels.append(below)
                if len(self._levels) > _OPEN_LEVELS:
                    self._levels[-_OPEN_LEVELS - 1].close()
        else:
            self._levels.pop()
            try:
                if self._levels:
                    self._levels[-1].open_above(level, self._reader, self._placer.identity, self._shown)
                if level.mode is not None:
                    where = self._shown(self._target, level.name)
                    with named(where, self._target_side), self._placer.identity.owning(os.fstat(level.target)):
                        os.fchmod(level.target, level.mode)
            finally:
                level.close()
            await self._turn()

    async def _scan(self, level: _Level) -> None:
        """Copy what is no directory; note the directories."""
        with named(self._shown(), self._source_side):
            entries = os.scandir(level.source)
        with entries:
            while True:
                with named(self._shown(), self._source_side):
                    entry = next(entries, None)
                    if entry is None:
                        return
                    try:
                        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                        with self._reader.over(level.status):
                            probe = os.open(entry.name, flags, dir_fd=level.source)
                    except FileNotFoundError:  # it has gone meanwhile
                        continue
                try:
                    status = os.fstat(probe)
                    if stat.S_ISDIR(status.st_mode):
                        level.below.append(entry.name)
                        self._count(ENTRY)
                    else:
                        await self._entry(probe, status, level.target, entry.name, entry.name)
                finally:
                    os.close(probe)
                await self._turn()

    def _enter(self, level: _Level, name: str) -> _Level | None:
        with named(self._shown(self._source, name), self._source_side):
            try:
                source = self._reader.open_directory(level.source, name, 0)
            except FileNotFoundError:  # it has gone meanwhile
                return None
        try:
            mode = stat.S_IMODE(os.fstat(source).st_mode) & 0o777
            if _identity(source) == self._levels[0].target_id:
                raise InvalidArgumentError(f"{self._source!r} is copied into itself, at {self._target!r}")
            path = self._shown(self._target, name)
            with named(path, self._target_side):
                # Ours to write in until its copy is complete.
                target, made = self._placer.directory(level.target, name, path, mode | 0o700)
            try:
                return _Level(name, source, target, final_mode(target, mode) if made else None)
            except BaseException:
                os.close(target)
                raise
        except BaseException:
            os.close(source)
            raise

    async def _entry(self, probe: int, status: os.stat_result, directory: int, name: str, below: str) -> None:
        path = self._shown(self._target, below)
        origin = self._shown(self._source, below)
        if stat.S_ISLNK(status.st_mode):
            self._count(ENTRY)
            with named(origin, self._source_side):
                leads_to = link_target(probe)
            with named(path, self._target_side):
                self._placer.link(directory, name, path, leads_to)
        elif stat.S_ISREG(status.st_mode):
            with named(origin, self._source_side):
                source = self._reader.reopen(probe, 0)
            try:
                mode = stat.S_IMODE(status.st_mode) & 0o777
                self._count(ENTRY)
                with named(path, self._target_side), self._placer.file(directory, name, path, mode) as target:
                    await self._content(source, target, origin)
            finally:
                os.close(source)
        else:
            raise InvalidArgumentError(
                f"{origin!r} is neither a file, a directory nor a link but a {kind_of(status.st_mode)}"
            )

    async def _content(self, source: int, target: int, origin: str) -> None:
        """Copy what a file holds. Its holes stay holes: a sandbox's sparse file must not fill the host's disk."""
        size = os.fstat(source).st_size
        position = 0
        while True:
            with named(origin, self._source_side):
                data = _next_data(source, position, size)
            if data is None:
                os.ftruncate(target, size)
                return
            position, end = data
            while position < end:
                with named(origin, self._source_side):
                    piece = os.pread(source, min(PIECE, end - position), position)
                if not piece:  # it has been cut meanwhile, or is of procfs, where files have no size
                    os.ftruncate(target, position)
                    return
                self._count(len(piece))
                self._placer.room(target, len(piece) + ENTRY)
                view = memoryview(piece)
                while view:
                    written = os.pwrite(target, view, position)
                    view = view[written:]
                    position += written
                if len(piece) == PIECE:
                    await anyio.lowlevel.checkpoint()
            await self._turn()  # a file may be of a million small pieces

    def _count(self, number: int) -> None:
        self._bytes += number
        if self._limit is not None and self._bytes > self._limit:
            raise InvalidArgumentError(
                f"{self._source!r} has more than {self._limit} bytes (each entry counts for {ENTRY} at least)",
                hint="Give a larger limit=.",
            )

    async def _turn(self) -> None:
        self._entries += 1
        if self._entries % _ENTRIES == 0:
            await anyio.lowlevel.checkpoint()

    def _shown(self, start: str | None = None, name: str = "") -> str:
        """Where we are, as a path for messages; of a very deep tree its beginning and end."""
        top = self._source if start is None else start
        levels = self._levels
        parts = (
            [level.name for level in levels[1:]]
            if len(levels) < _SHOWN_LEVELS
            else [
                *(level.name for level in levels[1 : _SHOWN_LEVELS // 2]),
                "...",
                *(level.name for level in levels[-_SHOWN_LEVELS // 2 :]),
            ]
        )
        parts += [name] if name else []
        return "/".join([top.rstrip("/"), *parts]) if parts else top


def final_mode(fd: int, mode: int) -> int:
    """The bits of `mode` that a directory, made with 0o700 added, kept under the umask."""
    return stat.S_IMODE(os.fstat(fd).st_mode) & (mode | 0o7000)


def _next_data(source: int, position: int, size: int) -> tuple[int, int] | None:
    """Where the next data is, from `position` on; None at the end of the file."""
    if size == 0:  # procfs and the like: read until the end
        return (position, position + PIECE)
    if position >= size:
        return None
    try:
        start = os.lseek(source, position, os.SEEK_DATA)
        return None if start >= size else (start, min(os.lseek(source, start, os.SEEK_HOLE), size))
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left
            return None
        if error.errno == errno.EINVAL:  # a file system that knows no holes
            return (position, size)
        raise


def _identity(fd: int) -> Inode:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _above(fd: int, inode: Inode, identity: Identity, where: Callable[[], str]) -> int:
    with named(where()):
        above = identity.open_directory(fd, "..", 0)
    if _identity(above) != inode:
        os.close(above)
        raise FailedPreconditionError(f"{where()!r} was moved while it was copied", hint="Try again.")
    return above
