"""The engine's own event stream: bounded, numbered, and never slowed down by a reader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import Event, EventKind, Exit

_KEPT: Final = 4096


class EventLog:
    """The last events of an engine, and whoever waits for the next."""

    def __init__(self, *, kept: int = _KEPT) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._next = 1
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
        self._next += 1
        self._events.append(event)
        self._wake()

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


class EventReader(AsyncIterator[Event]):
    """Reads an event log at its own pace. An object and no generator: it may be left at any point without cleaning."""

    def __init__(self, log: EventLog, after: int) -> None:
        self._log = log
        self._after = after

    async def __anext__(self) -> Event:
        event = await self._log.next_after(self._after)
        if event is None:
            raise StopAsyncIteration
        self._after = event.seq
        return event
