"""What users have asked for under an operation id, so that asking again does nothing twice, also after a crash.

One small file per operation. It is made before the work begins, with all its content and by one process only (link(2)
refuses a second), and replaced when the work is done. What is in progress, and what a crash has cut, is told by the
process that began it: it lives, or not. What was cut is taken over by one of those who ask again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final, Literal, NamedTuple, get_args

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    check_name,
)
from unisandbox.engine import durable
from unisandbox.engine.record import Record, boot_id, this_process
from unisandbox.host import pidfd as pidfds
from unisandbox.host import small_files

Kind = Literal["create", "exec", "remove"]
_KINDS: Final[tuple[str, ...]] = get_args(Kind)

RESULT_LIMIT: Final = 64 << 10
"""Bytes of a result, as UTF-8."""
_TARGET_LIMIT: Final = 1024
_FILE_LIMIT: Final = 8 * RESULT_LIMIT  # six bytes for a character of JSON at worst, and the rest
_VERSION: Final = 1
_SUFFIX: Final = ".json"
_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.json")
# The files are counted once in so many beginnings as this part of `kept`.
_PART: Final = 16
# A writer takes milliseconds; a temporary file of this age (seconds) is of one that was killed.
_ABANDONED: Final = 3600.0


class Operation(NamedTuple):
    """What was asked for under an operation id.

    Attributes:
        operation_id: the user's.
        kind: what was to be done.
        target: with what; a sandbox's id or name, and what the caller adds to it.
        digest: of all else that was asked for; see `digest_of`.
        state: "begun", until the one who does it says that it is done.
        result: what it came to, in the words of the one who did it; "" while it is "begun".
        begun_at: seconds since the epoch.
        owner: pid and start time of the process that began it.
        boot_id: of the kernel that it ran on.
    """

    operation_id: str
    kind: Kind
    target: str
    digest: str
    state: Literal["begun", "finished"]
    result: str
    begun_at: float
    owner: tuple[int, int]
    boot_id: str

    @property
    def in_progress(self) -> bool:
        """It is not finished, and the process that began it still lives."""
        return self.state == "begun" and self.boot_id == boot_id() and pidfds.lives(*self.owner)


def digest_of(request: Mapping[str, object]) -> str:
    """A digest of plain data: equal data, equal digest, whatever the order of its fields."""
    return durable.checksum(json.dumps(request, sort_keys=True, separators=(",", ":")))


class OperationLog:
    """The operations of one state directory, shared by all processes that use it.

    Args:
        directory: made at the first operation.
        durable: wait until the disk has it.
        kept: so many are remembered. They are counted once in `kept` / 16 beginnings; then the oldest are forgotten,
            but none that is in progress.
    """

    def __init__(self, directory: str, *, durable: bool, kept: int = 1024) -> None:
        if kept < 1:
            raise InvalidArgumentError(f"kept must be > 0, got {kept}")
        self._directory = directory
        self._durable = durable
        self._kept = kept
        self._uncounted = kept  # so the first one counts
        # When the latest that is known here was changed, as its file says it (nanoseconds since the epoch).
        self._latest = 0

    def begin(
        self, operation_id: str, kind: Kind, target: str, digest: str, *, former_digests: Collection[str] = ()
    ) -> Operation | None:
        """Note that an operation begins, unless it is known.

        Args:
            operation_id: the user's; as names are.
            kind, target, digest: see `Operation`.
            former_digests: what former versions of unisandbox would have noted for the same.

        Returns:
            None: it is noted, and the caller's to do; `finish` or `forget` it. Otherwise what is known of it: it is
            finished, in progress, or was cut by a crash; then look for what it has come to, and `take_over` the rest.

        Raises:
            FailedPreconditionError: the id was used for something else.
            InvalidArgumentError: the id is no name, or the rest is too long.
            BackendError: it cannot be noted, or what was noted cannot be read.
        """
        path = self._path(operation_id)
        if kind not in _KINDS:
            raise InvalidArgumentError(f"an operation is one of {', '.join(_KINDS)}, got {kind!r}")
        for what, text in (("target", target), ("digest", digest)):
            if len(text) > _TARGET_LIMIT:
                raise InvalidArgumentError(f"the {what} of operation {operation_id!r} is too long: {text[:80]!r}...")
        now = time.time()
        wanted = Operation(operation_id, kind, target, digest, "begun", "", now, this_process(), boot_id())
        try:
            self._forget_oldest()
        except OSError as error:
            raise self._cannot("note", operation_id, error) from error
        while True:
            known = self.find(operation_id)
            if known is not None:
                _check_same(known, wanted, former_digests)
                return known
            try:
                if durable.create(path, _bytes_of(wanted), durable=self._durable, at=self._now()):
                    self._uncounted += 1
                    return None
            except OSError as error:
                raise self._cannot("note", operation_id, error) from error
            # Another process was quicker, or has already forgotten it again.

    def take_over(self, known: Operation) -> bool:
        """Go on with an operation that a crash has cut: of all who try, one gets it.

        Ask whether it is in progress first, then look for what it may have made, then call this: in another order,
        its former owner could have made something after the look.

        Returns:
            Whether it is the caller's to do from now on; otherwise another one has it, or it is finished.

        Raises:
            BackendError: it cannot be noted.
        """
        if known.state != "begun" or known.in_progress:
            return False
        ours = known._replace(owner=this_process(), boot_id=boot_id())
        try:
            with self._alone():
                if self.find(known.operation_id) != known:
                    return False
                self._replace(ours)
        except OSError as error:
            raise self._cannot("take over", known.operation_id, error) from error
        return True

    def finish(self, operation_id: str, result: str) -> None:
        """Note what an operation came to. Again with the same result is harmless.

        Raises:
            NotFoundError: it was not begun, or was forgotten.
            FailedPreconditionError: it is finished with another result.
            InvalidArgumentError: the result is too long.
            BackendError: it cannot be noted.
        """
        if len(result.encode(errors="surrogatepass")) > RESULT_LIMIT:
            raise InvalidArgumentError(f"the result of operation {operation_id!r} is longer than {RESULT_LIMIT} bytes")
        try:
            with self._alone():
                known = self.find(operation_id)
                if known is None:
                    raise NotFoundError(f"operation {operation_id!r} has not been begun, or is forgotten")
                if known.state == "begun":
                    done = known._replace(state="finished", result=result)
                    self._replace(done)
                elif known.result != result:
                    raise FailedPreconditionError(
                        f"operation {operation_id!r} is finished already, as {known.result!r:.80} and not"
                        f" {result!r:.80}"
                    )
        except FileNotFoundError as error:
            raise NotFoundError(f"operation {operation_id!r} has not been begun, or is forgotten") from error
        except OSError as error:
            raise self._cannot("finish", operation_id, error) from error

    def note_created(self, record: Record) -> None:
        """Finish the creation of a sandbox that is about to be removed, if its maker was cut before he could.

        A disk that does not take it keeps nothing alive.
        """
        if record.operation_id and record.phase in {"ready", "stopped"}:
            with contextlib.suppress(NotFoundError, BackendError, FailedPreconditionError):
                known = self.find(record.operation_id)
                # Forgotten meanwhile, its id may be that of a later one.
                if known is not None and known.kind == "create" and known.begun_at <= record.created_at:
                    self.finish(record.operation_id, record.sandbox_id)

    def forget(self, operation_id: str) -> None:
        """Make as if it had never been begun: it failed, and may be tried again. Repeating is harmless.

        Raises:
            BackendError: it cannot be removed.
        """
        try:
            durable.remove(self._path(operation_id), durable=self._durable)
        except OSError as error:
            raise self._cannot("forget", operation_id, error) from error

    def find(self, operation_id: str) -> Operation | None:
        """What is known of an operation; None when nothing is.

        Raises:
            BackendError: what was noted cannot be read: whether it was done is not known.
        """
        path = self._path(operation_id)
        try:
            return _operation(small_files.read(path, _FILE_LIMIT)[0], operation_id)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._cannot("read", operation_id, error) from error
        except (ValueError, RecursionError, small_files.NotARegularFileError, small_files.TooLargeError) as error:
            raise BackendError(
                f"what was noted of operation {operation_id!r} in {path} is damaged; whether it was done is not known",
                hint="Look whether it was done, and then use another operation id.",
            ) from error

    def unfinished(self) -> list[Operation]:
        """Those that were begun and never finished, the oldest first: see `Operation.in_progress` for which are cut."""
        found: list[Operation] = []
        for _, name in self._by_age():
            try:
                operation = self.find(name)
            except BackendError:
                continue  # damaged: told to whoever uses its id again, since nothing else can be done about it
            if operation is not None and operation.state == "begun":
                found.append(operation)
        return sorted(found, key=lambda operation: operation.begun_at)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What is read in the block is still so when it is replaced there.

        For the time of one small write; the kernel frees the lock of a process that dies. Source: flock(2).
        """
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _replace(self, operation: Operation) -> None:
        path = self._path(operation.operation_id)
        durable.replace(path, _bytes_of(operation), durable=self._durable, at=self._now())

    def _now(self) -> int:
        """The time for the file of what changes now: later than all others, also when the clock has been set back."""
        self._latest = max(time.time_ns(), self._latest + 1)
        return self._latest

    def _path(self, operation_id: str) -> str:
        return os.path.join(self._directory, check_name(operation_id, "operation id") + _SUFFIX)

    def _by_age(self) -> list[tuple[int, str]]:
        """When each was last changed (nanoseconds since the epoch), and its id; the oldest first."""
        found: list[tuple[int, str]] = []
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # forgotten meanwhile
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    if _FILE.fullmatch(entry.name):
                        found.append((status.st_mtime_ns, entry.name.removesuffix(_SUFFIX)))
                    elif entry.name.endswith(durable.TEMPORARY) and time.time() - status.st_mtime > _ABANDONED:
                        durable.remove_temporary(entry.path)
        except FileNotFoundError:
            return []
        return sorted(found)

    def _forget_oldest(self) -> None:
        """Make room for one more."""
        if self._uncounted < max(1, self._kept // _PART):
            return
        by_age = self._by_age()
        self._uncounted = 0
        self._latest = max([self._latest, *(changed_at for changed_at, _ in by_age[-1:])])
        excess = len(by_age) - self._kept + 1
        for _, name in by_age:
            if excess <= 0:
                return
            try:
                operation = self.find(name)
            except BackendError:
                operation = None  # damaged: it has been told to nobody for as long as the others, and says nothing
            if operation is None or not operation.in_progress:
                self.forget(name)
                excess -= 1

    def _cannot(self, do: str, operation_id: str, error: OSError) -> BackendError:
        return BackendError(
            f"cannot {do} operation {operation_id!r} in {self._directory}: {error.strerror}",
            hint="Free space there, or open the engine with another state directory.",
        )


def in_progress_error(known: Operation) -> FailedPreconditionError:
    """What to raise when somebody is at work on an operation."""
    return FailedPreconditionError(
        f"operation {known.operation_id!r} is in progress in another call (begun in process {known.owner[0]})",
        hint="Ask again in a moment.",
    )


def _check_same(known: Operation, wanted: Operation, former_digests: Collection[str]) -> None:
    is_same = known.digest in {wanted.digest, *former_digests}
    if is_same and (known.kind, known.target) == (wanted.kind, wanted.target):
        return
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known.begun_at))
    used = f"operation id {known.operation_id!r} was used at {at} for {known.kind!r} of {known.target!r}"
    if (known.kind, known.target) == (wanted.kind, wanted.target):
        asked = "with other arguments"
    else:
        asked = f"not for {wanted.kind!r} of {wanted.target!r}"
    raise FailedPreconditionError(f"{used}, {asked}", hint="Use a new operation id for what is a new operation.")


def _bytes_of(operation: Operation) -> bytes:
    body = json.dumps(operation._asdict(), sort_keys=True, separators=(",", ":"))
    digest = durable.checksum(body)
    return f'{{"version": {_VERSION}, "sha256": "{digest}", "operation": {body}}}\n'.encode()


def _operation(raw: bytes, operation_id: str) -> Operation:
    """The operation of these bytes; ValueError when they are not, to the byte, what was written for that id."""
    outer = json.loads(raw.decode("ascii"))
    body = outer.get("operation") if type(outer) is dict else None
    if type(body) is not dict or set(body) != set(_CHECKS):
        raise ValueError("it is no operation")
    for name, check in _CHECKS.items():
        if not check(body[name]):
            raise ValueError(f"{name} has a wrong value")
    operation = Operation(**{**body, "owner": (body["owner"][0], body["owner"][1])})
    if operation.operation_id != operation_id or _bytes_of(operation) != raw:
        raise ValueError("it is another one, or was changed")
    return operation


def _is_text(value: object) -> bool:
    return type(value) is str


_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    "operation_id": _is_text,
    "kind": lambda value: value in _KINDS,
    "target": _is_text,
    "digest": _is_text,
    "state": lambda value: value in {"begun", "finished"} if type(value) is str else False,
    "result": _is_text,
    "begun_at": lambda value: type(value) is float,
    "owner": lambda value: type(value) is list and len(value) == 2 and all(type(item) is int for item in value),
    "boot_id": _is_text,
}
