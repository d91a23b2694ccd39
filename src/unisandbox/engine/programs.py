"""What runs in one sandbox: its main container, made at the first use, those that are added, and what they write."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Final

import anyio
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    ContainerSpec,
    CreateTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    SandboxError,
    Stdio,
    TaskService,
)
from unisandbox.api.newcomers import check_new_container
from unisandbox.engine.logs import LOG_BYTES, LOG_STREAMS, LogReader, LogStream
from unisandbox.host.pipes import open_pipe

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore
    from unisandbox.engine.entry import Entry

MAIN: Final = "main"
"""The name of the container that `run` and `exec` use."""

# Of one sandbox. Processes inside can keep any number of them open (SCM_RIGHTS), and the keeper's descriptors are for
# all sandboxes. Two for each of the processes that a sandbox may have unless it is said.
_MOST_DRAINED: Final = 512
# How long the init of a container that is about to be deleted may take to tell how its processes ended.
_TOLD_SECONDS: Final = 1.0


class Programs:
    """Those of one sandbox.

    Attributes:
        main_made: the main container is there, as far as this process knows; it may have ended.
    """

    def __init__(self, core: EngineCore, entry: Entry) -> None:
        self.main_made: bool = False
        self._core = core
        self._entry = entry
        self._host = core.host
        self._prefix = core.host.prefix(entry.sandbox_id)
        self._execs = 0
        # Processes in the main container that this process is starting, and that it has started and not deleted.
        self._starting: set[str] = set()
        self._going: set[str] = set()
        self._containers = 0
        # One at a time counts the pipes that are drained, and adds its own.
        self._draining = anyio.Lock()
        # The main container is about to be gone: what begins now waits for the turn.
        self._main_goes = False

    @contextlib.asynccontextmanager
    async def beginning(self, exec_id: str = "") -> AsyncIterator[None]:
        """Around all that starts a program: what fails is told in our words, and as the end of the ttl if that is why.

        Args:
            exec_id: of a process in the main container, which is not given to another program meanwhile.

        Raises:
            NotFoundError: its ttl is over.
            SandboxError: see `Entry.in_our_words`.
        """
        try:
            with self._entry.in_our_words(), self._kept_for(exec_id):
                yield
        except SandboxError as error:
            if await self._entry.sharing.has_expired():
                raise self._entry.gone() from error
            raise

    # --- the main container ---

    async def ready(self) -> TaskService:
        """The task service, with the main container running: it is made at the first use.

        Raises:
            NotFoundError: the sandbox was removed.
            FailedPreconditionError: it is stopped.
        """
        entry = self._entry
        await self.check_usable()
        await entry.sharing.await_expiry()
        entry.check_alive()
        await entry.sharing.refresh()
        self._core.check_keeper()  # it may have ended meanwhile, and then nothing was learnt
        task = entry.task
        entry.check_started()
        if not await self._main_runs(task):
            async with entry.sharing.changing():
                entry.check_started()
                task = entry.task
                if self.main_made and not await self._main_runs(task):
                    if await entry.held.launched():
                        raise FailedPreconditionError(
                            f"the program that was launched in sandbox {entry.label!r} has ended",
                            hint="launch() another one, or stop() and start() the sandbox.",
                        )
                    # Its init is gone (killed for memory, say): what it ran has ended, the files are still there.
                    await self._drop_main(task)
                if not self.main_made:
                    await self._make_main(task)
        return task

    async def launch(self, process: ProcessSpec) -> int | None:
        """Make the main container with this program as its main process; its pid on the host, if it has one.

        Raises:
            FailedPreconditionError: the main container is in use, or may be by another process at this moment.
        """
        entry = self._entry
        await self.check_usable()
        async with self.beginning(), entry.sharing.changing():
            entry.check_started()
            task = entry.task
            if self.main_made:
                if await self._main_runs(task):
                    await self._check_idle(task)
                await self._drop_main(task)
            return await self._launch(task, process)

    async def launch_first(self, task: TaskService, process: ProcessSpec) -> None:
        """The same as a part of the sandbox's creation, by whoever has its turn: nobody else can have use of it yet."""
        async with self.beginning():
            await self._launch(task, process)

    async def _launch(self, task: TaskService, process: ProcessSpec) -> int | None:
        held = self._entry.held
        await held.launch()
        try:
            pid = await self._add(task, ContainerSpec(name=MAIN, process=process))
        except BaseException:
            held.forget_launch()
            raise
        self.main_made = True
        return pid

    async def _check_idle(self, task: TaskService) -> None:
        """Raises FailedPreconditionError: somebody has use of the main container, or may have at this moment.

        Of other processes that is not known: they start programs without a turn. One that attaches from now on waits
        for ours before it does.
        """
        entry, keeper = self._entry, self._host.keeper
        if await entry.held.launched():
            raise FailedPreconditionError(
                f"a launched program runs in sandbox {entry.label!r} already",
                hint="Use exec, or stop the sandbox first.",
            )
        clients = await keeper.clients() if self._host.shared else {keeper.hello.client}
        in_use = bool(await task.pids(MAIN) or await entry.held.read())
        if in_use or self._starting or self._going:  # asked last: what begins after that finds no main container
            raise FailedPreconditionError(
                f"what run or exec has started in sandbox {entry.label!r} runs, or was not waited for",
                hint="Wait for it, or stop() and start() the sandbox first.",
            )
        if clients != {keeper.hello.client}:
            raise FailedPreconditionError(
                f"run or exec was used in sandbox {entry.label!r}, and another process may be about to use it again",
                hint="Launch before the first run, or stop() and start() the sandbox first.",
            )

    async def remove(self, container_id: str, identity: str) -> Exit | None:
        """Free a container with all that is kept of it: how its main process ended, if that is known.

        A later one of the same name than the one with this identity is left alone.
        """
        entry = self._entry
        # On an engine of this process alone a stop with a grace period has the turn all that time, and no other process
        # can take the name of one that was added.
        needs_turn = self._host.shared or container_id == MAIN
        async with entry.sharing.changing(in_cleaning=True) if needs_turn else contextlib.nullcontext():
            if not self._is(container_id, identity):
                return None
            if container_id == MAIN:
                return await self._drop_main(entry.last_task)
            exit = await entry.last_task.delete(container_id)
            if self._is(container_id, identity):  # another task may have removed it first, and its name be taken
                await self.drop_logs(container_id)
            return exit

    def _is(self, container_id: str, identity: str) -> bool:
        return not self._entry.telling.is_replaced(container_id, identity)

    async def forget_main(self) -> None:
        """The main container is gone, with what ran in it: if it was launched, what it wrote goes, too."""
        self._going.clear()
        if await self._entry.held.launched():
            await self.drop_logs(MAIN)
            self._entry.held.forget_launch()

    async def _main_runs(self, task: TaskService) -> bool:
        # Another process may have ended it, and a look has just found that.
        if not self.main_made or self._main_goes or MAIN not in task.container_ids:
            return False
        state = (await task.state(MAIN)).state
        if state == "paused":
            raise self._paused()
        return state != "stopped"

    async def _check_going(self, task: TaskService) -> None:
        """Nothing is to begin beside what is paused."""
        for container_id in task.container_ids:
            if (await task.state(container_id)).state == "paused":
                raise self._paused()

    def _paused(self) -> FailedPreconditionError:
        return FailedPreconditionError(f"sandbox {self._entry.label!r} is paused", hint="await sandbox.resume() first.")

    async def _drop_main(self, task: TaskService) -> Exit | None:
        telling = self._entry.telling
        identity = telling.identity_of(MAIN)
        self._main_goes = True
        try:
            task.kill_now(MAIN)
            with anyio.move_on_after(_TOLD_SECONDS):  # one that does not answer is ended by the deletion
                await self.finish_operations()
            exit = await task.delete(MAIN)
            self.main_made = False
        finally:
            self._main_goes = False
        await self.finish_operations()
        telling.container_exited(MAIN, identity, exit)
        await self.forget_main()
        return exit

    async def _make_main(self, task: TaskService) -> None:
        await self._check_going(task)
        self._entry.telling.container_begins(MAIN)
        try:
            await task.create(CreateTask(MAIN, container=ContainerSpec(name=MAIN)))
            self._entry.telling.container_created(MAIN)
            await task.start(MAIN)
        except BaseException:
            await self._entry.cleaning.run(lambda: task.delete(MAIN))
            raise
        self.main_made = True
        self._entry.telling.container_started(MAIN)

    # --- processes in it ---

    def next_exec_id(self) -> str:
        """A new id for a process, never reused in this sandbox."""
        self._execs += 1
        if not self._host.shared:
            return f"p{self._execs}"
        # Other processes count, too, each for itself; and each begins anew after a take-over.
        exec_id = f"p{self._execs}-{self._host.keeper.hello.client}"
        generation = self._entry.record.generation
        return exec_id if generation == 1 else f"{exec_id}-{generation}"

    @contextlib.contextmanager
    def _kept_for(self, exec_id: str) -> Iterator[None]:
        if exec_id:
            self._starting.add(exec_id)
        try:
            yield
        finally:
            self._starting.discard(exec_id)

    def started(self, exec_id: str) -> None:
        """A process was started in the main container."""
        self._going.add(exec_id)
        self._entry.telling.process_started(MAIN, exec_id)

    def ended(self, exec_id: str) -> None:
        """A process of the main container has ended, and is about to be deleted."""
        self._going.discard(exec_id)

    def exited(self, exec_id: str, exit: Exit | None) -> None:
        """A process of the main container has ended, and whoever started it knows how."""
        self.ended(exec_id)
        self._entry.held.forget(exec_id)
        self._entry.telling.process_exited(MAIN, exec_id, exit)

    async def finish_operations(self) -> None:
        """What was started under an operation id and has ended with the rest is not to be run again."""
        for process in await self._entry.held.read():
            if process.operation_id:
                exit = Exit.lost(exited_at=time.time())
                with contextlib.suppress(SandboxError):
                    exit = await self._entry.last_task.wait(MAIN, process.exec_id)
                with contextlib.suppress(NotFoundError, FailedPreconditionError):  # forgotten, or told already
                    self._core.operations.finish(process.operation_id, json.dumps(attrs.asdict(exit)))

    async def take_over_output(self, fd: int) -> None:
        """Let the keeper read and drop what background processes still write to the pipe `fd`.

        It does so for so many pipes at a time; who writes to another one gets SIGPIPE.
        """
        keeper, drains = self._host.keeper, f"{self._prefix}drain/"
        async with self._draining:
            held = await keeper.held(drains)
            ended = [name for name, number in held.items() if number < 0]
            if ended:
                await keeper.drop(ended)
            if len(held) - len(ended) < _MOST_DRAINED:
                await keeper.spools.ring(f"{drains}{self.next_exec_id()}", fd, limit=1)

    # --- containers that are added ---

    def next_container_name(self) -> str:
        """A name for a container that the user did not name."""
        taken = self._entry.telling.identities()
        # Other processes name some, too, at the same time.
        suffix = "" if self._core.owner else f"-{self._core.host.keeper.hello.client}"
        while True:
            self._containers += 1
            name = f"c{self._containers}{suffix}"
            if name not in taken:
                return name

    async def add(self, spec: ContainerSpec) -> int | None:
        """Create and start a container; the keeper keeps the last of what it writes. Its pid on the host, if any."""
        entry = self._entry
        entry.check_alive()
        check_new_container(spec)
        if spec.resources is not None:
            self._core.check_resources(entry.backend, spec.resources)
        await self.check_usable()
        if spec.name == MAIN:
            raise AlreadyExistsError(
                f"container {MAIN!r} of sandbox {entry.label!r} is the one that run and exec use",
                hint="Take another name, or launch() a program in it.",
            )
        async with self.beginning(), entry.sharing.changing():
            entry.check_started()
            return await self._add(entry.task, spec)

    async def _add(self, task: TaskService, spec: ContainerSpec) -> int | None:
        await self._check_going(task)
        if spec.name in task.container_ids:
            raise AlreadyExistsError(
                f"sandbox {self._entry.label!r} has a container {spec.name!r} already",
                hint="Take another name.",
            )

        async def undo() -> None:
            task.kill_now(spec.name)
            await task.delete(spec.name)
            await self.drop_logs(spec.name)

        with contextlib.ExitStack() as ends:
            readers: list[int] = []
            writers: list[int] = []
            for _ in LOG_STREAMS:
                reader, writer = open_pipe()
                ends.callback(os.close, reader)
                ends.callback(os.close, writer)
                readers.append(reader)
                writers.append(writer)
            self._entry.telling.container_begins(spec.name)
            try:
                await task.create(CreateTask(spec.name, container=spec, stdio=Stdio(None, *writers)))
                self._entry.telling.container_created(spec.name)
                if self._host.shared:
                    await self.drop_logs(spec.name)  # of one whose creation was cut
                for stream, reader in zip(LOG_STREAMS, readers, strict=True):
                    await self._host.keeper.spools.ring(self._log(spec.name, stream), reader, limit=LOG_BYTES)
                started = await task.start(spec.name)
            except BaseException:
                if not self._entry.in_fork:
                    await self._entry.cleaning.run(undo)
                raise
        self._entry.telling.container_started(spec.name)
        return started.pid

    # --- what they write ---

    def logs(
        self, container_id: str, identity: str, stream: LogStream, *, offset: int = 0, tail: int | None = None
    ) -> LogReader:
        """What the main process of the container with this name and identity writes."""
        if stream not in LOG_STREAMS:
            raise InvalidArgumentError(f"stream must be 'stdout' or 'stderr', got {stream!r}")
        whose = f"container {container_id!r} of sandbox {self._entry.label!r}"

        async def is_replaced() -> bool:
            await self._entry.sharing.try_to_look()
            return not self._is(container_id, identity)

        return LogReader(
            self._host.keeper,
            self._log(container_id, stream),
            whose,
            is_replaced=is_replaced,
            offset=offset,
            tail=tail,
        )

    async def drop_logs(self, container_id: str) -> None:
        """Forget what a container wrote."""
        await self._host.keeper.drop([self._log(container_id, stream) for stream in LOG_STREAMS])

    def _log(self, container_id: str, stream: LogStream) -> str:
        return f"{self._prefix}log/{container_id}/{stream}"

    async def check_usable(self, *, catch_up: bool = True) -> None:
        """Before something new is done with it: it is there, and what was cut before is finished (`catch_up`).

        Raises:
            NotFoundError: it was removed.
            UnavailableError: the keeper has ended.
        """
        self._entry.check_alive()
        self._core.check_keeper()
        if catch_up:
            await self._entry.cleaning.catch_up()
