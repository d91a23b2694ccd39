"""One sandbox of an engine: its state, its lock, and the calls that change it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    ContainerSpec,
    CreateSandbox,
    CreateTask,
    DeadlineExceededError,
    EventKind,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    RecoverSandbox,
    Resources,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    SandboxStatus,
    Stdio,
    SupportsPause,
    TaskService,
    UnsupportedError,
)
from unisandbox.engine.cleaning import CLEANING_SECONDS, Cleaning
from unisandbox.engine.held import HeldProcesses
from unisandbox.engine.logs import LOG_BYTES, LOG_STREAMS, LogReader, LogStream
from unisandbox.engine.operations import OperationLog
from unisandbox.engine.records import Phase, Record, this_process

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore

MAIN: Final = "main"

# How long the keeper may take to end what has expired; more only when the wall clock was set forward.
_EXPIRY_SECONDS: Final = 2.0
_EXPIRY_POLL: Final = 0.01


class Entry:
    """One sandbox of this engine, as its handles see it.

    Attributes:
        sandbox_id, spec, backend: as created.
        record: what is on disk of it, or will be in a moment.
        held: its processes, as far as the keeper holds what outlives this process.
        main: the name of the container that `run` and `exec` use.
        closing: what to call when the sandbox is removed (streams of its processes).
    """

    def __init__(self, core: EngineCore, record: Record, spec: SandboxSpec, sandboxer: Sandboxer) -> None:
        self.sandbox_id: str = record.sandbox_id
        self.spec = spec
        self.backend: str = record.backend
        self.record: Record = record
        self.main = MAIN
        self.closing: set[Callable[[], None]] = set()
        self.held: HeldProcesses = HeldProcesses(core.host, record.sandbox_id)
        self._core = core
        self._sandboxer = sandboxer
        self._lock = anyio.Lock()
        self._task: TaskService | None = None
        self._execs = 0
        self._containers = 0
        self._main_made = False
        # Containers whose end the readers of events have been told.
        self._told: set[str] = set()
        # "new": being created here; "unread": another process has made it, and it was not looked at yet.
        self._state: Literal["new", "unread", "ready", "stopped", "removed"] = "new"
        # When this process last had the right to change it; see `Keeper.lock`.
        self._turn = 0
        self._prefix = core.host.prefix(record.sandbox_id)
        if record.phase != "creating" or record.owner != this_process():
            self._state = "unread"

    @property
    def label(self) -> str:
        """What to call it in messages: its name, or its id."""
        return self.spec.name or self.sandbox_id

    @property
    def engine_open(self) -> bool:
        """Whether the engine still answers."""
        return not self._core.closed

    @property
    def cleaning(self) -> Cleaning:
        """Where cleaning goes that must not be lost."""
        return self._core.cleaning

    @property
    def removed(self) -> bool:
        """Whether it is gone for good."""
        return self._state == "removed"

    @property
    def known(self) -> bool:
        """Whether it is more than an intent of this process."""
        return self._state != "new"

    @property
    def expired(self) -> bool:
        """Whether its ttl is over: the keeper has ended it."""
        return self.record.expires_at is not None and self._prefix in self._core.host.keeper.expirations

    @property
    def sandboxer(self) -> Sandboxer:
        """Who manages it."""
        self._check_alive()
        return self._sandboxer

    @property
    def task(self) -> TaskService:
        """Its task service."""
        self._check_alive()
        if self._task is None:
            raise FailedPreconditionError(f"sandbox {self.label!r} has not been started")
        return self._task

    @property
    def last_task(self) -> TaskService:
        """Its task service, also after the end: it still knows how processes ended."""
        if self._task is None:
            raise FailedPreconditionError(f"sandbox {self.label!r} has not been started")
        return self._task

    def container_exited(self, container_id: str, exit: Exit | None) -> None:
        """Tell the readers of events of a container's end, once."""
        if container_id not in self._told:
            self._told.add(container_id)
            self.emit("container.exited", container_id=container_id, exit=exit)

    async def _containers_exited(self, containers: Sequence[str]) -> None:
        for container_id in containers:
            if container_id not in self._told:
                exit = None
                with contextlib.suppress(SandboxError):  # a container without a main process, or one never started
                    exit = await self.last_task.wait(container_id)
                self.container_exited(container_id, exit)

    def next_exec_id(self) -> str:
        """A new id for a process, never reused in this sandbox."""
        self._execs += 1
        # Other processes count, too, each for itself.
        return f"p{self._execs}" + (f"-{self._core.host.keeper.hello.client}" if self._core.host.shared else "")

    def emit(
        self,
        kind: EventKind,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        """Tell the engine's readers of events."""
        self._core.events.emit(
            kind,
            self.sandbox_id,
            container_id=container_id or (MAIN if exec_id else ""),
            exec_id=exec_id,
            exit=exit,
            detail=detail,
        )

    async def take_over_output(self, fd: int) -> None:
        """Let the keeper read and drop what background processes still write to the pipe `fd`."""
        await self._core.host.keeper.ring(f"{self._prefix}drain/{self.next_exec_id()}", fd, limit=4096)

    async def ready(self) -> TaskService:
        """The task service, with the main container running: it is made at the first use.

        Raises:
            NotFoundError: the sandbox was removed.
            FailedPreconditionError: it is stopped.
        """
        self._check_alive()
        self._core.check_keeper()
        await self.cleaning.catch_up()
        await self._await_expiry()
        self._check_alive()
        if self._core.host.shared and (self._state == "unread" or self._core.records.changed(self.sandbox_id)):
            await self._read()
        task = self.task
        self._check_started()
        if not self._main_made or (await task.state(MAIN)).state == "stopped":
            async with self.changing():
                self._check_started()
                task = self.task
                if self._main_made and (await task.state(MAIN)).state == "stopped":
                    if await self.held.launched():
                        raise FailedPreconditionError(
                            f"the program that was launched in sandbox {self.label!r} has ended",
                            hint="launch() another one, or stop() and start() the sandbox.",
                        )
                    # Its init is gone (killed for memory, say): what it ran has ended, the files are still there.
                    await self._drop_main(task)
                if not self._main_made:
                    await self._make_main(task)
        return task

    async def launch(self, process: ProcessSpec) -> int:
        """Make the main container with this program as its main process; its pid on the host.

        Raises:
            FailedPreconditionError: the main container runs.
        """
        self._check_alive()
        self._core.check_keeper()
        await self.cleaning.catch_up()
        async with self.changing():
            self._check_started()
            task = self.task
            if self._main_made:
                if (await task.state(MAIN)).state != "stopped":
                    raise FailedPreconditionError(
                        f"something runs in sandbox {self.label!r} already", hint="Use exec, or stop the sandbox first."
                    )
                await self._drop_main(task)
            await self.held.launch()
            pid = await self._add_container(task, ContainerSpec(name=MAIN, process=process))
            self._main_made = True
            return pid

    async def _drop_main(self, task: TaskService) -> None:
        self._main_made = False
        await task.delete(MAIN)
        await self._forget_main()

    async def _forget_main(self) -> None:
        if await self.held.launched():
            await self.drop_logs(MAIN)
            self.held.forget_launch()

    async def _make_main(self, task: TaskService) -> None:
        try:
            await task.create(CreateTask(MAIN, container=ContainerSpec(name=MAIN)))
            self.emit("container.created", container_id=MAIN)
            await task.start(MAIN)
        except BaseException:
            await self.cleaning.run(lambda: task.delete(MAIN))
            raise
        self._main_made = True
        self._told.discard(MAIN)
        self.emit("container.started", container_id=MAIN)

    def process_exited(self, exec_id: str, exit: Exit | None) -> None:
        """A process has ended, and whoever started it knows how."""
        self.held.forget(exec_id)
        if exit is not None and exit.reason == "oom":
            self.emit("process.oom", exec_id=exec_id, exit=exit)
        self.emit("process.exited", exec_id=exec_id, exit=exit)

    @property
    def operations(self) -> OperationLog:
        """What was asked for under operation ids."""
        return self._core.operations

    async def known_task(self) -> TaskService:
        """The task service, with all that other processes have done."""
        self._check_alive()
        if self._core.host.shared and self._state != "new":
            await self._catch_up(exclusive=False)
        return self.task

    def next_container_name(self) -> str:
        """A name for a container that the user did not name."""
        taken = self._task.container_ids if self._task is not None else ()
        while True:
            self._containers += 1
            name = f"c{self._containers}"
            if name not in taken:
                return name

    async def add_container(self, spec: ContainerSpec) -> int:
        """Create and start a container; the keeper keeps the last of what it writes. Its pid on the host."""
        self._check_alive()
        self._core.check_keeper()
        await self.cleaning.catch_up()
        if spec.name == MAIN:
            raise AlreadyExistsError(
                f"container {MAIN!r} of sandbox {self.label!r} is the one that run and exec use",
                hint="Take another name, or launch() a program in it.",
            )
        async with self.changing():
            self._check_started()
            return await self._add_container(self.task, spec)

    async def _add_container(self, task: TaskService, spec: ContainerSpec) -> int:
        if spec.name in task.container_ids:
            raise AlreadyExistsError(
                f"sandbox {self.label!r} has a container {spec.name!r} already",
                hint="Take another name.",
            )
        readers: list[int] = []
        writers: list[int] = []

        async def undo() -> None:
            task.kill_now(spec.name)
            await task.delete(spec.name)
            await self.drop_logs(spec.name)

        try:
            for _ in LOG_STREAMS:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                readers.append(reader)
                writers.append(writer)
            try:
                await task.create(CreateTask(spec.name, container=spec, stdio=Stdio(None, *writers)))
                self._told.discard(spec.name)
                self.emit("container.created", container_id=spec.name)
                for stream, reader in zip(LOG_STREAMS, readers, strict=True):
                    await self._core.host.keeper.ring(self._log(spec.name, stream), reader, limit=LOG_BYTES)
                started = await task.start(spec.name)
            except BaseException:
                await self.cleaning.run(undo)
                raise
        finally:
            for fd in (*readers, *writers):
                os.close(fd)
        self.emit("container.started", container_id=spec.name)
        return started.pid

    def logs(self, container_id: str, stream: LogStream, *, offset: int = 0, tail: int | None = None) -> LogReader:
        """What the main process of a container writes."""
        if stream not in LOG_STREAMS:
            raise InvalidArgumentError(f"stream must be 'stdout' or 'stderr', got {stream!r}")
        whose = f"container {container_id!r} of sandbox {self.label!r}"
        name = self._log(container_id, stream)
        return LogReader(self._core.host.keeper, name, whose, offset=offset, tail=tail)

    async def drop_logs(self, container_id: str) -> None:
        """Forget what a container wrote."""
        await self._core.host.keeper.drop([self._log(container_id, stream) for stream in LOG_STREAMS])

    def _log(self, container_id: str, stream: LogStream) -> str:
        return f"{self._prefix}log/{container_id}/{stream}"

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Nobody else changes the sandbox meanwhile, in this process or another one; what others have done is known.

        Raises:
            NotFoundError: another process has removed it.
            FailedPreconditionError: another engine has taken it over.
        """
        async with self._lock:
            keeper = self._core.host.keeper
            await self._await_expiry()
            if not self._core.host.shared or not keeper.alive:
                yield
                return
            name = f"{self._prefix}change"
            turn = await keeper.lock(name)
            try:
                if turn != self._turn + 1 and self._state != "new":
                    await self._catch_up(exclusive=True)
                self._turn = turn
                yield
            finally:
                keeper.unlock(name)

    async def _await_expiry(self) -> None:
        """About the time at which its ttl is over: wait until the keeper, whose clock decides, has said so."""
        over = self.record.expires_at
        if over is None or self.expired or self._state in {"new", "removed"} or time.time() < over:
            return
        with anyio.move_on_after(_EXPIRY_SECONDS):
            while not self.expired:
                await self._core.host.keeper.clients()  # with each answer comes what is new
                await anyio.sleep(_EXPIRY_POLL)

    async def _read(self) -> None:
        """Learn what others have done, as whoever wants to change it."""
        async with self.changing():
            return

    async def _catch_up(self, *, exclusive: bool) -> None:
        """Learn what other processes have done to it."""
        record = self._core.records.read(self.sandbox_id)
        if record is None or self.expired:
            await self.vanish()
            raise self._gone()
        self._check_same(record)
        self.record = record
        request = RecoverSandbox(
            self.sandbox_id, self.spec, lived=True, started=record.phase == "ready", exclusive=exclusive
        )
        started = await self._sandboxer.recover(request)
        if started is None:
            raise FailedPreconditionError(
                f"sandbox {self.label!r} cannot be used: its creation or removal by process {record.owner[0]} was cut",
                hint="Remove it.",
            )
        self._task = started.task
        self._state = "stopped" if record.phase == "stopped" else "ready"
        self._main_made = MAIN in started.task.container_ids

    def _check_same(self, record: Record) -> None:
        if record.generation != self.record.generation:
            self._core.drop(self)  # `Engine.get` gives a new one
            raise FailedPreconditionError(
                f"sandbox {self.label!r} was taken over by the engine of process {record.owner[0]}: this handle is of "
                f"generation {self.record.generation}, the sandbox now of {record.generation}",
                hint="Get it again with Engine.get().",
            )

    def _gone(self) -> NotFoundError:
        why = f": its ttl of {self.spec.ttl:g} s is over" if self.expired and self.spec.ttl is not None else ""
        return NotFoundError(f"sandbox {self.label!r} was removed{why}")

    async def vanish(self) -> None:
        """Another process has removed it, or its ttl is over: let go of it here."""
        if self._state == "removed":
            return
        expired = self.expired
        self._state = "removed"
        for close in tuple(self.closing):
            close()
        await self._sandboxer.recover(
            RecoverSandbox(self.sandbox_id, self.spec, lived=False, started=False, exclusive=True)
        )
        await self._sandboxer.remove(self.sandbox_id)
        if expired:
            self._core.forget(self)
            self.emit("sandbox.removed", detail={"reason": "ttl"})
        else:
            self._core.drop(self)

    async def adopt(self) -> bool:
        """Take it over from a former engine, under a new generation; False when nothing of use lives."""
        keeper, name = self._core.host.keeper, f"{self._prefix}change"
        # One that has attached may be about to change it.
        self._turn = await keeper.lock(name)
        try:
            record = self._core.records.read(self.sandbox_id)
            if record is None:
                await self.vanish()
                return False
            lived = record.phase in {"ready", "stopped"}
            request = RecoverSandbox(
                self.sandbox_id, self.spec, lived=lived, started=record.phase == "ready", exclusive=True
            )
            started = await self._sandboxer.recover(request)
            if started is None:
                return False
            self._task = started.task
            self._state = "stopped" if record.phase == "stopped" else "ready"
            self._main_made = MAIN in started.task.container_ids
            self.record = attrs.evolve(self.record, phase=record.phase)
            self._core.records.write(self.record)
        finally:
            keeper.unlock(name)
        return True

    async def free_cut(self) -> bool:
        """Free what a process that is gone has left half made or half removed; False when that was not so any more."""
        keeper, name = self._core.host.keeper, f"{self._prefix}change"
        self._turn = await keeper.lock(name)
        try:
            record = self._core.records.read(self.sandbox_id)
            if record is None or record.phase in {"ready", "stopped"}:
                self._core.drop(self)
                return False
            await self._sandboxer.recover(
                RecoverSandbox(self.sandbox_id, self.spec, lived=False, started=False, exclusive=True)
            )
            return await self.cleaning.run(self._remove_now)
        finally:
            keeper.unlock(name)

    async def settled(self) -> None:
        """Wait until whoever creates it has done so."""
        async with self.changing():
            self._check_alive()

    def intend(self) -> None:
        """Write down that it shall be."""
        self._core.records.write(self.record)

    async def begin(self) -> None:
        """Create and start it; on any failure nothing is left."""
        try:
            async with self.changing():
                await self._begin()
        except BaseException as error:
            await self.cleaning.run(self._free)
            if isinstance(error, OSError):
                raise BackendError(f"sandbox {self.label!r} cannot be made: {error}") from error
            raise
        self.emit("sandbox.started")

    async def _begin(self) -> None:
        if self.spec.ttl is not None:
            await self._core.host.keeper.expire(self._prefix, self.spec.ttl)
        await self._sandboxer.create(CreateSandbox(self.sandbox_id, self.spec))
        self.emit("sandbox.created")
        self._task = (await self._sandboxer.start(self.sandbox_id)).task
        self._write("ready", started_at=time.time())
        self._state = "ready"

    def _write(self, phase: Phase, **changes: float | None) -> None:
        record = attrs.evolve(self.record, phase=phase, **changes)  # type: ignore[arg-type]
        self._core.records.write(record)
        self.record = record

    async def start(self) -> None:
        """Make a stopped sandbox ready again; a ready one stays so."""
        await self.cleaning.catch_up()
        async with self.changing():
            self._check_alive()
            if self._state == "ready":
                return
            self._task = (await self._sandboxer.start(self.sandbox_id)).task
            self._state = "ready"
            self._write("ready", started_at=time.time(), stopped_at=None)
        self.emit("sandbox.started")

    async def stop(self, grace: float) -> None:
        """End every process; the files stay. Repeating is harmless."""
        if self._core.closed:
            return
        async with self.changing():
            if self._state != "ready" or self._core.closed:
                return
            containers = tuple(self.task.container_ids)
            # Whatever comes now, what runs is not to be used any more.
            self._main_made = False
            self._state = "stopped"

            async def finish() -> None:
                await self._sandboxer.stop(self.sandbox_id, grace=0)
                await self._containers_exited(containers)
                if MAIN in containers:
                    await self._forget_main()
                self._note("stopped")

            try:
                await self._sandboxer.stop(self.sandbox_id, grace=grace)
            finally:
                # Cut while it waited for the grace period: then at once, and whole.
                await self.cleaning.run(finish)
        self.emit("sandbox.stopped")

    def kill_now(self) -> None:
        """End every process by synchronous system calls."""
        if self._state in {"ready", "stopped"} and not self._core.gone:
            self._sandboxer.kill_now(self.sandbox_id)

    async def kill(self) -> None:
        """End every process at once; the files stay. Repeating is harmless."""
        if self._state == "unread":
            await self._read()
        self.kill_now()
        await self.stop(grace=0)

    async def remove(self) -> None:
        """End it and free everything. Repeating is harmless, also from several tasks."""
        if self._state == "removed" or self._core.gone:
            return
        self.kill_now()
        # Not to be cancelled: what was begun is finished, or left to the next call.
        if not await self.cleaning.run(self._remove):
            raise DeadlineExceededError(
                f"sandbox {self.label!r} could not be removed within {CLEANING_SECONDS:g} s",
                hint="Something in it may sit in the kernel (a disk, a network file system). Remove it again later.",
            )
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def _remove(self) -> None:
        try:
            async with self.changing():
                await self._remove_now()
        except NotFoundError:
            return  # another process was quicker
        except FailedPreconditionError:
            # What a creation or a removal that was cut has left; not one that another engine has taken over.
            if self._core.records.generation(self.sandbox_id) != self.record.generation:
                raise
            await self._remove_now()

    async def _remove_now(self) -> None:
        if not self.removed:
            self.record = attrs.evolve(self.record, owner=this_process())  # who finds it cut asks whether we live
            self._note("removing")
            await self._free()
            self.emit("sandbox.removed")

    async def status(self) -> SandboxStatus:
        """The state at this moment; never waits for another call."""
        if self._core.host.shared and self._state != "new" and self._core.host.keeper.alive:
            self._check_alive()
            if self._state == "unread" and not self._is_whole():
                return self._halfway()
            await self._catch_up(exclusive=False)
        status = await self.sandboxer.status(self.sandbox_id)
        return attrs.evolve(status, generation=self.record.generation, expires_at=self.record.expires_at)

    def _is_whole(self) -> bool:
        """Whether whoever makes it is ready, and nobody removes it."""
        record = self._core.records.read(self.sandbox_id)
        return record is None or record.phase in {"ready", "stopped"}

    def _halfway(self) -> SandboxStatus:
        """While another process makes or removes it: what is written down."""
        return SandboxStatus(
            id=self.sandbox_id,
            name=self.spec.name,
            backend=self.backend,
            state="created",
            generation=self.record.generation,
            created_at=self.record.created_at,
            expires_at=self.record.expires_at,
            labels=self.spec.labels,
            annotations=self.spec.annotations,
        )

    async def pause(self) -> None:
        """Stop every process of it until `resume`."""
        await self._freeze("sandbox.paused")

    async def resume(self) -> None:
        """Let its processes go on."""
        await self._freeze("sandbox.resumed")

    async def _freeze(self, kind: Literal["sandbox.paused", "sandbox.resumed"]) -> None:
        async with self.changing():
            self._check_started()
            task = self.task
            if not isinstance(task, SupportsPause):
                raise UnsupportedError("pause", self.backend)
            for container_id in task.container_ids:
                await (task.pause if kind == "sandbox.paused" else task.resume)(container_id)
        self.emit(kind)

    async def update(self, resources: Resources) -> None:
        """Change the limits of the whole sandbox."""
        async with self.changing():
            self._check_alive()
            await self._sandboxer.update(self.sandbox_id, resources)

    def _note(self, phase: Literal["stopped", "removing"]) -> None:
        """Write down an ending, if the disk takes it: a full one must not keep anything alive.

        The old record stays then, and whoever reads it finds nothing of it alive.
        """
        with contextlib.suppress(BackendError):
            self._write(phase, **({"stopped_at": time.time()} if phase == "stopped" else {}))

    async def _free(self) -> None:
        for close in tuple(self.closing):
            close()
        containers = tuple(self._task.container_ids) if self._task is not None else ()
        if self.record.expires_at is not None and self._core.host.keeper.alive:
            await self._core.host.keeper.expire(self._prefix, None)
        await self._sandboxer.remove(self.sandbox_id)
        await self._containers_exited(containers)
        self._state = "removed"
        self._core.forget(self)

    def _check_alive(self) -> None:
        if self._core.closed:
            raise FailedPreconditionError(f"the engine of sandbox {self.label!r} is closed")
        if self._state == "removed" or self.expired:
            raise self._gone()

    def _check_started(self) -> None:
        self._check_alive()
        if self._state != "ready":
            raise FailedPreconditionError(f"sandbox {self.label!r} is stopped", hint="await sandbox.start() first.")
