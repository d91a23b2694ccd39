"""State directories of engines that were given none: made, claimed until a keeper has them, and swept when dead.

Whoever makes one has its flock until a keeper has the lock in it. So one with neither belongs to a process that was
killed in between, and the next engine that needs such a directory removes it. Source: flock(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

from unisandbox.host.keeper.protocol import LOCK_NAME
from unisandbox.host.keeper.starting import read_lock
from unisandbox.host.removal import remove_tree

_PREFIX: Final = "state-"
NAME: Final = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{8}")


def make(runtime: str) -> tuple[str, int]:
    """Make one in this directory: its path, and a descriptor that claims it, the caller's to close.

    Raises:
        FileNotFoundError: the directory is gone.
        OSError: it cannot be made.
    """
    while True:
        path = os.path.join(runtime, f"{_PREFIX}{os.urandom(4).hex()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            claim = _claimed(path)
            if claim >= 0:
                return path, claim


def sweep(runtime: str, free: Callable[[str], None]) -> None:
    """Remove those whose makers were killed before a keeper had them; `free` removes first what belongs to one."""
    with contextlib.suppress(OSError):  # none was made yet, or another engine is faster
        for name in os.listdir(runtime):
            if NAME.fullmatch(name):
                path = os.path.join(runtime, name)
                with _dead(path) as dead, contextlib.suppress(OSError):
                    if dead:
                        free(path)
                        remove_tree(path)


@contextlib.contextmanager
def _dead(path: str) -> Iterator[bool]:
    """Whether nobody has it and no keeper ever had; nobody can take it while the context lasts."""
    claim = _claimed(path)
    try:
        yield claim >= 0 and not _had_keeper(path)
    finally:
        if claim >= 0:
            os.close(claim)


def _had_keeper(path: str) -> bool:
    """Whether a keeper holds the lock, or has written into it: what that has left is not only directories."""
    try:
        fd = os.open(os.path.join(path, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return read_lock(fd).keeper != 0
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _claimed(path: str) -> int:
    """A descriptor of the directory that has its flock; -1 when another has it, or the directory is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink > 0:  # whoever swept has had it, and removed it
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1
