"""The client's side of named locks: tickets that the keeper calls up one after another.

A wait for a lock is no request that waits for its answer: of those a client may have 256 under way at a time, and with
so many waiting the one that has the lock could not ask for anything any more.
"""

from __future__ import annotations

from typing import cast

import anyio

from unisandbox.api.errors import FailedPreconditionError
from unisandbox.host.keeper.link import Link, checked
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import LockTimeoutError


class Turnstile:
    """The locks of one connection: those that it has, and those that it waits for."""

    def __init__(self, link: Link) -> None:
        self._link = link
        #: Tickets that were called up, and what the keeper said: `turn`, or `error` and `errno`.
        self._called: dict[int, Message] = {}
        self._waiting: set[int] = set()
        #: The ticket of each lock that is ours, by name.
        self._held: dict[str, int] = {}

    async def lock(self, name: str, *, timeout: float | None = None) -> int:
        """Wait until the lock of this name is ours; those who wait for it get it in the order in which they asked.

        It is ours until `unlock`, or the end of this connection. It is no lock of the task: another one that asks for
        it over the same connection waits too. Cancelled, it leaves no lock behind.

        Args:
            name: of the lock.
            timeout: seconds; None: for ever.

        Returns:
            A number that rises by one whenever anybody locks this name: who had it with n and now has it with n + 1
            knows that nobody had it in between. (It may rise by more when the name was not used for very long.)

        Raises:
            OSError: ENOSPC when this client waits for too many locks (1024).
            LockTimeoutError: it was not free in time; says which process has it.
        """
        checked(name)
        with anyio.move_on_after(timeout):
            return await self._lock(name)
        raise LockTimeoutError(cast("int", (await self._link.ask("lock_holder", name=name)).message["pid"]))

    async def _lock(self, name: str) -> int:
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
        """Give a lock to the next one, without an await and without an answer.

        Does nothing once the connection is closed: its end has freed what it had.

        Raises:
            FailedPreconditionError: this client has not locked it.
        """
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
