"""The engine's own event stream: bounded, numbered, and never slowed down by a reader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final

import anyio

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

    async def read(self, after: int = 0) -> AsyncIterator[Event]:
        """Every event with a number above `after`, then new ones as they come, until the engine closes.

        A reader that is so slow that events were dropped gets a "gap" event whose `seq` is the last one lost.
        """
        while True:
            oldest = self._events[0].seq if self._events else self._next
            if after + 1 < oldest:
                after = oldest - 1
                yield Event(seq=after, at=time.time(), kind="gap")
            pending = [event for event in self._events if event.seq > after]
            for event in pending:
                after = event.seq
                yield event
            if not pending:
                if self._closed:
                    return
                await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()
