"""Files in memory, by which more is handed on than fits into a message. Standard library only."""

from __future__ import annotations

import os


def in_memory(content: bytes | memoryview, name: str) -> int:
    """A memory file with this content, read from its beginning; the caller closes it.

    Args:
        content: all of it.
        name: for whoever looks at /proc/PID/fd.

    Raises:
        OSError: there is no room, or no descriptor.
    """
    memory = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(memory, view) :]
        os.lseek(memory, 0, os.SEEK_SET)
    except BaseException:
        os.close(memory)
        raise
    return memory
