"""The composition root: one engine in the caller's process, its keeper, its backends and its sandboxes."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, Literal

import anyio
import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    ContainerSpec,
    CreateSandbox,
    CreateTask,
    DeadlineExceededError,
    Event,
    EventKind,
    Exit,
    FailedPreconditionError,
    NotFoundError,
    Probe,
    Resources,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    SandboxStatus,
    Stdio,
    TaskService,
    UnavailableError,
    check_id,
)
from unisandbox.engine.choice import Choice, choose
from unisandbox.engine.events import EventLog
from unisandbox.engine.records import Record, RecordStore, boot_id, plain_spec
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import StateDirectory
from unisandbox.host.cgroups import Cgroups, ending
from unisandbox.host.keeper import Keeper
from unisandbox.host.services import Host

MAIN: Final = "main"
# What cleaning after a cancelled or failed call may take before the engine's close and the keeper's guards finish it.
_CLEANING_SECONDS: Final = 10.0

# What is kept of each output stream of a container that nobody reads.
LOG_BYTES: Final = 1 << 20

# Guards whose failure means nothing: another engine uses the directory that all share.
_MAY_FAIL: Final = frozenset({"engine/runtime"})

Policy = Literal["stop", "keep"]
LogStream = Literal["stdout", "stderr"]
LOG_STREAMS: Final[tuple[LogStream, LogStream]] = ("stdout", "stderr")


class Entry:
    """One sandbox of this engine, as its handles see it.

    Attributes:
        sandbox_id, spec, backend: as created.
        main: the name of the container that `run` and `exec` use.
        closing: what to call when the sandbox is removed (streams of its processes).
    """

    def __init__(
        self, core: EngineCore, sandbox_id: str, spec: SandboxSpec, backend: str, sandboxer: Sandboxer
    ) -> None:
        self.sandbox_id = sandbox_id
        self.spec = spec
        self.backend = backend
        self.main = MAIN
        self.closing: set[Callable[[], None]] = set()
        self.created_at = time.time()
        self._core = core
        self._sandboxer = sandboxer
        self._lock = anyio.Lock()
        self._task: TaskService | None = None
        self._execs = 0
        self._containers = 0
        self._main_made = False
        self._state: Literal["new", "ready", "stopped", "removed"] = "new"

    @property
    def label(self) -> str:
        """What to call it in messages: its name, or its id."""
        return self.spec.name or self.sandbox_id

    @property
    def engine_open(self) -> bool:
        """Whether the engine still answers."""
        return not self._core.closed

    @property
    def removed(self) -> bool:
        """Whether it is gone for good."""
        return self._state == "removed"

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

    def next_exec_id(self) -> str:
        """A new id for a process, never reused in this sandbox."""
        self._execs += 1
        return f"p{self._execs}"

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
        await self._core.host.keeper.ring(f"{self.sandbox_id}/drain/{self.next_exec_id()}", fd, limit=4096)

    async def ready(self) -> TaskService:
        """The task service, with the main container running: it is made at the first use.

        Raises:
            NotFoundError: the sandbox was removed.
            FailedPreconditionError: it is stopped.
        """
        task = self.task
        self._check_started()
        if not self._main_made or (await task.state(MAIN)).state == "stopped":
            async with self._lock:
                self._check_started()
                if self._main_made and (await task.state(MAIN)).state == "stopped":
                    # Its init is gone (killed for memory, say): what it ran has ended, the files are still there.
                    self._main_made = False
                    await task.delete(MAIN)
                if not self._main_made:
                    await self._make_main(task)
        return task

    async def _make_main(self, task: TaskService) -> None:
        try:
            await task.create(CreateTask(MAIN, container=ContainerSpec(name=MAIN)))
            await task.start(MAIN)
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
                await task.delete(MAIN)
            raise
        self._main_made = True
        self.emit("container.started", container_id=MAIN)

    def next_container_name(self) -> str:
        """A name for a container that the user did not name."""
        self._containers += 1
        return f"c{self._containers}"

    async def add_container(self, spec: ContainerSpec) -> int:
        """Create and start a container; the keeper keeps the last of what it writes. Its pid on the host."""
        task = self.task
        self._check_started()
        readers: list[int] = []
        writers: list[int] = []
        try:
            for _ in LOG_STREAMS:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                readers.append(reader)
                writers.append(writer)
            await task.create(CreateTask(spec.name, container=spec, stdio=Stdio(None, *writers)))
            try:
                for stream, reader in zip(LOG_STREAMS, readers, strict=True):
                    await self._core.host.keeper.ring(self._log(spec.name, stream), reader, limit=LOG_BYTES)
                started = await task.start(spec.name)
            except BaseException:
                task.kill_now(spec.name)
                with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
                    await task.delete(spec.name)
                    await self.drop_logs(spec.name)
                raise
        finally:
            for fd in (*readers, *writers):
                os.close(fd)
        self.emit("container.started", container_id=spec.name)
        return started.pid

    async def logs(self, container_id: str, stream: LogStream) -> bytes:
        """What the keeper has kept of a container's output."""
        return (await self._core.host.keeper.ring_read(self._log(container_id, stream), limit=LOG_BYTES)).data

    async def drop_logs(self, container_id: str) -> None:
        """Forget what a container wrote."""
        await self._core.host.keeper.drop([self._log(container_id, stream) for stream in LOG_STREAMS])

    def _log(self, container_id: str, stream: LogStream) -> str:
        return f"{self.sandbox_id}/log/{container_id}/{stream}"

    async def begin(self) -> None:
        """Create and start it; on any failure nothing is left."""
        try:
            self._core.write_record(self, "creating")
            await self._sandboxer.create(CreateSandbox(self.sandbox_id, self.spec))
            self.emit("sandbox.created")
            self._task = (await self._sandboxer.start(self.sandbox_id)).task
            self._core.write_record(self, "ready")
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
                await self._free()
            raise
        self._state = "ready"
        self.emit("sandbox.started")

    async def start(self) -> None:
        """Make a stopped sandbox ready again; a ready one stays so."""
        async with self._lock:
            self._check_alive()
            if self._state == "ready":
                return
            self._task = (await self._sandboxer.start(self.sandbox_id)).task
            self._state = "ready"
            self._core.write_record(self, "ready")
        self.emit("sandbox.started")

    async def stop(self, grace: float) -> None:
        """End every process; the files stay. Repeating is harmless."""
        async with self._lock:
            if self._state != "ready":
                return
            await self._sandboxer.stop(self.sandbox_id, grace=grace)
            self._main_made = False
            self._state = "stopped"
            self._core.write_record(self, "stopped")
        self.emit("sandbox.stopped")

    def kill_now(self) -> None:
        """End every process by synchronous system calls."""
        if self._state == "ready":
            self._sandboxer.kill_now(self.sandbox_id)

    async def kill(self) -> None:
        """End every process at once; the files stay. Repeating is harmless."""
        self.kill_now()
        await self.stop(grace=0)

    async def remove(self) -> None:
        """End it and free everything. Repeating is harmless, also from several tasks."""
        if self._state == "removed":
            return
        self.kill_now()
        # Not to be cancelled: what was begun is finished, or left to the engine's close and the keeper's guards.
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
            async with self._lock:
                if not self.removed:
                    self._core.write_record(self, "removing")
                    await self._free()
                    self.emit("sandbox.removed")
        if not self.removed:
            raise DeadlineExceededError(
                f"sandbox {self.label!r} could not be removed within {_CLEANING_SECONDS:g} s",
                hint="Something in it may sit in the kernel (a disk, a network file system). Remove it again later.",
            )
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def status(self) -> SandboxStatus:
        """The state at this moment; never waits for another call."""
        return await self.sandboxer.status(self.sandbox_id)

    async def update(self, resources: Resources) -> None:
        """Change the limits of the whole sandbox."""
        async with self._lock:
            self._check_alive()
            await self._sandboxer.update(self.sandbox_id, resources)

    async def _free(self) -> None:
        for close in tuple(self.closing):
            close()
        await self._sandboxer.remove(self.sandbox_id)
        self._state = "removed"
        self._core.forget(self)

    def _check_alive(self) -> None:
        if self._core.closed:
            raise FailedPreconditionError(f"the engine of sandbox {self.label!r} is closed")
        if self._state == "removed":
            raise NotFoundError(f"sandbox {self.label!r} was removed")

    def _check_started(self) -> None:
        self._check_alive()
        if self._state != "ready":
            raise FailedPreconditionError(f"sandbox {self.label!r} is stopped", hint="await sandbox.start() first.")


class EngineCore:
    """One engine. Use `open` to make one.

    Attributes:
        host: what it lends to backends.
        events: what happened.
        closed: it has been closed, or is being closed.
    """

    def __init__(self, host: Host, state: StateDirectory, registry: Registry) -> None:
        self.host = host
        self.events = EventLog()
        self.closed = False
        self._state = state
        self._registry = registry
        self._records = RecordStore(os.path.join(host.state_dir, "sandboxes"), durable=state.durable)
        self._boot_id = boot_id()
        self._sandboxers: dict[str, Sandboxer] = {}
        self._chosen: dict[str, Backend] = {}
        self._entries: dict[str, Entry] = {}
        self._closing = anyio.Lock()

    @classmethod
    async def open(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        policy: Policy = "stop",
        backends: Mapping[str, Backend] | None = None,
    ) -> EngineCore:
        """Open an engine on a state directory, or on a temporary one that vanishes with it.

        Raises:
            FailedPreconditionError: another engine owns the directory; its process is named.
            UnavailableError: this host cannot carry an engine.
            BackendError: the directory cannot be used.
        """
        state = StateDirectory.prepare(directory)
        try:
            cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}")
            keeper = await Keeper.start(state.path, workdir=state.work_dir, hide=_hidden(cgroups), policy=policy)
        except BaseException:
            state.discard()
            raise
        host = Host(
            engine_id=state.engine_id,
            state_dir=state.path,
            work_dir=state.work_dir,
            keeper=keeper,
            cgroups=cgroups,
        )
        core = cls(host, state, Registry(backends))
        try:
            await keeper.guard(state.guards(cgroups))
        except BaseException:
            core.abandon()
            raise
        return core

    async def explain(self, spec: SandboxSpec) -> Choice:
        """Which backend a sandbox would get, and why; nothing is created."""
        return (await choose(self._registry, spec))[1]

    async def probe(self, *, deep: bool = False) -> list[Probe]:
        """What every installed backend says about this host."""
        return await probe_all(self._registry, deep=deep)

    async def create(self, spec: SandboxSpec, *, sandbox_id: str | None = None) -> Entry:
        """Create and start a sandbox.

        Args:
            spec: what it shall be like.
            sandbox_id: an id from outside (containerd's); None: a new one.

        Raises:
            AlreadyExistsError: the name or id is taken.
            UnsupportedError, UnavailableError: it cannot be had; nothing was done.
        """
        self._check_open()
        identity = check_id(sandbox_id) if sandbox_id is not None else secrets.token_hex(16)
        self._check_free(identity, spec)
        backend = self._chosen.get(spec.isolation)
        if backend is None:
            backend, _ = await choose(self._registry, spec)
            self._check_free(identity, spec)
            self._check_open()
        entry = Entry(self, identity, spec, backend.name, self._sandboxer(backend))
        self._entries[identity] = entry
        try:
            await entry.begin()
        except BaseException:
            if entry.removed:
                self._entries.pop(identity, None)
            raise
        # What has run here once need not be probed again by this engine.
        self._chosen[spec.isolation] = backend
        return entry

    def get(self, ref: str) -> Entry:
        """The sandbox with that id or name.

        Raises:
            NotFoundError: there is none.
        """
        self._check_open()
        for entry in self._entries.values():
            if ref in {entry.sandbox_id, entry.spec.name}:
                return entry
        raise NotFoundError(f"no sandbox has the id or name {ref!r}")

    def entries(self) -> list[Entry]:
        """Every sandbox that is not removed, the oldest first."""
        return sorted(self._entries.values(), key=lambda entry: entry.created_at)

    async def read_events(self, after: int = 0) -> AsyncIterator[Event]:
        """See `EventLog.read`."""
        async for event in self.events.read(after):
            yield event

    def write_record(self, entry: Entry, phase: Literal["creating", "ready", "stopped", "removing"]) -> None:
        """Put on disk what is being done, or was reached."""
        self._records.write(
            Record(
                sandbox_id=entry.sandbox_id,
                name=entry.spec.name,
                backend=entry.backend,
                phase=phase,
                created_at=entry.created_at,
                boot_id=self._boot_id,
                owner_pid=os.getpid(),
                spec=plain_spec(entry.spec) if phase == "creating" else {},
            )
        )

    def forget(self, entry: Entry) -> None:
        """A sandbox is gone: its record and its name are free."""
        self._records.remove(entry.sandbox_id)
        self._entries.pop(entry.sandbox_id, None)

    async def close(self) -> None:
        """Remove every sandbox, end the keeper, leave nothing. Repeating is harmless."""
        async with self._closing:
            if self.closed:
                return
            self.closed = True
            self.events.close()
            errors: list[SandboxError] = []
            try:
                async with anyio.create_task_group() as group:
                    for entry in self.entries():
                        group.start_soon(self._remove, entry, errors)
                for sandboxer in self._sandboxers.values():
                    await sandboxer.close()
                with anyio.CancelScope(shield=True):
                    report = await self.host.keeper.close(run_guards=True)
                errors = errors if set(report.failed) - _MAY_FAIL else []
            except UnavailableError:
                errors = []  # the keeper is dead; its mounts, pins and runtimes went with it
            finally:
                self._sweep()
            if errors:
                raise errors[0]

    def abandon(self) -> None:
        """Close without an event loop: the keeper runs the guards (policy "stop"), and its end is waited for."""
        if self.closed:
            return
        self.closed = True
        self.events.close()
        for entry in self.entries():
            with contextlib.suppress(SandboxError, OSError):  # the keeper's guards kill what this could not
                entry.kill_now()
            for close in tuple(entry.closing):
                close()
        self._sweep()

    def _sweep(self) -> None:
        """Whatever happened before: no process, cgroup or directory of the engine stays. Synchronous."""
        self.host.keeper.abandon(wait=_CLEANING_SECONDS)
        dirs = [f"{place.parent}/{self.host.cgroups.name}" for place in self.host.cgroups.places]
        if any(os.path.isdir(directory) for directory in dirs):
            ending.kill(dirs)
            ending.remove(dirs, _CLEANING_SECONDS)
        self._state.discard()

    @staticmethod
    async def _remove(entry: Entry, errors: list[SandboxError]) -> None:
        try:
            await entry.remove()
        except SandboxError as error:
            errors.append(error)  # the others are removed all the same; the keeper's guards take care of this one

    def _sandboxer(self, backend: Backend) -> Sandboxer:
        if backend.name not in self._sandboxers:
            self._sandboxers[backend.name] = backend.open(self.host)
        return self._sandboxers[backend.name]

    def _check_open(self) -> None:
        if self.closed:
            raise FailedPreconditionError("the engine is closed", hint="Open another one with Engine.open().")

    def _check_free(self, identity: str, spec: SandboxSpec) -> None:
        for entry in self._entries.values():
            if identity in {entry.sandbox_id, entry.spec.name}:
                raise AlreadyExistsError(f"a sandbox with the id or name {identity!r} exists already")
            if spec.name is not None and spec.name in {entry.spec.name, entry.sandbox_id}:
                raise AlreadyExistsError(
                    f"a sandbox with the name {spec.name!r} exists already",
                    hint="Take another name, or remove the other sandbox first.",
                )


async def probe_all(registry: Registry, *, deep: bool = False) -> list[Probe]:
    """What every installed backend says about this host; needs no engine."""
    probes: list[Probe] = []
    for name in registry.names():
        try:
            backend = registry.get(name)
        except SandboxError as error:
            probes.append(Probe(backend=name, available=False, reason=error.message, hint=error.hint))
            continue
        probes.append(await backend.probe(deep=deep))
    return probes


def _hidden(cgroups: Cgroups) -> tuple[str, ...]:
    # crun refuses a host with both cgroup versions mounted; what it cannot see it cannot refuse.
    return ("/sys/fs/cgroup/unified",) if cgroups.version == "hybrid" else ()
