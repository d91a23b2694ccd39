"""Small files of a state directory: whoever may have touched them, nobody waits for them and nothing is endless.

For the keeper, too: standard library only.
"""

from __future__ import annotations

import errno
import os
import stat

# Without O_NONBLOCK the opening of a FIFO would wait for a writer, for ever.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class NotARegularFileError(Exception):
    """Something else is in the place of the file: a directory, a link, a device."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is not a regular file")


class TooLargeError(Exception):
    """The file is larger than anything that we write."""


def opened(path: str, flags: int = os.O_RDONLY, *, dir_fd: int | None = None) -> int:
    """A descriptor of the file that is there, or is made (0600). Follows no link and waits for nobody.

    Raises:
        FileNotFoundError: there is none.
        NotARegularFileError: what is there is none of ours.
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, flags | _FLAGS, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:  # a link; a socket, a FIFO; a directory
            raise NotARegularFileError(path) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotARegularFileError(path)
    return fd


def read(path: str, limit: int, *, dir_fd: int | None = None) -> tuple[bytes, tuple[int, int]]:
    """The whole content, and which file it was (device, inode). Follows no link and waits for nobody.

    Raises:
        FileNotFoundError: there is none.
        NotARegularFileError, TooLargeError: what is there is none of ours.
        OSError: it cannot be read.
    """
    fd = opened(path, dir_fd=dir_fd)
    try:
        status = os.fstat(fd)
        chunks: list[bytes] = []
        left = limit + 1
        while left and (chunk := os.read(fd, left)):
            chunks.append(chunk)
            left -= len(chunk)
    finally:
        os.close(fd)
    if not left:
        raise TooLargeError
    return b"".join(chunks), (status.st_dev, status.st_ino)
