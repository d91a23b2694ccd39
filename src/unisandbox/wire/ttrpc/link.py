"""One connected stream socket: bytes in, bytes out, with nothing lost when a task is cancelled.

Bytes to send are queued and written by whoever can; a cancelled writer leaves the rest for the next one. So a frame is
never cut by a timeout, which would spoil the connection for all other calls.
"""

from __future__ import annotations

import socket
from typing import Final

import anyio.lowlevel

from unisandbox.host.readiness import Descriptor
from unisandbox.wire.ttrpc.shapes import Inbox

_CHUNK: Final = 64 << 10

MUCH: Final = 1 << 20
"""With more bytes than this waiting to be written, who has more waits too."""

_MESSAGES_IN_A_ROW: Final = 32
"""How many messages of a call that are there already are taken before everybody else has a turn."""


async def take(inbox: Inbox) -> bytes:
    """The oldest message of an inbox; there must be one. It is not lost, whenever this is cancelled."""
    message = inbox.take()
    if not inbox.taken % _MESSAGES_IN_A_ROW:
        # Shielded also for the sake of who was cancelled and takes what is there still.
        await anyio.lowlevel.cancel_shielded_checkpoint()
    return message


class Link:
    """A connected stream socket, ours from now on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # A process-wide socket.setdefaulttimeout() would make Python wait by itself.
        sock.setblocking(False)
        self._descriptor = Descriptor(sock.fileno(), lambda _: sock.close())
        self._out = bytearray()

    @property
    def closed(self) -> bool:
        return self._descriptor.closed

    @property
    def pending(self) -> int:
        """How many bytes wait to be written."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Queue bytes, and write what the kernel takes now."""
        self._out += data
        self.flush()

    def flush(self) -> None:
        """Write what the kernel takes now."""
        while self._out and not self.closed:
            try:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                # The peer is gone. What it sent before can still be read, and reading tells the end.
                self.give_up()
                return
            del self._out[:sent]

    def read(self) -> bytes | None:
        """What is there: b"" when nothing more will come, None when nothing is there yet."""
        if self.closed:
            return b""
        try:
            return self._sock.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError:  # reset by the peer: what it had sent and we had not read is lost, and that is an end too
            return b""

    async def readable(self) -> None:
        """Wait until `read` has something; raises anyio.ClosedResourceError when it is closed meanwhile."""
        await self._descriptor.readable()

    async def writable(self) -> None:
        """Wait until `flush` can go on; raises anyio.ClosedResourceError when it is closed meanwhile."""
        await self._descriptor.writable()

    def give_up(self) -> None:
        """Throw away what waits to be written: nobody reads it any more."""
        self._out.clear()

    def close(self) -> None:
        """Close the socket; repeating is harmless."""
        self.give_up()
        self._descriptor.close()
