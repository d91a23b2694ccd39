"""What the keeper reads for its clients: spools of what a client has left, and rings. Client side."""

from __future__ import annotations

import base64
import errno
from collections.abc import Collection, Mapping
from typing import cast

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.keeper.link import Link, checked
from unisandbox.host.keeper.protocol import Message, Packet
from unisandbox.host.keeper.records import Reclaimed, RingData


class Spools:
    """The descriptors that outlive a client with what is written to them, or happens to them, meanwhile."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def hold_now(
        self, fds: Mapping[str, int], *, spool: Mapping[str, int] | None = None, stamp: Collection[str] = ()
    ) -> None:
        """Let the keeper hold copies of several fds (at most 64), which it gets even if this process dies right after.

        A message without an answer: waits only while the keeper's queue is full. What was held or ringed under one of
        these names before is closed. Should the keeper have no room for the fds it holds none of them, and its log says
        so.

        Args:
            fds: fds by the names under which they are held.
            spool: of those that others write to (pipes, terminals, sockets), how many bytes to keep: when the
                connection that held them ends and the keeper lives on, it begins to drain them, and keeps the last so
                many bytes of each. When all that is kept would be over 256 MiB, the largest drops its oldest
                bytes. See `reclaim`.
            stamp: of those that can be waited for: when they first become readable the keeper tells what
                `KeeperEvents.publish` has asked it to tell then.

        Raises:
            InvalidArgumentError: more than 64 fds, or `spool` or `stamp` name one that is not among them.
        """
        spool = dict(spool or {})
        for name in fds:
            checked(name)
        strangers = ({*spool} | {*stamp}) - {*fds}
        if strangers:
            raise InvalidArgumentError(f"to be spooled or stamped, but not among the fds: {sorted(strangers)}")
        message: Message = {"op": "hold_now", "names": list(fds), "spool": spool, "stamp": list(stamp)}
        await self._link.tell(message, list(fds.values()))

    async def reclaim(self, name: str) -> Reclaimed:
        """Take an fd back from its spool (or ring), with what was kept meanwhile.

        The keeper stops draining it, gives us a copy, and will drain it again, with the same limit, when this
        connection has ended. An fd that was not drained has no `data`. What comes back is kept for whoever asks next,
        before what comes then, until we say by `taken` that it was taken. An fd that was drained is non-blocking from
        then on.

        Raises:
            FileNotFoundError: nothing is held under this name.
        """
        packet = await self._link.ask("reclaim", name=name)
        message = packet.message
        if packet.lost:
            packet.close()
            raise OSError(errno.EMFILE, f"no file descriptor left here for {name!r}")
        has_fd = cast("bool", message["has_fd"])
        try:
            data = _data_of(message, packet, int(has_fd))
            fd = packet.claim() if has_fd else -1
        finally:
            packet.close()
        lost, serial, end = (cast("int", message[part]) for part in ("lost", "spool", "end"))
        return Reclaimed(fd, data, lost, cast("bool", message["eof"]), serial, end)

    def taken(self, name: str, got: Reclaimed, left: int = 0) -> None:
        """All but the last `left` bytes of what was reclaimed under this name need not be kept any more.

        Without an await and without an answer; nothing happens once something else is held there, or the keeper has
        ended. Nothing may be read from the fd before all was taken: the order would be lost with us.
        """
        self._link.say({"op": "reclaimed", "name": name, "spool": got.serial, "end": got.end - left})

    async def ring(self, name: str, fd: int, *, limit: int = 1 << 20) -> None:
        """Let the keeper read from a copy of `fd` (pipe, terminal, socket) and keep the last `limit` bytes.

        When all that it keeps of outputs would be over 256 MiB, the largest ring drops its oldest bytes.

        Raises:
            FileExistsError: the name is taken.
            PermissionError: it is a regular file.
        """
        await self._link.ask("ring", [fd], name=name, limit=limit)

    async def ring_read(self, name: str, offset: int = 0, *, limit: int = 1 << 20, wait: float = 0.0) -> RingData:
        """Up to `limit` bytes of a ring from `offset` on; if there are none yet, wait for some up to `wait` seconds.

        Raises:
            FileNotFoundError: there is no such ring.
        """
        packet = await self._link.wait("ring_read", name=name, offset=offset, limit=limit, wait=wait)
        message = packet.message
        if packet.lost:
            raise OSError(errno.EMFILE, f"no file descriptor left here to read ring {name!r}")
        data = _data_of(message, packet, 0)
        begin, end, first = (cast("int", message[part]) for part in ("begin", "next", "first"))
        return RingData(data, begin, end, first, cast("bool", message["eof"]))


def _data_of(message: Message, packet: Packet, index: int) -> bytes:
    """Bytes that came in a message, or in a memfd when they are many."""
    if "data" in message:
        return base64.b64decode(cast("str", message["data"]))
    with open(packet.claim(index), "rb") as file:
        file.seek(0)
        return file.read()
