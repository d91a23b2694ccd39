"""What both sides of a connection share: the shapes of calls, and what a peer may make us hold."""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

import attrs


@attrs.frozen
class Shape:
    """How many messages a call has: one, or any number, in each direction."""

    client_streams: bool = False
    server_streams: bool = False

    @property
    def unary(self) -> bool:
        """One message there and one back: no data frames at all."""
        return not (self.client_streams or self.server_streams)


UNARY: Final = Shape()


@attrs.frozen
class Limits:
    """What one peer may make us hold. ttrpc has no flow control: what is beyond ends a call, never stops the reading.

    Attributes:
        calls: calls at the same time on one connection.
        stream: bytes of messages of one stream that nobody has taken yet.
        connection: bytes of all requests in progress and of all messages that nobody has taken yet.
    """

    calls: int = 4096
    stream: int = 16 << 20
    connection: int = 64 << 20


LIMITS: Final = Limits()

OVERHEAD: Final = 128
"""What an empty message costs in memory, about, in bytes: an empty one is not free."""


class Messages(Protocol):
    """The messages of one call, as bytes, seen by who handles it."""

    async def receive(self) -> bytes | None:
        """The next message of the caller; None when he sends no more."""
        ...

    async def send(self, message: bytes) -> None:
        """Send one to the caller; returns when no more than a little waits to be written.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, it is too long for the protocol; nothing was sent.
        """
        ...


class Inbox:
    """Messages of one call that have arrived and nobody has taken yet.

    Attributes:
        closed: no more will arrive.
        taken: how many were taken.
    """

    __slots__ = ("_budget", "_held", "_limit", "_messages", "closed", "taken")

    def __init__(self, budget: Budget, limit: int) -> None:
        self._budget = budget
        self._limit = limit
        self._messages: deque[bytes] = deque()
        self._held = 0
        self.closed: bool = False
        self.taken: int = 0

    def __bool__(self) -> bool:
        return bool(self._messages)

    def put(self, message: bytes) -> bool:
        """Keep a message; False, and it is not kept, when that would be beyond a limit."""
        cost = len(message) + OVERHEAD
        if self._held + cost > self._limit or not self._budget.take(cost):
            return False
        self._held += cost
        self._messages.append(message)
        return True

    def take(self) -> bytes:
        """The oldest message; there must be one."""
        message = self._messages.popleft()
        self.taken += 1
        cost = len(message) + OVERHEAD
        self._held -= cost
        self._budget.give(cost)
        return message

    def clear(self) -> None:
        """Throw away what is there."""
        self._messages.clear()
        self._budget.give(self._held)
        self._held = 0


class Budget:
    """Bytes that one connection may hold."""

    __slots__ = ("_left",)

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, cost: int) -> bool:
        """Whether `cost` bytes more may be held; they are, then."""
        if cost > self._left:
            return False
        self._left -= cost
        return True

    def give(self, cost: int) -> None:
        """So many bytes are not held any more."""
        self._left += cost
