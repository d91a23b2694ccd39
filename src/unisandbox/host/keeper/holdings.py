"""What the keeper holds for its clients by name: file descriptors, and rings of output. Standard library only.

A client that reads an fd itself may have it spooled: when its connection ends, the keeper drains the fd into a ring
until somebody reclaims it. What the fd brings is then somewhere at every moment: with the client, or in the ring.
"""

from __future__ import annotations

import binascii
import errno
import fcntl
import itertools
import os
import select
import time

from unisandbox.host.keeper import names, protocol, rings
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Client, Reply
    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Message, Packet

_INLINE_LIMIT = 48 * 1024
_WAIT_LIMIT = 3600.0
# Of an fd that can be held and waited for, but not read: a pidfd, the writing end of a pipe, a directory.
_UNREADABLE = (errno.EINVAL, errno.EBADF, errno.EISDIR)


class _Reader:
    """A `ring_read` that waits for bytes at `offset`."""

    __slots__ = ("limit", "offset", "reply", "timer")

    def __init__(self, reply: Reply, offset: int, limit: int) -> None:
        self.reply = reply
        self.offset = offset
        self.limit = limit
        self.timer: Timer | None = None


class _Holding:
    """What is behind a name."""

    __slots__ = (
        "client",
        "draining",
        "fd",
        "limit",
        "readers",
        "ring",
        "serial",
        "stamp",
        "stamp_wanted",
        "stamped",
        "stamping",
        "watched",
    )

    def __init__(self, fd: int, serial: int) -> None:
        #: -1: it was drained to its end.
        self.fd = fd
        self.serial = serial
        #: How many bytes to keep when nobody reads; 0: not spooled.
        self.limit = 0
        #: Whose end begins the draining.
        self.client: Client | None = None
        #: What was drained, also what a client has reclaimed and nobody has taken from it yet.
        self.ring: rings.Ring | None = None
        self.draining = False
        self.readers: list[_Reader] = []
        #: When it became readable; None while it has not, or is not to be stamped.
        self.stamp: float | None = None
        self.stamping = False
        #: Somebody has asked for it by `on_stamp`.
        self.stamp_wanted = False
        #: What to do then, with the fd and the time.
        self.stamped: Callable[[int, float], None] | None = None
        self.watched = False


class Holdings:
    """Names, and what is behind each."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held: dict[str, _Holding] = {}
        self._serials = itertools.count(1)
        self._ring_memory = rings.Memory()

    def all_under(self, prefix: str) -> bool:
        """Whether nothing is held but under names that begin so."""
        return all(name.startswith(prefix) for name in self._held)

    def free(self, name: str) -> str:
        """The name, if it may be given to something new."""
        names.check(name)
        if name in self._held:
            raise OSError(errno.EEXIST, f"{name!r} is held already")
        return name

    def put(self, name: str, fd: int) -> int:
        """Hold an fd; the number that it has here."""
        self._held[self.free(name)] = _Holding(fd, next(self._serials))
        return fd

    def number(self, name: str) -> int:
        """The fd that is held as `name`. Raises OSError ENOENT when none is."""
        held = self._held.get(name)
        if held is None or held.fd < 0:
            raise OSError(errno.ENOENT, f"nothing is held as {name!r}")
        return held.fd

    def forget(self, name: str) -> None:
        """Close what is behind this name, if anything."""
        held = self._held.pop(name, None)
        if held is not None:
            if held.stamped is not None and _is_readable(held.fd):
                self._stamp(held)  # whoever drops it has seen that before us
            self._close(held)
            self._answer_all(held)
            if held.ring is not None:
                self._ring_memory.remove(held.ring)

    def is_new(self, name: str, *, missing: bool) -> bool:
        """Whether nobody has called `on_stamp` for what is held under this name; `missing` when nothing is."""
        held = self._held.get(name)
        return missing if held is None else not held.stamp_wanted

    def on_stamp(self, name: str, action: Callable[[int, float], None]) -> None:
        """Call `action(fd, time)` once when what is held under this name has become readable, in place of another one.

        It must be among what is to be stamped; nothing happens when it is not, or is dropped before.
        """
        held = self._held.get(name)
        if held is None:
            return
        held.stamp_wanted = True
        if held.stamping:
            held.stamped = action
        elif held.stamp is not None:
            action(held.fd, held.stamp)

    def drop(self, wanted: list[str], prefix: str) -> None:
        """Close what is behind these names, and behind all with this prefix unless it is empty."""
        for name in names.selected(self._held, wanted, prefix):
            self.forget(name)

    def gone(self, client: Client) -> None:
        """A connection ended: what it was reading itself is drained from now on, and its own waits are over."""
        for held in self._held.values():
            if held.readers:
                self._end_waits(held, [reader for reader in held.readers if reader.reply.client is client])
            if held.client is client:
                held.client = None
                if held.fd >= 0:
                    try:
                        self._begin_drain(held, held.limit)
                    except OSError as error:
                        note(f"what is held as number {held.fd} cannot be spooled: {error}")

    # --- requests ---

    def hold(self, packet: Packet, reply: Reply) -> None:
        """Hold the fd that came along."""
        name = self.free(protocol.text(packet.message, "name"))
        reply({"number": self.put(name, packet.claim())})

    def hold_now(self, packet: Packet, reply: Reply) -> None:
        """Hold the fds that came along, all or none, in place of what is held under their names."""
        message = packet.message
        wanted = protocol.texts(message, "names")
        spool = protocol.integers(message, "spool", 1, rings.TOTAL_LIMIT)
        stamp = set(protocol.texts(message, "stamp"))
        for name in wanted:
            names.check(name)
        if len(set(wanted)) != len(wanted) or len(wanted) != len(packet.fds):
            raise OSError(errno.EINVAL, f"{len(packet.fds)} file descriptors came for {len(set(wanted))} names")
        if not {*spool, *stamp} <= {*wanted}:
            raise OSError(errno.EINVAL, "spool and stamp must be among the names")
        new: dict[str, _Holding] = {}
        try:
            for index, name in enumerate(wanted):
                new[name] = held = _Holding(packet.claim(index), next(self._serials))
                if name in spool:
                    held.limit = spool[name]
                    held.client = reply.client
                if name in stamp:
                    held.stamping = True
                    self._watch(held)
        except BaseException:  # EPERM: something that cannot be waited for
            for held in new.values():
                self._close(held)
            raise
        for name, held in new.items():
            self.forget(name)
            self._held[name] = held
        reply({})

    def take(self, packet: Packet, reply: Reply) -> None:
        """Give out a copy; the fd is held on until it is dropped, since an answer may be lost."""
        reply({}, [os.dup(self.number(protocol.text(packet.message, "name")))])

    def held(self, packet: Packet, reply: Reply) -> None:
        """A page of names with their numbers (-1: a ring that has ended)."""
        reply(names.page(packet.message, "held", {name: held.fd for name, held in self._held.items()}))

    def reclaim(self, packet: Packet, reply: Reply) -> None:
        """Stop draining; give out a copy and what was drained. Kept until `reclaimed`: a client may be lost."""
        name = protocol.text(packet.message, "name")
        held = self._held.get(name)
        if held is None:
            raise OSError(errno.ENOENT, f"nothing is held as {name!r}")
        ring = held.ring
        end, lost, eof, data = 0, 0, False, b""
        if ring is not None:
            end, lost, eof = ring.end, ring.lost, ring.eof
            data = ring.offer()
        message: Message = {"has_fd": held.fd >= 0, "spool": held.serial, "end": end, "lost": lost, "eof": eof}
        fds = [os.dup(held.fd)] if held.fd >= 0 else []
        try:
            _carry(data, message, fds)
        except OSError:
            protocol.close_all(fds)
            raise
        held.draining = False
        self._update(held)
        if held.limit:
            held.client = reply.client
        self._answer_all(held)
        reply(message, fds)

    def reclaimed(self, packet: Packet, reply: Reply) -> None:
        """What was given out by `reclaim` is in other hands up to here."""
        held = self._held.get(protocol.text(packet.message, "name"))
        serial = protocol.integer(packet.message, "spool", 0, 1 << 62)
        end = protocol.integer(packet.message, "end", 0, 1 << 62)
        if held is not None and held.ring is not None and held.serial == serial:
            held.ring.give(end)
        reply({})

    def ring(self, packet: Packet, reply: Reply) -> None:
        """Begin to drain the fd that came along."""
        name = self.free(protocol.text(packet.message, "name"))
        limit = protocol.integer(packet.message, "limit", 1, rings.TOTAL_LIMIT, rings.DEFAULT_LIMIT)
        held = _Holding(packet.claim(), next(self._serials))
        try:
            held.limit = limit
            # EPERM: a regular file, which is never to be waited for.
            self._begin_drain(held, limit)
        except BaseException:
            self._close(held)
            if held.ring is not None:
                self._ring_memory.remove(held.ring)
            raise
        self._held[name] = held
        reply({"number": held.fd})

    def ring_read(self, packet: Packet, reply: Reply) -> None:
        """Bytes from an offset on; if there are none yet, wait for some up to `wait` seconds."""
        name = protocol.text(packet.message, "name")
        held = self._held.get(name)
        if held is None or held.ring is None:
            raise OSError(errno.ENOENT, f"there is no ring {name!r}")
        ring = held.ring
        offset = protocol.integer(packet.message, "offset", 0, 1 << 62)
        limit = protocol.integer(packet.message, "limit", 1, rings.TOTAL_LIMIT, rings.DEFAULT_LIMIT)
        wait = protocol.seconds(packet.message, "wait", _WAIT_LIMIT, 0.0)
        reader = _Reader(reply, offset, limit)
        if wait == 0 or ring.eof or offset < ring.end:
            self._answer(reader, ring)
            return
        held.readers.append(reader)
        reader.timer = self._loop.later(wait, lambda: self._end_waits(held, [reader]))

    def cancel(self, client: Client, request: int) -> None:
        """This request of this client need not wait any longer."""
        for held in self._held.values():
            if held.readers:
                self._end_waits(held, [each for each in held.readers if each.reply.is_for(client, request)])

    # --- rings at work ---

    def _begin_drain(self, held: _Holding, limit: int) -> None:
        if fcntl.fcntl(held.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            raise OSError(errno.EINVAL, "it is open for writing only")
        if held.ring is None:
            held.ring = rings.Ring(held.fd, limit, self._ring_memory)
        held.ring.limit = limit
        held.ring.trim()
        held.draining = True
        try:
            self._update(held)
        except BaseException:
            held.draining = False
            raise

    def _update(self, held: _Holding) -> None:
        """Watch it as long as there is something to watch for."""
        if held.draining or held.stamping:
            self._watch(held)
        elif held.watched:
            held.watched = False
            self._loop.unwatch(held.fd)

    def _watch(self, held: _Holding) -> None:
        if not held.watched:
            self._loop.watch(held.fd, lambda _events: self._ready(held))
            held.watched = True

    def _ready(self, held: _Holding) -> None:
        if held.stamping:
            self._stamp(held)
        if held.draining and held.ring is not None:
            self._drain(held, held.ring)
        else:
            self._update(held)

    def _stamp(self, held: _Holding) -> None:
        held.stamping = False
        held.stamp = time.time()
        action, held.stamped = held.stamped, None
        if action is not None:
            try:
                action(held.fd, held.stamp)
            except OSError as error:
                note(f"the end of what is held as number {held.fd} is not told: {error}")

    def _drain(self, held: _Holding, ring: rings.Ring) -> None:
        try:
            found = ring.drain()
        except OSError as error:
            note(f"what is held as number {held.fd} cannot be read any more: {error}")
            ring.eof = error.errno not in _UNREADABLE
            held.draining = False
            self._update(held)
            found = True
        if not found:
            return
        if ring.eof:
            self._close(held)
        self._answer_all(held)

    def _close(self, held: _Holding) -> None:
        held.draining = held.stamping = False
        if held.fd >= 0:
            self._update(held)
            os.close(held.fd)
            held.fd = -1

    # --- answers ---

    def _end_waits(self, held: _Holding, over: list[_Reader]) -> None:
        for reader in over:
            held.readers.remove(reader)
            if held.ring is not None:
                self._answer(reader, held.ring)

    def _answer_all(self, held: _Holding) -> None:
        self._end_waits(held, list(held.readers))

    def _answer(self, reader: _Reader, ring: rings.Ring) -> None:
        if reader.timer is not None:
            reader.timer.cancel()
        begin, data = ring.read(reader.offset, reader.limit)
        end = begin + len(data)
        message: Message = {"begin": begin, "next": end, "first": ring.first, "eof": ring.eof and end == ring.end}
        fds: list[int] = []
        try:
            _carry(data, message, fds)
        except OSError as error:
            reader.reply.fail(error)
            return
        reader.reply(message, fds)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _carry(data: bytes, message: Message, fds: list[int]) -> None:
    """Put bytes into a message, or into a memfd that goes with it (the last of `fds`) when they are many."""
    if len(data) <= _INLINE_LIMIT:
        message["data"] = binascii.b2a_base64(data, newline=False).decode("ascii")
        return
    memory = os.memfd_create("ring", os.MFD_CLOEXEC)
    try:
        # A memfd takes it whole, or there is no memory.
        view = memoryview(data)
        while view:
            view = view[os.write(memory, view) :]
    except BaseException:
        os.close(memory)
        raise
    fds.append(memory)
