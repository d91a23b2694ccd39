"""What the keeper undoes at a set time, as its clients set it and are told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.eventlog import event_text
from unisandbox.host.keeper.link import Link, checked
from unisandbox.host.keeper.protocol import Message

# How many of the prefixes that have expired the client remembers; names are not used again.
_KEPT = 16384


class Expirations:
    """One time for each prefix of names, for all clients."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._known: dict[str, None] = {}

    async def set(
        self,
        prefix: str,
        seconds: float | None,
        *,
        files: Sequence[str] = (),
        event: Mapping[str, object] | None = None,
        key: str = "",
    ) -> None:
        """Let the keeper undo, in so many seconds, all that has a name with this prefix, whoever is there then.

        It runs the guards with the prefix (kills first, then the rest in reverse), drops fds, rings, notes and leases,
        and tells all clients: see `known`. A guard that failed three times stays for the keeper's end, and so do the
        leases. The time goes on while the machine sleeps (CLOCK_BOOTTIME). A message without an answer.

        Args:
            prefix: not empty.
            seconds: from now on, in place of what was said for this prefix before; None: never.
            files: that are of no use after it. Who is told of the expiry removes them; the keeper does when it ends
                because nobody has come.
            event: what readers of events are told when it has expired; the keeper adds "at". None: as said before.
            key: of that event; see `KeeperEvents.publish`.

        Raises:
            InvalidArgumentError: the prefix is empty or too long, or the time is not from 0 to the limit.
        """
        checked(prefix)
        if seconds is not None and not 0 <= seconds <= protocol.EXPIRE_LIMIT:
            raise InvalidArgumentError(f"seconds must be from 0 to {protocol.EXPIRE_LIMIT}, got {seconds}")
        message: Message = {"op": "expire", "prefix": prefix, "seconds": seconds, "files": list(files)}
        if event is not None:
            message |= {"event": event_text(event), "key": key}
        await self._link.tell(message)

    @property
    def known(self) -> frozenset[str]:
        """The prefixes that have expired, as far as this client was told: at its greeting, and with every answer since.

        The keeper tells the last 4096 of before the greeting, too.
        """
        return frozenset(self._known)

    def told(self, message: Message) -> None:
        """The keeper has said that some have expired."""
        self._known |= dict.fromkeys(cast("list[str]", message["prefixes"]))
        while len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
