"""A copy of a program in memory that nobody can change."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

# Source: include/uapi/linux/memfd.h.
_MFD_EXEC: Final = 0x10
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_copy(path: str, name: str) -> int:
    """A memory file with the content of a program that nobody can change."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        memory = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        memory = os.memfd_create(name, flags)  # before Linux 6.3 every memory file may be executed
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size and (sent := os.sendfile(memory, file.fileno(), offset, size - offset)):
                offset += sent
        os.fchmod(memory, 0o555)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory
