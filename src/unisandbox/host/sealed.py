"""A copy of a program in memory that nobody can change. Standard library only: the keeper imports this module too."""

from __future__ import annotations

import errno
import fcntl
import os

# Source: include/uapi/linux/memfd.h.
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_copy(path: str, name: str, mode: int = 0o555) -> int:
    """A memory file with the content of a program that nobody can change, with the permissions `mode`.

    Raises:
        OSError: EACCES: this host allows no memory files that may be executed (vm.memfd_noexec); or the program cannot
            be read, or there is no memory.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        memory = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        memory = os.memfd_create(name, flags)  # before Linux 6.3 every memory file may be executed
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size and (sent := os.sendfile(memory, file.fileno(), offset, size - offset)):
                offset += sent
        os.fchmod(memory, mode)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory
