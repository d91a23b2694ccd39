"""The way of a terminal's master from a runtime to us: a listening socket whose path the runtime is given.

Source: runc, docs/terminals.md: one connection, one message with one descriptor.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Final

import anyio

from unisandbox.api import BackendError
from unisandbox.host.keeper import Keeper
from unisandbox.host.readiness import readable

_MOST_NAME: Final = 4096
_TOLD_SECONDS: Final = 5.0


class Console:
    """One terminal to come.

    Attributes:
        path: of the socket, as the keeper and its children see it.
    """

    def __init__(self, path: str, listener: socket.socket) -> None:
        self.path: str = path
        self._listener = listener

    async def master(self) -> int:
        """The master's descriptor, now the caller's; call it when the runtime has said that it succeeded.

        Raises:
            BackendError: the runtime has sent none.
        """
        with anyio.move_on_after(_TOLD_SECONDS):
            await readable(self._listener.fileno())
            connection, _ = self._listener.accept()
            with connection:
                connection.setblocking(False)
                await readable(connection.fileno())
                size = socket.CMSG_SPACE(4)
                _, ancillary, _, _ = connection.recvmsg(_MOST_NAME, size, socket.MSG_CMSG_CLOEXEC)
                for level, kind, data in ancillary:
                    if (level, kind, len(data)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 4):
                        return int.from_bytes(data, sys.byteorder)
        raise BackendError("the runtime has made no terminal")


@contextlib.contextmanager
def listening(keeper: Keeper, directory: str) -> Iterator[Console]:
    """A console whose socket is in `directory` (as the keeper sees it) for the block."""
    name = f"tty-{os.urandom(4).hex()}"
    place = os.open(keeper.outside(directory), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # The directory's own path may be longer than the 107 bytes that an address has.
        listener.bind(f"/proc/self/fd/{place}/{name}")
        try:
            listener.listen(1)
            yield Console(f"{directory}/{name}", listener)
        finally:
            os.unlink(name, dir_fd=place)
    finally:
        listener.close()
        os.close(place)
