"""The runtime directory: what the engines of a user share, and what does not survive a restart of the machine.

In it each engine has the place for its mounts, and a link by which it is found.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from unisandbox.host.keeper.leases import NAME as LEASES_NAME
from unisandbox.host.keeper.leases import Leases, any_held

RUNTIME_DIRECTORY: Final = "/run/unisandbox"
POINTER: Final = ".state"
"""How the links in the runtime directory end that say which state directory an engine has."""
# How often to make the runtime directory again that another engine, the last one, removes at this very moment.
TRIES: Final = 50
# One thread at a time: the locks are the process's, so that two would not keep each other out, and who closes the file
# gives the other's back.
_at_leases: Final = threading.Lock()

_T = TypeVar("_T")


def runtime_directory() -> str:
    """Where this user's engines have what does not survive a restart of the machine."""
    if os.geteuid() == 0:
        return RUNTIME_DIRECTORY
    directory = os.environ.get("XDG_RUNTIME_DIR")
    if directory:
        return os.path.join(directory, "unisandbox")
    import tempfile  # heavy, and only for users without a session

    # All users are there.
    return os.path.join(tempfile.gettempdir(), f"unisandbox-{os.geteuid()}")


def in_runtime(runtime: str, action: Callable[[], _T]) -> _T:
    """Make the runtime directory and use it; again when another engine, which was the last, has removed it between."""
    for left in reversed(range(TRIES)):
        try:
            _make_directory(runtime, 0o711)
            return action()
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError("the loop returns or raises")


def _make_directory(path: str, mode: int) -> None:
    """Make it with this mode whatever the umask; one of ours that is there gets what it lacks.

    A service manager may have made it for this user alone, and the root of a user namespace, who is somebody else,
    reaches the root file system of its sandbox through it.
    """
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        status = os.stat(path)
        had = stat.S_IMODE(status.st_mode)
        if mode & ~had and status.st_uid == os.geteuid():
            os.chmod(path, had | mode)
        return
    os.chmod(path, mode)


def remove_if_empty(path: str) -> None:
    """Remove a directory that all engines share, or that is the caller's, once nothing is in it."""
    with contextlib.suppress(OSError):  # the keeper was faster, or another engine uses it
        os.rmdir(path)


def has_unused_leases(runtime: str) -> bool:
    """Whether there is a file of leased numbers, ours, and nobody leases any."""
    with _at_leases:
        try:
            fd = os.open(os.path.join(runtime, LEASES_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # missing, a link, not for our eyes
            return False
        try:
            status = os.fstat(fd)
            return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not any_held(fd)
        finally:
            os.close(fd)


def end_leases(runtime: str) -> None:
    """Remove the file of leased numbers if nobody leases any: a keeper that was killed could not."""
    with _at_leases:
        if os.path.exists(os.path.join(runtime, LEASES_NAME)):
            leases = Leases()
            with contextlib.suppress(OSError):  # another engine is about to remove it
                leases.release(runtime, leases.lease(runtime, 0, 1))
