"""Small files that survive: a reader sees the old or the new content, never a part of one, whoever dies when.

What is written goes to a temporary file beside it (`NAME.RANDOM.tmp`), which is renamed or linked to its name. Power
may fail too: where `durable` is asked for, the file is on the disk before it has its name, and the name before the call
returns. How such a file is read: `host.small_files`. Source: rename(2), link(2), fsync(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from unisandbox.host.boundary import reached

TEMPORARY: Final = ".tmp"
"""How the names of temporary files end; what a killed writer has left is recognised by it."""


def checksum(text: str) -> str:
    """By which is seen whether a file is whole: SHA-256, in hex."""
    import hashlib  # see `api.names.short_name`

    return hashlib.sha256(text.encode()).hexdigest()


def sealed(version: int, name: str, text: str) -> bytes:
    """One line of JSON with a version, a checksum and `text` (JSON, too) under `name`: it is seen when it changes."""
    digest = checksum(f"{version}\n{text}")
    return f'{{"version": {version}, "sha256": "{digest}", "{name}": {text}}}\n'.encode()


def replace(path: str, data: bytes, *, durable: bool, at: int = 0) -> None:
    """Make this the content of the file, whether it is there or not. Its directory is made when it is missing.

    Args:
        path, data, durable: of the file.
        at: nanoseconds since the epoch, kept as the file's time of change; 0: now.

    Raises:
        OSError: the old content is still there, unless it was the disk's word (fsync) that failed at the end.
    """
    temporary = _written(path, data, durable=durable, at=at)
    reached("before file.rename", path)
    try:
        os.rename(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    reached("after file.rename", path)
    _sync(os.path.dirname(path), durable=durable)


def create(path: str, data: bytes, *, durable: bool, at: int) -> bool:
    """The same for a file that is not there yet; False when it is. Of two at once one makes it, with all its content.

    Args:
        path, data, durable, at: as for `replace`.
    """
    temporary = _written(path, data, durable=durable, at=at)
    reached("before file.link", path)
    try:
        os.link(temporary, path)
        reached("after file.link", path)
    except FileExistsError:
        return False
    finally:
        _discard(temporary)
    _sync(os.path.dirname(path), durable=durable)
    return True


def remove(path: str, *, durable: bool) -> None:
    """Remove the file; missing is fine."""
    reached("before file.unlink", path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    reached("after file.unlink", path)
    _sync(os.path.dirname(path), durable=durable)


def set_aside(path: str, directory: str, *, of: tuple[int, int] | None, durable: bool) -> str:
    """Move what is at `path` into `directory` under a name that nothing there has; its new path.

    Args:
        path: a file, or whatever is in its place.
        directory: made (0700) when it is missing; on the same file system.
        of: device and inode of what is meant. When a writer has put another file there meanwhile, that one stays.
        durable: wait for the disk.

    Raises:
        OSError: it is where it was.
        FileNotFoundError: it is not there any more, or is another one.
    """
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise
    name = os.fsdecode(os.fsencode(os.path.basename(path))[:200])  # a name has at most 255 bytes
    aside = os.path.join(directory, f"{name}.{os.urandom(8).hex()}")
    reached("before file.set_aside", path)
    os.rename(path, aside)
    reached("after file.set_aside", path)
    status = os.lstat(aside)
    if of is not None and (status.st_dev, status.st_ino) != of:
        # Not overwriting: if there is a still newer one, this one is old.
        with contextlib.suppress(FileExistsError):
            os.link(aside, path, follow_symlinks=False)
        os.unlink(aside)
        raise FileNotFoundError(errno.ENOENT, "another one has taken its place", path)
    _sync(directory, durable=durable)
    _sync(os.path.dirname(path), durable=durable)
    return aside


def remove_temporary(path: str) -> None:
    """Remove what a killed writer has left, if it is a regular file; anything else stays."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            reached("before file.clean", path)
            os.unlink(path)
            reached("after file.clean", path)
    except FileNotFoundError:
        return


def _written(path: str, data: bytes, *, durable: bool, at: int = 0) -> str:
    """A temporary file beside `path` with this content; its path."""
    temporary = f"{path}.{os.urandom(4).hex()}{TEMPORARY}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    reached("before file.write", path)
    try:
        fd = os.open(temporary, flags, 0o600)
    except FileNotFoundError:
        _make_directory(os.path.dirname(path), durable=durable)
        fd = os.open(temporary, flags, 0o600)
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        if at:
            os.utime(fd, ns=(at, at))
        reached("after file.write", path)
        if durable:
            os.fsync(fd)
    except BaseException:
        _discard(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):  # the disk refuses everything; the error that matters is on its way
        os.unlink(path)


def _make_directory(path: str, *, durable: bool) -> None:
    reached("before file.mkdir", path)
    # This one alone: what is above it was there, and may have been moved.
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    reached("after file.mkdir", path)
    _sync(os.path.dirname(path), durable=durable)


def sync_entry(path: str) -> None:
    """Wait until the disk has the name of what is at `path`, in the directory above."""
    with contextlib.suppress(PermissionError):  # one that may be written and not be read
        _sync(os.path.dirname(path), durable=True)


def _sync(directory: str, *, durable: bool) -> None:
    if not durable:
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
