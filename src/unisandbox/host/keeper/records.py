"""What the keeper's client takes and gives: plain data, and errors that say more than an errno."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from unisandbox.api.errors import FailedPreconditionError, UnavailableError

Policy = Literal["stop", "keep"]
GuardKind = Literal["kill_cgroup", "kill_process", "rmdir_cgroup", "remove_tree", "unlink", "rmdir", "umount"]
SpawnStage = Literal["fork", "mounts", "fds", "cgroup", "cwd", "exec", "pidfd"]


class ExitRecord(NamedTuple):
    """How a process ended. `status` is wait(2)'s word (`os.waitstatus_to_exitcode`), `at` Unix time in seconds."""

    seq: int
    pid: int
    start_time: int
    status: int
    at: float


class Spawned(NamedTuple):
    """A started program. Its pidfd is the caller's to close.

    `pidfd` is -1 only when an earlier `spawn` of the same key is answered again and the process was reaped meanwhile.
    """

    pid: int
    start_time: int
    pidfd: int


class SpawnFailed(OSError):
    """A program could not be started; nothing runs. `errno` says why, `stage` how far it came.

    Stages: "cgroup" it could not be put into its cgroup, "cwd" its directory cannot be entered, "exec" it cannot be
    executed; "fork", "fds", "pidfd" the keeper lacks something (memory, processes, file descriptors, its launcher).
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


class LockTimeoutError(Exception):
    """A lock was not free in time; `pid` is the process that has it, 0 when it has just become free."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} has the lock")
        self.pid = pid


class KeeperWaitsError(FailedPreconditionError):
    """A keeper holds the state directory and has no owner: attach to it."""


class KeeperVersionError(UnavailableError):
    """The keeper that runs was started by another version of this library, whose protocol it speaks."""


class KeeperElsewhereError(UnavailableError):
    """The keeper that runs is in another pid namespace, and takes no requests from ours."""


class JobResult(NamedTuple):
    """What a job answered, and the numbers that its held fds have in the keeper, by held name."""

    result: Mapping[str, object]
    held: Mapping[str, int]


class Guard(NamedTuple):
    """How to undo something; see `Keeper.guard`. Paths are absolute, as the host (not the keeper) sees them.

    Those of "kill_process" are no paths but processes, written as "/PID/START_TIME".
    """

    name: str
    kind: GuardKind
    paths: Sequence[str]


class RingData(NamedTuple):
    """A part of a ring. Offsets count bytes since the ring began.

    `begin` is later than what was asked for when older bytes are gone (`first` is the oldest that is there), `next` is
    where to go on, `eof` is True when nothing will come after `next`.
    """

    data: bytes
    begin: int
    next: int
    first: int
    eof: bool


class Reclaimed(NamedTuple):
    """An fd that was taken back from the keeper's spool; see `Spools.reclaim`.

    `fd` is a copy for the caller, who closes it; -1 when it had met its end and the keeper has closed it. `data` is
    what was kept and nobody has taken, `lost` how many bytes were ever dropped because they were over the limit, `eof`
    whether nothing will ever come after `data`. `serial` and `end` are for `Spools.taken`.
    """

    fd: int
    data: bytes
    lost: int
    eof: bool
    serial: int = 0
    end: int = 0


class EventPage(NamedTuple):
    """A part of the keeper's log of events, in order, each with its number.

    `first` is the oldest number that is still there, `last` the newest that was ever given: who asked for what comes
    after n and is told `first > n + 1` has missed those between.
    """

    events: list[tuple[int, Mapping[str, object]]]
    first: int
    last: int


class CloseReport(NamedTuple):
    """What the keeper's end has undone: how many guards succeeded, and why others did not (at most 200 are named)."""

    done: int = 0
    failures: int = 0
    failed: Mapping[str, str] = {}


class Hello(NamedTuple):
    """What the keeper says about itself. `private_mounts` is False where it may not make a mount namespace.

    Where it has one, `workdir` is its private file system in memory.
    `start_time` is the keeper's own (clock ticks after boot): with its pid it is a name that is never given again.
    `client` is our number among all the connections that this keeper ever had (1, 2, 3 ...); `owner_pid` the process of
    its owner when we came, 0 for none.
    """

    pid: int
    start_time: int
    boot_id: str
    version: int
    policy: Policy
    owner: bool
    private_mounts: bool
    workdir: str
    client: int
    owner_pid: int


class EndEvent(NamedTuple):
    """An event that the keeper tells of an end.

    Attributes:
        event: what is known before; the keeper adds `at`, and `end`: the time (`at`), the `packet` that waits there in
            hex (empty: none), the `count` of the counter (0: it could not be read) and whether there is the note
            (`noted`).
        key: as for `KeeperEvents.publish`.
        packets: it is told only when the packet is one of these, the count is not 0 and there is no note; none: always.
    """

    event: Mapping[str, object]
    key: str
    packets: Sequence[str] = ()


class EndNotice(NamedTuple):
    """What the keeper tells when something that it holds and stamps has become readable.

    Attributes:
        name: of what it holds; when nothing is held there, nothing is told.
        noted: the name of a note.
        events: what to tell, in this order; at most four.
        counter, line: a file of lines `word number`, and the word; empty: none.
        late: only if nobody has told of it, and it is held.
        at_once: without patience for somebody who may know better how it ended.
    """

    name: str
    noted: str
    events: Sequence[EndEvent]
    counter: str = ""
    line: str = ""
    late: bool = False
    at_once: bool = False
