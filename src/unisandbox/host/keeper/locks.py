"""Named locks among the keeper's clients: a queue for each. Standard library only.

A client asks with a ticket (a number of its own) and is called up by a push: a wait is no request under way, since a
client with too many of those is not read any more, and then could not unlock either.
"""

from __future__ import annotations

import errno

from unisandbox.host.keeper import names, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Client, Connections, Reply
    from unisandbox.host.keeper.protocol import Message, Packet

# Locks that one client has or waits for.
TICKETS_LIMIT = 1024
# So many names that nobody uses are remembered with their turn numbers.
_IDLE_KEPT = 4096


class _Lock:
    """A lock in use: the first of the queue has it."""

    __slots__ = ("queue", "turn")

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.queue: list[tuple[Client, int]] = []


class Locks:
    """All of them."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._used: dict[str, _Lock] = {}
        #: The last turn of locks that nobody has or waits for; the longest unused first.
        self._idle: dict[str, int] = {}
        #: A name that was forgotten goes on behind this: its numbers never fall, and never repeat.
        self._forgotten = 0
        self._names: dict[Client, dict[int, str]] = {}

    def lock(self, packet: Packet, reply: Reply) -> None:
        """Queue a ticket; it is called up by `{"push": "locked", "ticket", "turn"}`."""
        client = reply.client
        name = names.given(packet.message)
        ticket = protocol.integer(packet.message, "ticket", 0, 1 << 62)
        tickets = self._names.setdefault(client, {})
        if ticket in tickets:
            raise OSError(errno.EEXIST, f"ticket {ticket} is used already")
        reply({})
        if len(tickets) >= TICKETS_LIMIT:
            error = f"process {client.pid} has or waits for {TICKETS_LIMIT} locks already"
            self._call(client, ticket, {"error": error, "errno": errno.ENOSPC})
            return
        tickets[ticket] = name
        lock = self._used.get(name)
        if lock is None:
            lock = self._used[name] = _Lock(self._idle.pop(name, self._forgotten))
        lock.queue.append((client, ticket))
        if len(lock.queue) == 1:
            self._grant(lock)

    def holder(self, packet: Packet, reply: Reply) -> None:
        """The process that has the lock of this name; 0 when nobody has it."""
        lock = self._used.get(protocol.text(packet.message, "name"))
        reply({"pid": lock.queue[0][0].pid if lock is not None else 0})

    def leave(self, packet: Packet, reply: Reply) -> None:
        """A client gives its lock back, or its place in the queue; one that has neither is no error."""
        ticket = protocol.integer(packet.message, "ticket", 0, 1 << 62)
        name = self._names.get(reply.client, {}).pop(ticket, None)
        if name is not None:
            self._remove(name, lambda client, number: client is reply.client and number == ticket)
        reply({})

    def gone(self, client: Client) -> None:
        """A connection ended, and with it all that it had and waited for."""
        for name in dict.fromkeys(self._names.pop(client, {}).values()):
            self._remove(name, lambda other, _number: other is client)

    def _remove(self, name: str, is_leaving: Callable[[Client, int], bool]) -> None:
        lock = self._used[name]
        former = lock.queue[0]
        lock.queue = [place for place in lock.queue if not is_leaving(*place)]
        if not lock.queue:
            del self._used[name]
            self._idle[name] = lock.turn
            if len(self._idle) > _IDLE_KEPT:
                oldest = next(iter(self._idle))
                self._forgotten = max(self._forgotten, self._idle.pop(oldest))
        elif lock.queue[0] is not former:
            self._grant(lock)

    def _grant(self, lock: _Lock) -> None:
        lock.turn += 1
        client, ticket = lock.queue[0]
        self._call(client, ticket, {"turn": lock.turn})

    def _call(self, client: Client, ticket: int, message: Message) -> None:
        self._connections.post(client, {"push": "locked", "ticket": ticket, **message}, [])
