"""A null device for what a runtime starts: not the host's own.

crun gives the descriptors 0 to 2 of a container to its user (fchown), whatever they are. The host's /dev/null, which
containers also see as theirs, would belong to a sandbox then, which could take it away from everybody. Source: crun
src/libcrun/utils.c, set_uid_gid_owner / maybe_chown_std_streams; runc leaves /dev/null out.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from unisandbox.host import syscalls
from unisandbox.host.power import standing

_HOSTS: Final = "/dev/null"
_DEVICE: Final = os.makedev(1, 3)
_MODE: Final = 0o666


def is_null(fd: int) -> bool:
    """Whether this is a null device."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE


def open_null() -> int:
    """A null device on a file system that nobody else sees, open for reading and writing; the caller's to close.

    For who has not the host's root's power, and can make none, it is the host's. That belongs to the host's root, who
    is nobody where such a user's runtime runs, and so it is given to nobody there.

    Raises:
        OSError: it cannot be made.
    """
    if standing.lacking():
        return os.open(_HOSTS, os.O_RDWR | os.O_CLOEXEC)
    context = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        mount = syscalls.fsmount(context, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC)
    finally:
        os.close(context)
    try:
        os.mknod("null", stat.S_IFCHR | _MODE, _DEVICE, dir_fd=mount)
        os.chmod("null", _MODE, dir_fd=mount)  # whatever the umask
        return os.open("null", os.O_RDWR | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
