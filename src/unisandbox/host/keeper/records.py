"""What the keeper's client takes and gives: plain data, and the two errors that carry more than an errno."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

Policy = Literal["stop", "keep"]
GuardKind = Literal["kill_cgroup", "rmdir_cgroup", "remove_tree", "unlink", "rmdir", "umount"]
SpawnStage = Literal["fork", "mounts", "fds", "cgroup", "cwd", "exec", "pidfd"]


@attrs.frozen
class ExitRecord:
    """How a process ended. `status` is wait(2)'s word (`os.waitstatus_to_exitcode`), `at` Unix time in seconds."""

    seq: int
    pid: int
    start_time: int
    status: int
    at: float


@attrs.frozen
class Spawned:
    """A started program. Its pidfd is the caller's to close.

    `pidfd` is -1 only when an earlier `spawn` of the same key is answered again and the process was reaped meanwhile.
    """

    pid: int
    start_time: int
    pidfd: int


class SpawnFailed(OSError):
    """A program could not be started; nothing runs. `errno` says why, `stage` how far it came.

    Stages: "cgroup" it could not be put into its cgroup, "cwd" its directory cannot be entered, "exec" it cannot be
    executed; "fork", "fds", "pidfd" the keeper lacks something (memory, processes, file descriptors).
    """

    def __init__(self, number: int, message: str, stage: SpawnStage) -> None:
        super().__init__(number, message)
        self.stage = stage


class JobFailed(OSError):
    """A job failed. `index` and `do` name the step; None when no step did (killed at its time: ETIMEDOUT)."""

    def __init__(self, number: int, message: str, index: int | None, do: str | None) -> None:
        super().__init__(number, message)
        self.index = index
        self.do = do


@attrs.frozen
class JobResult:
    """What a job answered, and the numbers that its held fds have in the keeper, by held name."""

    result: Mapping[str, object]
    held: Mapping[str, int]


def _as_tuple(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(paths)


@attrs.frozen
class Guard:
    """How to undo something; see `Keeper.guard`. Paths are absolute, as the host (not the keeper) sees them."""

    name: str
    kind: GuardKind
    paths: tuple[str, ...] = attrs.field(converter=_as_tuple)


@attrs.frozen
class RingData:
    """A part of a ring. Offsets count bytes since the ring began.

    `begin` is later than what was asked for when older bytes are gone (`first` is the oldest that is there), `next` is
    where to go on, `eof` is True when nothing will come after `next`.
    """

    data: bytes
    begin: int
    next: int
    first: int
    eof: bool


@attrs.frozen
class Reclaimed:
    """An fd that was taken back from the keeper's spool; see `Keeper.reclaim`.

    `fd` is a copy for the caller, who closes it; -1 when it had met its end and the keeper has closed it. `data` is
    what was kept since it was last reclaimed, `lost` how many bytes before `data` were dropped because they were over
    the limit, `eof` whether nothing will ever come after `data`.
    """

    fd: int
    data: bytes
    lost: int
    eof: bool


@attrs.frozen
class EventPage:
    """A part of the keeper's log of events, in order, each with its number.

    `first` is the oldest number that is still there, `last` the newest that was ever given: who asked for what comes
    after n and is told `first > n + 1` has missed those between.
    """

    events: list[tuple[int, Mapping[str, object]]]
    first: int
    last: int


@attrs.frozen
class CloseReport:
    """What the keeper's end has undone: how many guards succeeded, and why others did not (at most 200 are named)."""

    done: int = 0
    failures: int = 0
    failed: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Hello:
    """What the keeper says about itself. `private_mounts` is False where it may not make a mount namespace.

    `client` is our number among all the connections that this keeper ever had (1, 2, 3 ...); `owner_pid` the process of
    its owner when we came, 0 for none.
    """

    pid: int
    boot_id: str
    version: int
    policy: Policy
    owner: bool
    private_mounts: bool
    client: int
    owner_pid: int
