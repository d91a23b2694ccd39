"""The engine's own event stream: bounded, numbered, and never slowed down by a reader."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import Event, EventKind, Exit, FailedPreconditionError, UnavailableError
from unisandbox.host.keeper import Keeper

_KEPT: Final = 4096
# How long one request for the next event stays with the keeper.
_WAIT_SECONDS: Final = 60.0


class EventLog:
    """The last events of an engine, and whoever waits for the next."""

    def __init__(self, *, kept: int = _KEPT, after: int = 0) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._next = after + 1
        self._news = anyio.Event()
        self._closed = False

    def emit(
        self,
        kind: EventKind,
        sandbox_id: str,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        """Number the event and keep it; readers are woken, nobody is waited for."""
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
        """Nothing has to be fetched: all is here."""

    def close(self) -> None:
        """No more events come: readers end after what is kept."""
        self._closed = True
        self._wake()

    def read(self, after: int = 0) -> EventReader:
        """Every event with a number above `after`, then new ones as they come, until the engine closes."""
        return EventReader(self, after)

    async def next_after(self, after: int) -> Event | None:
        """The event that follows number `after`, waiting for it; None when the engine is closed and no more come.

        When it was dropped meanwhile: a "gap" event whose `seq` is the number of the last one lost.
        """
        await anyio.lowlevel.checkpoint()
        while self._next <= after + 1:
            if self._closed:
                return None
            await self._news.wait()
        oldest = self._next - len(self._events)
        if after + 1 < oldest:
            return Event(seq=oldest - 1, at=time.time(), kind="gap")
        return self._events[after + 1 - oldest]

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()


class SharedEventLog:
    """The events of an engine that several processes use: the keeper numbers and keeps them."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._closed = False
        self._readers: weakref.WeakSet[EventReader] = weakref.WeakSet()
        self._rest: EventLog | None = None

    def emit(
        self,
        kind: EventKind,
        sandbox_id: str,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        """Tell the keeper; nobody is waited for."""
        if self._closed:
            return
        self._keeper.publish_now(
            {
                "at": time.time(),
                "kind": kind,
                "sandbox_id": sandbox_id,
                "container_id": container_id,
                "exec_id": exec_id,
                "exit": None if exit is None else attrs.asdict(exit),
                "detail": dict(detail or {}),
            }
        )

    async def finish(self) -> None:
        """Fetch what readers of this process have not read yet: the keeper may end."""
        if self._readers:
            after = min(reader.after for reader in self._readers)
            self._rest = EventLog(after=after)
            while page := (await self._keeper.events_after(after)).events:
                for number, event in page:
                    self._rest.add(_event_of(number, event))
                after = page[-1][0]

    def close(self) -> None:
        """No more events come: readers end after what is there."""
        self._closed = True
        if self._rest is not None:
            self._rest.close()

    def read(self, after: int = 0) -> EventReader:
        """As `EventLog.read`."""
        reader = EventReader(self, after)
        self._readers.add(reader)
        return reader

    async def next_after(self, after: int) -> Event | None:
        """As `EventLog.next_after`."""
        while True:
            if self._rest is not None:
                return await self._rest.next_after(after)
            if self._closed:
                return None
            try:
                page = await self._keeper.events_after(after, wait=_WAIT_SECONDS, limit=1)
            except (UnavailableError, FailedPreconditionError):
                if self._rest is None:
                    return None  # the keeper has ended, or the engine was closed without an event loop
                continue
            if page.first > after + 1 and page.last > after:
                return Event(seq=page.first - 1, at=time.time(), kind="gap")
            if page.events:
                return _event_of(*page.events[0])


def _event_of(number: int, data: Mapping[str, object]) -> Event:
    exit = data["exit"]
    fields = {**data, "exit": Exit(**exit) if isinstance(exit, dict) else None}
    return Event(seq=number, **fields)  # type: ignore[arg-type]


class EventReader(AsyncIterator[Event]):
    """Reads an event log at its own pace. An object and no generator: it may be left at any point without cleaning."""

    def __init__(self, log: EventLog | SharedEventLog, after: int) -> None:
        self._log = log
        #: The number of the last event that was read.
        self.after: int = after

    async def __anext__(self) -> Event:
        event = await self._log.next_after(self.after)
        if event is None:
            raise StopAsyncIteration
        self.after = event.seq
        return event
