"""What a client has heard of exits: those it was told, and asking for those that it was not. Client side."""

from __future__ import annotations

import errno
from typing import cast

from unisandbox.host.keeper.link import Link
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import ExitRecord

# How many exits the client remembers; the keeper is asked for older ones.
_KEPT = 16384


class HeardExits:
    """The exits that one connection was told, the last of them remembered."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._exits: dict[tuple[int, int], ExitRecord] = {}
        #: Those that live as far as we know: their end will be told.
        self._expected: set[tuple[int, int]] = set()
        #: How often the keeper had forgotten exits before it could tell us.
        self._gaps = 0
        self.last_seq: int = 0

    def expect(self, pid: int, start_time: int) -> None:
        """This process lives, and is the keeper's child: its end will be told, and `wait` need not ask for it."""
        if (pid, start_time) not in self._exits:
            self._expected.add((pid, start_time))

    async def wait(self, pid: int, start_time: int) -> ExitRecord:
        """See `Keeper.wait_exit`."""
        process = (pid, start_time)
        gaps = self._gaps
        if process not in self._exits and process not in self._expected:
            record = await self._ask(process)
            if record is not None:
                return record
        while True:
            await self._link.until(lambda seen=gaps: process in self._exits or self._gaps != seen)  # type: ignore[misc]
            if process in self._exits:
                return self._exits[process]
            # We did not read for so long that the keeper has forgotten exits that we were not told; perhaps this one.
            gaps = self._gaps
            record = await self._ask(process)
            if record is not None:
                return record

    async def _ask(self, process: tuple[int, int]) -> ExitRecord | None:
        try:
            packet = await self._link.ask("exit_of", pid=process[0], start_time=process[1])
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, str(error.strerror)) from None
        told = cast("tuple[int, int, int, int, float] | None", packet.message["exit"])
        return None if told is None else ExitRecord(*told)

    async def after(self, seq: int) -> tuple[list[ExitRecord], int]:
        """See `Keeper.exits_after`."""
        packet = await self._link.ask("exits_after", after=seq)
        records = cast("list[tuple[int, int, int, int, float]]", packet.message["exits"])
        return [ExitRecord(*record) for record in records], cast("int", packet.message["first"])

    def told(self, message: Message) -> None:
        """The keeper tells some, and whether there were others that it has forgotten."""
        if message["gap"]:
            self._gaps += 1
            self._expected.clear()  # the end of one may be among what is forgotten: whoever waits for it asks
        for told in cast("list[tuple[int, int, int, int, float]]", message["exits"]):
            record = ExitRecord(*told)
            process = (record.pid, record.start_time)
            self.last_seq = record.seq
            self._expected.discard(process)
            self._exits[process] = record
        while len(self._exits) > _KEPT:
            del self._exits[next(iter(self._exits))]
