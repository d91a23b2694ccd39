"""What systemd gives to a service and wants to hear of it. Source: sd_listen_fds(3), sd_notify(3)."""

from __future__ import annotations

import os
import socket
from typing import Final

from unisandbox.api import InvalidArgumentError

_FIRST: Final = 3


def listener() -> socket.socket | None:
    """The socket that systemd listens on for us; None when it does not.

    Raises:
        InvalidArgumentError: it gives several, or one that is no listening unix stream socket.
    """
    given = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if given == ("0", "") or given[1] != str(os.getpid()):
        return None
    if given[0] != "1":
        raise InvalidArgumentError(f"one socket is wanted of systemd, it gives {given[0]}")
    os.set_inheritable(_FIRST, False)
    taken = socket.socket(fileno=_FIRST)
    kind = taken.family, taken.type, taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        taken.close()
        raise InvalidArgumentError("what systemd gives is no listening unix stream socket")
    return taken


def notify(state: str) -> None:
    """Tell systemd, if it wants to know, such as "READY=1"."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), f"\0{address[1:]}" if address[0] == "@" else address)
        except OSError:
            return  # it is a courtesy
