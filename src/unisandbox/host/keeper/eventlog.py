"""The keeper's log of events, as its clients write and read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from unisandbox.host.keeper.link import Link
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import EndNotice, EventPage


class KeeperEvents:
    """One order of events for all clients; numbers that are never given again."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def publish(
        self, event: Mapping[str, object], *, key: str = "", unless: str = "", end: EndNotice | None = None
    ) -> None:
        """Add an event to the log of this keeper, which gives it a number; without an await and without an answer.

        Nothing happens once the keeper has ended.

        Args:
            event: as JSON at most 16 KiB; a larger one is lost, and the keeper's log says so.
            key: of several with the same one, by whomever, only the first is told (16384 keys are remembered).
            unless: it comes too late, and is not told, when one with this key was.
            end: what the keeper tells of itself when what this event began has ended. Of several events that begin the
                same, the first is told.
        """
        message: Message = {"op": "publish", "event": event_text(event)}
        if key:
            message["key"] = key
        if unless:
            message["unless"] = unless
        if end is not None:
            message["end"] = {
                "name": end.name,
                "counter": end.counter,
                "line": end.line,
                "noted": end.noted,
                "late": end.late,
                "at_once": end.at_once,
                "events": [
                    {"event": event_text(said.event), "key": said.key, "packets": list(said.packets)}
                    for said in end.events
                ],
            }
        self._link.say(message)

    async def after(self, seq: int, *, wait: float = 0.0, limit: int = 500) -> EventPage:
        """Events after number `seq`; if there are none yet, wait for one up to `wait` seconds.

        The last 4096 are kept. Numbers rise by one, and are never given again, also not by a later keeper of the same
        state directory: after a keeper was killed they go on behind a gap. For a number that was never given there
        (`last` is below it) nobody waits.

        Args:
            seq: 0 for all that are there.
            wait: at most 3600.
            limit: of events; a page may have fewer also because it is full of large ones.
        """
        message = (await self._link.wait("events_after", after=seq, wait=wait, limit=limit)).message
        told = cast("list[tuple[int, str]]", message["events"])
        events = [(number, cast("Mapping[str, object]", json.loads(text))) for number, text in told]
        return EventPage(events, cast("int", message["first"]), cast("int", message["last"]))


def event_text(event: Mapping[str, object]) -> str:
    """As the keeper takes it."""
    return json.dumps(dict(event), separators=(",", ":"))
