"""A writable layer over a directory for who has not the power of the host's root: the kernel's overlay, or a program's.

Both keep what is written in a tmpfs. The kernel's overlay marks with extended attributes of users what hides a
directory below it, and a tmpfs has those since Linux 6.6. Before, fuse-overlayfs does it, which hides with files, too.
Source: fs/overlayfs/super.c, "userxattr" without extended attributes in the upper file system; fuse-overlayfs(1).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from unisandbox.host.power import standing

SINCE: Final = (6, 6)
"""The Linux whose overlays an ordinary user can write, on a tmpfs."""

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Nothing of the caller's: a user's PATH must not choose programs."""

PROGRAM: Final = "fuse-overlayfs"
DEVICE: Final = "/dev/fuse"
"""What the program serves, and whoever mounts has to open."""

# What it is started by, so that it has no network and no power that files do not take.
_PACKAGES: Final = {PROGRAM: PROGRAM, "unshare": "util-linux", "setpriv": "util-linux"}
_CAPABILITIES: Final = ("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "mknod", "setfcap")


def by_kernel(release: str = "") -> bool:
    """Whether the kernel's own overlay can be written, on this Linux or that of a release."""
    return standing.kernel(release or os.uname().release) >= SINCE


def obstacle() -> tuple[str, str]:
    """Why no program can do it here, and the remedy; empty when nothing that can be seen forbids it."""
    for name, package in _PACKAGES.items():
        if not _found(name):
            return f"{name} is not installed", f"Install it: apt install {package}."
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = {
            errno.EACCES: f"As root: chmod 666 {DEVICE}, as udev does: it alone gives nobody any right.",
            errno.EPERM: f"This process may not use that device: let its container have {DEVICE}.",
        }.get(error.errno or 0, f"As root: modprobe fuse. In a container: let that have {DEVICE}.")
        return f"{DEVICE} cannot be opened: {error.strerror}", remedy
    return "", ""


def fact(release: str = "") -> str:
    """How a directory that is written inside is had here, for who reads it."""
    if by_kernel(release):
        return "by the kernel's overlay"
    why, remedy = obstacle()
    return f"not here: before Linux 6.6 by {PROGRAM} only, and {why}. {remedy}" if why else f"by {_found(PROGRAM)}"


def command(below: tuple[str, str, str], *, device: int) -> Sequence[str]:
    """What serves an overlay.

    Args:
        below: the lower, the upper and the work directory, below the one in which it is started: no part of a
            path of the host's can be an option.
        device: the number that it has of the descriptor which `Tree.fuse` has returned.
    """
    # What is written is there, or refused for want of room, when the call returns; as in the tmpfs itself. And no
    # extended attributes: it would set those of a link by a path, follow it, and change files of the user's outside.
    lower, upper, work = below
    options = f"threaded=0,writeback=0,noacl,noxattrs=1,lowerdir={lower},upperdir={upper},workdir={work}"
    powers = ",".join(("-all", *(f"+{name}" for name in _CAPABILITIES)))
    return (
        *(_found("unshare"), "--net", "--ipc", "--uts", "--"),
        *(_found("setpriv"), "--no-new-privs", "--inh-caps=-all", "--bounding-set", powers, "--"),
        *(_found(PROGRAM), "-f", "-o", options, f"/dev/fd/{device}"),
    )


def _found(name: str) -> str:
    """The path of a program; empty where it is not installed."""
    paths = (f"{directory}/{name}" for directory in PATH.split(":"))
    return next((path for path in paths if os.access(path, os.X_OK)), "")
