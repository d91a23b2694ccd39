"""The OCI task service: the containers of one sandbox, through an OCI runtime.

Containers of the SDK have our init as PID 1, and every program is spawned by it: no runtime call for `run` and `exec`.
Bundles that come from an engine (containerd) run as they are, and `exec` goes through the runtime.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal as signals
import socket
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    CreateTask,
    ExecTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    Metrics,
    NotFoundError,
    ProcessSpec,
    Resources,
    StartedTask,
    TaskState,
    Terminal,
    UnavailableError,
    UnsupportedError,
    check_id,
)
from unisandbox.api.status import ContainerState
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.init import ExecFailed, ended, ended_now, spawn
from unisandbox.host.keeper import Keeper
from unisandbox.host.readiness import readable
from unisandbox.oci.ledger import ContainerFacts, Ledger, ProcessFacts
from unisandbox.oci.plan import Planner, limits_of, metrics_of
from unisandbox.oci.processes import (
    Container,
    Process,
    birthplace,
    copied,
    duplicate,
    ended_process,
    has_ended,
    last_words,
    oom_kills_of,
    status_without_init,
    streams,
)
from unisandbox.oci.runtime import Created, Runtime

START_SECONDS: Final = 30.0
# How long the end of a killed process may take: it may sit in the kernel (a disk, a network file system).
_END_SECONDS: Final = 10.0
_DYING_SECONDS: Final = 0.1
_TOLD_SECONDS: Final = 1.0
# A shell's answers for a program that cannot be started. Source: POSIX, 2.8.2 Exit Status for Commands.
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126


class OciTaskService:
    """Drives the containers of one sandbox; see `TaskService`, `SupportsPause` and `SupportsUpdate`."""

    def __init__(self, label: str, keeper: Keeper, runtime: Runtime, planner: Planner, ledger: Ledger) -> None:
        self._label = label
        self._keeper = keeper
        self._runtime = runtime
        self._planner = planner
        self._ledger = ledger
        self._containers: dict[str, Container] = {}
        self._oom_kills_gone = 0
        # Exits of processes whose container is gone, for those who have not asked yet.
        self._exits: dict[tuple[str, str], Exit] = {}

    @property
    def container_ids(self) -> list[str]:
        """The containers that there are, the oldest first."""
        return list(self._containers)

    def abandon(self) -> None:
        """Close every descriptor that this process holds; ends nothing, and waits for nothing."""
        for name in list(self._containers):
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        """Forget a container here, and close what this process holds of it."""
        container = self._containers.pop(name)
        for exec_id, process in container.processes.items():
            if process.pid is not None:
                exit = process.exit or self._last_look(process)
                self._exits[name, exec_id] = exit or Exit.lost(exited_at=time.time())
            process.close()
        if container.control is not None:
            container.control.close()
            container.control = None
        if container.created is not None and container.created.pidfd >= 0:
            os.close(container.created.pidfd)
            container.created = None

    def _last_look(self, process: Process) -> Exit | None:
        """How it ended, if that can be told without waiting."""
        status = None if process.life is None else ended_now(process.life)
        return None if status is None else self._exit(process, status, process.ended_at or time.time())

    async def restore(self, *, exclusive: bool) -> None:
        """Take over the containers that other processes have made, and let go of those that they have ended.

        Args:
            exclusive: nobody else makes one meanwhile: what a creation that was cut has left is undone.

        Raises:
            BackendError: what is written down about one cannot be read.
        """
        try:
            containers, processes = await self._ledger.read()
        except (ValueError, TypeError, KeyError) as error:
            raise BackendError(f"what the keeper holds of sandbox {self._label!r} cannot be read: {error}") from error
        ends = await self._ledger.ends()
        made = {facts.name: facts for facts in containers}
        for name, container in list(self._containers.items()):
            facts, created = made.get(name), container.created
            if created is None and not exclusive:
                continue  # this process is making it
            if facts is None or created is None or (created.pid, created.start_time) != (facts.pid, facts.start_time):
                self._let_go(name)
        for facts in sorted(containers, key=lambda facts: facts.start_time):
            if facts.pid == 0:
                if exclusive:
                    await self._undo(facts)
            elif facts.name in self._containers:
                known = self._containers[facts.name]
                known.started |= facts.started
                known.paused = facts.paused
            else:
                await self._take_over(facts)
        for process in processes:
            owner = self._containers.get(process.container)
            mine = owner.processes.get(process.exec_id) if owner is not None else None
            if owner is not None and process.started and (mine is None or mine.pid is None):
                await self._take_over_process(owner, process, ends.get((process.container, process.exec_id)))

    async def _undo(self, facts: ContainerFacts) -> None:
        """End what a creation that was cut has left: it is known by its name only."""
        plan = await self._planner.restore(facts.name, facts.spec, facts.bundle)
        plan.cgroup.kill()
        await self._runtime.delete(plan.oci_id, force=True)
        plan.cgroup.remove(timeout=_END_SECONDS)
        await self._planner.free(facts.name)
        self._ledger.forget_container(facts.name)

    async def _take_over(self, facts: ContainerFacts) -> None:
        plan = await self._planner.restore(facts.name, facts.spec, facts.bundle)
        container = Container(facts.name, plan, with_init=facts.spec is not None, spec=facts.spec)
        container.started, container.paused, container.verified = facts.started, facts.paused, True
        pidfd = await self._ledger.take_container(facts.name, "pidfd")
        container.created = Created(facts.pid, facts.start_time, pidfd, plan.bundle)
        container.processes[""] = Process("", facts.spec.process if facts.spec else None, [])
        self._containers[facts.name] = container
        if facts.spec is not None:
            container.control = socket.socket(fileno=await self._ledger.take_container(facts.name, "control"))

    async def _take_over_process(self, container: Container, facts: ProcessFacts, ended_at: float | None) -> None:
        process = Process(facts.exec_id, facts.spec, [])
        process.start_time, process.killed_by_us = facts.start_time, facts.killed_by_us
        process.ended_at = ended_at
        leaf = facts.exec_id or ("main" if container.with_init else "init")
        with contextlib.suppress(FileNotFoundError):  # on v1 the container's own cgroup is the leaf of its init
            process.cgroup = container.plan.cgroup.find(leaf)
        if process.cgroup is None and not facts.exec_id and not container.with_init:
            process.cgroup = container.plan.cgroup
        try:
            what = "pidfd"
            process.pidfd = await self._ledger.take_process(container.name, facts.exec_id, what)
            if container.with_init:
                life = await self._ledger.take_process(container.name, facts.exec_id, "life")
                process.life = socket.socket(fileno=life)
            if facts.spec is not None and facts.spec.terminal is not None:
                process.master = await self._ledger.take_process(container.name, facts.exec_id, "master")
        except BaseException as error:
            process.close()
            if isinstance(error, FileNotFoundError):
                return  # deleted meanwhile by whoever it belongs to
            raise
        process.pid = facts.pid
        container.processes[facts.exec_id] = process

    async def running(self) -> list[tuple[str, str]]:
        """(container id, exec id) of every process that was started and is not known to have ended."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        return [
            (container.name, exec_id)
            for container in self._containers.values()
            for exec_id, process in container.processes.items()
            if process.pid is not None and process.exit is None
        ]

    async def create(self, request: CreateTask) -> None:
        """See `TaskService.create`."""
        name = check_id(request.container_id)
        self._exits = {key: exit for key, exit in self._exits.items() if key != (name, "")}
        if (request.container is None) == (not request.bundle):
            raise InvalidArgumentError("a container is made from either a spec or a bundle")
        if request.terminal:
            raise UnsupportedError("a terminal of a bundle's main process", "runc", hint="Use exec with a terminal.")
        if name in self._containers:
            raise AlreadyExistsError(f"sandbox {self._label!r} has a container {name!r} already")
        stdio = duplicate(request.stdio)
        main = Process("", request.container.process if request.container else None, stdio)
        facts = ContainerFacts(name, request.container, request.bundle)
        try:
            await self._ledger.container(facts)
            if request.container is not None:
                plan = await self._planner.prepare(request.container)
            else:
                plan = await self._planner.adopt(name, request.bundle)
            container = Container(name, plan, with_init=request.container is not None, spec=request.container)
            container.processes[""] = main
            self._containers[name] = container
            await self._create(container, main)
            await self._note(container)
        except BaseException as error:
            if name not in self._containers:
                main.close()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_END_SECONDS):
                await self.delete(name)
            if isinstance(error, OSError):
                raise BackendError(
                    f"container {name!r} of sandbox {self._label!r} cannot be made: {error.strerror or error}",
                    hint="Is a limit of the sandbox too small for it?" if error.errno == errno.ENOMEM else "",
                ) from error
            raise

    async def _create(self, container: Container, main: Process) -> None:
        plan = container.plan
        leaf = plan.cgroup.leaf("init")
        if container.with_init:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            container.control = ours
            with theirs, streams() as (null, _, _), last_words() as stderr:
                container.created = await self._runtime.create(
                    plan.oci_id,
                    plan.bundle,
                    stdio=(null, null, stderr),
                    extra_fds=(theirs.fileno(), *plan.extra_fds),
                    cgroup_procs=leaf.entry,
                    netns=plan.netns,
                    mounts=plan.mounts,
                    timeout=START_SECONDS,
                )
        else:
            main.cgroup = leaf
            with streams(main.stdio) as stdio:
                container.created = await self._runtime.create(
                    plan.oci_id, plan.bundle, stdio=stdio, cgroup_procs=leaf.entry, timeout=START_SECONDS
                )
        plan.verify(container.created.pid)

    async def _note(self, container: Container) -> None:
        """Write down what another process needs to drive this container."""
        created = container.created
        assert created is not None  # noqa: S101 (called for what was made)
        descriptors = {"pidfd": created.pidfd}
        if container.control is not None:
            descriptors["control"] = container.control.fileno()
        await self._ledger.container(self._facts_of(container), descriptors)

    @staticmethod
    def _facts_of(container: Container) -> ContainerFacts:
        created = container.created
        assert created is not None  # noqa: S101 (called for what was made)
        return ContainerFacts(
            container.name,
            container.spec,
            "" if container.with_init else container.plan.bundle,
            created.pid,
            created.start_time,
            container.started,
            container.paused,
        )

    @staticmethod
    def _process_facts(container: Container, process: Process, pid: int, *, started: bool) -> ProcessFacts:
        return ProcessFacts(
            container.name, process.exec_id, process.spec, pid, process.start_time, started, process.killed_by_us
        )

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """See `TaskService.start`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        if process.pid is not None:
            raise FailedPreconditionError(
                f"process {exec_id or 'main'} of container {container_id!r} was started before"
            )
        assert container.created is not None  # noqa: S101 (create fails otherwise)
        if exec_id == "" and not container.started:
            await self._runtime.start(container.plan.oci_id, created=container.created, timeout=START_SECONDS)
            container.started = True
            await self._ledger.container(self._facts_of(container))
            if not container.with_init:
                process.pid, process.start_time = container.created.pid, container.created.start_time
                process.pidfd = os.dup(container.created.pidfd)
                await self._ledger.process(self._process_facts(container, process, process.pid, started=True))
        if process.pid is None and process.spec is not None:
            if container.with_init:
                await self._spawn(container, process)
            else:
                await self._exec(container, process)
        for fd in process.stdio:
            if fd >= 0:
                os.close(fd)
        process.stdio = []
        terminal, process_master = None, process.master
        if process_master >= 0:
            terminal = fcntl.fcntl(process_master, fcntl.F_DUPFD_CLOEXEC, 0)
        return StartedTask(process.pid if process.pid is not None else container.created.pid, terminal)

    async def _spawn(self, container: Container, process: Process) -> None:
        assert container.control is not None and process.spec is not None  # noqa: S101, PT018 (a container of the SDK)
        request = container.plan.request(process.spec)
        if process.exec_id == "":
            request = attrs.evolve(request, main=True)
        process.cgroup = container.plan.cgroup.child(process.exec_id or "main", for_process=True)

        async def hold(life: int, pid: int, pidfd: int) -> None:
            facts = self._process_facts(container, process, pid, started=False)
            await self._ledger.process(facts, {"life": life, "pidfd": pidfd})

        try:
            with streams(process.stdio) as stdio, birthplace(process.cgroup, container.plan.admitted) as cgroup:
                started = await spawn(
                    container.control,
                    request,
                    None if request.tty is not None else stdio,
                    before_exec=lambda pid, pidfd: self._before_exec(container, process, pid, pidfd),
                    timeout=START_SECONDS,
                    hold_life=hold if self._ledger.kept else None,
                    cgroup=cgroup,
                )
        except UnavailableError:
            # Init's socket closes a moment before its death can be seen: who asks again shall see it.
            if container.created is not None:
                with anyio.move_on_after(_TOLD_SECONDS):
                    await readable(container.created.pidfd)
            raise
        except ExecFailed as error:
            raise self._not_started(container, process.spec, request.cwd, error) from error
        process.pid, process.pidfd, process.life = started.pid, started.pidfd, started.life
        process.master = started.master if started.master is not None else -1
        facts = self._process_facts(container, process, started.pid, started=True)
        await self._ledger.process(facts, {} if started.master is None else {"master": started.master})

    @staticmethod
    def _before_exec(container: Container, process: Process, pid: int, pidfd: int) -> None:
        try:
            process.enter(pid)
            if not container.verified:
                container.plan.verify_process(pid)
                container.verified = True
        except OSError as error:
            # One that is killed leaves its cgroup before its end can be seen. Source: do_exit() in kernel/exit.c.
            if has_ended(pidfd, patience=_DYING_SECONDS):
                return  # and `wait` will say by what
            raise BackendError(f"process {process.exec_id or 'main'} cannot enter its cgroup: {error}") from error

    async def _exec(self, container: Container, process: Process) -> None:
        assert process.spec is not None  # noqa: S101 (only exec comes here)
        process.cgroup = container.plan.cgroup.child(process.exec_id, for_process=True)
        with streams(process.stdio) as stdio:
            created = await self._runtime.exec(
                container.plan.oci_id,
                container.plan.bundle,
                _process_json(container.plan.bundle, process.spec),
                stdio=stdio,
                exec_id=process.exec_id,
                cgroup_procs=process.cgroup.entry,
                timeout=START_SECONDS,
            )
        process.pid, process.pidfd, process.start_time = created.pid, created.pidfd, created.start_time
        facts = self._process_facts(container, process, created.pid, started=True)
        await self._ledger.process(facts, {"pidfd": created.pidfd} if created.pidfd >= 0 else {})

    async def exec(self, request: ExecTask) -> None:
        """See `TaskService.exec`."""
        container = self._container(request.container_id)
        check_id(request.exec_id)
        if request.exec_id in container.processes:
            raise AlreadyExistsError(f"container {container.name!r} has a process {request.exec_id!r} already")
        if not container.started:
            raise FailedPreconditionError(f"container {container.name!r} has not been started")
        if request.process.terminal is not None and not container.with_init:
            raise UnsupportedError("a terminal for exec in a bundle", "runc", reason="it has no init of ours")
        self._sweep(container)
        container.processes[request.exec_id] = Process(request.exec_id, request.process, duplicate(request.stdio))
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """See `TaskService.kill`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        if not 0 < signal < signals.NSIG:
            raise InvalidArgumentError(f"signal must be 1 to {signals.NSIG - 1}, got {signal}")
        if signal == signals.SIGKILL and all:
            self.kill_now(container_id, exec_id)
            return
        if signal == signals.SIGKILL:
            self._mark_killed(container, process)
        with contextlib.suppress(ProcessLookupError):  # it has ended: there is nothing to signal
            if all and process.cgroup is not None:
                for pid in process.cgroup.pids():
                    _signal_member(process.cgroup, pid, signal)
            elif process.pidfd >= 0:
                signals.pidfd_send_signal(process.pidfd, signal)
        await anyio.lowlevel.checkpoint()

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.kill_now`. Init stays, to tell how everybody ended."""
        container = self._containers.get(container_id)
        if container is None:
            return
        if exec_id:
            processes = [process for process in (container.processes.get(exec_id),) if process is not None]
        else:
            processes = list(container.processes.values())
            for cgroup in container.lingering:
                cgroup.kill()
        for process in processes:
            if process.cgroup is not None and process.exit is None:
                self._mark_killed(container, process)
                process.cgroup.kill()

    def _mark_killed(self, container: Container, process: Process) -> None:
        """It is about to get a SIGKILL from us, which is no end for want of memory; whoever asks later shall know."""
        if not process.killed_by_us and process.pid is not None:
            process.killed_by_us = True
            self._ledger.process_now(self._process_facts(container, process, process.pid, started=True))
        process.killed_by_us = True

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """See `TaskService.wait`."""
        if (container_id, exec_id) in self._exits:
            await anyio.lowlevel.checkpoint()
            return self._exits[container_id, exec_id]
        process = self._process(self._container(container_id), exec_id)
        if process.exit is None:
            if process.pid is None:
                raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has not been started")
            status, at = await self._ended(process)
            if process.exit is None:
                process.exit = self._exit(process, status, at)
        else:
            await anyio.lowlevel.checkpoint()
        return process.exit

    async def _ended(self, process: Process) -> tuple[int | None, float]:
        """The raw wait status, and when the end was seen."""
        if process.life is not None:
            # Copies: whoever asked first may have deleted the process before the others wake up.
            with process.life.dup() as life, copied(process.pidfd) as pidfd:
                status = await ended(life)
                if status is None:
                    status = await status_without_init(pidfd)
            return status, process.ended_at or time.time()
        assert process.pid is not None  # noqa: S101 (started)
        record = await self._keeper.wait_exit(process.pid, process.start_time)
        return record.status, record.at

    @staticmethod
    def _exit(process: Process, status: int | None, at: float) -> Exit:
        if status is None:
            return Exit.lost(exited_at=at)
        kills = oom_kills_of(process.cgroup) if process.cgroup is not None else 0
        return Exit.from_wait_status(status, exited_at=at, oom_kills=kills, killed_by_us=process.killed_by_us)

    async def delete(self, container_id: str, exec_id: str = "") -> Exit | None:
        """See `TaskService.delete`. What an exec'd process left in the background goes on."""
        container = self._containers.get(container_id)
        if container is None:
            if not exec_id:
                await self._planner.free(container_id)  # a creation that was cut may have left something
                self._ledger.forget_container(container_id)
            return self._exits.pop((container_id, exec_id), None)
        if exec_id:
            return await self._delete_process(container, exec_id)
        return await self._delete_container(container)

    async def _delete_process(self, container: Container, exec_id: str) -> Exit | None:
        process = container.processes.get(exec_id)
        if process is None:
            await anyio.lowlevel.checkpoint()
            return None
        process.deleted = True
        if process.pid is not None and process.exit is None:
            await self.wait(container.name, exec_id)
        # Once begun it is done, with or without the rest.
        self._free_process(container, process)
        self._sweep(container)
        if process.cgroup in container.lingering and (process.killed_by_us or process.pid is None):
            # Everything in it was killed, and is about to be gone; background work is not waited for.
            with anyio.move_on_after(_TOLD_SECONDS):
                while process.cgroup in container.lingering:
                    await anyio.sleep(0.001)
                    self._sweep(container)
        return process.exit

    def _free_process(self, container: Container, process: Process) -> None:
        container.processes.pop(process.exec_id, None)
        self._ledger.forget_process(container.name, process.exec_id)
        process.close()
        if process.cgroup is not None:
            container.lingering[process.cgroup] = 0

    def _sweep(self, container: Container) -> None:
        """Free what has ended meanwhile: background work, and processes whose delete was cut by a cancellation."""
        for process in list(container.processes.values()):
            if process.deleted and (process.pid is None or has_ended(process.pidfd)):
                self._free_process(container, process)
        # A few cgroups at a time keep this call short.
        known = list(container.lingering)
        for cgroup in {*known[:4], *known[-1:]}:
            container.lingering[cgroup] = max(container.lingering[cgroup], oom_kills_of(cgroup))
            if cgroup.remove():
                container.oom_kills += container.lingering.pop(cgroup)

    async def _delete_container(self, container: Container) -> Exit | None:
        self.kill_now(container.name)
        # Init tells how they ended; one that does not answer (stopped, say) is killed too, and the kernel may tell.
        for patience in (_TOLD_SECONDS, _END_SECONDS):
            with anyio.move_on_after(patience):
                for exec_id, process in list(container.processes.items()):
                    if process.pid is not None and process.exit is None:
                        await self.wait(container.name, exec_id)
            container.plan.cgroup.kill()
        # Each step may be repeated: a cancellation may have cut this call before.
        if container.control is not None:
            container.control.close()
            container.control = None
        if container.created is not None:
            await ended_process(self._keeper, container.created)
            await self._runtime.delete(container.plan.oci_id)
            os.close(container.created.pidfd)
            container.created = None
        main = container.processes.get("")
        self._oom_kills_gone += self._oom_kills(container)
        container.lingering.clear()
        for exec_id, process in container.processes.items():
            process.close()
            process.cgroup = None
            if process.pid is not None:
                self._exits[container.name, exec_id] = process.exit or Exit.lost(exited_at=time.time())
        with anyio.move_on_after(_END_SECONDS):
            while not container.plan.cgroup.remove():
                # The kernel frees the last process a moment after its end, and no event tells.
                await anyio.sleep(0.001)
        await self._planner.free(container.name)
        self._ledger.forget_container(container.name)
        self._containers.pop(container.name, None)
        return main.exit if main else None

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """See `TaskService.state`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        state = self._state(container, process)
        if state == "stopped" and process.exit is None and process.life is not None:
            process.exit = self._last_look(process)  # nobody has waited for it here, and init has told
        # An ended process has no pid any more: the kernel may have given it to another one.
        pid = process.pid if state != "stopped" else None
        return TaskState(container_id, exec_id, state, pid, process.exit)

    @staticmethod
    def _state(container: Container, process: Process) -> ContainerState:
        if process.exit is not None or (container.created is not None and has_ended(container.created.pidfd)):
            return "stopped"
        if process.pidfd >= 0 and has_ended(process.pidfd):
            return "stopped"
        if not container.started or (process.exec_id and process.pid is None):
            return "created"
        return "paused" if container.paused else "running"

    async def pids(self, container_id: str) -> Sequence[int]:
        """See `TaskService.pids`. Our init is not among them."""
        container = self._container(container_id)
        first = container.created.pid if container.created is not None and container.with_init else -1
        await anyio.lowlevel.checkpoint_if_cancelled()
        return [pid for pid in container.plan.cgroup.pids() if pid != first]

    async def stats(self, container_id: str) -> Metrics:
        """See `TaskService.stats`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        container = self._container(container_id)
        return attrs.evolve(metrics_of(container.plan.cgroup), oom_kills=self._oom_kills(container))

    def oom_kills(self) -> int:
        """Processes of the sandbox that were killed for memory; cgroup v1 counts only those of one cgroup."""
        return self._oom_kills_gone + sum(self._oom_kills(container) for container in self._containers.values())

    @staticmethod
    def _oom_kills(container: Container) -> int:
        cgroups = [process.cgroup for process in container.processes.values() if process.cgroup is not None]
        lingering = sum(max(kills, oom_kills_of(cgroup)) for cgroup, kills in container.lingering.items())
        return container.oom_kills + lingering + sum(map(oom_kills_of, cgroups))

    async def resize_pty(self, container_id: str, exec_id: str, size: Terminal) -> None:
        """See `TaskService.resize_pty`."""
        process = self._process(self._container(container_id), exec_id)
        if process.master < 0:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has no terminal")
        fcntl.ioctl(process.master, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))
        await anyio.lowlevel.checkpoint()

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.close_io`. Our copy was closed when the process started: there is nothing left to do."""
        self._process(self._container(container_id), exec_id)
        await anyio.lowlevel.checkpoint()

    async def pause(self, container_id: str) -> None:
        """See `SupportsPause.pause`."""
        container = self._container(container_id)
        container.plan.cgroup.freeze(_END_SECONDS)
        container.paused = True
        await self._ledger.container(self._facts_of(container))
        await anyio.lowlevel.checkpoint()

    async def resume(self, container_id: str) -> None:
        """See `SupportsPause.resume`."""
        container = self._container(container_id)
        container.plan.cgroup.thaw()
        container.paused = False
        await self._ledger.container(self._facts_of(container))
        await anyio.lowlevel.checkpoint()

    async def update(self, container_id: str, resources: Resources) -> None:
        """See `SupportsUpdate.update`."""
        self._container(container_id).plan.cgroup.set_limits(limits_of(resources))
        await anyio.lowlevel.checkpoint()

    def _not_started(
        self, container: Container, spec: ProcessSpec, cwd: str, error: ExecFailed
    ) -> InvalidArgumentError:
        program = spec.argv[0]
        where = f"in sandbox {self._label!r}"
        if error.step == "cwd":
            return InvalidArgumentError(
                f"cannot start {program!r} {where}: working directory {cwd!r}: {os.strerror(error.errno)}",
                exit_code=_NOT_EXECUTABLE,
            )
        if error.step == "exec" and error.errno == errno.ENOENT:
            return InvalidArgumentError(
                f"cannot start {program!r} {where}: no such program, or its interpreter is missing",
                hint=container.plan.explain(spec),
                exit_code=_NOT_FOUND,
            )
        return InvalidArgumentError(
            f"cannot start {program!r} {where}: {error.step}: {os.strerror(error.errno)}",
            hint="The program's arguments and environment are too large." if error.errno == errno.E2BIG else "",
            exit_code=_NOT_EXECUTABLE,
        )

    def _container(self, container_id: str) -> Container:
        container = self._containers.get(container_id)
        if container is None:
            raise NotFoundError(f"sandbox {self._label!r} has no container {container_id!r}")
        return container

    def _process(self, container: Container, exec_id: str) -> Process:
        process = container.processes.get(exec_id)
        if process is None:
            raise NotFoundError(f"container {container.name!r} of sandbox {self._label!r} has no process {exec_id!r}")
        return process


def _signal_member(cgroup: Cgroup, pid: int, number: int) -> None:
    """Signal a process if it still is in the cgroup: its number may be another's by now."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if cgroup.holds(pid):
                signals.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _process_json(bundle: str, spec: ProcessSpec) -> str:
    """The OCI process object for an exec: that of the container with another program."""
    try:
        process = json.loads(Path(bundle, "config.json").read_bytes())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"the bundle {bundle} has no readable config.json: {error}") from error
    if spec.user is not None:
        uid, _, gid = spec.user.partition(":")
        if not uid.isdecimal() or not (gid or "0").isdecimal():
            raise InvalidArgumentError(f"user {spec.user!r}: exec in a bundle takes numbers only")
        process["user"] = {"uid": int(uid), "gid": int(gid or 0)}
    process["args"] = list(spec.argv)
    process["env"] = [*process.get("env", []), *(f"{name}={value}" for name, value in spec.env.items())]
    process["cwd"] = spec.cwd or process.get("cwd", "/")
    process["terminal"] = False
    return json.dumps(process)
