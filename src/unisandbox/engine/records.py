"""One record per sandbox on disk: what was intended before it was done, so that it can be found after a crash.

A record is one line of JSON: a header with version and checksum, and the body. It is read as a stranger's words: one
that is not to the byte what we would have written, or says something that we never say, is set aside and reported.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from unisandbox.api import (
    BackendError,
    InvalidArgumentError,
    SandboxSpec,
    SandboxStatus,
    UnavailableError,
    check_id,
    check_name,
)
from unisandbox.api.names import check_isolation
from unisandbox.api.plain import plain, sandbox_spec_of
from unisandbox.api.status import SandboxState
from unisandbox.engine import durable
from unisandbox.host import pidfd as pidfds
from unisandbox.host import small_files

RECORD_VERSION: Final = 3
RECORD_LIMIT: Final = 16 << 20
"""Bytes. The largest part is the environment, and a program's argv and environment together are limited to 6 MiB by
the kernel (3/4 of _STK_LIM, fs/exec.c); as JSON they may double."""
DAMAGED: Final = "damaged"
"""The directory, beside that of the records, where unreadable ones are kept."""

Phase = Literal["creating", "ready", "stopped", "removing"]
_PHASES: Final[tuple[str, ...]] = get_args(Phase)
_SUFFIX: Final = ".json"
# The reader lacks something; what it reads is not at fault.
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_LARGEST: Final = 1 << 62


class Record(NamedTuple):
    """What is known of one sandbox beyond this process.

    Attributes:
        sandbox_id, name, backend, created_at: as in SandboxStatus.
        phase: what was being done, or was reached.
        generation: rises with each engine that takes the sandbox over.
        boot_id: of the kernel that it lives on; another one means that nothing of it lives.
        owner: pid and start time of the process that wrote this, as it sees itself; for messages. (0, 0) for nobody, a
            start time of 0 is not known.
        client: its number among the keeper's clients: it is at work as long as that one is connected, wherever its
            process is. 0: none of this keeper's.
        spec: the request, as plain data; see `spec_of`.
        started_at, stopped_at: seconds since the epoch; None: not yet.
        expires_at: when its ttl is over, in seconds since the epoch; None: never.
        operation_id: under which it was created; "" when the user gave none.
    """

    sandbox_id: str
    name: str | None
    backend: str
    phase: Phase
    created_at: float
    generation: int = 1
    boot_id: str = ""
    owner: tuple[int, int] = (0, 0)
    client: int = 0
    spec: Mapping[str, object] = {}
    started_at: float | None = None
    stopped_at: float | None = None
    expires_at: float | None = None
    operation_id: str = ""


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


def boot_id() -> str:
    """The id of this boot of the kernel. Source: random(4), /proc/sys/kernel/random/boot_id."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def this_process() -> tuple[int, int]:
    """Pid and start time of this process; for `Record.owner`."""
    return _process(os.getpid())


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> tuple[int, int]:
    return pid, pidfds.start_time(pid)


# A child is another process, also where its pid is the same: as the first one of a pid namespace within another.
os.register_at_fork(after_in_child=_process.cache_clear)


def status_of(record: Record, state: SandboxState = "created") -> SandboxStatus:
    """What a record says: all that can be told while another process makes, removes or has the sandbox."""
    spec = cast("Mapping[str, Mapping[str, str]]", record.spec)
    return SandboxStatus(
        id=record.sandbox_id,
        name=record.name,
        backend=record.backend,
        state=state,
        generation=record.generation,
        created_at=record.created_at,
        started_at=record.started_at,
        stopped_at=record.stopped_at if state == "stopped" else None,
        expires_at=record.expires_at,
        labels=spec.get("labels", {}),
        annotations=spec.get("annotations", {}),
    )


def plain_spec(spec: SandboxSpec) -> dict[str, object]:
    """The spec as plain data that JSON can hold."""
    return plain(spec)


def spec_of(record: Record) -> SandboxSpec:
    """What the sandbox of a record was asked to be like.

    Raises:
        InvalidArgumentError: this version of unisandbox does not know such a spec; the field is named.
    """
    try:
        return sandbox_spec_of(record.spec)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"record of sandbox {record.sandbox_id!r}: {error.message}", hint=error.hint) from (
            error
        )


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
        line = _line(RECORD_VERSION, record._asdict())
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
            record = _parse(raw)
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
            return _Unusable(Damaged(path, str(error), path, later=isinstance(error, _LaterError)), identity)
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


class _LaterError(ValueError):
    """It is whole, and this version is too old for it."""


class _Unusable(NamedTuple):
    """What is in the place of a record, and which file it was."""

    damage: Damaged
    identity: tuple[int, int] | None
    movable: bool = True


def _line(version: int, body: Mapping[str, object]) -> bytes:
    """The bytes of a record. Version 1 had a checksum of the body alone."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if version > 1:
        return durable.sealed(version, "record", text)
    return f'{{"version": {version}, "sha256": "{durable.checksum(text)}", "record": {text}}}\n'.encode()


def _parse(raw: bytes) -> Record:
    """The record of these bytes.

    Raises:
        ValueError, InvalidArgumentError: they are none; says why.
    """
    try:
        outer = json.loads(raw.decode("ascii"))
    except RecursionError:
        raise ValueError("it is nested without end") from None
    except ValueError:
        raise ValueError("it is not whole, or is no record") from None
    if type(outer) is not dict or type(outer.get("version")) is not int:
        raise ValueError("it is no record")
    version = outer["version"]
    if version > RECORD_VERSION:
        raise _LaterError(f"it has version {version}, written by a later unisandbox; this one knows {RECORD_VERSION}")
    if version < 1 or type(body := outer.get("record")) is not dict:
        raise ValueError("it is no record")
    if _line(version, body) != raw:
        raise ValueError("the checksum does not match")
    if version == 1:
        body = _second(body)
    return _record(body if version > 2 else {**body, "client": 0})


def _second(body: Mapping[str, object]) -> dict[str, object]:
    """A body of version 1 as version 2 has it: the owner's start time was not noted, nor when it was started."""
    return {
        **{name: value for name, value in body.items() if name != "owner_pid"},
        "owner": [body.get("owner_pid"), 0],
        "started_at": None,
        "stopped_at": None,
        "expires_at": None,
        "operation_id": "",
    }


def _record(body: Mapping[str, object]) -> Record:
    names = set(Record._fields)
    unknown, missing = sorted(set(body) - names), sorted(names - set(body))
    if unknown:
        raise _LaterError(f"the field {unknown[0]!r:.80} is not known; a later unisandbox may have written it")
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing")
    for name, (check, wanted) in _CHECKS.items():
        if not check(body[name]):
            raise ValueError(f"{name} must be {wanted}, got {body[name]!r:.80}")
    checked: dict[str, Any] = {**body}
    checked["owner"] = tuple(checked["owner"])
    check_id(checked["sandbox_id"])
    check_isolation(checked["backend"])
    if checked["name"] is not None:
        check_name(checked["name"])
    if checked["operation_id"]:
        check_name(checked["operation_id"], "operation id")
    return Record(**checked)


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_time(value: object) -> bool:
    return (type(value) is int and abs(value) < _LARGEST) or (type(value) is float and math.isfinite(value))


def _is_time_or_none(value: object) -> bool:
    return value is None or _is_time(value)


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_owner(value: object) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_is_whole, value))


_TIME: Final = "seconds since the epoch"
_CHECKS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "sandbox_id": (_is_text, "text"),
    "name": (lambda value: value is None or type(value) is str, "text or null"),
    "backend": (_is_text, "text"),
    "phase": (lambda value: value in _PHASES, f"one of {', '.join(_PHASES)}"),
    "created_at": (_is_time, _TIME),
    "generation": (lambda value: _is_whole(value) and value != 0, "a whole number > 0"),
    "boot_id": (lambda value: type(value) is str and len(value) <= 64, "a boot id"),
    "owner": (_is_owner, "a pid and a start time"),
    "client": (_is_whole, "a whole number"),
    "spec": (lambda value: type(value) is dict, "an object"),
    "started_at": (_is_time_or_none, f"{_TIME}, or null"),
    "stopped_at": (_is_time_or_none, f"{_TIME}, or null"),
    "expires_at": (_is_time_or_none, f"{_TIME}, or null"),
    "operation_id": (_is_text, "text"),
}
