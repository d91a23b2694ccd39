"""Pipes for the streams of what runs inside."""

from __future__ import annotations

import os

_MODE = 0o666


def open_pipe() -> tuple[int, int]:
    """A pipe's reading and writing end, which whoever has them can also open by name (/dev/stdout, /proc/self/fd/1).

    It belongs to the user of this process, who is nobody inside; so its mode gives the right. Others get nothing:
    the way to a pipe is through a process that has it, for whoever may trace that. Source: proc_fd_access_allowed() in
    fs/proc/base.c.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.fchmod(writer, _MODE)
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    return reader, writer
