"""One call of a runtime's command line: what it is given, its deadline, its end and everything that it started.

The runtime is a child of the keeper. Its end is learnt from the keeper, never from the end of a pipe: the container
inherits the runtime's descriptors and keeps them open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import anyio

from unisandbox.api.errors import BackendError, DeadlineExceededError, UnavailableError
from unisandbox.host import pidfd as pidfds
from unisandbox.oci.answers import read_log, why

# A killed process may sit in the kernel; what waits behind us should not.
_DEATH_SECONDS: Final = 5.0
# How long a process may take until a stop is in force. One that waits for a disk (state D) may take longer.
_STOP_SECONDS: Final = 0.1
_STOP_POLL: Final = 0.0002
# What a runtime needs to find its own helpers; nothing of the caller's environment (NOTIFY_SOCKET and LISTEN_FDS would
# be obeyed, and a user's PATH must not choose programs).
ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
}
NOWHERE: Final[Mapping[str, str]] = {}
"""No namespace to enter."""


class Child(Protocol):
    """A process that the spawner has started; its pidfd is the caller's to close."""

    @property
    def pid(self) -> int:
        """As the host sees it."""
        ...

    @property
    def start_time(self) -> int:
        """Clock ticks after boot."""
        ...

    @property
    def pidfd(self) -> int:
        """Close-on-exec."""
        ...


class Ended(Protocol):
    """How a process ended."""

    @property
    def seq(self) -> int:
        """Later ends have greater numbers."""
        ...

    @property
    def pid(self) -> int:
        """Its pid while it lived."""
        ...

    @property
    def start_time(self) -> int:
        """Clock ticks after boot."""
        ...

    @property
    def status(self) -> int:
        """wait(2)'s status word."""
        ...


class Spawner(Protocol):
    """What of `host.keeper.Keeper` a runtime needs: the parent and reaper of everything that is started."""

    pid: int

    @property
    def last_seq(self) -> int:
        """The number of the last end that is known here."""
        ...

    @property
    def alive(self) -> bool:
        """See `Keeper.alive`."""
        ...

    def outside(self, path: str) -> str:
        """See `Keeper.outside`."""
        ...

    async def spawn(
        self,
        key: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str = "/",
        cgroup_procs: Sequence[str] = (),
        mounts: str = "",
        fds: Sequence[int] = (),
    ) -> Child:
        """See `Keeper.spawn`."""
        ...

    def expect(self, pid: int, start_time: int) -> None:
        """See `Keeper.expect`."""
        ...

    async def wait_exit(self, pid: int, start_time: int) -> Ended:
        """See `Keeper.wait_exit`."""
        ...

    async def exits_after(self, seq: int) -> tuple[Sequence[Ended], int]:
        """See `Keeper.exits_after`."""
        ...

    async def hold(self, name: str, fd: int) -> int:
        """See `Keeper.hold`."""
        ...

    async def held(self, prefix: str = "") -> Mapping[str, int]:
        """See `Keeper.held`."""
        ...


class Call(NamedTuple):
    """A call of a runtime.

    Attributes:
        label: for messages: "crun create of container 'x'".
        argv: all of it; `argv[0]` is the absolute path of the program.
        log: the runtime's log, as seen from here; "" when it has none.
        fds: become its fds 0, 1, 2 ...
        cgroup_procs: `cgroup.procs` files that it enters before it becomes the runtime.
        mounts: name of the mount namespace, held by the keeper, in which it runs; empty: the keeper's own.
        timeout: seconds.
    """

    label: str
    argv: Sequence[str]
    log: str
    fds: Sequence[int]
    cgroup_procs: Sequence[str] = ()
    mounts: str = ""
    timeout: float = 30.0


async def run(spawner: Spawner, call: Call) -> int:
    """Run it to its end: its exit code, or minus the number of the signal that ended it.

    However this returns, the runtime and what belongs to it (but not a container that it made) is gone.

    Raises:
        DeadlineExceededError: it took too long and was killed.
        UnavailableError: the runtime cannot be executed any more.
        BackendError: it could not be started for another reason.
    """
    try:
        with anyio.fail_after(call.timeout):
            # Not cancelled in between: only who knows the process can wait until it is dead. It takes about 2 ms.
            with anyio.fail_after(call.timeout, shield=True):
                child = await _spawn(spawner, call)
            try:
                record = await spawner.wait_exit(child.pid, child.start_time)
            except BaseException:
                # Also cancelled: the kill is made first, without an await.
                kill_tree(child.pid, child.pidfd)
                await _dead(child.pidfd)
                raise
            finally:
                os.close(child.pidfd)
    except TimeoutError:
        raise DeadlineExceededError(
            f"{call.label} did not end within {call.timeout:g} s and was killed{_said(call.log)}",
            hint="The host may be overloaded, or a hook or a file system hangs.",
        ) from None
    return os.waitstatus_to_exitcode(record.status)


async def _spawn(spawner: Spawner, call: Call) -> Child:
    try:
        return await spawner.spawn(
            # Never asked for twice: a call that lost its answer is not repeated but cleaned up after.
            f"runtime/{os.urandom(8).hex()}",
            call.argv,
            env=ENVIRONMENT,
            cgroup_procs=call.cgroup_procs,
            mounts=call.mounts,
            fds=call.fds,
        )
    except OSError as error:
        stage = getattr(error, "stage", "")
        reason = error.strerror or str(error)
        if stage == "exec":
            raise UnavailableError(
                f"{call.label} failed: {call.argv[0]} cannot be executed: {reason}",
                hint="Was it removed or replaced? Install it: apt install crun.",
            ) from error
        if stage == "cgroup":
            raise BackendError(f"{call.label} failed: its cgroup cannot be entered: {reason}") from error
        raise BackendError(f"{call.label} failed: it could not be started: {reason}") from error


async def _dead(pidfd: int) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(_DEATH_SECONDS):
        await anyio.wait_readable(pidfd)


def kill_tree(pid: int, pidfd: int) -> None:
    """Kill the process behind `pidfd`, its descendants and its process group; synchronous.

    Each is stopped before its children are looked up, so that none can fork away meanwhile; but others may end them,
    and then their ids are anybody's.
    """
    if not pidfds.send_signal(pidfd, signal.SIGSTOP):
        pidfds.kill_group(pidfd)  # it has died with the keeper; a hook of it may go on
        return
    found = {pid: pidfd}
    opened: list[int] = []
    try:
        pending = [pid]
        while pending:
            parent = pending.pop()
            _await_stop(parent)
            for child in children(parent):
                if child in found:
                    continue
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    fd = os.pidfd_open(child)
                    opened.append(fd)
                    # Only what is a child now, while the pidfd holds its id, is the one that was listed.
                    if child in children(parent):
                        pidfds.send_signal(fd, signal.SIGSTOP)
                        found[child] = fd
                        pending.append(child)
        # The keeper made it the leader of a session and a group; while it is stopped its number stays its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for fd in found.values():
            pidfds.send_signal(fd, signal.SIGKILL)
    finally:
        for fd in opened:
            os.close(fd)


def _await_stop(pid: int) -> None:
    """Wait until the SIGSTOP that a process was sent is in force, which is not so when kill(2) returns; blocks.

    Until then it may end a fork that it is in. Source: the states of proc_pid_stat(5).
    """
    deadline = time.monotonic() + _STOP_SECONDS
    while not _is_stopped(pid) and time.monotonic() < deadline:
        time.sleep(_STOP_POLL)


def _is_stopped(pid: int) -> bool:
    """Whether none of its threads runs, or it has ended."""
    threads: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = os.listdir(f"/proc/{pid}/task")
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this one has ended
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                text = file.read()
            if text[text.rindex(b")") + 2 :][:1] not in b"tTZX":
                return False
    return True


def children(pid: int) -> list[int]:
    """The children of a process; exact while it is stopped. Source: proc_tid_children(5), CONFIG_PROC_CHILDREN."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    return found


def _said(path: str) -> str:
    text = why(read_log(path))
    return f" (its log ends with: {text})" if text else ""


def nsenter(namespaces: Mapping[str, str]) -> list[str]:
    """The beginning of an argv that runs the rest inside namespaces: their paths by kind ("net", "ipc", "uts").

    Raises:
        UnavailableError: util-linux's nsenter is not installed.
    """
    import shutil  # heavy, and not every runtime needs nsenter

    program = shutil.which("nsenter", path=ENVIRONMENT["PATH"])
    if program is None:
        raise UnavailableError("nsenter was not found", hint="Install it: apt install util-linux.")
    return [program, *(f"--{kind}={path}" for kind, path in namespaces.items()), "--"]
