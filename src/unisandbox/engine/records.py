"""One record per sandbox on disk: what was intended before it was done, so that it can be found after a crash.

A file that is no record (`record_format` says what one is) is set aside and reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final, NamedTuple

from unisandbox.api import BackendError, InvalidArgumentError, UnavailableError, check_id
from unisandbox.engine import durable
from unisandbox.engine.record import Record
from unisandbox.engine.record_format import RECORD_VERSION, LaterError, line_of, parse
from unisandbox.host import small_files

RECORD_LIMIT: Final = 16 << 20
"""Bytes. The largest part is the environment, and a program's argv and environment together are limited to 6 MiB by
the kernel (3/4 of _STK_LIM, fs/exec.c); as JSON they may double."""
DAMAGED: Final = "damaged"
"""The directory, beside that of the records, where unreadable ones are kept."""

_SUFFIX: Final = ".json"
# The reader lacks something; what it reads is not at fault.
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Damaged(NamedTuple):
    """A record that cannot be used.

    Attributes:
        path: where it was.
        reason: what is wrong with it.
        kept_as: where it is now: `path` itself when it was not moved.
        later: a later version has written it, which may be at work with what it describes.
    """

    path: str
    reason: str
    kept_as: str
    later: bool = False


class Records(NamedTuple):
    """All that a store holds, by name of the files."""

    records: tuple[Record, ...]
    damaged: tuple[Damaged, ...]


class RecordStore:
    """The directory of records of one engine. One process at a time may change it; any may read.

    Args:
        directory: made when the first record is written.
        durable: wait until the disk has it (fsync of file and directory). Not needed on a file system in memory.
        place: device and inode of the directory above, as long as somebody holds it open; None: it is not looked at.
            What is not there says nothing when that one is not there: it was moved, with all records.
    """

    def __init__(self, directory: str, *, durable: bool, place: tuple[int, int] | None = None) -> None:
        self._directory = directory
        self._durable = durable
        self._place = place
        # Whether there has been a record: its directory is never removed by us.
        self._was_there = False
        # Inode and time of change of what was read or written last, by sandbox.
        self._seen: dict[str, tuple[int, int]] = {}

    def path(self, sandbox_id: str) -> str:
        """Where the record of a sandbox is, or would be."""
        return os.path.join(self._directory, check_id(sandbox_id) + _SUFFIX)

    def write(self, record: Record) -> None:
        """Replace the record by this one.

        Raises:
            BackendError: the disk is full or not writable; the old record is still there.
            InvalidArgumentError: it is larger than any that will be read.
            UnavailableError: see `check_place`; or the records were moved, and would find another directory on return.
        """
        self._check_missing()
        path = self.path(record.sandbox_id)
        line = line_of(RECORD_VERSION, record._asdict())
        if len(line) > RECORD_LIMIT:
            raise InvalidArgumentError(
                f"the spec of sandbox {record.sandbox_id!r} needs {len(line)} bytes, at most {RECORD_LIMIT} are kept",
                hint="Pass what is large in a file.",
            )
        try:
            durable.replace(path, line, durable=self._durable)
        except OSError as error:
            raise BackendError(
                f"cannot write the record of sandbox {record.sandbox_id!r} to {path}: {error.strerror}",
                hint="Free space there, or open the engine with another state directory.",
            ) from error
        self._note_seen(record.sandbox_id)

    def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox. A record that is not there is no error.

        Raises:
            BackendError: it cannot be removed.
        """
        path = self.path(sandbox_id)
        try:
            durable.remove(path, durable=self._durable)
        except OSError as error:
            raise BackendError(f"cannot remove the record of sandbox {sandbox_id!r} ({path}): {error.strerror}") from (
                error
            )
        self._seen.pop(sandbox_id, None)

    def read(self, sandbox_id: str) -> Record | None:
        """One record; None when there is none. Nothing is changed.

        Raises:
            BackendError: it is damaged; says how. `read_all` sets it aside.
            UnavailableError: see `check_place`.
        """
        self._note_seen(sandbox_id)  # before: a change in between is then seen twice, and never missed
        return self.peek(sandbox_id)

    def peek(self, sandbox_id: str) -> Record | None:
        """The same, but for `changed` the record counts as seen as it did."""
        try:
            found = self._read(sandbox_id + _SUFFIX, self.path(sandbox_id))
        except FileNotFoundError:
            self._check_missing()
            return None
        if isinstance(found, Record):
            return found
        raise BackendError(
            f"the record of sandbox {sandbox_id!r} ({found.damage.path}) cannot be used: {found.damage.reason}",
            hint="Open an engine on its state directory: that keeps it aside and cleans up what it described.",
        )

    def ids(self) -> list[str]:
        """The ids of all sandboxes that have a record, readable or not.

        Raises:
            BackendError: the directory cannot be read.
            UnavailableError: see `check_place`.
        """
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            self._check_missing()
            return []
        except OSError as error:
            raise BackendError(f"cannot read the records in {self._directory}: {error.strerror}") from error
        self.check_place()
        return sorted(name[: -len(_SUFFIX)] for name in names if name.endswith(_SUFFIX))

    def check_place(self) -> None:
        """Whether the directory above is still the one that it was.

        Raises:
            UnavailableError: it was moved or removed: what is missing there may be somewhere else.
        """
        if self._place is None:
            return
        above = os.path.dirname(self._directory)
        try:
            status = os.stat(above)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._place:
            raise UnavailableError(
                f"the state directory {above} was moved or removed"
                + (" since the engine was opened" if status is None else ", and another one is in its place"),
                hint="Move it back, or close this engine and open one where it is now.",
            )

    def _check_missing(self) -> None:
        """That a record is not there, or none is, says something only while their directory is there."""
        self.check_place()
        if self._was_there and not os.path.isdir(self._directory):
            raise UnavailableError(
                f"the directory of records {self._directory} was moved or removed", hint="Move it back."
            )

    def changed(self, sandbox_id: str) -> bool:
        """Whether the record is another one than this process has read or written last, or is gone. Cheap."""
        try:
            status = os.stat(self.path(sandbox_id), follow_symlinks=False)
        except FileNotFoundError:
            return True
        return self._seen.get(sandbox_id) != (status.st_ino, status.st_mtime_ns)

    def _note_seen(self, sandbox_id: str) -> None:
        try:
            status = os.stat(self.path(sandbox_id), follow_symlinks=False)
        except FileNotFoundError:
            self._seen.pop(sandbox_id, None)
        else:
            self._was_there = True
            self._seen[sandbox_id] = (status.st_ino, status.st_mtime_ns)

    def read_all(self, *, repair: bool = True, alone: bool = True) -> Records:
        """Every record.

        Args:
            repair: for the one that may change the store. What cannot be used is moved into the directory `damaged`
                beside this one, under a new name, and temporary files of writers that were killed are removed. False:
                only look.
            alone: nobody else writes. False: then temporary files may be those of writers that live, and records of a
                later version those of processes that live: both stay.

        Raises:
            OSError: the directory cannot be read, or this process has no file descriptors left.
        """
        records: list[Record] = []
        damaged: list[Damaged] = []
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return Records((), ())
        for name in names:
            path = os.path.join(self._directory, name)
            if name.endswith(durable.TEMPORARY) and repair and alone:
                durable.remove_temporary(path)
            if not name.endswith(_SUFFIX):
                continue
            found = self._look(name, path, repair=repair, alone=alone)
            if isinstance(found, Record):
                records.append(found)
            elif found is not None:
                damaged.append(found)
        return Records(tuple(records), tuple(damaged))

    def _look(self, name: str, path: str, *, repair: bool, alone: bool) -> Record | Damaged | None:
        while True:
            try:
                found = self._read(name, path)
                if isinstance(found, Record):
                    return found
                if not repair or not found.movable or (found.damage.later and not alone):
                    return found.damage
            except FileNotFoundError:
                return None  # removed meanwhile
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile: look again
                return self._set_aside(found)

    def _read(self, name: str, path: str) -> Record | _Unusable:
        identity: tuple[int, int] | None = None
        try:
            raw, identity = small_files.read(path, RECORD_LIMIT)
            record = parse(raw)
            if name != record.sandbox_id + _SUFFIX:
                raise ValueError(f"it is the record of sandbox {record.sandbox_id!r}")
        except small_files.NotARegularFileError:
            return _Unusable(Damaged(path, "it is not a regular file", path), None)
        except small_files.TooLargeError:
            return _Unusable(Damaged(path, f"it is larger than {RECORD_LIMIT} bytes", path), None)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _OURS:
                raise
            # The disk fails, or it is not for us to read: it may be good, so it stays.
            return _Unusable(Damaged(path, f"it cannot be read: {error.strerror}", path), None, movable=False)
        except (ValueError, InvalidArgumentError) as error:
            return _Unusable(Damaged(path, str(error), path, later=isinstance(error, LaterError)), identity)
        return record

    def _set_aside(self, found: _Unusable) -> Damaged:
        damage = found.damage
        directory = os.path.join(os.path.dirname(self._directory), DAMAGED)
        try:
            kept_as = durable.set_aside(damage.path, directory, of=found.identity, durable=self._durable)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = f"{damage.reason}; it could not be moved to {directory} ({error.strerror})"
            return damage._replace(reason=reason)
        return damage._replace(kept_as=kept_as)


class _Unusable(NamedTuple):
    """What is in the place of a record, and which file it was."""

    damage: Damaged
    identity: tuple[int, int] | None
    movable: bool = True
