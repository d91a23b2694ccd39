"""One sandbox that several processes use: whose turn it is to change it, and what the others have done to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    NotFoundError,
    RecoverSandbox,
    Sandboxer,
    SandboxError,
    SandboxStatus,
    UnavailableError,
)
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.events import removal_by_ttl
from unisandbox.engine.locks import LOCK_SECONDS, locked
from unisandbox.engine.record import Record, spec_of, status_of

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore
    from unisandbox.engine.entry import Entry

# How long the keeper may take to end what has expired.
_EXPIRY_SECONDS: Final = 2.0
_EXPIRY_POLL: Final = 0.01
# How long a look at what other processes have done may hold up what can do without.
_LOOK_SECONDS: Final = 2.0
# The time of its end is noted that much later at most than the keeper has heard of it.
_NOTE_SECONDS: Final = 0.25
# Seconds. Who removes says in time who is in his way.
_REMOVE_LOCK_SECONDS: Final = 0.8 * CLEANING_SECONDS


class Sharing:
    """That of one sandbox. On an engine that nobody else can attach to, only tasks of this process take turns."""

    def __init__(self, core: EngineCore, entry: Entry, sandboxer: Sandboxer) -> None:
        self._core = core
        self._entry = entry
        self._sandboxer = sandboxer
        self._host = core.host
        self._prefix = core.host.prefix(entry.sandbox_id)
        # A note of the keeper's: when it will expire, by the clock that is never set.
        self._expiry = f"{self._prefix}expires"
        # Another one: when it was stopped, where the disk did not take that.
        self._stop = f"{self._prefix}stopped"
        self._is_stop_noted = False
        self._lock = anyio.Lock()
        # Whether it is this process's turn.
        self._has_turn = False
        # One at a time takes over what others have done.
        self._catching_up = anyio.Lock()
        # When this process last had the right to change it; see `Turnstile.lock`.
        self._turn = 0

    # --- turns ---

    @contextlib.asynccontextmanager
    async def changing(self, *, to_free: bool = False, in_cleaning: bool = False) -> AsyncIterator[None]:
        """Nobody else changes the sandbox meanwhile, in this process or another one; what others have done is known.

        Args:
            to_free: it is only to be freed: what a creation or removal has left that was cut will do.
            in_cleaning: whoever asks has less time, see `CLEANING_SECONDS`; as with `to_free`.

        Raises:
            NotFoundError: another process has removed it.
            FailedPreconditionError: another engine has taken it over, or its creation or removal was cut.
            DeadlineExceededError: another process has been changing it for long.
            UnavailableError: the keeper is dead, and another engine has opened the directory since.
        """
        entry = self._entry
        self._core.loop.check()
        async with self._lock:
            if not self._host.shared:
                with entry.in_our_words():
                    yield
                return
            await self.await_expiry()
            if not self._host.keeper.alive:
                async with self._core.regaining.alone():
                    entry.record = await self._check_record() or entry.record
                    with self._turn_taken(), entry.in_our_words():
                        if entry.state == "unread":
                            await self._recover_dead()
                        yield
                return
            async with self._locked(_REMOVE_LOCK_SECONDS if to_free or in_cleaning else LOCK_SECONDS) as turn:
                with self._turn_taken(), entry.in_our_words():
                    async with self._catching_up:
                        pass  # a look that has begun compares what it has read with what we are about to change
                    if turn != self._turn + 1 and entry.state != "new":
                        await self._catch_up(exclusive=True, to_free=to_free)
                    self._turn = turn
                    yield

    @contextlib.contextmanager
    def _turn_taken(self) -> Iterator[None]:
        self._has_turn = True
        try:
            yield
        finally:
            self._has_turn = False

    async def settled(self) -> None:
        """Wait until whoever changes it has done so."""
        async with self.changing():
            self._entry.check_alive()

    def _locked(self, timeout: float = LOCK_SECONDS) -> contextlib.AbstractAsyncContextManager[int]:
        """The lock of whoever changes it."""
        return locked(self._host.keeper, f"{self._prefix}change", f"sandbox {self._entry.label!r}", timeout=timeout)

    # --- what others have done ---

    async def look(self) -> None:
        """Learn what others have done to it, whoever changes it now.

        Nothing while it is this process's turn: then nobody else changes it, and what is written down is behind.
        """
        if self._host.shared and self._entry.state != "new" and not self._has_turn:
            async with self._catching_up:
                await self._catch_up(exclusive=False)

    async def try_to_look(self, *, shield: bool = False) -> None:
        """The same; a look that fails, or takes too long, is none."""
        if not self._entry.removed:
            with anyio.move_on_after(_LOOK_SECONDS, shield=shield), contextlib.suppress(SandboxError):
                await self.look()

    async def learn(self) -> None:
        """The same for whoever uses it: one that is being made or removed is waited for."""
        self._entry.check_alive()
        # A change by this process that is under way reads it first: until then nothing of it is known here.
        is_being_read = self._entry.state == "unread" and self._lock.locked()
        if self._entry.state == "new" or is_being_read or (self._host.shared and not self.is_whole):
            await self.settled()
        else:
            await self.look()

    async def refresh(self) -> None:
        """The same if its record has changed, when whoever changes it has done so.

        What only the keeper knows is for `look`.
        """
        entry = self._entry
        # One that is known no more was taken over: its record may have been read since, for its new generation.
        is_current = entry.state not in {"new", "unread"} and self._core.knows(entry)
        if not is_current or (self._host.shared and self._core.records.changed(entry.sandbox_id)):
            await self.settled()

    async def set_expiry(self, seconds: float | None, *, is_told: bool = True) -> None:
        """Let the keeper end it in so many seconds, whoever is there then, and tell of it (`is_told`); None: never."""
        keeper, identity = self._host.keeper, self._entry.sandbox_id
        event, key = removal_by_ttl(identity) if is_told and self._host.shared else (None, "")
        await keeper.expirations.set(
            self._prefix, seconds, files=[self._core.records.path(identity)], event=event, key=key
        )
        if seconds is None:
            keeper.drop_now([self._expiry])
        else:
            keeper.notes.write_now(self._expiry, str(time.clock_gettime(time.CLOCK_BOOTTIME) + seconds))

    async def note_stop(self) -> None:
        """It was stopped, and its record could not be written: let the keeper know, by which all others go."""
        if self._host.shared and self._host.keeper.alive:
            self._is_stop_noted = True
            with contextlib.suppress(UnavailableError):  # nothing of it outlives the keeper
                await self._host.keeper.notes.write(self._stop, str(time.time()))

    def forget_stop(self) -> None:
        """It is started again, or removed."""
        if self._is_stop_noted:
            self._is_stop_noted = False
            self._host.keeper.drop_now([self._stop])

    async def _with_stop(self, record: Record) -> Record:
        """What is true of it by this record, and by the note of a stop."""
        noted = await self._host.keeper.notes.find(self._stop) if record.phase in {"ready", "stopped"} else None
        self._is_stop_noted = noted is not None
        # A start that was cut before it had forgotten the note has written down that it was done.
        if noted is None or record.phase == "stopped" or float(noted) < (record.started_at or 0.0):
            return record
        return record._replace(phase="stopped", stopped_at=float(noted))

    async def await_expiry(self) -> None:
        """About the time at which its ttl is over: wait until the keeper, whose clock decides, has said so.

        By the wall clock that time may be over although it is not: somebody has set it forward.
        """
        over = self._entry.record.expires_at
        if over is not None and time.time() >= over:
            await self._until_expired(_EXPIRY_SECONDS)

    async def has_expired(self) -> bool:
        """Whether its ttl is over at this moment, by the keeper's clock and whatever that on the wall says."""
        with contextlib.suppress(UnavailableError):
            await self._until_expired(_NOTE_SECONDS)
        return self._entry.expired

    @contextlib.asynccontextmanager
    async def telling_expiry(self) -> AsyncIterator[None]:
        """What fails within is told as the end of the ttl if that is why.

        Raises:
            NotFoundError: its ttl is over.
        """
        try:
            yield
        except (SandboxError, OSError) as error:
            if await self.has_expired():
                raise self._entry.gone() from error
            raise

    async def _until_expired(self, within: float) -> None:
        """Wait for its end if that comes within so many seconds."""
        entry = self._entry
        if entry.record.expires_at is None or entry.expired or entry.state == "removed":
            return
        if not self._host.keeper.alive:
            return
        noted = await self._host.keeper.notes.find(self._expiry)
        # Without a note it is not to expire any more, or it has: the keeper forgets it when it is about to say so, and
        # what it says has come before this answer.
        if noted is None or float(noted) > time.clock_gettime(time.CLOCK_BOOTTIME) + within:
            return
        with anyio.move_on_after(_EXPIRY_SECONDS):
            while not entry.expired:
                await self._host.keeper.clients()  # with each answer comes what is new
                await anyio.sleep(_EXPIRY_POLL)

    @property
    def is_whole(self) -> bool:
        """Whether whoever makes it is ready, and nobody removes it."""
        record = self._core.records.peek(self._entry.sandbox_id)
        return record is None or record.phase in {"ready", "stopped"}

    def written_down(self) -> SandboxStatus:
        """See `status_of`."""
        return status_of(self._entry.record)

    @property
    def is_of_other_generation(self) -> bool:
        """Whether another owner has taken it over."""
        record = self._peek()
        return record is not None and record.generation != self._entry.record.generation

    def check_ours(self) -> None:
        """Before something is done to it without a turn.

        Raises:
            FailedPreconditionError: another owner has taken it over.
        """
        record = self._peek()
        if record is not None and record.generation != self._entry.record.generation:
            raise self._taken_over(record)

    async def reach(self) -> None:
        """Before it is used from outside what runs in it: it is known here, and still ours.

        Raises:
            NotFoundError: it was removed.
            FailedPreconditionError: another owner has taken it over, or its creation or removal was cut.
        """
        if self._entry.state in {"new", "unread"}:
            await self.learn()
        else:
            self._entry.check_alive()
            self.check_ours()
            await anyio.lowlevel.checkpoint()

    def check_there(self) -> None:
        """After something of it was not found: raise NotFoundError if another process has removed it, or does."""
        entry = self._entry
        if self._host.shared and entry.known and not entry.removed:
            with contextlib.suppress(BackendError):  # damaged: for the next owner to tell
                record = self._core.records.peek(entry.sandbox_id)
                if record is None or (record.phase == "removing" and entry.record.phase != "removing"):
                    raise entry.gone()

    def _peek(self) -> Record | None:
        """Its record, if others may have written one and it can be read."""
        if not self._host.shared or not self._entry.known:
            return None
        with contextlib.suppress(BackendError):  # damaged: for the next owner to tell
            return self._core.records.peek(self._entry.sandbox_id)
        return None

    def _taken_over(self, record: Record) -> FailedPreconditionError:
        entry = self._entry
        return FailedPreconditionError(
            f"sandbox {entry.label!r} was taken over by the engine of process {record.owner[0]}: this handle is of "
            f"generation {entry.record.generation}, the sandbox now of {record.generation}",
            hint="Get it again with Engine.get().",
        )

    async def _check_record(self) -> Record | None:
        """The record, which must still be that of our generation; None while it is only an intent."""
        entry = self._entry
        if entry.state == "new":
            return None
        record = self._core.records.read(entry.sandbox_id)
        if record is None or entry.expired:
            await self._vanish()
            raise entry.gone()
        if record.generation != entry.record.generation:
            self._core.drop(entry)  # `Engine.get` gives a new one
            raise self._taken_over(record)
        return record

    async def _catch_up(self, *, exclusive: bool, to_free: bool = False) -> None:
        entry, record = self._entry, await self._check_record()
        if record is None:
            return
        record = await self._with_stop(record)
        if record.spec != entry.record.spec:
            entry.spec = spec_of(record)  # another process has changed its limits
        entry.record = record
        if to_free and record.phase in {"creating", "removing"}:
            # Whoever was at it had the lock that is ours now.
            await self._recover_dead()
            return
        request = RecoverSandbox(
            entry.sandbox_id, entry.spec, lived=True, started=record.phase == "ready", exclusive=exclusive
        )
        started = await self._sandboxer.recover(request)
        if started is None and to_free:
            return
        if started is None and await self.has_expired():
            await self._vanish()
            raise entry.gone()
        if started is None and record.expires_at is not None and time.time() >= record.expires_at:
            # The keeper is about to free it, and says so when it has.
            raise NotFoundError(f"sandbox {entry.label!r} is about to be gone: its ttl is over")
        if started is None:
            raise FailedPreconditionError(
                f"sandbox {entry.label!r} cannot be used: its creation or removal by process {record.owner[0]} was cut",
                hint="Remove it.",
            )
        entry.take(started.task)

    async def _recover_dead(self) -> None:
        """Nothing of it is of use any more: what is left is to be removed."""
        entry = self._entry
        await self._sandboxer.recover(
            RecoverSandbox(entry.sandbox_id, entry.spec, lived=False, started=False, exclusive=True)
        )

    # --- what others have left ---

    async def part(self) -> None:
        """Another process has removed it, or its ttl is over: let go of it here, when nobody looks at it any more."""
        async with self._catching_up:
            await self._vanish()

    async def _vanish(self) -> None:
        entry = self._entry
        if entry.removed:
            return
        expired = entry.expired
        entry.operations.note_created(entry.record)
        entry.let_go()
        await self._recover_dead()
        await self._sandboxer.remove(entry.sandbox_id)
        if expired:
            entry.telling.emit("sandbox.removed", detail={"reason": "ttl"})
            self._core.forget(entry)
        else:
            self._core.drop(entry)

    async def adopt(self) -> bool:
        """Take it over from a former engine, under a new generation; False when nothing of use lives."""
        entry = self._entry
        await self.await_expiry()  # the keeper may be freeing it at this moment
        # One that has attached may be about to change it.
        async with self._locked() as self._turn:
            record = self._core.records.read(entry.sandbox_id)
            if record is None:
                await self._vanish()
                return False
            ours, record = entry.record, await self._with_stop(record)
            entry.record = record._replace(generation=ours.generation, owner=ours.owner, client=ours.client)
            entry.spec = spec_of(record)
            lived = record.phase in {"ready", "stopped"} and not entry.expired
            request = RecoverSandbox(
                entry.sandbox_id, entry.spec, lived=lived, started=record.phase == "ready", exclusive=True
            )
            try:
                started = await self._sandboxer.recover(request)
            except (SandboxError, OSError):
                if await self.has_expired():  # in the middle
                    return False
                raise
            if started is None:
                return False
            entry.take(started.task)
            if not entry.programs.main_made:
                await entry.programs.forget_main()  # a launch that was cut
            self._core.records.write(entry.record)
        return True

    async def free_cut(self) -> bool:
        """Free what a process that is gone has left half made or half removed; False when that was not so any more."""
        async with self._locked() as self._turn:
            if self.is_whole:
                self._core.drop(self._entry)
                return False
            await self._recover_dead()
            await self._entry.free()
            return True
