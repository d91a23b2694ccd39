"""Opening what one name in a directory means, also where openat2 cannot be had. Standard library only.

A filter of system calls cannot look into the arguments of openat2, so some forbid it altogether (RestrictSUIDSGID= of
systemd's units). Of one name that is no link open(2) says the same; the mount is looked at afterwards, and what is open
stays what it is.
"""

from __future__ import annotations

import errno
import os

from unisandbox.host import mounts, syscalls

# What a filter answers, and a kernel before 5.6.
_FORBIDDEN = frozenset({errno.EPERM, errno.ENOSYS})


def open_entry(directory: int, name: str, flags: int, *, resolve: int) -> int:
    """Open `name` in `directory` as openat2 does with these flags and rules; never a link. Always O_CLOEXEC.

    Raises:
        OSError: EXDEV: it is on another mount, and `resolve` has RESOLVE_NO_XDEV; else what the kernel says.
    """
    flags |= os.O_NOFOLLOW
    try:
        return syscalls.openat2(directory, name, flags, resolve=resolve)
    except OSError as error:
        if error.errno not in _FORBIDDEN or "/" in name or name == "..":
            raise
    fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=directory)
    try:
        if resolve & syscalls.RESOLVE_NO_XDEV and mounts.mount_of(fd) != mounts.mount_of(directory):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    except BaseException:
        os.close(fd)
        raise
    return fd
