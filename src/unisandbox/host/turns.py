"""Waiting without a background task: whoever waits takes his turn at reading for everybody.

Several tasks wait for different things that all arrive over one channel (replies and exits over the keeper's socket,
answers of an init over its own). There is no task whose job it is to read; instead the first waiter becomes the reader
("leads"), hands on what is not his by changing shared state, and wakes those whose wait is over. When he leaves, be it
because he has what he wanted, by an exception or by cancellation, another waiter leads.

So a channel can be opened in one task and closed in another, and nothing is left running when nobody waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio


class Turns:
    """One channel's waiters. Belongs to one event loop; not thread-safe."""

    __slots__ = ("_heir", "_leader", "_leader_ready", "_sleepers")

    def __init__(self) -> None:
        self._leader: anyio.CancelScope | None = None
        self._leader_ready: Callable[[], bool] | None = None
        self._sleepers: dict[anyio.Event, Callable[[], bool]] = {}
        self._heir: anyio.Event | None = None

    @property
    def waiting(self) -> int:
        """How many tasks wait now, the leader included."""
        return len(self._sleepers) + (self._leader is not None)

    async def until(self, ready: Callable[[], bool], turn: Callable[[], Awaitable[None]]) -> None:
        """Return once `ready()` is true; meanwhile take turns at `turn()` with all the others that wait here.

        Args:
            ready: looks at shared state only, cheap, and called often, also by other waiters. What it raises is raised
                here, in its own waiter.
            turn: waits for the channel, takes what came and changes the shared state. It is never run twice at once.
                Cancelled at an await, it must have lost nothing.

        Raises:
            Exception: what `turn()` raised, to the waiter that led; the others lead next and see for themselves.

        No checkpoint happens when `ready()` is true at once.
        """
        try:
            while not ready():
                if self._leader is None:
                    await self._lead(ready, turn)
                else:
                    await self._sleep(ready)
        finally:
            self._appoint()

    def notify(self) -> None:
        """The shared state was changed from outside of a turn: wake those whose wait is over, the leader too."""
        self._wake_ready()
        if self._leader is not None and self._leader_ready is not None and _over(self._leader_ready):
            self._leader.cancel()

    async def _lead(self, ready: Callable[[], bool], turn: Callable[[], Awaitable[None]]) -> None:
        with anyio.CancelScope() as scope:
            self._leader, self._leader_ready = scope, ready
            try:
                while not ready():
                    await turn()
                    self._wake_ready()
            finally:
                self._leader = self._leader_ready = None
                self._wake_ready()

    async def _sleep(self, ready: Callable[[], bool]) -> None:
        event = anyio.Event()
        self._sleepers[event] = ready
        try:
            await event.wait()
        finally:
            self._sleepers.pop(event, None)
            if self._heir is event:
                # Awake (or cancelled on the way): from here on it leads, or `until` appoints another.
                self._heir = None

    def _wake_ready(self) -> None:
        for event in [event for event, ready in self._sleepers.items() if _over(ready)]:
            del self._sleepers[event]
            event.set()

    def _appoint(self) -> None:
        """See to it that somebody leads, or is on his way to, while anybody sleeps."""
        if self._leader is None and self._heir is None and self._sleepers:
            self._heir = next(iter(self._sleepers))
            del self._sleepers[self._heir]
            self._heir.set()


def _over(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except Exception:
        # It is raised again in the waiter's own task, where it belongs.
        return True
