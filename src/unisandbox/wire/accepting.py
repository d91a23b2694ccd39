"""Accepting connections: whatever goes wrong with one, the next is accepted."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import Final, NoReturn

import anyio

_logger: Final = logging.getLogger("unisandbox.wire")

# This process or host is short of something; that passes.
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def accept(listener: socket.socket, take: Callable[[socket.socket], object]) -> NoReturn:
    """Accept connections until cancelled.

    Args:
        listener: a listening socket, the caller's to close.
        take: gets each connection, to close it in the end; must not wait.
    """
    listener.setblocking(False)
    while True:
        await anyio.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in _SHORT:
                raise
            _logger.error("no connection can be accepted now: %s", error)
            await anyio.sleep(0.1)  # nothing tells when there are free descriptors again
            continue
        take(sock)
