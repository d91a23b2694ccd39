"""The task service: containers are names for guests that see the same files, processes are guests.

A container without a main process has nothing of its own but its name. The descriptors of a guest's streams are the
guest's from its start on, and closed at its end.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    BackendError,
    ContainerSpec,
    CreateTask,
    ExecTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    Metrics,
    StartedTask,
    TaskState,
    Terminal,
    UnsupportedError,
)
from unisandbox.api.checks import check_signal
from unisandbox.backends.wasm.capabilities import NAME
from unisandbox.backends.wasm.checks import check_own_container, check_process, files_of
from unisandbox.backends.wasm.containers import Containers
from unisandbox.backends.wasm.domain import Domain
from unisandbox.backends.wasm.given import (
    STOPPING,
    Given,
    Surroundings,
    check_room,
    container_of,
    found,
    is_deadly,
    not_started,
)
from unisandbox.backends.wasm.guest import Guest, GuestEnd, GuestLimits, GuestSpec, Preopen
from unisandbox.backends.wasm.modules import Modules
from unisandbox.backends.wasm.programs import Programs
from unisandbox.backends.wasm.shares import Shares
from unisandbox.backends.wasm.tree import SandboxTree

_END_SECONDS: Final = 10.0


@attrs.define(eq=False)
class _Process:
    """One that was asked for; without a guest it was not started. `starting`: a start is under way."""

    given: Given
    guest: Guest | None = None
    starting: bool = False
    killed: bool = False
    exit: Exit | None = None
    cpu_seconds: float = 0.0

    @property
    def running(self) -> bool:
        return self.guest is not None and self.guest.ended is None


@attrs.define(eq=False)
class _Container:
    spec: ContainerSpec
    tree: SandboxTree
    #: It has files of its own.
    own: bool
    #: Its own limits, or the sandbox's.
    shares: Shares
    processes: dict[str, _Process] = attrs.field(factory=dict)


class WasmTasks:
    """See `TaskService`. One object per sandbox."""

    def __init__(
        self,
        label: str,
        *,
        around: Surroundings,
        shares: Shares,
        fuel: int | None,
        domain: Domain,
        modules: Modules,
        programs: Programs,
        tree: Callable[[ContainerSpec], Awaitable[SandboxTree]],
        free_tree: Callable[[SandboxTree], Awaitable[None]],
        own_tree: SandboxTree,
    ) -> None:
        """Args: around: of every process that does not say otherwise; tree: makes the files of a container."""
        self._label, self._around = label, around
        self._shares, self._fuel = shares, fuel
        self._domain, self._modules, self._programs = domain, modules, programs
        self._make_tree, self._free_tree, self._tree = tree, free_tree, own_tree
        self._containers: Containers[_Container] = Containers(label)
        self._oom_kills = 0
        self._cpu_seconds = 0.0

    @property
    def container_ids(self) -> list[str]:
        """The containers, the oldest first."""
        return self._containers.ids

    # --- beginning ---

    async def create(self, request: CreateTask) -> None:
        """See `TaskService.create`."""
        container = container_of(request, NAME)
        check_own_container(container, NAME)
        shared = container.rootfs is None and not container.mounts
        shares = self._shares if container.resources is None else Shares.of(container.resources, self._shares)
        made = _Container(container, self._tree, not shared, shares)
        if container.process is not None:
            made.processes[""] = _Process(Given.of(container.process, request.stdio))
        try:
            self._containers.add(made)
            if not shared:
                made.tree = await self._make_tree(container)
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            self._containers.discard(made)
            await self._discard(made)
            raise

    async def exec(self, request: ExecTask) -> None:
        """See `TaskService.exec`."""
        container = self._containers.get(request.container_id)
        spec = request.given(NAME)
        check_process(spec, NAME)
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._containers.expect(container, request.exec_id)
        container.processes[request.exec_id] = _Process(Given.of(spec, request.stdio))

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """See `TaskService.start`; compiles the module when it is not known yet.

        Raises:
            InvalidArgumentError: there is no such module (exit code 127), or it cannot be started (126).
            FailedPreconditionError: as many guests run as `pids` allows, or the start was overtaken by a kill.
            DeadlineExceededError: it takes too long to compile.
        """
        container = self._containers.get(container_id)
        if not exec_id and container.spec.process is None:
            await anyio.lowlevel.checkpoint()
            return StartedTask(None)
        process = self._containers.process(container, exec_id)
        if process.guest is not None or process.starting:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} was started before")
        process.starting = True
        try:
            await self._start(container, exec_id, process)
        finally:
            process.starting = False
        return StartedTask(None)

    async def _start(self, container: _Container, exec_id: str, process: _Process) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        spec, tree = process.given.spec, container.tree
        around = self._around.within(container.spec, spec)
        lower = tree.lower if tree.originals is None else tree.originals
        async with found(self._programs, spec.argv[0], around, tree.root, lower, self._label) as program:
            module = self._modules.loaded(program) or await self._modules.get(self._domain, program, self._label)
        self._containers.check_startable(container, exec_id, killed=process.killed)
        check_room(self._shares.resources.pids, self.running, f"sandbox {self._label!r}")
        here = sum(each.running for each in container.processes.values())
        check_room(container.shares.resources.pids, here, f"container {container.spec.name!r}")
        begin = [Preopen(f"/proc/self/fd/{at.fd}", at.target, at.writable, at.counted) for at in tree.begin]
        limits = self._limits(container.shares)
        streams = process.given.streams
        given = GuestSpec(spec.argv, around.env, begin, *streams, limits, around.cwd, tree.disk)
        guest = Guest(self._domain, module, given)
        try:
            guest.start()
        except InvalidArgumentError as error:
            raise not_started(spec.argv[0], self._label, error) from error
        process.guest = guest
        process.given.take()  # they are the guest's now, and were ours until now: a start that failed can be repeated

    def _limits(self, shares: Shares) -> GuestLimits:
        """Of a guest in a container with these."""
        seconds = [each.resources.cpu_seconds for each in (self._shares, shares)]
        return GuestLimits(
            memory=shares.memory,
            cpu=shares.cpu,
            cpu_seconds=min((each for each in seconds if each is not None), default=None),
            fuel=self._fuel,
            files=files_of(self._shares.resources, shares.resources),
        )

    # --- going on ---

    @property
    def _processes(self) -> list[_Process]:
        return [process for container in self._containers.all for process in container.processes.values()]

    @property
    def running(self) -> int:
        """How many guests run now."""
        return sum(process.running for process in self._processes)

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """See `TaskService.state`."""
        container = self._containers.get(container_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if not exec_id and container.spec.process is None:
            return TaskState(container_id, exec_id, "running")
        process = self._containers.process(container, exec_id)
        exit = self._exit_of(process)
        if exit is not None:
            return TaskState(container_id, exec_id, "stopped", None, exit)
        return TaskState(container_id, exec_id, "created" if process.guest is None else "running")

    async def pids(self, container_id: str) -> Sequence[int]:
        """See `TaskService.pids`: none; guests are threads of this process."""
        self._containers.get(container_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        return ()

    async def stats(self, container_id: str) -> Metrics:
        """See `TaskService.stats`."""
        container = self._containers.get(container_id)
        processes = container.processes.values()
        await anyio.lowlevel.checkpoint_if_cancelled()
        for process in processes:
            self._exit_of(process)
        alive = [process.guest for process in processes if process.guest is not None and process.running]
        return Metrics(
            memory_bytes=sum(guest.memory_bytes for guest in alive),
            cpu_seconds=sum(p.cpu_seconds for p in processes) + sum(guest.cpu_seconds for guest in alive),
            pids=len(alive),
            oom_kills=sum(p.exit.oom_kills for p in processes if p.exit is not None),
            memory_limit_bytes=container.shares.resources.memory,
            pids_limit=container.shares.resources.pids,
        )

    def metrics(self) -> Metrics:
        """What the sandbox uses now; memory is that of all guests' linear memories."""
        for process in self._processes:
            self._exit_of(process)
        alive = [process.guest for process in self._processes if process.guest and process.running]
        return Metrics(
            memory_bytes=self._shares.memory.used,
            memory_peak_bytes=self._shares.memory.peak,
            memory_limit_bytes=self._shares.resources.memory,
            cpu_seconds=self._cpu_seconds + sum(guest.cpu_seconds for guest in alive),
            pids=len(alive),
            pids_limit=self._shares.resources.pids,
            oom_kills=self._oom_kills,
        )

    async def resize_pty(self, container_id: str, exec_id: str, size: Terminal) -> None:
        """No guest has a terminal."""
        self._containers.process(self._containers.get(container_id), exec_id)
        await anyio.lowlevel.checkpoint()
        raise UnsupportedError("tty", NAME)

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """There is nothing to close: a guest has our only copies."""
        self._containers.get(container_id)
        await anyio.lowlevel.checkpoint()

    # --- ending ---

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """See `TaskService.kill`: a guest has no handlers, so each signal does what it does by default.

        Raises:
            UnsupportedError: a signal that stops a process for a while.
        """
        container = self._containers.get(container_id)
        if not exec_id and container.spec.process is None:
            chosen = list(container.processes.values()) if all else []
        else:
            chosen = [self._containers.process(container, exec_id)]
        check_signal(signal)
        if signal in STOPPING:
            raise UnsupportedError(f"signal {signal}", NAME, reason="a guest cannot be stopped for a while")
        await anyio.lowlevel.checkpoint_if_cancelled()
        if is_deadly(signal):
            for process in chosen:
                _end(process, signal)

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.kill_now`."""
        container = self._containers.find(container_id)
        for name, process in () if container is None else tuple(container.processes.items()):
            if exec_id in {"", name}:
                _end(process, signals.SIGKILL)

    async def ask_to_end(self) -> None:
        """SIGTERM to every guest, which ends them."""
        for process in self._processes:
            _end(process, signals.SIGTERM)
        await anyio.lowlevel.checkpoint()

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """See `TaskService.wait`."""
        gone = self._containers.exit_of_gone(container_id, exec_id)
        if gone is not None:
            await anyio.lowlevel.checkpoint()
            return gone
        process = self._containers.process(self._containers.get(container_id), exec_id)
        if process.guest is None:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has not been started")
        await process.guest.wait()
        exit = self._exit_of(process)
        assert exit is not None  # noqa: S101 (its end was waited for)
        return exit

    async def delete(self, container_id: str, exec_id: str = "") -> Exit | None:
        """See `TaskService.delete`; what still runs is ended.

        Raises:
            BackendError: a guest sits in a call of the kernel (a network file system, say) and has not ended yet.
        """
        container = self._containers.find(container_id)
        if container is None:
            await anyio.lowlevel.checkpoint()
            return self._containers.forget_exit(container_id, exec_id)
        if exec_id:
            process = container.processes.get(exec_id)
            if process is None:
                await anyio.lowlevel.checkpoint()
                return None
            await self._ended([process])
            container.processes.pop(exec_id, None)
            process.given.close()
            return process.exit
        self.kill_now(container_id)
        await self._ended(list(container.processes.values()))
        self._containers.discard(container)
        for name, process in container.processes.items():
            if process.exit is not None:
                self._containers.keep_exit(container_id, name, process.exit)
        await self._discard(container)
        main = container.processes.get("")
        return main.exit if main is not None else None

    async def _ended(self, processes: Sequence[_Process]) -> None:
        for process in processes:
            _end(process, signals.SIGKILL)
        with anyio.move_on_after(_END_SECONDS):
            for process in processes:
                if process.guest is not None:
                    await process.guest.wait()
        await anyio.lowlevel.checkpoint_if_cancelled()
        for process in processes:
            if process.guest is not None and self._exit_of(process) is None:
                raise BackendError(
                    f"guest {process.given.spec.argv[0]!r} of sandbox {self._label!r} has not ended: "
                    "it sits in the kernel",
                    hint="A file in it may be on a network or a FUSE file system that does not answer.",
                )

    async def _discard(self, container: _Container) -> None:
        for process in container.processes.values():
            process.given.close()
        if container.own and container.tree is not self._tree:
            with anyio.CancelScope(shield=True):
                await self._free_tree(container.tree)

    def abandon(self) -> None:
        """End the guests, which close what is theirs, and close what is ours of them. Synchronous."""
        for container in self._containers.all:
            self.kill_now(container.spec.name)
            for process in container.processes.values():
                process.given.close()
            if container.own and container.tree is not self._tree:
                container.tree.close()

    def _exit_of(self, process: _Process) -> Exit | None:
        """How it ended, noted once; None while it runs."""
        if process.exit is None and process.guest is not None and process.guest.ended is not None:
            end = process.guest.ended
            process.exit, process.cpu_seconds = _exit(end), end.cpu_seconds
            self._cpu_seconds += end.cpu_seconds
            self._oom_kills += process.exit.oom_kills
        return process.exit


def _exit(end: GuestEnd) -> Exit:
    return Exit(
        code=end.code,
        signal=end.signal,
        reason=end.reason,
        oom_kills=int(end.reason == "oom"),
        exited_at=end.ended_at,
        detail=end.detail,
    )


def _end(process: _Process, signal: int) -> None:
    if process.guest is None:
        process.killed = True
    else:
        process.guest.kill(signal)
