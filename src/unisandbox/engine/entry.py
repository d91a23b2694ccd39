"""One sandbox of an engine: its state, and the calls that change it."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

import anyio.lowlevel

from unisandbox.api import (
    BackendError,
    CreateSandbox,
    DeadlineExceededError,
    FailedPreconditionError,
    FileBounds,
    Metrics,
    NotFoundError,
    ProcessSpec,
    Resources,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    SandboxStatus,
    SupportsFileBounds,
    SupportsGrace,
    TaskService,
    UnavailableError,
)
from unisandbox.engine import limiting, looking, pausing
from unisandbox.engine.cleaning import CLEANING_SECONDS, Action, Cleaning
from unisandbox.engine.held import HeldProcesses, OpenStreams
from unisandbox.engine.operations import OperationLog
from unisandbox.engine.programs import MAIN, Programs
from unisandbox.engine.record import Phase, Record, this_process
from unisandbox.engine.sharing import Sharing
from unisandbox.engine.telling import Telling, tell_recovered
from unisandbox.host.cgroups import ending

if TYPE_CHECKING:
    from unisandbox.engine.clerk import Clerk
    from unisandbox.engine.core import EngineCore


class Entry:
    """One sandbox of this engine, as its handles see it.

    Attributes:
        sandbox_id, spec, backend: as created.
        record: what is on disk of it, or will be in a moment.
        state: "new": being created here; "unread": another process has made it, and it was not looked at yet.
        sharing: whose turn it is to change it.
        programs: what runs in it.
        held: its processes, as far as the keeper holds what outlives this process.
        telling: what the readers of events are told of it.
        cleaning: what was cut of what it did, and has to be finished.
        streams: what this process has open of its processes.
        recovered: why it is removed, when that is the work of a recovery.
        recorded: its record is on disk. One that ends with this process, and that no other can know of, needs none.
    """

    main: Final = MAIN

    def __init__(self, core: EngineCore, record: Record, spec: SandboxSpec, sandboxer: Sandboxer) -> None:
        self.sandbox_id: str = record.sandbox_id
        self.spec: SandboxSpec = spec
        self.backend: str = record.backend
        self.record: Record = record
        self.state: Literal["new", "unread", "ready", "stopped", "removed"] = "new"
        if record.phase != "creating" or record.client != core.host.keeper.hello.client:
            self.state = "unread"
        self.streams: OpenStreams = core.streams_of(record.sandbox_id)
        self.recovered: str = ""
        self.recorded: bool = core.records_of(record.backend)
        self.held: HeldProcesses = HeldProcesses(core.host, record.sandbox_id)
        self.cleaning: Cleaning = Cleaning()
        self.telling: Telling = Telling(core.events, record.sandbox_id, lambda: self._task)
        self.programs: Programs = Programs(core, self)
        self.sharing: Sharing = Sharing(core, self, sandboxer)
        self._core = core
        self._sandboxer = sandboxer
        self._task: TaskService | None = None
        self._prefix = core.host.prefix(record.sandbox_id)
        self._is_free = False  # whether nothing is left of it but its record
        # Whether readers of events may know it: not while it is being made here.
        self._is_told = True

    @property
    def label(self) -> str:
        """What to call it in messages: its name, or its id."""
        return self.spec.name or self.sandbox_id

    @property
    def clerk(self) -> Clerk | None:
        """Who works with its files, where this process may not."""
        return None if self.bounds is not None else self._core.clerk

    @property
    def bounds(self) -> FileBounds | None:
        """What holds work with its files, where the kernel does not."""
        sandboxer = self._sandboxer
        return sandboxer.file_bounds(self.sandbox_id) if isinstance(sandboxer, SupportsFileBounds) else None

    @property
    def engine_open(self) -> bool:
        """Whether the engine still answers."""
        return not self._core.closed

    @property
    def in_fork(self) -> bool:
        """Whether this process is a fork of the one whose sandbox it is."""
        return self._core.loop.is_of_fork

    @property
    def removed(self) -> bool:
        """Whether it is gone for good."""
        return self.state == "removed"

    @property
    def known(self) -> bool:
        """Whether it is more than an intent of this process."""
        return self.state != "new"

    @property
    def expired(self) -> bool:
        """Whether its ttl is over: the keeper has ended it."""
        return self.record.expires_at is not None and self._prefix in self._core.host.keeper.expirations.known

    @property
    def sandboxer(self) -> Sandboxer:
        """Who manages it."""
        self.check_alive()
        return self._sandboxer

    @property
    def task(self) -> TaskService:
        """Its task service."""
        self.check_alive()
        return self.last_task

    @property
    def last_task(self) -> TaskService:
        """Its task service, also after the end: it still knows how processes ended."""
        self._core.loop.check()
        if self._task is None:
            raise FailedPreconditionError(f"sandbox {self.label!r} has not been started")
        return self._task

    async def known_task(self) -> TaskService:
        """The task service, with all that other processes have done."""
        await self.sharing.learn()
        return self.task

    @property
    def operations(self) -> OperationLog:
        """What was asked for under operation ids."""
        return self._core.operations

    def take(self, task: TaskService) -> None:
        """It is as its record says, and driven by this task service."""
        self._task = task
        self.state = "stopped" if self.record.phase == "stopped" else "ready"
        self.programs.main_made = MAIN in task.container_ids
        self.telling.taken_over()

    @contextlib.contextmanager
    def in_our_words(self) -> Iterator[None]:
        """What a sandbox has is reached through the keeper's process and its cgroups: when these die, paths fail first.

        So does the start of a process that ends with them.

        Raises:
            UnavailableError: the keeper has ended, or this process has too many open files.
            NotFoundError: another process has removed it.
            BackendError: anything else that the operating system or the runtime refuses.
        """
        try:
            yield
        except TimeoutError:
            raise  # ours, or the caller's own
        except BackendError as error:
            if isinstance(error.__cause__, OSError):
                self._check_room(error.__cause__)
            self.check_there()
            raise
        except OSError as error:
            self._check_room(error)
            self.check_there()
            raise BackendError(f"sandbox {self.label!r}: {error}") from error

    def _check_room(self, error: OSError) -> None:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise UnavailableError(
                f"sandbox {self.label!r}: {error.strerror}",
                hint="This process, or this host, has too many open files: close some, or raise the limit (ulimit -n).",
            ) from error

    def check_there(self) -> None:
        """After a path of it was not there.

        Raises:
            UnavailableError: the keeper has ended.
            NotFoundError: another process has removed it.
        """
        self._core.check_keeper(after_error=True)
        self.sharing.check_there()
        self._core.check_dying()

    def check_alive(self) -> None:
        """Raise FailedPreconditionError when the engine is closed or another loop's, NotFoundError when it is gone."""
        self._core.loop.check()
        if self._core.closed:
            raise FailedPreconditionError(f"the engine of sandbox {self.label!r} is closed")
        if self.removed or self.expired:
            raise self.gone()

    def check_started(self) -> None:
        """The same, and FailedPreconditionError when it is stopped."""
        self.check_alive()
        if self.state != "ready":
            raise FailedPreconditionError(f"sandbox {self.label!r} is stopped", hint="await sandbox.start() first.")

    def gone(self) -> NotFoundError:
        """What to raise when it is gone."""
        why = f": its ttl of {self.spec.ttl:g} s is over" if self.expired and self.spec.ttl is not None else ""
        return NotFoundError(f"sandbox {self.label!r} was removed{why}")

    # --- its life ---

    def intend(self) -> None:
        """Write down that it shall be."""
        self.save(self.record)

    async def begin(self, program: ProcessSpec | None = None) -> None:
        """Create and start it, with a program launched in it, as whoever changes it; on any failure nothing is left."""
        self._is_told = False
        try:
            await self._begin(program)
        except BaseException as error:
            await self.cleaning.run(self._undo)
            if isinstance(error, (BackendError, OSError)):
                self._core.check_keeper(after_error=True)
            if isinstance(error, OSError):
                raise BackendError(f"sandbox {self.label!r} cannot be made: {error}") from error
            raise

    async def _undo(self) -> None:
        is_lost = self._core.host.shared and not self._core.host.keeper.alive
        async with self._core.regaining.alone() if is_lost else contextlib.nullcontext():
            await self._free()

    async def _begin(self, program: ProcessSpec | None) -> None:
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self.spec.ttl is not None:
            await self.sharing.set_expiry(self.spec.ttl, is_told=False)
        await self._sandboxer.create(CreateSandbox(self.sandbox_id, self.spec))
        self.telling.emit("sandbox.created")
        self._is_told = True
        if self.spec.ttl is not None:
            # Now that readers of events know it they are told of its end, too.
            left = began + self.spec.ttl - time.clock_gettime(time.CLOCK_BOOTTIME)
            await self.sharing.set_expiry(max(0.0, left))
        await self._make_ready(program)

    async def _make_ready(self, program: ProcessSpec | None = None) -> None:
        """The last steps of a creation and of a start: it is ready when all of them are done, and to others, too."""
        async with self.sharing.telling_expiry():
            self._task = (await self._sandboxer.start(self.sandbox_id)).task
        if program is not None:
            self.telling.emit("sandbox.started")  # before what begins in it
            await self.programs.launch_first(self._task, program)
        self._write("ready", started_at=time.time(), stopped_at=None)
        self.sharing.forget_stop()
        self._core.check_keeper()  # not each step has asked it for something
        self.state = "ready"

    def _write(self, phase: Phase, **changes: float | None) -> None:
        self.save(self.record._replace(phase=phase, **changes))  # type: ignore[arg-type]

    def save(self, record: Record) -> None:
        """Write it down, and take it for what is true; on any failure neither."""
        if self.recorded:
            self._core.records.write(record)
        self.record = record

    async def start(self) -> None:
        """Make a stopped sandbox ready again; a ready one stays so. On any failure it is stopped."""
        await self.cleaning.catch_up()
        async with self.sharing.changing():
            self.check_alive()
            if self.state == "ready":
                if (await self._sandboxer.status(self.sandbox_id)).state != "stopped":
                    return
                # It has lost what its containers share, and with it all that ran.
                self.programs.main_made = False
                await self._sandboxer.stop(self.sandbox_id, grace=0)
                await self.programs.finish_operations()
                self.state = "stopped"
                self._note("stopped")
            try:
                await self._make_ready()
            except BaseException:
                # Not to be finished later, when another process may have started it; what went wrong first is told.
                with anyio.move_on_after(CLEANING_SECONDS, shield=True), contextlib.suppress(SandboxError, OSError):
                    await self._sandboxer.stop(self.sandbox_id, grace=0)
                raise
        self.telling.emit("sandbox.started")

    async def stop(self, grace: float) -> None:
        """End every process; the files stay. Repeating is harmless.

        Raises:
            BackendError: all has ended, which cannot be written down (a full disk); others know it from the keeper.
        """
        if self.ended_with_engine():
            return
        if grace > 0 and self._core.host.shared and isinstance(self._sandboxer, SupportsGrace):
            # Others may use it meanwhile, and end it sooner.
            await self._ask_to_end(self._sandboxer, grace)
            with contextlib.suppress(NotFoundError):
                await self._stop(grace=0)
        else:
            await self._stop(grace)

    async def _stop(self, grace: float) -> None:
        async with self.sharing.changing():
            if self.state != "ready" or self._core.closed:
                return
            containers = self.telling.identities()
            # Whatever comes now, what runs is not to be used any more.
            self.programs.main_made = False
            self.state = "stopped"
            unwritten: SandboxError | None = None

            async def finish() -> None:
                nonlocal unwritten
                await self._sandboxer.stop(self.sandbox_id, grace=0)
                await self.telling.containers_exited(containers)
                await self.programs.finish_operations()
                if MAIN in containers:
                    await self.programs.forget_main()
                unwritten = self._note("stopped")
                if unwritten is not None:
                    await self.sharing.note_stop()

            try:
                await self._sandboxer.stop(self.sandbox_id, grace=grace)
            finally:
                # Cut while it waited for the grace period: then at once, and whole.
                await self.cleaning.run(finish)
        self.telling.emit("sandbox.stopped")
        if unwritten is not None:
            raise unwritten

    def ended_with_engine(self) -> bool:
        """Whether it has ended, or is about to, with the engine.

        Raises:
            FailedPreconditionError: the engine is closed, and the sandbox lives on; or it is another event loop's.
        """
        self._core.loop.check()
        if not self._core.closed or self.removed:
            return self._core.closed
        if self._core.owner and self._core.policy == "stop":
            return True
        raise FailedPreconditionError(
            f"the engine of sandbox {self.label!r} is closed, and left it as it was",
            hint="Engine.attach() or open() one.",
        )

    async def _ask_to_end(self, sandboxer: SupportsGrace, grace: float) -> None:
        if not self._core.host.keeper.alive:
            return
        await self.sharing.refresh()
        if self.state == "ready":
            with self.in_our_words():
                await sandboxer.ask_to_end(self.sandbox_id, grace)

    def kill_now(self) -> None:
        """End every process by synchronous system calls, whoever changes it now."""
        if self._core.gone or self.in_fork or self.state in {"new", "removed"}:
            return
        if self._core.host.shared and self.sharing.is_of_other_generation:
            return  # it is another engine's, and whoever asks is about to be told so
        if self.state == "unread":
            # Not looked at yet, and whoever changes it may be held up: its cgroup is known by its name.
            if self._core.host.keeper.alive and self.sharing.is_whole:
                cgroups = self._core.host.cgroups.below(self.spec.cgroup_parent)
                ending.kill(cgroups.dirs_of(self._prefix.rstrip("/")), timeout=0)
            return
        self._sandboxer.kill_now(self.sandbox_id)

    async def kill(self) -> None:
        """End every process at once; the files stay. Repeating is harmless."""
        if self.ended_with_engine():
            return
        self.kill_now()
        await self.stop(grace=0)

    async def remove(self) -> None:
        """End it and free everything. Repeating is harmless, also from several tasks."""
        if self.removed or (self._core.gone and self.ended_with_engine()):
            self._forget()
            return
        self._core.loop.check()
        self.kill_now()
        # Not to be cancelled: what was begun is finished, or left to the next call.
        await self._finish(self._remove)
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def _remove(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.sharing.changing(to_free=True))
            except NotFoundError:
                return  # another process was quicker
            await self._remove_now()

    async def free(self) -> None:
        """The same, as whoever changes it."""
        await self._finish(self._remove_now)

    async def _finish(self, removal: Action) -> None:
        if not await self.cleaning.run(removal):
            raise DeadlineExceededError(
                f"sandbox {self.label!r} could not be removed within {CLEANING_SECONDS:g} s",
                hint="Something in it may sit in the kernel (a disk, a network file system). Remove it again later.",
            )

    async def _remove_now(self) -> None:
        if not self.removed:
            # Who finds it cut asks whether we are still there.
            self.record = self.record._replace(owner=this_process(), client=self._core.host.keeper.hello.client)
            self.operations.note_created(self.record)
            self._note("removing")
            await self._free()

    async def status(self) -> SandboxStatus:
        """See `looking.status`."""
        return await looking.status(self._core, self)

    async def metrics(self) -> Metrics:
        """See `looking.metrics`."""
        return await looking.metrics(self)

    async def pause(self) -> None:
        """See `pausing.pause`."""
        await pausing.pause(self)

    async def resume(self) -> None:
        """See `pausing.resume`."""
        await pausing.resume(self)

    async def update(self, resources: Resources) -> None:
        """See `limiting.update`."""
        await limiting.update(self._core, self, self._sandboxer, resources)

    def _note(self, phase: Literal["stopped", "removing"]) -> SandboxError | None:
        """Write down an ending, if the disk takes it: a full one must not keep anything alive.

        The old record stays then, and whoever reads it finds nothing of it alive.

        Returns:
            Why it could not be written.
        """
        try:
            self._write(phase, **({"stopped_at": time.time()} if phase == "stopped" else {}))
        except (BackendError, UnavailableError) as error:
            return error
        return None

    def let_go(self) -> None:
        """It is gone: close what its handles hold of it."""
        self.state = "removed"
        self.streams.close()

    async def _free(self) -> None:
        self.streams.close()
        containers = self.telling.identities()
        if self.record.expires_at is not None and self._core.host.keeper.alive:
            await self.sharing.set_expiry(None)
        await self._sandboxer.remove(self.sandbox_id)
        self.sharing.forget_stop()
        await self.telling.containers_exited(containers)
        self.state = "removed"
        self._is_free = True
        if self._is_told:
            # While there is the record: whoever dies in between is followed by one who tells it, and it is told once.
            if self.recovered:
                tell_recovered(self._core.events, self.sandbox_id, "removed", self.recovered)
            self.telling.emit("sandbox.removed")
        self._forget()

    def _forget(self) -> None:
        """Its record goes when all else has gone; again, when the disk did not let it."""
        if self._is_free:
            self._core.forget(self)
            self._is_free = False
