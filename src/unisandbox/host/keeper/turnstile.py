"""The client's side of named locks: tickets that the keeper calls up one after another.

A wait for a lock is no request that waits for its answer: of those a client may have 256 under way at a time, and with
so many waiting the one that has the lock could not ask for anything any more.
"""

from __future__ import annotations

from typing import cast

from unisandbox.api.errors import FailedPreconditionError
from unisandbox.host.keeper.link import Link
from unisandbox.host.keeper.protocol import Message


class Turnstile:
    """The locks of one connection: those that it has, and those that it waits for."""

    def __init__(self, link: Link) -> None:
        self._link = link
        #: Tickets that were called up, and what the keeper said: `turn`, or `error` and `errno`.
        self._called: dict[int, Message] = {}
        self._waiting: set[int] = set()
        #: The ticket of each lock that is ours, by name.
        self._held: dict[str, int] = {}

    async def lock(self, name: str) -> int:
        """See `Keeper.lock`."""
        ticket = self._link.number()
        self._waiting.add(ticket)
        try:
            await self._link.tell({"op": "lock", "name": name, "ticket": ticket})
            await self._link.until(lambda: ticket in self._called)
        except BaseException:
            # Also when we have been called up already: nobody will know that the lock is ours.
            self._link.say({"op": "cancel_lock", "name": name, "ticket": ticket})
            raise
        else:
            said = self._called[ticket]
        finally:
            self._waiting.discard(ticket)
            self._called.pop(ticket, None)
        if "error" in said:
            raise OSError(cast("int", said["errno"]), f"cannot lock {name!r}: {said['error']}")
        self._held[name] = ticket
        return cast("int", said["turn"])

    def unlock(self, name: str) -> None:
        """See `Keeper.unlock`."""
        ticket = self._held.pop(name, None)
        if ticket is not None:
            self._link.say({"op": "unlock", "name": name, "ticket": ticket})
        elif not self._link.closed:
            raise FailedPreconditionError(f"cannot unlock {name!r}: this client has not locked it")

    def called(self, message: Message) -> None:
        """The keeper calls up a ticket."""
        ticket = cast("int", message["ticket"])
        if ticket in self._waiting:
            self._called[ticket] = message
