"""Small texts that the keeper keeps under names, for whoever comes later. Client side."""

from __future__ import annotations

import json
from typing import cast

from unisandbox.host.keeper.link import Link, checked
from unisandbox.host.keeper.messages import note_request
from unisandbox.host.keeper.spools import Spools


class Notebook:
    """The notes of all clients. A note and an fd may have the same name; `Keeper.drop` forgets both."""

    def __init__(self, link: Link, spools: Spools) -> None:
        self._link = link
        self._spools = spools

    async def write(self, name: str, value: str) -> None:
        """Let the keeper keep a small text under a name, in place of what it kept there before.

        A message without an answer, which the keeper reads even if this process dies right after; waits only while the
        keeper's queue is full. All notes together are bounded by 64 MiB: a note beyond is not kept (its former text
        is), and the keeper's log says so.

        Raises:
            InvalidArgumentError: `value` has more than 64 KiB, or NUL.
        """
        await self._link.tell(note_request(name, value))

    def write_now(self, name: str, value: str) -> None:
        """As `write`, without an await; nothing happens once the keeper has ended."""
        self._link.say({"op": "note", "name": checked(name), "value": value})

    async def read(self, prefix: str = "") -> dict[str, str]:
        """The notes whose names begin with `prefix`."""
        return cast("dict[str, str]", await self._link.pages("notes", prefix))

    async def find(self, name: str) -> str | None:
        """The note of this name; None where there is none."""
        return (await self.read(name)).get(name)

    async def write_process(self, name: str, pid: int, start_time: int, pidfd: int) -> None:
        """Note which process it is, whose pidfd the keeper holds from now on under the same name."""
        await self._spools.hold_now({name: pidfd})
        await self.write(name, json.dumps([pid, start_time]))

    async def find_process(self, name: str) -> tuple[int, int] | None:
        """The pid and start time that `write_process` has noted; its pidfd is held, see `Keeper.take`."""
        note = await self.find(name)
        if note is None:
            return None
        pid, start_time = json.loads(note)
        return pid, start_time
