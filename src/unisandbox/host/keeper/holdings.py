"""What the keeper holds for its clients by name: file descriptors, and rings of output. Standard library only."""

from __future__ import annotations

import binascii
import errno
import os

from unisandbox.host.keeper import protocol, rings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Message, Packet

_NAMES_PER_MESSAGE = 1000
_NAME_LIMIT = 128
_INLINE_LIMIT = 48 * 1024
_WAIT_LIMIT = 3600.0


class _Reader:
    """A `ring_read` that waits for bytes at `offset`."""

    __slots__ = ("limit", "offset", "reply", "timer")

    def __init__(self, reply: Reply, offset: int, limit: int) -> None:
        self.reply = reply
        self.offset = offset
        self.limit = limit
        self.timer: Timer | None = None


class Holdings:
    """Names, and the fd or ring behind each."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._fds: dict[str, int] = {}
        self._rings: dict[str, rings.Ring] = {}
        self._readers: dict[str, list[_Reader]] = {}

    def free(self, name: str) -> str:
        """The name, if it may be given to something new."""
        if not 0 < len(name) <= _NAME_LIMIT:
            raise OSError(errno.EINVAL, f"a name has 1 to {_NAME_LIMIT} characters, got {name[:200]!r}")
        if name in self._fds or name in self._rings:
            raise OSError(errno.EEXIST, f"{name!r} is held already")
        return name

    def put(self, name: str, fd: int) -> int:
        """Hold an fd; the number that it has here."""
        self._fds[self.free(name)] = fd
        return fd

    def number(self, name: str) -> int:
        """The fd that is held as `name`. Raises OSError ENOENT when none is."""
        fd = self._fds.get(name, -1)
        if fd < 0:
            raise OSError(errno.ENOENT, f"nothing is held as {name!r}")
        return fd

    def forget(self, name: str) -> None:
        """Close what is behind this name, if anything."""
        fd = self._fds.pop(name, -1)
        if fd >= 0:
            os.close(fd)
        ring = self._rings.pop(name, None)
        if ring is not None:
            self._close(ring)
            for reader in self._readers.pop(name, []):
                self._answer(reader, ring)

    # --- requests ---

    def hold(self, packet: Packet, reply: Reply) -> None:
        """Hold the fd that came along."""
        name = self.free(protocol.text(packet.message, "name"))
        reply({"number": self.put(name, packet.claim())})

    def take(self, packet: Packet, reply: Reply) -> None:
        """Give out a copy; the fd is held on until it is dropped, since an answer may be lost."""
        name = protocol.text(packet.message, "name")
        if name not in self._fds:
            raise _unknown(name)
        reply({}, [os.dup(self._fds[name])])

    def drop(self, packet: Packet, reply: Reply) -> None:
        """Close what is behind these names, and behind all with this prefix; none that are not there are no error."""
        names = protocol.texts(packet.message, "names")
        prefix = protocol.text(packet.message, "prefix")
        if prefix:
            names += [name for name in (*self._fds, *self._rings) if name.startswith(prefix)]
        for name in names:
            self.forget(name)
        reply({})

    def held(self, packet: Packet, reply: Reply) -> None:
        """The names that begin with `prefix` and come after `after`, in order, with their numbers (-1: ended ring)."""
        prefix = protocol.text(packet.message, "prefix")
        after = protocol.text(packet.message, "after")
        everything = {**self._fds, **{name: ring.fd for name, ring in self._rings.items()}}
        names = sorted(name for name in everything if name.startswith(prefix) and name > after)
        page = names[:_NAMES_PER_MESSAGE]
        reply({"held": {name: everything[name] for name in page}, "more": len(names) > len(page)})

    def ring(self, packet: Packet, reply: Reply) -> None:
        """Begin to drain the fd that came along."""
        name = self.free(protocol.text(packet.message, "name"))
        limit = protocol.integer(packet.message, "limit", 1, rings.TOTAL_LIMIT, rings.DEFAULT_LIMIT)
        total = limit + sum(ring.limit for ring in self._rings.values())
        if total > rings.TOTAL_LIMIT:
            message = f"all rings together would be {total} bytes; at most {rings.TOTAL_LIMIT}"
            raise OSError(errno.ENOSPC, message)
        fd = packet.claim()
        try:
            ring = rings.Ring(fd, limit)
            # EPERM: a regular file, which is never to be waited for.
            self._loop.watch(fd, lambda _events: self._drain(name, ring))
        except BaseException:
            os.close(fd)
            raise
        self._rings[name] = ring
        reply({"number": ring.fd})

    def ring_read(self, packet: Packet, reply: Reply) -> None:
        """Bytes from an offset on; if there are none yet, wait for some up to `wait` seconds."""
        name = protocol.text(packet.message, "name")
        ring = self._rings.get(name)
        if ring is None:
            raise _unknown(name)
        offset = protocol.integer(packet.message, "offset", 0, 1 << 62)
        limit = protocol.integer(packet.message, "limit", 1, rings.TOTAL_LIMIT, rings.DEFAULT_LIMIT)
        wait = protocol.seconds(packet.message, "wait", _WAIT_LIMIT, 0.0)
        reader = _Reader(reply, offset, limit)
        if wait == 0 or ring.eof or offset < ring.end:
            self._answer(reader, ring)
            return
        waiting = self._readers.setdefault(name, [])
        waiting.append(reader)

        def give_up() -> None:
            waiting.remove(reader)
            self._answer(reader, ring)

        reader.timer = self._loop.later(wait, give_up)

    # --- rings at work ---

    def _drain(self, name: str, ring: rings.Ring) -> None:
        if not ring.drain():
            return
        if ring.eof:
            self._close(ring)
        waiting = self._readers.pop(name, [])
        for reader in waiting:
            self._answer(reader, ring)

    def _close(self, ring: rings.Ring) -> None:
        if ring.fd >= 0:
            self._loop.unwatch(ring.fd)
            os.close(ring.fd)
            ring.fd = -1

    def _answer(self, reader: _Reader, ring: rings.Ring) -> None:
        if reader.timer is not None:
            reader.timer.cancel()
        begin, data = ring.read(reader.offset, reader.limit)
        end = begin + len(data)
        message: Message = {"begin": begin, "next": end, "first": ring.first, "eof": ring.eof and end == ring.end}
        if len(data) <= _INLINE_LIMIT:
            message["data"] = binascii.b2a_base64(data, newline=False).decode("ascii")
            reader.reply(message)
            return
        try:
            memory = os.memfd_create("ring", os.MFD_CLOEXEC)
        except OSError as error:
            reader.reply.fail(error)
            return
        # A memfd takes it whole, or there is no memory.
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(memory, view) :]
        except OSError as error:
            os.close(memory)
            reader.reply.fail(error)
            return
        reader.reply(message, [memory])


def _unknown(name: str) -> OSError:
    return OSError(errno.ENOENT, f"nothing is held as {name!r}")
