"""The OCI task service: the containers of one sandbox, through an OCI runtime.

Containers of the SDK have our init as PID 1, and every program is spawned by it: no runtime call for `run` and `exec`.
Bundles that come from an engine (containerd) run as they are, and `exec` goes through the runtime.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal as signals
import struct
import termios
import time
from collections.abc import Sequence
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    CreateTask,
    DeadlineExceededError,
    ExecTask,
    Exit,
    FailedPreconditionError,
    Metrics,
    NotFoundError,
    Resources,
    StartedTask,
    TaskState,
    Terminal,
    UnsupportedError,
    check_id,
)
from unisandbox.api.checks import check_signal
from unisandbox.host.cgroups import Cgroup, patience
from unisandbox.host.ends import HeldEnd
from unisandbox.host.keeper import Keeper
from unisandbox.host.latest import EXITS_KEPT, Latest
from unisandbox.oci import killing, lingering, looking, requests
from unisandbox.oci.changing import change_limits
from unisandbox.oci.ends import end_now, exit_of, wait_end, wait_end_of_init
from unisandbox.oci.ledger import ContainerFacts, Ledger, container_facts
from unisandbox.oci.memory import more_oom_kills
from unisandbox.oci.plan import Planner
from unisandbox.oci.processes import (
    Container,
    Process,
    all_oom_kills_of,
    awaits_start,
    duplicate,
    end_init,
)
from unisandbox.oci.restore import Restorer
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.starting import START_SECONDS, Starter, is_with_terminal

# How long the end of a killed process may take: it may sit in the kernel (a disk, a network file system).
_END_SECONDS: Final = 10.0
_TOLD_SECONDS: Final = 1.0


class OciTaskService:
    """Drives the containers of one sandbox; see `TaskService`, `SupportsPause` and `SupportsUpdate`."""

    def __init__(self, label: str, keeper: Keeper, runtime: Runtime, planner: Planner, ledger: Ledger) -> None:
        self._label = label
        self._keeper = keeper
        self._runtime = runtime
        self._planner = planner
        self._ledger = ledger
        self._starter = Starter(label, keeper, runtime, ledger)
        self._containers: dict[str, Container] = {}
        self._making: set[str] = set()
        self._oom_kills_gone = 0
        # Exits of processes whose container is gone, for those who have not asked yet.
        self._exits: Latest[tuple[str, str], Exit] = Latest(EXITS_KEPT)
        # Of the last container of a name that is gone, whose exits these are.
        self._identities: Latest[str, str] = Latest(EXITS_KEPT)
        self._taken_over: list[tuple[str, str]] = []

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
        self._remember(container)
        for exec_id, process in container.processes.items():
            if process.pid is not None:
                exit = process.exit or end_now(process)
                self._exits[name, exec_id] = exit or Exit.lost(exited_at=time.time())
            process.close()
        if container.control is not None:
            container.control.close()
            container.control = None
        if container.created is not None and container.created.pidfd >= 0:
            os.close(container.created.pidfd)
            container.created = None

    async def restore(self, *, exclusive: bool) -> None:
        """Take over the containers that other processes have made, and let go of those that they have ended.

        Args:
            exclusive: nobody else makes one meanwhile: what a creation that was cut has left is undone.

        Raises:
            BackendError: what is written down about one cannot be read.
        """
        restorer = Restorer(self._label, self._containers, self._ledger, self._planner, self._runtime)
        self._taken_over += await restorer.run(exclusive=exclusive, let_go=self._let_go)
        for name in self._containers:
            self._exits.pop((name, ""), None)  # of a namesake that another process has removed
        for container in self._containers.values():
            lingering.sweep(container, self._ledger)

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
        self._exits.pop((name, ""), None)
        requests.check_create(request)
        if name in self._containers or name in self._making:
            raise AlreadyExistsError(f"sandbox {self._label!r} has a container {name!r} already")
        self._identities.pop(name, None)
        stdio = duplicate(request.stdio)
        main = Process("", request.container.process if request.container else None, stdio, terminal=request.terminal)
        facts = ContainerFacts(name, request.container, request.bundle)
        container: Container | None = None
        self._making.add(name)
        try:
            await self._ledger.container(facts)
            if request.container is not None:
                plan = await self._planner.prepare(request)
            elif request.config:
                plan = await self._planner.adapt(request)
            else:
                plan = await self._planner.adopt(name, request.bundle)
            container = Container(name, plan, with_init=request.container is not None, spec=request.container)
            container.processes[""] = main
            self._containers[name] = container
            await self._starter.create(container, main)
            await self._guard(container)
            await self._note(container)
        except BaseException as error:
            if container is None:
                main.close()
            else:
                # It may have been deleted while it was made: what came after that is undone, too.
                self._containers.setdefault(name, container)
            with anyio.CancelScope(shield=True), anyio.move_on_after(_END_SECONDS):
                await self.delete(name)
            if isinstance(error, OSError):
                raise BackendError(
                    f"container {name!r} of sandbox {self._label!r} cannot be made: {error.strerror or error}",
                    hint="Is a limit of the sandbox too small for it?" if error.errno == errno.ENOMEM else "",
                ) from error
            raise
        finally:
            self._making.discard(name)

    async def _guard(self, container: Container) -> None:
        """Where no cgroup ends it, the keeper has to know its first process, with which all of it ends."""
        created = container.created
        if created is not None and not container.plan.cgroup.holds_processes:
            await self._keeper.guard([self._ledger.guard(container.name, created.pid, created.start_time)])

    async def _note(self, container: Container) -> None:
        """Write down what another process needs to drive this container."""
        created = container.created
        assert created is not None  # noqa: S101 (called for what was made)
        descriptors = {"pidfd": created.pidfd}
        main = container.processes[""]
        if main.master >= 0:
            descriptors["master"] = main.master
        if container.control is not None:
            descriptors["control"] = container.control.fileno()
        await self._ledger.container(container_facts(container), descriptors)

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """See `TaskService.start`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        if process.pid is not None or process.starting is not None:
            raise FailedPreconditionError(
                f"process {exec_id or 'main'} of container {container_id!r} was started before"
            )
        if container.created is None or container.deleting:
            raise NotFoundError(f"container {container_id!r} of sandbox {self._label!r} is being removed")
        process.starting = anyio.Event()
        try:
            await self._start(container, process)
        finally:
            process.starting.set()
            process.starting = None
            if process.closed:  # it took too long for the one who deletes its container
                self._ledger.forget_process(container_id, exec_id)
                process.close()
        if process.closed or container.created is None:
            raise NotFoundError(f"container {container_id!r} of sandbox {self._label!r} was removed")
        for fd in process.stdio:
            if fd >= 0:
                os.close(fd)
        process.stdio = []
        terminal, process_master = None, process.master
        if process_master >= 0:
            terminal = fcntl.fcntl(process_master, fcntl.F_DUPFD_CLOEXEC, 0)
        return StartedTask(process.pid if process.pid is not None else container.created.pid, terminal)

    async def _start(self, container: Container, process: Process) -> None:
        if process.exec_id == "" and not container.started:
            assert container.created is not None  # noqa: S101 (looked at by `start`)
            await self._runtime.start(container.plan.oci_id, created=container.created, timeout=START_SECONDS)
            container.started = True
            await self._ledger.container(container_facts(container))
            if not container.with_init:
                process.pid, process.start_time = container.created.pid, container.created.start_time
                process.pidfd = os.dup(container.created.pidfd)
                facts = self._ledger.facts(container, process, process.pid, started=True)
                await self._ledger.process(facts, {"pidfd": process.pidfd})
        if process.pid is None and (process.spec is not None or process.oci_process):
            if container.with_init:
                await self._starter.spawn(container, process)
            else:
                await self._starter.exec(container, process)

    async def exec(self, request: ExecTask) -> None:
        """See `TaskService.exec`."""
        container = self._container(request.container_id)
        requests.check_exec(request, container, self._label)
        terminal = bool(request.oci_process) and is_with_terminal(request.oci_process)
        lingering.sweep(container, self._ledger)
        process = Process(request.exec_id, request.process, duplicate(request.stdio), request.oci_process, terminal)
        container.processes[request.exec_id] = process
        self._exits.pop((container.name, request.exec_id), None)  # of its namesake in an earlier container
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """See `TaskService.kill`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        check_signal(signal)
        if signal == signals.SIGKILL and all:
            self.kill_now(container_id, exec_id)
            return
        killing.send(container, process, signal, self._ledger, all=all)
        await anyio.lowlevel.checkpoint()

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.kill_now`."""
        container = self._containers.get(container_id)
        if container is None:
            return
        if not exec_id:
            killing.end_all(container, self._ledger)
        elif (process := container.processes.get(exec_id)) is not None:
            killing.end(container, [process], self._ledger)

    def identity_of(self, container_id: str) -> str:
        """See `TellsEnds.identity_of`."""
        container = self._containers.get(container_id)
        there = "" if container is None else looking.identity(container)
        return there or self._identities.get(container_id, "")

    def _remember(self, container: Container) -> None:
        if identity := looking.identity(container):
            self._identities[container.name] = identity

    def end_of(self, container_id: str, exec_id: str = "") -> HeldEnd | None:
        """See `TellsEnds.end_of`. A bundle's process has no init of ours that would tell the keeper."""
        container = self._containers.get(container_id)
        process = container.processes.get(exec_id) if container is not None else None
        return None if container is None or process is None else looking.end(container, process, self._ledger)

    def taken_over(self) -> Sequence[tuple[str, str]]:
        """See `TellsEnds.taken_over`."""
        taken, self._taken_over = self._taken_over, []
        return taken

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """See `TaskService.wait`."""
        if (container_id, exec_id) in self._exits:
            await anyio.lowlevel.checkpoint()
            return self._exits[container_id, exec_id]
        container = self._container(container_id)
        process = self._process(container, exec_id)
        if process.exit is None:
            if process.pid is None and awaits_start(container, process) is None:
                raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has not been started")
            status, at = await wait_end(self._keeper, container, process)
            if process.exit is None:
                process.exit = exit_of(process, status, at)
        else:
            await anyio.lowlevel.checkpoint()
        if not exec_id:
            killing.end_rest(container, process)
        return process.exit

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
        async with container.deletion:
            if self._containers.get(container_id) is container:
                return await self._delete_container(container)
        return self._exits.get((container_id, ""))  # somebody else was quicker, and its name may be another's by now

    async def _delete_process(self, container: Container, exec_id: str) -> Exit | None:
        process = container.processes.get(exec_id)
        if process is None:
            await anyio.lowlevel.checkpoint()
            return None
        process.deleted = True
        if process.starting is not None:
            await process.starting.wait()
        if process.pid is not None and process.exit is None:
            await self.wait(container.name, exec_id)
        # Once begun it is done, with or without the rest.
        lingering.free(container, process, self._ledger)
        lingering.sweep(container, self._ledger)
        if process.swept or process.killed_by_us or process.pid is None:
            # Everything in it was killed, and is about to be gone; background work is not waited for.
            await lingering.wait_swept(container, process, self._ledger)
        return process.exit

    async def _delete_container(self, container: Container) -> Exit | None:
        container.deleting = True
        self._remember(container)
        self.kill_now(container.name)
        # Init tells how they ended; one that does not answer (stopped, say) is killed too, and the kernel may tell.
        for seconds in (_TOLD_SECONDS, _END_SECONDS):
            with anyio.move_on_after(seconds) as scope:
                for exec_id, process in list(container.processes.items()):
                    if process.starting is not None:
                        await process.starting.wait()
                        self.kill_now(container.name, exec_id)  # it may have come after the first kill
                    is_there = container.processes.get(exec_id) is process
                    if is_there and process.pid is not None and process.exit is None:
                        await self.wait(container.name, exec_id)
            end_init(container.plan.cgroup, container.created)
            if not scope.cancelled_caught:
                break
        # Each step may be repeated: a cancellation may have cut this call before.
        if container.control is not None:
            container.control.close()
            container.control = None
        created = container.created
        if created is not None:
            await wait_end_of_init(self._keeper, created)
            await self._runtime.delete(container.plan.oci_id)
            if container.created is created:  # nobody else was quicker
                os.close(created.pidfd)
                container.created = None
        else:
            # One that failed, or was cut, while it was made: what could not be scrapped then.
            await self._runtime.delete(container.plan.oci_id, force=True)
        main = container.processes.get("")
        self._oom_kills_gone += all_oom_kills_of(container)
        container.lingering.clear()
        for exec_id, process in container.processes.items():
            process.close()
            process.cgroup = None
            if process.pid is not None:
                self._exits[container.name, exec_id] = process.exit or Exit.lost(exited_at=time.time())
        await patience.remove(container.plan.cgroup.dirs, _END_SECONDS)  # the last process goes a moment after its end
        await self._planner.free(container.name)
        if not container.plan.cgroup.holds_processes:
            await self._keeper.unguard([self._ledger.guard(container.name, 0, 0).name])
        self._ledger.forget_container(container.name)
        self._containers.pop(container.name, None)
        return main.exit if main else None

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """See `TaskService.state`."""
        container = self._container(container_id)
        process = self._process(container, exec_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        return looking.state(container, process)

    async def pids(self, container_id: str) -> Sequence[int]:
        """See `TaskService.pids`. Our init is not among them."""
        container = self._container(container_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        return looking.pids(container)

    async def stats(self, container_id: str) -> Metrics:
        """See `TaskService.stats`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        return looking.metrics(self._container(container_id), self._label)

    async def more_oom_kills(self, container_id: str, than: int = 0) -> int:
        """See `SupportsOomNotice.more_oom_kills`."""
        return await more_oom_kills(self._container(container_id), than)

    def oom_kills(self) -> int:
        """Processes of the sandbox that were killed for memory; cgroup v1 counts only those of one cgroup."""
        return self._oom_kills_gone + sum(all_oom_kills_of(container) for container in self._containers.values())

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
        await anyio.lowlevel.checkpoint_if_cancelled()
        try:
            await patience.freeze(self._freezer(container_id), _END_SECONDS)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"container {container_id!r} of sandbox {self._label!r} could not be paused within {_END_SECONDS:g} s",
                hint="Something in it may sit in the kernel (a disk, a network file system).",
            ) from error

    async def resume(self, container_id: str) -> None:
        """See `SupportsPause.resume`."""
        self._freezer(container_id).thaw()
        await anyio.lowlevel.checkpoint()

    def _freezer(self, container_id: str) -> Cgroup:
        cgroup = self._container(container_id).plan.cgroup
        if not cgroup.holds_processes:
            raise UnsupportedError("pause", "runc", reason="there is no cgroup that this user may write")
        return cgroup

    async def update(self, container_id: str, resources: Resources | str) -> None:
        """See `SupportsUpdate.update`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        change_limits(self._container(container_id), resources, self._label)

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
