"""The engine's own event stream: bounded, numbered, and never slowed down by a reader."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import Event, EventKind, Exit, FailedPreconditionError, UnavailableError
from unisandbox.host.ends import KILLED_PACKETS, HeldEnd, exit_of
from unisandbox.host.keeper import EndEvent, EndNotice, Keeper
from unisandbox.host.latest import Latest

_KEPT: Final = 4096
# How long one request for the next event stays with the keeper.
_WAIT_SECONDS: Final = 60.0
# So many are fetched at a time, and so many kept for whoever reads on: enough for a few readers at different places.
_PAGE: Final = 64
_PAGES_KEPT: Final = 256
# What happens once to a sandbox or process, and may be seen by several at once.
_ONCE: Final = frozenset({"sandbox.removed", "process.exited", "process.oom"})
# The same of each of what has an identity.
_ONCE_EACH: Final = frozenset({"container.exited", "sandbox.recovered"})
# What is told of a sandbox only as long as its removal was not: whoever did it may have been overtaken.
_WHILE_THERE: Final = frozenset({"sandbox.started", "sandbox.stopped", "sandbox.paused", "sandbox.resumed"})


class EventLog:
    """The last events of an engine, and whoever waits for the next.

    Args:
        keeper: with whose end what happens ends, too; None: nobody's.
        kept: so many are.
        after: the number of the last one that is not.
    """

    def __init__(self, keeper: Keeper | None = None, *, kept: int = _KEPT, after: int = 0) -> None:
        self._keeper = keeper
        self._events: deque[Event] = deque(maxlen=kept)
        self._next = after + 1
        self._news = anyio.Event()
        self._closed = False
        # What was removed last, and is told of no more.
        self._removed: Latest[str, None] = Latest(kept)

    def emit(
        self,
        kind: EventKind,
        sandbox_id: str,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
        identity: str = "",
        end: HeldEnd | None = None,
    ) -> None:
        """Number the event and keep it; readers are woken, nobody is waited for.

        Nobody else tells the same: `identity` and `end`, by which a `SharedEventLog` knows that, say nothing here.
        """
        if kind in _WHILE_THERE and sandbox_id in self._removed:
            return
        if kind == "sandbox.removed":
            self._removed[sandbox_id] = None
        event = Event(
            seq=self._next,
            at=time.time(),
            kind=kind,
            sandbox_id=sandbox_id,
            container_id=container_id,
            exec_id=exec_id,
            exit=exit,
            detail=detail or {},
        )
        self.add(event)

    def add(self, event: Event) -> None:
        """Keep an event that has its number already."""
        self._next = event.seq + 1
        self._events.append(event)
        self._wake()

    async def finish(self) -> None:
        """Nothing has to be fetched: all is here. The keeper may end."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.look_again()

    def close(self) -> None:
        """No more events come: readers end after what is kept."""
        self._closed = True
        self._wake()

    def read(self, after: int = 0, *, check: Callable[[], None] = lambda: None) -> EventReader:
        """Every event with a number above `after`, then new ones as they come, until the engine closes.

        Args:
            after: 0 for all that are kept.
            check: raises what is to be said when the keeper has ended.
        """
        return EventReader(self, after, check)

    async def next_after(self, after: int) -> Event | None:
        """The event that follows number `after`, waiting for it; None when the engine is closed and no more come.

        When it was dropped meanwhile: a "gap" event whose `seq` is the number of the last one lost.

        Raises:
            UnavailableError: the keeper has ended, and no more come although the engine is open.
            DeadlineExceededError: the keeper is suspended or stuck.
        """
        await anyio.lowlevel.checkpoint()
        while self._next <= after + 1:
            if self._closed:
                return None
            await self._until_news()
        oldest = self._next - len(self._events)
        if after + 1 < oldest:
            return Event(seq=oldest - 1, at=time.time(), kind="gap")
        return self._events[after + 1 - oldest]

    async def _until_news(self) -> None:
        keeper, news = self._keeper, self._news
        if keeper is None:
            await news.wait()
        else:
            await keeper.until(lambda: news.is_set() or self._keeper is None)

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()
        if self._keeper is not None:
            self._keeper.look_again()


class SharedEventLog:
    """The events of an engine that several processes use: the keeper numbers and keeps them."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._closed = False
        self._readers: weakref.WeakSet[EventReader] = weakref.WeakSet()
        self._rest: EventLog | None = None
        self._fetched: Latest[int, Mapping[str, object]] = Latest(_PAGES_KEPT)

    def emit(
        self,
        kind: EventKind,
        sandbox_id: str,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
        identity: str = "",
        end: HeldEnd | None = None,
    ) -> None:
        """Tell the keeper; nobody is waited for.

        Args:
            kind, sandbox_id, container_id, exec_id, exit, detail: as in `Event`.
            identity: what tells the container from a later one of the same name, or one recovery from another: it is
                told once. Empty: this is not known, and it is told as often as this is called.
            end: where the keeper sees the end of the process that this event tells the begin of; it tells that then.
                Of several events with the same one, the first is told.
        """
        if self._closed:
            return
        about = {"kind": kind, "sandbox_id": sandbox_id, "container_id": container_id, "exec_id": exec_id}
        event = {
            **about,
            "at": time.time(),
            "exit": None if exit is None else attrs.asdict(exit),
            "detail": dict(detail or {}),
        }
        notice = None if end is None else _notice(end, about, identity)
        unless = _key("sandbox.removed", about, "") if kind in _WHILE_THERE else ""
        self._keeper.events.publish(event, key=_key(kind, about, identity), unless=unless, end=notice)

    async def finish(self) -> None:
        """Fetch what readers of this process have not read yet: the keeper may end."""
        if self._readers:
            after = min(reader.after for reader in self._readers)
            self._rest = EventLog(after=after)
            # No reader's wish is worth a close that fails: he has what came until then.
            with contextlib.suppress(OSError, UnavailableError):
                while page := (await self._keeper.events.after(after)).events:
                    for number, event in page:
                        self._rest.add(_event_of(number, event))
                    after = page[-1][0]

    def close(self) -> None:
        """No more events come: readers end after what is there."""
        self._closed = True
        if self._rest is not None:
            self._rest.close()

    def read(self, after: int = 0, *, check: Callable[[], None] = lambda: None) -> EventReader:
        """As `EventLog.read`."""
        reader = EventReader(self, after, check)
        self._readers.add(reader)
        return reader

    async def next_after(self, after: int) -> Event | None:
        """As `EventLog.next_after`."""
        while True:
            if self._rest is not None:
                return await self._rest.next_after(after)
            if self._closed:
                return None
            if after + 1 in self._fetched:
                found = _event_of(after + 1, self._fetched[after + 1])
                await anyio.lowlevel.checkpoint()
                return found
            try:
                page = await self._keeper.events.after(after, wait=_WAIT_SECONDS, limit=_PAGE)
            except (UnavailableError, FailedPreconditionError):
                if self._rest is None and not self._closed:
                    raise
                continue  # closed meanwhile, maybe without an event loop
            # Behind `last`: the number of another directory, or of one whose numbers were lost.
            if (page.first > after + 1 and page.last > after) or page.last < after:
                return Event(seq=page.first - 1, at=time.time(), kind="gap")
            if page.events:
                for number, event in page.events:
                    self._fetched[number] = event
                return _event_of(*page.events[0])


def _key(kind: EventKind, about: Mapping[str, str], identity: str) -> str:
    """What only one event may have; empty for what may be told again."""
    if kind in _ONCE_EACH and identity:
        return f"{about['sandbox_id']}/{about['container_id']}/{identity}/{kind}"
    return f"{about['sandbox_id']}/{about['exec_id']}/{kind}" if kind in _ONCE else ""


def removal_by_ttl(sandbox_id: str) -> tuple[Mapping[str, object], str]:
    """What the keeper tells when a sandbox's ttl is over, and the key under which it is told once."""
    about = {"kind": "sandbox.removed", "sandbox_id": sandbox_id, "container_id": "", "exec_id": ""}
    return {**about, "exit": None, "detail": {"reason": "ttl"}}, _key("sandbox.removed", about, "")


def _notice(end: HeldEnd, about: Mapping[str, str], identity: str) -> EndNotice:
    """What the keeper shall tell at the end of a process."""

    def said(kind: EventKind, packets: Sequence[str] = ()) -> EndEvent:
        event: dict[str, object] = {**about, "kind": kind, "exit": None, "detail": {}, "is_init": end.is_init}
        return EndEvent(event, _key(kind, about, identity), packets)

    events = [said("container.exited")]
    if about["exec_id"]:
        events = [said("process.oom", KILLED_PACKETS), said("process.exited")]
    counter, line = end.counter or ("", "")
    return EndNotice(end.name, end.noted, events, counter, line, end.late, at_once=end.is_init)


def _event_of(number: int, data: Mapping[str, object]) -> Event:
    fields = dict(data)
    exit, seen = data["exit"], fields.pop("end", None)
    if fields.pop("is_init", False):
        return Event(seq=number, **fields)  # type: ignore[arg-type]
    if isinstance(seen, dict):
        fields["exit"] = exit_of(seen)
    elif isinstance(exit, dict):
        fields["exit"] = Exit(**exit)
    return Event(seq=number, **fields)  # type: ignore[arg-type]


class EventReader(AsyncIterator[Event]):
    """Reads an event log at its own pace. An object and no generator: it may be left at any point without cleaning."""

    def __init__(self, log: EventLog | SharedEventLog, after: int, check: Callable[[], None]) -> None:
        self._log = log
        self._check = check
        #: The number of the last event that was read.
        self.after: int = after

    async def __anext__(self) -> Event:
        try:
            event = await self._log.next_after(self.after)
        except UnavailableError:
            self._check()  # in the words of every other call
            raise
        if event is None:
            raise StopAsyncIteration
        self.after = event.seq
        return event
