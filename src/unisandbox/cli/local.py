"""The caller's own terminal and standard streams.

Their open file descriptions are shared with whoever started us, so they are never made non-blocking: what is written
to them is small enough not to block after poll(2) has said that there is room.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import FailedPreconditionError, Terminal

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
_PIECE: Final = 1 << 16
# A pipe that polls writable takes this much without blocking; source: pipe(7), PIPE_BUF.
_WITHOUT_BLOCKING: Final = 4096


class LocalInput:
    """What the caller types or pipes into us."""

    def __init__(self, fd: int = STDIN) -> None:
        self._fd = fd
        self._waits = _can_wait(fd)

    async def read(self) -> bytes:
        """The next bytes; b"" at the end, also when there is no standard input at all, or no terminal any more.

        Raises:
            FailedPreconditionError: it cannot be read.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            if self._waits:
                await anyio.wait_readable(self._fd)
            try:
                return os.read(self._fd, _PIECE)
            except BlockingIOError:  # another reader of the same pipe was quicker
                continue
            except OSError as error:
                if error.errno == errno.EIO:  # a terminal that is gone; source: pty(7)
                    return b""
                raise _unreadable(error) from error


def check_input(fd: int = STDIN) -> None:
    """See that standard input can be read, as far as that is known before it is.

    Raises:
        FailedPreconditionError: it was opened for writing only.
    """
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise _unreadable(OSError(errno.EBADF, "it is open for writing only"))


def _unreadable(error: OSError) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"standard input cannot be read: {error.strerror}", hint="Leave out -i, or give an input that can be read."
    )


class LocalOutput:
    """Where the program's output goes. Its reader may be slow: then the program waits, and nothing else does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waits = _can_wait(fd)

    async def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            BrokenPipeError: nobody reads it any more.
            OSError: the file system is full, the terminal is gone.
        """
        await anyio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self._waits and not _has_room(self._fd):
                await anyio.wait_writable(self._fd)
            try:
                view = view[os.write(self._fd, view[:_WITHOUT_BLOCKING] if self._waits else view) :]
            except BlockingIOError:  # somebody has made it non-blocking, and another writer was quicker
                await anyio.wait_writable(self._fd)


def _can_wait(fd: int) -> bool:
    """Whether readiness is a question: files and /dev/null are always ready. Source: epoll_ctl(2), EPERM."""
    with select.epoll() as poll:
        try:
            poll.register(fd, select.EPOLLIN)
        except OSError:  # EPERM; or EBADF: not open at all, which read(2) and write(2) will say
            return False
    return True


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def terminal_size() -> Terminal | None:
    """The size of the caller's terminal; None when there is none, or one that does not know its size."""
    for fd in (STDOUT, STDIN, STDERR):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows > 0 and columns > 0:
            return Terminal(rows, columns)
    return None


@contextmanager
def raw_terminal(fd: int = STDIN) -> Iterator[None]:
    """Every key goes through as it is, Ctrl-C too; afterwards the terminal is as it was."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        # TCSANOW: waiting for output that nobody takes (TCSADRAIN) could hang here for ever.
        termios.tcsetattr(fd, termios.TCSANOW, before)
