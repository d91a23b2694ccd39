"""The composition root: one engine in the caller's process, its keeper, its backends and its sandboxes."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final, Literal

import anyio
import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Probe,
    RecoveryReport,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    UnavailableError,
    UnsupportedError,
    check_id,
)
from unisandbox.engine.choice import Choice, choose, probe_all
from unisandbox.engine.cleaning import CLEANING_SECONDS, Cleaning
from unisandbox.engine.entry import Entry
from unisandbox.engine.events import EventLog, SharedEventLog
from unisandbox.engine.operations import OperationLog, digest_of
from unisandbox.engine.records import Record, RecordStore, boot_id, plain_spec, spec_of, this_process
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import SANDBOXES, StateDirectory, check_directory
from unisandbox.host.cgroups import Cgroups, ending
from unisandbox.host.keeper import Keeper
from unisandbox.host.services import Host

# Guards whose failure means nothing: another engine uses the directory that all share.
_MAY_FAIL: Final = frozenset({"engine/runtime"})
_NAMES: Final = "names"
_LEAVING: Final = "leaving"

Policy = Literal["stop", "keep"]


class EngineCore:
    """One engine. Use `open` or `attach` to make one.

    Attributes:
        host: what it lends to backends.
        events: what happened.
        cleaning: what was cut and has to be finished.
        owner: whether its end is what the keeper's policy speaks of; otherwise it is one client beside others.
        policy: what becomes of the sandboxes at the owner's end.
        recovery: what was found of a former engine.
        closed: it has been closed, or is being closed.
        gone: nothing of it is left here.
    """

    def __init__(self, host: Host, state: StateDirectory, registry: Registry, *, owner: bool, policy: Policy) -> None:
        self.host = host
        self.events: EventLog | SharedEventLog = SharedEventLog(host.keeper) if host.shared else EventLog()
        self.cleaning: Cleaning = Cleaning()
        self.owner = owner
        self.policy: Policy = policy
        self.recovery: RecoveryReport = RecoveryReport("attached")
        self.closed: bool = False
        self.gone: bool = False
        self.records: RecordStore = RecordStore(os.path.join(host.state_dir, SANDBOXES), durable=state.durable)
        self.operations: OperationLog = OperationLog(os.path.join(host.state_dir, "operations"), durable=state.durable)
        self.boot_id: str = boot_id()
        # Records that were found and are not to be touched (`on_recover="report"`), by id.
        self.left: dict[str, Record] = {}
        self._state = state
        self._registry = registry
        self._sandboxers: dict[str, Sandboxer] = {}
        self._chosen: dict[str, Backend] = {}
        self._entries: dict[str, Entry] = {}
        self._closing = anyio.Lock()
        self._names_turn = 0

    @classmethod
    async def open(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        policy: Policy = "stop",
        on_recover: Literal["adopt", "stop", "report"] = "adopt",
        backends: Mapping[str, Backend] | None = None,
    ) -> EngineCore:
        """Open an engine on a state directory, or on a temporary one that vanishes with it.

        Raises:
            FailedPreconditionError: another engine owns the directory; its process is named.
            UnavailableError: this host cannot carry an engine.
            BackendError: the directory cannot be used.
        """
        if policy not in {"stop", "keep"}:
            raise InvalidArgumentError(f"policy must be 'stop' or 'keep', got {policy!r}")
        if on_recover not in {"adopt", "stop", "report"}:
            raise InvalidArgumentError(f"on_recover must be 'adopt', 'stop' or 'report', got {on_recover!r}")
        if directory is None and policy == "keep":
            raise InvalidArgumentError(
                "policy 'keep' needs a state directory of your own",
                hint="Give one: a temporary one cannot be found again.",
            )
        state = StateDirectory.prepare(directory)
        try:
            cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}")
            keeper, is_new = await _own_keeper(state, _hidden(cgroups), policy)
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
        former = state.cgroup_parents()
        if not is_new:
            cgroups = cgroups.placed(former)
        core = cls(_host(state, keeper, cgroups), state, Registry(backends), owner=True, policy=policy)
        try:
            await keeper.guard(state.guards(cgroups))
            if not state.temporary:
                from unisandbox.engine.recovery import Recovery

                recovery = Recovery(core, is_new=is_new, on_recover=on_recover)
                core.recovery = await recovery.run(former=cgroups.placed(former) if is_new else None)
                state.keep_cgroup_parents({place.key: place.parent for place in cgroups.places})
        except BaseException:
            core.abandon()
            raise
        return core

    @classmethod
    async def attach(
        cls, directory: str | os.PathLike[str], *, backends: Mapping[str, Backend] | None = None
    ) -> EngineCore:
        """Use the sandboxes of an engine that is open on this directory, or was kept there, beside its owner.

        What a process that is gone has left half made or half removed is freed; see `recovery`.

        Raises:
            UnavailableError: none is: open one.
            FailedPreconditionError: others could write into the directory.
            BackendError: the directory cannot be used.
        """
        path = os.fspath(directory)
        try:
            check_directory(path)
            keeper = await Keeper.attach(path)
        except OSError as error:
            raise BackendError(
                f"cannot use the state directory {path!r}: {error.strerror}",
                hint="It must be a directory that this user can read and write.",
            ) from error
        try:
            state = StateDirectory.prepare(directory)
            cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}").placed(state.cgroup_parents())
            host = _host(state, keeper, cgroups)
        except BaseException:
            keeper.abandon()
            raise
        core = cls(host, state, Registry(backends), owner=False, policy=keeper.hello.policy)
        try:
            from unisandbox.engine.recovery import free_cut

            core.recovery = RecoveryReport("attached", await free_cut(core))
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

    # --- sandboxes ---

    async def create(self, spec: SandboxSpec, *, sandbox_id: str | None = None, operation_id: str = "") -> Entry:
        """Create and start a sandbox.

        Args:
            spec: what it shall be like.
            sandbox_id: an id from outside (containerd's); None: a new one.
            operation_id: asked again under the same one, the same sandbox is the answer.

        Raises:
            AlreadyExistsError: the name or id is taken.
            FailedPreconditionError: the operation id was used for something else.
            NotFoundError: what the operation created was removed meanwhile.
            UnsupportedError, UnavailableError: it cannot be had; nothing was done.
        """
        self._check_open()
        await self.cleaning.catch_up()
        identity = check_id(sandbox_id) if sandbox_id is not None else secrets.token_hex(16)
        if operation_id:
            known = await self._begun(operation_id, spec)
            if known is not None:
                return known
        try:
            entry = await self._create(spec, identity, operation_id)
        except BaseException:
            if operation_id:
                self.operations.forget(operation_id)
            raise
        if operation_id:
            self.operations.finish(operation_id, identity)
        return entry

    async def _begun(self, operation_id: str, spec: SandboxSpec) -> Entry | None:
        """The sandbox that this operation has made or is making; None: it is ours to make."""
        known = self.operations.begin(operation_id, "create", spec.name or "", digest_of(plain_spec(spec)))
        if known is None:
            return None
        if known.state == "finished":
            entry = await self.get(known.result)
            await entry.settled()
            return entry
        await self.refresh()
        for entry in self.entries():
            if entry.record.operation_id == operation_id:
                await entry.settled()
                return entry
        if known.in_progress:
            raise FailedPreconditionError(
                f"operation {operation_id!r} is in progress in process {known.owner[0]}", hint="Ask again in a moment."
            )
        return None  # it was cut before anything was made

    async def _create(self, spec: SandboxSpec, identity: str, operation_id: str) -> Entry:
        self._check_free(identity, spec)
        backend = self._chosen.get(spec.isolation)
        if backend is None:
            backend, _ = await choose(self._registry, spec)
        _check_supported(backend, spec, self.policy)
        now = time.time()
        record = Record(
            sandbox_id=identity,
            name=spec.name,
            backend=backend.name,
            phase="creating",
            created_at=now,
            boot_id=self.boot_id,
            owner=this_process(),
            spec=plain_spec(spec),
            expires_at=None if spec.ttl is None else now + spec.ttl,
            operation_id=operation_id,
        )
        async with self._naming():
            self._check_open()
            self._check_free(identity, spec)
            entry = Entry(self, record, spec, self.sandboxer(backend.name))
            self._entries[identity] = entry
            try:
                entry.intend()
            except BaseException:
                self._entries.pop(identity, None)
                raise
        try:
            await entry.begin()
        except BaseException:
            if entry.removed:
                self._entries.pop(identity, None)
            raise
        # What has run here once need not be probed again by this engine.
        self._chosen[spec.isolation] = backend
        return entry

    async def get(self, ref: str) -> Entry:
        """The sandbox with that id or name.

        Raises:
            NotFoundError: there is none.
            FailedPreconditionError: it was left by a former engine and not adopted.
        """
        self._check_open()
        await self.refresh()
        for entry in self._entries.values():
            if ref in {entry.sandbox_id, entry.spec.name}:
                return entry
        for record in self.left.values():
            if ref in {record.sandbox_id, record.name}:
                raise FailedPreconditionError(
                    f"sandbox {ref!r} was left by a former engine and not taken over",
                    hint="Open the engine with on_recover='adopt' or 'stop'.",
                )
        raise NotFoundError(f"no sandbox has the id or name {ref!r}")

    async def remove(self, ref: str, *, operation_id: str = "") -> None:
        """Remove the sandbox with that id or name.

        With an operation id it may be repeated: a sandbox that has the name by then is another one, and stays.

        Raises:
            NotFoundError: there is none, and this operation has removed none.
        """
        if not operation_id:
            await (await self.get(ref)).remove()
            return
        known = self.operations.find(operation_id)
        if known is None:
            identity = (await self.get(ref)).sandbox_id
            known = self.operations.begin(operation_id, "remove", ref, identity)
        else:
            identity = known.digest
            self.operations.begin(operation_id, "remove", ref, identity)  # says if the id was used for something else
        if known is not None and known.state == "finished":
            return
        with contextlib.suppress(NotFoundError):  # a former attempt came that far
            await (await self.get(identity)).remove()
        self.operations.finish(operation_id, identity)

    def entries(self) -> list[Entry]:
        """Every sandbox that is known here and not removed, the oldest first."""
        return sorted(self._entries.values(), key=lambda entry: entry.record.created_at)

    async def refresh(self) -> None:
        """Learn which sandboxes other processes have made and removed."""
        if not self.host.shared or self.closed:
            return
        ids = set(self.records.ids())
        for entry in self.entries():
            if entry.expired or (entry.known and entry.sandbox_id not in ids):
                await entry.vanish()
        for sandbox_id in ids - set(self._entries) - set(self.left):
            try:
                record = self.records.read(sandbox_id)
                if record is not None and record.phase != "removing":
                    self.take_in(record)
            except SandboxError:
                continue  # damaged, or of a backend that is missing here: for the next owner to tell

    def take_in(self, record: Record) -> Entry:
        """Know a sandbox from its record."""
        entry = Entry(self, record, spec_of(record), self.sandboxer(record.backend))
        self._entries[record.sandbox_id] = entry
        return entry

    def forget(self, entry: Entry) -> None:
        """A sandbox is gone: its record and its name are free."""
        self.records.remove(entry.sandbox_id)
        self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """Know a sandbox no more."""
        if self._entries.get(entry.sandbox_id) is entry:
            del self._entries[entry.sandbox_id]

    def check_keeper(self) -> None:
        """Raise UnavailableError when the keeper is dead: nothing can be started any more."""
        if not self.host.keeper.alive:
            raise UnavailableError(
                f"the keeper of engine {self.host.engine_id} (process {self.host.keeper.pid}) has ended,"
                " and with it what ran in its sandboxes",
                hint="Close the engine and open another one.",
            )

    def sandboxer(self, name: str) -> Sandboxer:
        """The sandboxer of the backend of this name.

        Raises:
            InvalidArgumentError, UnavailableError: there is none, or it cannot be had here.
        """
        if name not in self._sandboxers:
            self._sandboxers[name] = self._registry.get(name).open(self.host)
        return self._sandboxers[name]

    # --- the end ---

    async def close(self) -> None:
        """End this engine. Repeating is harmless.

        The owner with policy "stop" removes every sandbox, ends the keeper and leaves nothing. With "keep", and for one
        that has attached, the sandboxes live on; the keeper ends when there is none.
        """
        async with self._closing:
            if self.closed:
                return
            if self.owner and self.policy == "stop":
                await self._close()
            else:
                await self._detach()

    async def _close(self) -> None:
        errors: list[SandboxError] = []
        try:
            await self.refresh()
            self.closed = True
            async with anyio.create_task_group() as group:
                for entry in self.entries():
                    group.start_soon(self._remove, entry, errors)
            with anyio.CancelScope(shield=True):
                await self.events.finish()
                report = await self.host.keeper.close(run_guards=True)
            errors = errors if set(report.failed) - _MAY_FAIL else []
        except UnavailableError:
            errors = []  # the keeper is dead; its mounts, pins and runtimes went with it
        finally:
            self.closed = True
            self.events.close()
            self._sweep()
        if errors:
            raise errors[0]

    async def _detach(self) -> None:
        ended = False
        try:
            await self.cleaning.catch_up()
            self.closed = True
            with anyio.CancelScope(shield=True):
                await self.events.finish()
                if not self.records.ids():
                    # One after the other, and each until its connection ends: of several that leave at once, the last
                    # one finds itself alone.
                    await self.host.keeper.lock(_LEAVING)
                    if not self.records.ids():
                        ended = await self.host.keeper.retire()
        except UnavailableError:
            pass  # it is dead already; the next one to open the directory cleans up
        finally:
            self.closed = True
            self.events.close()
            self._let_go()
            if ended:
                self._state.discard()
            self.gone = True

    def _let_go(self) -> None:
        """Close what this process holds. The connection first: what is closed after it is not closed for others."""
        self.host.keeper.abandon()
        for entry in self.entries():
            for close in tuple(entry.closing):
                close()
        for sandboxer in self._sandboxers.values():
            sandboxer.abandon()

    def abandon(self) -> None:
        """Close without an event loop: the keeper runs the guards (policy "stop"), and its end is waited for."""
        if self.closed:
            return
        self.closed = True
        self.events.close()
        if not self.owner or self.policy == "keep":
            self._let_go()
            self.gone = True
            return
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

    @contextlib.asynccontextmanager
    async def _naming(self) -> AsyncIterator[None]:
        """Nobody else gives a name to a sandbox meanwhile, and all that others have given are known."""
        if not self.host.shared:
            yield
            return
        keeper = self.host.keeper
        turn = await keeper.lock(_NAMES)
        try:
            if turn != self._names_turn + 1:
                await self.refresh()
            self._names_turn = turn
            yield
        finally:
            keeper.unlock(_NAMES)

    def _check_open(self) -> None:
        if self.closed:
            raise FailedPreconditionError("the engine is closed", hint="Open another one with Engine.open().")

    def _check_free(self, identity: str, spec: SandboxSpec) -> None:
        taken = [(entry.sandbox_id, entry.spec.name) for entry in self._entries.values()]
        taken += [(record.sandbox_id, record.name) for record in self.left.values()]
        for known in taken:
            if identity in known:
                raise AlreadyExistsError(f"a sandbox with the id or name {identity!r} exists already")
            if spec.name is not None and spec.name in known:
                raise AlreadyExistsError(
                    f"a sandbox with the name {spec.name!r} exists already",
                    hint="Take another name, or remove the other sandbox first.",
                )


def _check_supported(backend: Backend, spec: SandboxSpec, policy: Policy) -> None:
    """Refuse what the engine would have to do for a backend that has nothing to do it with."""
    if spec.ttl is not None and not backend.capabilities.ttl:
        raise UnsupportedError("ttl", backend.name, hint="Call remove() yourself, e.g. after anyio.sleep().")
    if policy == "keep" and not backend.capabilities.survives_host_crash:
        raise UnsupportedError(
            "policy 'keep'",
            backend.name,
            reason="its sandboxes end with this process",
            hint="Open the engine with policy='stop'.",
        )


async def _own_keeper(state: StateDirectory, hide: tuple[str, ...], policy: Policy) -> tuple[Keeper, bool]:
    """A keeper that this process owns, and whether it is a new one: a former engine may have left its own."""
    if not state.temporary:
        try:
            keeper = await Keeper.attach(state.path, own=True)
        except (UnavailableError, FailedPreconditionError):
            pass  # there is none, it is about to end, or it has an owner: `start` waits, or says who
        else:
            if keeper.hello.policy != policy:
                await keeper.set_policy(policy)
            return keeper, False
    return await Keeper.start(state.path, workdir=state.work_dir, hide=hide, policy=policy), True


def _host(state: StateDirectory, keeper: Keeper, cgroups: Cgroups) -> Host:
    return Host(
        engine_id=state.engine_id,
        state_dir=state.path,
        disk_dir=state.disk_dir,
        work_dir=state.work_dir,
        keeper=keeper,
        cgroups=cgroups,
        shared=not state.temporary,
    )


def _hidden(cgroups: Cgroups) -> tuple[str, ...]:
    # crun refuses a host with both cgroup versions mounted; what it cannot see it cannot refuse.
    return ("/sys/fs/cgroup/unified",) if cgroups.version == "hybrid" else ()
