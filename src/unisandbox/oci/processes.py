"""What the OCI task service knows of containers and processes, and small things done to them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import anyio
import attrs

from unisandbox.api import BackendError, ContainerSpec, Exit, ProcessSpec, Stdio
from unisandbox.api.status import ContainerState
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.null import is_null, open_null
from unisandbox.host.pidfd import has_ended, send_signal
from unisandbox.oci.calls import children, kill_tree
from unisandbox.oci.made import Created
from unisandbox.oci.plan import Plan

_LARGEST_LAST_WORDS: Final = 4096


@attrs.define(eq=False, repr=False)
class Process:
    """A process of a container; its streams are closed here once it has them."""

    exec_id: str
    spec: ProcessSpec | None
    stdio: list[int]
    # An OCI process object, for one that an engine adds to a bundle of its own.
    oci_process: str = ""
    terminal: bool = False
    cgroup: Cgroup | None = None
    pid: int | None = None
    pidfd: int = -1
    start_time: int = 0
    life: socket.socket | None = None
    master: int = -1
    killed_by_us: bool = False
    # All that is in its cgroup was killed by us, whether it had ended or not.
    swept: bool = False
    # Set when a start that is under way is over.
    starting: anyio.Event | None = None
    deleted: bool = False
    closed: bool = False
    exit: Exit | None = None

    def enter(self, pid: int) -> None:
        """Move the process into its cgroup, if it was not born there; verified."""
        assert self.cgroup is not None  # noqa: S101 (made before the spawn)
        self.cgroup.enter(pid)

    def close(self) -> None:
        """Close every descriptor. A start that is under way closes what comes after that."""
        self.closed = True
        for fd in (*self.stdio, self.pidfd, self.master):
            if fd >= 0:
                os.close(fd)
        self.stdio, self.pidfd, self.master = [], -1, -1
        if self.life is not None:
            self.life.close()
            self.life = None


@attrs.define(eq=False, repr=False)
class Container:
    """A container with its processes, by exec id; the main one's is empty."""

    name: str
    plan: Plan
    with_init: bool
    created: Created | None = None
    control: socket.socket | None = None
    spec: ContainerSpec | None = None
    started: bool = False
    verified: bool = False
    deleting: bool = False
    # One at a time deletes it, by its name, which is free when that is done. The first one does not wait: nothing may
    # come between a cancellation and the kill.
    deletion: anyio.Lock = attrs.field(factory=lambda: anyio.Lock(fast_acquire=True))
    processes: dict[str, Process] = attrs.field(factory=dict)
    # Cgroups of ended processes that still hold something (background work, a zombie), with their kills for memory.
    lingering: dict[Cgroup, int] = attrs.field(factory=dict)
    # Kills for memory in cgroups that are gone.
    oom_kills: int = 0


@contextlib.contextmanager
def streams(stdio: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Three descriptors for a program; those that are missing (-1) are /dev/null, open for the block."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if min(stdio) < 0 else -1
    try:
        first, second, third = (fd if fd >= 0 else null for fd in stdio)
        yield first, second, third
    finally:
        if null >= 0:
            os.close(null)


@contextlib.contextmanager
def streams_to_own(stdio: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The same for a program that a runtime starts, which gives them to the program's user: none is the host's own."""
    ours = [-1 if fd >= 0 and is_null(fd) else fd for fd in stdio]
    null = open_null() if min(ours) < 0 else -1
    try:
        first, second, third = (fd if fd >= 0 else null for fd in ours)
        yield first, second, third
    finally:
        if null >= 0:
            os.close(null)


def end_tree(cgroup: Cgroup, pid: int, pidfd: int) -> None:
    """SIGKILL for all that is in a process's cgroup; where there are no cgroups, for it and what descends from it."""
    if cgroup.holds_processes:
        cgroup.kill()
    elif pidfd >= 0:
        kill_tree(pid, pidfd)


def end_init(cgroup: Cgroup, created: Created | None) -> None:
    """SIGKILL for a whole container: without cgroups for its first process, with which its pid namespace ends."""
    cgroup.kill()
    if created is not None and created.pidfd >= 0 and not cgroup.holds_processes:
        send_signal(created.pidfd, signal.SIGKILL)


def end_descendants(pid: int) -> None:
    """SIGKILL for all that descends from a process, but not for itself."""
    for child in children(pid):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            pidfd = os.pidfd_open(child)
            try:
                if child in children(pid):  # and no stranger with its number; see `kill_tree`
                    kill_tree(child, pidfd)
            finally:
                os.close(pidfd)


def members(cgroup: Cgroup, pid: int) -> Sequence[int]:
    """The processes of a cgroup; where there are none, `pid` and what descends from it."""
    if cgroup.holds_processes:
        return cgroup.pids()
    found = [pid]
    for one in found:
        found += [child for child in children(one) if child not in found]
    return found


def oom_kills_of(cgroup: Cgroup) -> int:
    """Processes of the cgroup that were killed for memory; 0 when it is gone, or nobody counts them on this host."""
    if cgroup.oom_counter is None:
        return 0
    try:
        return cgroup.oom_kills()
    except FileNotFoundError:
        return 0  # its directory is gone already


@contextlib.contextmanager
def last_words() -> Iterator[int]:
    """A descriptor for a runtime's standard error; what it wrote becomes the log of an error that has none."""
    memory = os.memfd_create("unisandbox-stderr", os.MFD_CLOEXEC)
    try:
        yield memory
    except BackendError as error:
        error.log = error.log or os.pread(memory, _LARGEST_LAST_WORDS, 0).decode("utf-8", "replace")
        raise
    finally:
        os.close(memory)


@contextlib.contextmanager
def copied(fd: int) -> Iterator[int]:
    """A second descriptor of the same, for the block."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        yield copy
    finally:
        os.close(copy)


def duplicate(stdio: Stdio) -> list[int]:
    """Our own copies of the caller's descriptors; -1 for none."""
    copies = [-1, -1, -1]
    try:
        for index, fd in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)):
            if fd is not None:
                copies[index] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except BaseException:
        for copy in copies:
            if copy >= 0:
                os.close(copy)
        raise
    return copies


@contextlib.contextmanager
def birthplace(cgroup: Cgroup, admitted: int | None) -> Iterator[list[int]]:
    """Descriptors for `host.init.spawn` of where a process is born; none where it has to be moved after its birth."""
    directory = cgroup.clone_into
    fds: list[int] = []
    try:
        if directory is not None and admitted is not None:
            cgroup.admit(admitted)
            fds.append(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            tasks = [f"{own}/tasks" for own in cgroup.dirs if own != directory]
            fds += [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in tasks]
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def state_of(container: Container, process: Process) -> ContainerState:
    """The state of a process; it is "stopped" with its container."""
    if process.exit is not None or (container.created is not None and has_ended(container.created.pidfd)):
        return "stopped"
    if process.pidfd >= 0 and has_ended(process.pidfd):
        return "stopped"
    if not container.started or (process.exec_id and process.pid is None):
        return "created"
    # The kernel knows, whichever process has paused it.
    return "paused" if container.plan.cgroup.is_frozen else "running"


def all_oom_kills_of(container: Container) -> int:
    """Processes of the container that were killed for memory, also those that are gone."""
    cgroups = [process.cgroup for process in container.processes.values() if process.cgroup is not None]
    lingering = sum(max(kills, oom_kills_of(cgroup)) for cgroup, kills in container.lingering.items())
    return container.oom_kills + lingering + sum(map(oom_kills_of, cgroups))


def awaits_start(container: Container, process: Process) -> Created | None:
    """What is to become a bundle's first process, and waits for its start; None for every other process."""
    return container.created if process.exec_id == "" and not container.with_init else None
