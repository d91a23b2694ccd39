"""Pasta, the helper of networks in user mode: where it is, and what is needed to run it."""

from __future__ import annotations

import errno
import os
from typing import Final

NAME_SERVER: Final = "10.0.2.53"
"""What leads to the first name server of the host's /etc/resolv.conf, by UDP."""

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Nothing of the caller's: a user's PATH must not choose programs."""

_DEVICE: Final = "/dev/net/tun"
INSTALL: Final = "Install it: apt install passt."
"""The remedy where it is missing."""


def program() -> str | None:
    """The path of pasta, where it is installed."""
    paths = (f"{directory}/pasta" for directory in PATH.split(":"))
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def obstacle() -> tuple[str, str]:
    """Why there is no such network here, and the remedy; empty when nothing that can be seen forbids it."""
    if program() is None:
        return "pasta is not installed", INSTALL
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = {
            errno.EACCES: f"As root: chmod 666 {_DEVICE}, as udev does: it alone gives nobody any right.",
            errno.EPERM: f"This process may not use that device: let its container have {_DEVICE}.",
        }.get(error.errno or 0, "As root: modprobe tun.")
        return f"{_DEVICE} cannot be opened: {error.strerror}", remedy
    return "", ""
