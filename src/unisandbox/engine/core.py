"""The composition root: one engine in the caller's process, its keeper, its backends and its sandboxes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from typing import Final, Literal

import anyio
import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    FailedPreconditionError,
    NotFoundError,
    Probe,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    UnavailableError,
    check_id,
)
from unisandbox.engine.choice import Choice, choose, probe_all
from unisandbox.engine.cleaning import CLEANING_SECONDS, Cleaning
from unisandbox.engine.entry import Entry
from unisandbox.engine.events import EventLog
from unisandbox.engine.records import Record, RecordStore, boot_id, this_process
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import StateDirectory
from unisandbox.host.cgroups import Cgroups, ending
from unisandbox.host.keeper import Keeper
from unisandbox.host.services import Host

# Guards whose failure means nothing: another engine uses the directory that all share.
_MAY_FAIL: Final = frozenset({"engine/runtime"})

Policy = Literal["stop", "keep"]


class EngineCore:
    """One engine. Use `open` to make one.

    Attributes:
        host: what it lends to backends.
        events: what happened.
        cleaning: what was cut and has to be finished.
        closed: it has been closed, or is being closed.
        gone: nothing of it is left.
    """

    def __init__(self, host: Host, state: StateDirectory, registry: Registry) -> None:
        self.host = host
        self.events: EventLog = EventLog()
        self.closed: bool = False
        self.gone: bool = False
        self._state = state
        self._registry = registry
        self._records = RecordStore(os.path.join(host.state_dir, "sandboxes"), durable=state.durable)
        self._boot_id = boot_id()
        self._sandboxers: dict[str, Sandboxer] = {}
        self._chosen: dict[str, Backend] = {}
        self._entries: dict[str, Entry] = {}
        self._closing = anyio.Lock()
        self.cleaning: Cleaning = Cleaning()

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
        except FailedPreconditionError:
            state.discard()  # not waiting: the directory is another engine's
            raise
        except OSError as error:
            state.discard(wait=CLEANING_SECONDS)
            place = f" ({os.fspath(error.filename)})" if error.filename else ""
            raise BackendError(
                f"cannot open an engine on {state.path}: {error.strerror or error}{place}",
                hint="It must be a directory that this user can write, on a disk with free space.",
            ) from error
        except BaseException:
            state.discard(wait=CLEANING_SECONDS)
            raise
        host = Host(
            engine_id=state.engine_id,
            state_dir=state.path,
            disk_dir=state.disk_dir,
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
        await self.cleaning.catch_up()
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
                owner=this_process(),
                spec=entry.plain_spec,
            )
        )

    def forget(self, entry: Entry) -> None:
        """A sandbox is gone: its record and its name are free."""
        self._records.remove(entry.sandbox_id)
        self._entries.pop(entry.sandbox_id, None)

    def check_keeper(self) -> None:
        """Raise UnavailableError when the keeper is dead: nothing can be started any more."""
        if not self.host.keeper.alive:
            raise UnavailableError(
                f"the keeper of engine {self.host.engine_id} (process {self.host.keeper.pid}) has ended,"
                " and with it what ran in its sandboxes",
                hint="Close the engine and open another one.",
            )

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
        for sandboxer in self._sandboxers.values():
            sandboxer.abandon()
        self.host.keeper.abandon(wait=CLEANING_SECONDS)
        dirs = [f"{place.parent}/{self.host.cgroups.name}" for place in self.host.cgroups.places]
        if any(os.path.isdir(directory) for directory in dirs):
            ending.kill(dirs)
            ending.remove(dirs, CLEANING_SECONDS)
        self._state.discard()
        self.gone = True

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


def _hidden(cgroups: Cgroups) -> tuple[str, ...]:
    # crun refuses a host with both cgroup versions mounted; what it cannot see it cannot refuse.
    return ("/sys/fs/cgroup/unified",) if cgroups.version == "hybrid" else ()
