"""What a runtime (or init) has made: from its pid to a process that is certainly the one, in its cgroup."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from unisandbox.api.errors import BackendError
from unisandbox.host import pidfd as pidfds
from unisandbox.oci.answers import read_log, why
from unisandbox.oci.calls import Call, Spawner, children, kill_tree
from unisandbox.oci.states import RuntimeFiles

# Source: PID_MAX_LIMIT, include/linux/threads.h.
_PID_LIMIT: Final = 1 << 22


class Created(NamedTuple):
    """A process that a runtime has made: the init of a container, or an exec'd one.

    Attributes:
        pid: as the host sees it.
        start_time: clock ticks after boot; with the pid it is an identity.
        pidfd: of exactly this process; the caller's to close. -1 when an exec'd process has ended and was reaped
            already: its exit is known to the keeper by pid and start time.
        bundle: the container's bundle directory.
    """

    pid: int
    start_time: int
    pidfd: int
    bundle: str


async def identify(
    files: RuntimeFiles, call: Call, pid_file: str, bundle: str, *, exits_after: int | None = None
) -> Created:
    """From a pid-file to a process that is certainly the one: a child of the keeper, held by a pidfd."""
    pid = _read_pid(files, call, pid_file)
    if created := child_of(files.keeper, pid, bundle):
        return created
    if exits_after is not None:
        # It has ended and was reaped before we could look at it.
        records, _ = await files.keeper.exits_after(exits_after)
        for record in reversed(records):
            if record.pid == pid:
                return Created(pid, record.start_time, -1, bundle)
    log = read_log(call.log)
    reason = why(log) or "its log is empty"
    raise BackendError(f"{call.label}: process {pid} is not there, or not its process: {reason}", log=log)


def child_of(keeper: Spawner, pid: int, bundle: str = "") -> Created | None:
    """The process that has this pid, if it is a child of the keeper's."""
    with contextlib.suppress(ProcessLookupError):
        start_time = pidfds.start_time(pid)
        # It is that process which had the start time before and has it after.
        if _parent(pid) == keeper.pid and keeper.alive:
            created = Created(pid, start_time, pidfds.open_verified(pid, start_time), bundle)
            keeper.expect(pid, start_time)
            return created
    return None


def _read_pid(files: RuntimeFiles, call: Call, pid_file: str) -> int:
    try:
        with open(files.view(pid_file), "rb") as file:
            raw = file.read(64)
    except OSError as error:
        raise BackendError(
            f"{call.label} said that it succeeded, but wrote no pid-file: {error.strerror}", log=read_log(call.log)
        ) from error
    pid = int(raw) if raw.strip().isdigit() else -1
    if not 1 < pid < _PID_LIMIT:
        raise BackendError(f"{call.label} wrote no pid into its pid-file but {raw!r}", log=read_log(call.log))
    return pid


def enter(call: Call, created: Created, cgroup_procs: Sequence[str]) -> None:
    """Put what a runtime with cgroups of its own has made into ours; closes `created.pidfd` when that fails."""
    if created.pidfd < 0:
        return
    path = ""
    try:
        # An exec'd process runs already and may have forked: its children are looked up after it was moved.
        pending, moved = [created.pid], set[int]()
        while pending:
            pid = pending.pop()
            moved.add(pid)
            for entry in cgroup_procs:
                # runc's init has threads: a v1 `tasks` file would take but one of them.
                path = f"{entry.removesuffix('/tasks')}/cgroup.procs" if entry.endswith("/tasks") else entry
                with open(path, "wb", buffering=0) as file:
                    file.write(b"%d" % pid)
            pending += [child for child in children(pid) if child not in moved]
    except ProcessLookupError:
        return  # ended, and with it the need
    except OSError as error:
        kill_tree(created.pid, created.pidfd)
        os.close(created.pidfd)
        raise BackendError(f"{call.label}: its process cannot enter {path}: {error.strerror}") from error


def _parent(pid: int) -> int:
    """Source: proc_pid_stat(5), field 4."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read(4096)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} does not exist") from None
    return int(text[text.rindex(b")") + 2 :].split(maxsplit=2)[1])
