"""Events of ends, told by the keeper when they happen, whether or not anybody waits. Standard library only.

What it tells was written by a client at the beginning; the keeper adds what it sees: when what it holds became
readable (if a stamped packet waits there, when that was sent), the packet, a number of a counter file, whether there is
a note. What that means only the readers of events know.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time

from unisandbox.host import stamps
from unisandbox.host.keeper import names, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.events import Events
    from unisandbox.host.keeper.holdings import Holdings
    from unisandbox.host.keeper.loop import Loop
    from unisandbox.host.keeper.notes import Notes
    from unisandbox.host.keeper.protocol import Message, Packet

# Seconds. Where the packet or the counter cannot be had any more somebody is at it who may know better, and tell it.
_PATIENCE = 0.25
_PACKET_LIMIT = 64
_COUNTER_LIMIT = 4096
_EVENTS_LIMIT = 4


class _Said:
    """An event to be told at an end: `packets` are those (in hex) at which alone it is true; empty: always."""

    __slots__ = ("key", "packets", "text")

    def __init__(self, message: Message) -> None:
        self.text = protocol.event(message)
        self.key = protocol.text(message, "key")
        self.packets = frozenset(protocol.texts(message, "packets"))


class _End:
    """What a client wants to be told about what is held as `name`."""

    __slots__ = ("at_once", "counter", "late", "line", "name", "noted", "said")

    def __init__(self, message: Message) -> None:
        self.name = _name(message, "name")
        counter = protocol.text(message, "counter")
        #: A file of lines `word number`, and the word; both empty: none.
        self.counter = protocol.path(counter, "counter") if counter else ""
        self.line = protocol.text(message, "line")
        self.noted = _name(message, "noted")
        #: Whoever should have told of it may have done so.
        self.late = message.get("late") is True
        #: Nobody may know better what the end was.
        self.at_once = message.get("at_once") is True
        said = message.get("events")
        if type(said) is not list or not all(type(each) is dict for each in said) or len(said) > _EVENTS_LIMIT:
            raise OSError(errno.EINVAL, f"events must be a list of at most {_EVENTS_LIMIT} objects")
        self.said = [_Said(each) for each in said]


def _name(message: Message, field: str) -> str:
    value = protocol.text(message, field)
    names.check(value)
    return value


class Ends:
    """Publishes events, and the ends of what they began."""

    def __init__(self, loop: Loop, holdings: Holdings, notes: Notes, events: Events) -> None:
        self._loop = loop
        self._holdings = holdings
        self._notes = notes
        self._events = events
        # What is about to be told.
        self._pending: dict[Callable[[], None], str] = {}

    def publish(self, packet: Packet, reply: Reply) -> None:
        """Number and keep an event now, and those of its `end` when that comes; once for what is held."""
        wanted = packet.message.get("end")
        if wanted is None:
            self._events.publish(packet, reply)
            return
        if type(wanted) is not dict:
            raise OSError(errno.EINVAL, "end must be an object")
        end = _End(wanted)
        if not self._holdings.is_new(end.name, missing=not end.late):
            reply({})
            return
        self._events.publish(packet, reply)
        self._holdings.on_stamp(end.name, lambda fd, at: self._ended(end, fd, at))

    def tell_last(self, text: str, key: str) -> None:
        """Tell what has happened now, an event without its time, when the ends that belong to it have been told."""
        timed = json.dumps({**json.loads(text), "at": time.time()}, separators=(",", ":"))
        self._loop.later(_PATIENCE, lambda: self._events.tell(timed, key))

    def _ended(self, end: _End, fd: int, at: float) -> None:
        packet, sent = _waiting(fd)
        count = self._loop.with_spare(lambda: _counted(end.counter, end.line)) if end.counter else 0
        was_noted = self._notes.has(end.noted)

        def tell() -> None:
            if self._pending.pop(tell, None) is None:
                return
            noted = was_noted or self._notes.has(end.noted)
            self._tell(end, {"at": sent if packet else at, "packet": packet, "count": count or 0, "noted": noted})

        self._pending[tell] = end.name
        # Not at once: what a client said before it brought about this end may wait in its socket.
        self._loop.later(0 if end.at_once or (packet and count is not None) else _PATIENCE, tell)

    def finish(self, prefix: str) -> None:
        """Tell at once what is waited with of names that begin so: nobody comes any more who knows better."""
        for tell in [tell for tell, name in self._pending.items() if name.startswith(prefix)]:
            tell()

    def _tell(self, end: _End, seen: Message) -> None:
        for said in end.said:
            if said.packets and (seen["packet"] not in said.packets or not seen["count"] or seen["noted"]):
                continue
            event = json.loads(said.text)
            self._events.tell(json.dumps({**event, "at": seen["at"], "end": seen}, separators=(",", ":")), said.key)


def _waiting(fd: int) -> tuple[str, float]:
    """The packet that whoever reads there would get, in hex, and when it was sent. Empty: none, or it is no socket."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError):
        return "", 0.0
    try:
        packet, at = stamps.peek(sock, _PACKET_LIMIT)
        return packet.hex(), at
    except OSError:
        return "", 0.0
    finally:
        sock.detach()


def _counted(path: str, word: str) -> int | None:
    """The number behind `word` in this file; None when it is not there any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise
        return None
    try:
        lines = os.read(fd, _COUNTER_LIMIT).decode("ascii", "replace").splitlines()
    except OSError:
        return None
    finally:
        os.close(fd)
    for line in lines:
        first, _, number = line.partition(" ")
        if first == word and number.isdigit():
            return int(number)
    return None
