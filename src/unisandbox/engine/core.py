"""One engine in the caller's process: its backends, and its sandboxes by id and name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import anyio
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    Capabilities,
    FailedPreconditionError,
    NotFoundError,
    Probe,
    ProcessSpec,
    RecoveryReport,
    Resources,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    SandboxStatus,
    SupportsPrefetch,
    UnavailableError,
    UnsupportedError,
    check_id,
)
from unisandbox.api.newcomers import check_new_sandbox
from unisandbox.api.plain import plain_given
from unisandbox.engine.choice import Choice, check_resources, check_supported, choose, probe_all
from unisandbox.engine.entry import Entry
from unisandbox.engine.events import EventLog, SharedEventLog
from unisandbox.engine.held import OpenStreams
from unisandbox.engine.left import Left
from unisandbox.engine.locks import locked
from unisandbox.engine.loops import OwnLoop
from unisandbox.engine.operations import OperationLog, digest_of, in_progress_error
from unisandbox.engine.record import Record, boot_id, check_ref, plain_spec, spec_of, this_process
from unisandbox.engine.records import RecordStore
from unisandbox.engine.regaining import Regaining
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import StateDirectory
from unisandbox.engine.state_files import OPERATIONS, SANDBOXES
from unisandbox.host.keeper.records import Policy
from unisandbox.host.services import Host

if TYPE_CHECKING:
    from unisandbox.engine.clerk import Clerk

# A keeper that is killed closes its files first; its end can be seen a moment later. Source: do_exit(), kernel/exit.c.
_DYING_SECONDS: Final = 0.05


class EngineCore:
    """One engine; `opening` makes one, `closing` ends it.

    Attributes:
        host: what it lends to backends.
        events: what happened.
        owner: whether its end is what the keeper's policy speaks of; otherwise it is one client beside others.
        policy: what becomes of the sandboxes at the owner's end.
        recovery: what was found of a former engine.
        gone: nothing of it is left here.
        left: what was found and is not to be touched (`on_recover="report"`), or could not be recovered, by id.
        regaining: how to have the state directory when the keeper is dead.
        sandboxers: those that were needed so far, by name of the backend.
        clerk: who works with files that belong to others than this process's user; None: this process may itself.
        closing: had by whoever closes it.
        loop: the event loop that it is used in.
        removes_own: what was made here is to be removed at the end, also where the keeper is to go on.
    """

    def __init__(self, host: Host, state: StateDirectory, registry: Registry, *, owner: bool, policy: Policy) -> None:
        self.host: Host = attrs.evolve(host, sandboxer=self.sandboxer)
        self.events: EventLog | SharedEventLog = SharedEventLog(host.keeper) if host.shared else EventLog(host.keeper)
        self.owner = owner
        self.policy: Policy = policy
        self.recovery: RecoveryReport = RecoveryReport("attached")
        self._closed: bool = False
        self.gone: bool = False
        self.records: RecordStore = RecordStore(
            os.path.join(host.state_dir, SANDBOXES), durable=state.durable, place=host.keeper.directory
        )
        self.operations: OperationLog = OperationLog(os.path.join(host.state_dir, OPERATIONS), durable=state.durable)
        self.boot_id: str = boot_id()
        self.left: dict[str, Left] = {}
        # What others have made and only they can use: its backend is missing here.
        self._others: dict[str, Left] = {}
        self.directory: StateDirectory = state
        self.regaining: Regaining = Regaining(self, state)
        self.sandboxers: dict[str, Sandboxer] = {}
        self._opening: dict[str, anyio.Lock] = {}
        self.clerk: Clerk | None = None
        if host.keeper.ids is not None:
            from unisandbox.engine.clerk import Clerk  # root needs none

            self.clerk = Clerk(host.keeper)
        self.closing: anyio.Lock = anyio.Lock()
        self.loop: OwnLoop = OwnLoop()
        self.removes_own: bool = False
        self._registry = registry
        # By isolation and kind of root file system, which is what "auto" looks at.
        self._chosen: dict[tuple[str, str], Backend] = {}
        self._entries: dict[str, Entry] = {}
        # By id, also of those that are known no more and may be again, in a new generation.
        self._streams: dict[str, OpenStreams] = {}

    @property
    def closed(self) -> bool:
        """It has been closed, or is being closed, or is that of the process of which this one is a fork."""
        return self._closed or self.loop.is_of_fork

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed

    async def explain(self, spec: SandboxSpec) -> Choice:
        """Which backend a sandbox would get, and why; nothing is created."""
        return (await choose(self._registry, spec))[1]

    def capabilities(self, isolation: str) -> Capabilities:
        """What the backend of this name can do where it runs.

        Raises:
            InvalidArgumentError: there is none.
            UnavailableError: it is installed but cannot be loaded, e.g. its extra is missing.
        """
        return self._registry.get(isolation).capabilities

    async def prefetch(self, spec: SandboxSpec, program: str) -> None:
        """Do what the first start of a program in such a sandbox would have to do.

        Raises:
            UnsupportedError: there is nothing that its backend could do ahead of time.
        """
        self.check_open()
        backend, _ = await choose(self._registry, spec)
        check_supported(backend, spec, self.policy)
        sandboxer = await self.sandboxer(backend.name)
        if not isinstance(sandboxer, SupportsPrefetch):
            raise UnsupportedError("prefetch", backend.name, reason="its programs need no preparation")
        await sandboxer.prefetch(spec.rootfs, program)

    async def probe(self, *, deep: bool = False) -> list[Probe]:
        """What every installed backend says about this host."""
        return await probe_all(self._registry, deep=deep)

    # --- sandboxes ---

    async def create(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: str | None = None,
        operation_id: str = "",
        program: ProcessSpec | None = None,
    ) -> Entry:
        """Create and start a sandbox.

        Args:
            spec: what it shall be like.
            sandbox_id: an id from outside (containerd's); None: a new one.
            operation_id: asked again under the same one, the same sandbox is the answer.
            program: launched before anybody can see the sandbox as ready: if that is cut, its creation was.

        Raises:
            AlreadyExistsError: the name or id is taken.
            FailedPreconditionError: the operation id was used for something else.
            NotFoundError: what the operation created was removed meanwhile.
            UnsupportedError, UnavailableError: it cannot be had; nothing was done.
        """
        self.check_open()
        check_new_sandbox(spec)
        self.check_keeper()
        self.records.check_place()
        identity = check_id(sandbox_id) if sandbox_id is not None else os.urandom(16).hex()
        if operation_id:
            known = await self._begun(operation_id, spec)
            if known is not None:
                return known
        try:
            entry = await self._create(spec, identity, operation_id, program, is_given=sandbox_id is not None)
        except BaseException:
            if operation_id:
                self.operations.forget(operation_id)
            raise
        if operation_id:
            self.operations.finish(operation_id, identity)
        return entry

    async def _begun(self, operation_id: str, spec: SandboxSpec) -> Entry | None:
        """The sandbox that this operation has made or is making; None: it is ours to make."""
        known = self.operations.begin(
            operation_id,
            "create",
            spec.name or "",
            digest_of(plain_given(spec)),
            # Former versions noted what is as by default, too.
            former_digests=[digest_of(plain_spec(spec))],
        )
        if known is None:
            return None
        if known.state == "finished":
            entry = await self.get(known.result)
            await entry.sharing.settled()
            return entry
        in_progress = known.in_progress  # before the look: whoever is dead now has made all that he ever will
        await self.refresh()
        for entry in self.entries():
            if entry.record.operation_id == operation_id:
                await entry.sharing.settled()
                self.operations.finish(operation_id, entry.sandbox_id)  # whoever made it may have been cut before that
                return entry
        # If it was cut before anything was made, it is made by one of those who ask again.
        if in_progress or not self.operations.take_over(known):
            raise in_progress_error(known)
        return None

    async def _create(
        self, spec: SandboxSpec, identity: str, operation_id: str, program: ProcessSpec | None, *, is_given: bool
    ) -> Entry:
        for entry in self._named(identity, spec):
            await entry.cleaning.catch_up()  # it may be about to be gone
        wanted = (spec.isolation, spec.rootfs.kind)
        backend = self._chosen.get(wanted)
        if backend is None:
            backend, _ = await choose(self._registry, spec)
        check_supported(backend, spec, self.policy)
        sandboxer = await self.sandboxer(backend.name)
        now = time.time()
        record = Record(
            sandbox_id=identity,
            name=spec.name,
            backend=backend.name,
            phase="creating",
            created_at=now,
            boot_id=self.boot_id,
            owner=this_process(),
            client=self.host.keeper.hello.client,
            spec=plain_spec(spec),
            expires_at=None if spec.ttl is None else now + spec.ttl,
            operation_id=operation_id,
        )
        async with contextlib.AsyncExitStack() as stack:
            async with self._naming({identity, *filter(None, [spec.name])} if is_given or spec.name else set()):
                self.check_open()
                self._check_free(identity, spec)
                # The lock before the record: whoever finds that and gets the lock knows that nobody makes it any more.
                entry = self._entries[identity] = Entry(self, record, spec, sandboxer)
                try:
                    await stack.enter_async_context(entry.sharing.changing())
                    entry.intend()
                except BaseException:
                    self.drop(entry)
                    raise
            await entry.begin(program)
        if program is None:
            entry.telling.emit("sandbox.started")
        # What has run here once need not be probed again by this engine.
        self._chosen[wanted] = backend
        return entry

    async def get(self, ref: str) -> Entry:
        """The sandbox with that id or name.

        Raises:
            InvalidArgumentError: it is no text: None is not the name of a sandbox that has none.
            NotFoundError: there is none.
            FailedPreconditionError: it was left by a former engine and not adopted, or its backend is missing here.
        """
        self.check_open()
        check_ref(ref)
        await self.refresh()
        for entry in self._entries.values():
            if ref in {entry.sandbox_id, entry.spec.name or entry.sandbox_id}:
                return entry
        for left in self._not_ours():
            if ref in {left.record.sandbox_id, left.record.name or left.record.sandbox_id}:
                raise left.refusal(ref)
        raise NotFoundError(f"no sandbox has the id or name {ref!r}")

    async def remove(self, ref: str, *, operation_id: str = "") -> None:
        """Remove the sandbox with that id or name.

        With an operation id it may be repeated: a sandbox that has the name by then is another one, and stays.

        Raises:
            NotFoundError: there is none, and this operation has removed none.
        """
        check_ref(ref)
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

    def unusable(self) -> list[SandboxStatus]:
        """Those that cannot be had here, and why."""
        return [left.status for left in self._not_ours() if left.why]

    def _not_ours(self) -> list[Left]:
        return [*self.left.values(), *self._others.values()]

    async def refresh(self) -> None:
        """Learn which sandboxes other processes have made and removed.

        Raises:
            UnavailableError: the keeper is dead: what is written down may be another engine's by now.
        """
        self.loop.check()
        if not self.host.shared or self.closed:
            return
        if not self.regaining.is_ours:
            self.check_keeper()
        ids = set(self.records.ids())
        # At this moment: one that is being made has its record before it counts as known.
        gone = [entry for entry in self.entries() if entry.known and entry.sandbox_id not in ids]
        for entry in () if self.owner else self.entries():
            # Taken over by another owner: from here on it is to be had in its new generation.
            if self.records.changed(entry.sandbox_id) and entry.sharing.is_of_other_generation:
                self.drop(entry)
        for sandbox_id in self.left.keys() - ids:
            del self.left[sandbox_id]
        others: dict[str, Left] = {}
        for sandbox_id in ids - set(self._entries) - set(self.left):
            record = None
            try:
                record = self.records.read(sandbox_id)
                if record is not None and record.phase != "removing":
                    await self.take_in(record)
            except SandboxError as error:
                if record is None:
                    continue  # it is damaged, which an opening or attaching tells
                if record.expires_at is not None and self.host.keeper.alive:
                    await self.host.keeper.clients()  # with each answer comes what is new
                if self.host.prefix(sandbox_id) in self.host.keeper.expirations.known:
                    # The keeper has ended and freed it, and maybe nobody comes who can use it.
                    self.events.emit("sandbox.removed", sandbox_id, detail={"reason": "ttl"})
                    self.records.remove(sandbox_id)
                else:
                    others[sandbox_id] = Left(record, error.message, error.hint)
        self._others = others
        # After that: also one that nobody here has known may have expired, and its record is to be removed.
        for entry in self.entries():
            if entry.expired or entry in gone:
                await entry.sharing.part()

    async def take_in(self, record: Record) -> Entry:
        """Know a sandbox from its record."""
        sandboxer = await self.sandboxer(record.backend)
        if record.sandbox_id not in self._entries:  # or another task was quicker
            self._entries[record.sandbox_id] = Entry(self, record, spec_of(record), sandboxer)
        return self._entries[record.sandbox_id]

    def forget(self, entry: Entry) -> None:
        """A sandbox is gone: its record and its name are free."""
        if entry.recorded:
            self.records.remove(entry.sandbox_id)
        self.drop(entry)

    def forget_others(self) -> None:
        """What only others could use is gone, with the keeper: nothing is left that its records speak of."""
        for sandbox_id in self._others:
            with contextlib.suppress(SandboxError):  # the next owner tells of it
                self.records.remove(sandbox_id)

    def knows(self, entry: Entry) -> bool:
        """Whether this is the sandbox's entry: a former one is fenced off."""
        return self._entries.get(entry.sandbox_id) is entry

    def drop(self, entry: Entry) -> None:
        """Know a sandbox no more. What is open of it stays so: it may have been taken over."""
        if self.knows(entry):
            del self._entries[entry.sandbox_id]
            if entry.streams.idle:
                self._streams.pop(entry.sandbox_id, None)

    def streams_of(self, sandbox_id: str) -> OpenStreams:
        """What this process has open of the processes of a sandbox."""
        return self._streams.setdefault(sandbox_id, OpenStreams())

    def close_streams(self) -> None:
        """Close all that this process has open of processes."""
        for streams in self._streams.values():
            streams.close()

    def check_keeper(self, *, after_error: bool = False) -> None:
        """Raise UnavailableError when the keeper is dead: nothing can be started any more, and nothing runs on.

        Args:
            after_error: a path was not there. One that is being killed loses its files before its end can be seen.
        """
        keeper = self.host.keeper
        if not keeper.alive or (after_error and not os.path.exists(f"/proc/{keeper.pid}/root")):
            for entry in tuple(self._entries.values()):
                with contextlib.suppress(SandboxError, OSError):  # most has ended with it; threads of ours have not
                    entry.kill_now()
            raise UnavailableError(
                f"the keeper of engine {self.host.engine_id} (process {self.host.keeper.pid}) has ended,"
                " and with it what ran in its sandboxes",
                hint="Close the engine and open another one.",
            )

    def check_dying(self) -> None:
        """Raise the same when it is about to be dead: a path of its was not there, or its connection has ended."""
        if self.host.keeper.ends_within(_DYING_SECONDS):
            self.check_keeper()

    def records_of(self, backend: str) -> bool:
        """Whether sandboxes of this backend are written down: somebody else may have to know of them."""
        return self.host.shared or self._registry.get(backend).capabilities.survives_host_crash

    def check_resources(self, backend: str, resources: Resources) -> None:
        """Raise UnsupportedError for a limit that this backend does not know."""
        check_resources(self._registry.get(backend), resources)

    async def sandboxer(self, name: str) -> Sandboxer:
        """The sandboxer of the backend of this name.

        Raises:
            FailedPreconditionError: the engine was closed meanwhile.
            InvalidArgumentError, UnavailableError: there is none, or it cannot be had here.
        """
        if name not in self.sandboxers:
            async with self._opening.setdefault(name, anyio.Lock()):
                if name not in self.sandboxers:
                    self.check_open()
                    try:
                        sandboxer = await self._registry.get(name).open(self.host)
                    except SandboxError:
                        self.check_open()  # what it needs is gone with the engine
                        raise
                    except Exception as error:  # a stranger's may do anything; the others go on
                        self.check_open()
                        self.check_keeper(after_error=True)
                        why = f"backend {name!r} cannot be opened: {type(error).__name__}: {error}"
                        raise UnavailableError(why, hint=self._registry.remedy(name)) from error
                    if self.closed:  # whoever closes it abandons those that he finds, and may have done so
                        sandboxer.abandon()
                        self.check_open()
                    self.sandboxers[name] = sandboxer
        return self.sandboxers[name]

    @contextlib.asynccontextmanager
    async def _naming(self, names: set[str]) -> AsyncIterator[None]:
        """Nobody else gives one of these names to a sandbox meanwhile, and all that others have given are known.

        Args:
            names: none for a sandbox that has but a new id: nobody else can take that.
        """
        if not self.host.shared or not names:
            yield
            return
        async with contextlib.AsyncExitStack() as stack:
            for name in sorted(names):  # in one order, so that two never wait for each other
                await stack.enter_async_context(locked(self.host.keeper, f"name/{name}", f"the name {name!r}"))
            await self.refresh()
            yield

    def _named(self, identity: str, spec: SandboxSpec) -> list[Entry]:
        """Those that have one of these names already."""
        wanted = {identity, spec.name} - {None}
        return [entry for entry in self.entries() if wanted & {entry.sandbox_id, entry.spec.name}]

    def check_open(self) -> None:
        """Raise FailedPreconditionError when the engine is closed, or another event loop's."""
        self.loop.check()
        if self.closed:
            raise FailedPreconditionError("the engine is closed", hint="Open another one with Engine.open().")

    def _check_free(self, identity: str, spec: SandboxSpec) -> None:
        # One whose ttl is over is gone; the next refresh lets go of it.
        taken = [(entry.sandbox_id, entry.spec.name) for entry in self._entries.values() if not entry.expired]
        taken += [(left.record.sandbox_id, left.record.name) for left in self._not_ours()]
        for known in taken:
            if identity in known:
                raise AlreadyExistsError(f"a sandbox with the id or name {identity!r} exists already")
            if spec.name is not None and spec.name in known:
                raise AlreadyExistsError(
                    f"a sandbox with the name {spec.name!r} exists already",
                    hint="Take another name, or remove the other sandbox first.",
                )
