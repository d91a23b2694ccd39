"""Waiting for what the kernel does to a cgroup in its own time, without holding up the event loop.

For clients. A task that sits in the kernel (a disk, a network file system) neither stops nor ends: nobody else is to
wait for that. The keeper, which has no event loop, waits in `ending`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from unisandbox.host.cgroups import ending
from unisandbox.host.cgroups.cgroup import Cgroup

# As in `ending`: what is not over in a moment deserves fewer looks. No event tells in time.
_POLL_FIRST: Final = 0.0002
_POLL_LAST: Final = 0.01


async def kill(dirs: Sequence[str], timeout: float) -> bool:
    """SIGKILL for every process in and below these directories; whether all are gone within so many seconds."""

    def is_over() -> bool:
        ending.kill(dirs, 0)
        return not any(map(ending.populated, dirs))

    return await _until(is_over, timeout)


async def remove(dirs: Sequence[str], timeout: float) -> bool:
    """Remove these directories and all below; whether they are gone within so many seconds. See `ending.remove`."""
    return await _until(lambda: ending.remove(dirs), timeout)


async def freeze(cgroup: Cgroup, timeout: float) -> None:
    """Stop every process in and below; when this fails or is cancelled all run on.

    Raises:
        TimeoutError: one could not be stopped in so many seconds.
        UnavailableError: this host has no freezer for us.
    """
    try:
        if await _until(cgroup.freeze, timeout):
            return
        raise TimeoutError(errno.ETIMEDOUT, f"cgroup {cgroup} did not freeze in {timeout:g} s")
    except BaseException:
        cgroup.thaw()
        raise


async def _until(is_over: Callable[[], bool], timeout: float) -> bool:
    """Look at once, and then again and again; the last look is after the time is over."""
    if is_over():
        return True
    pause = _POLL_FIRST
    with anyio.move_on_after(timeout):
        while not is_over():
            await anyio.sleep(pause)
            pause = min(pause * 2, _POLL_LAST)
        return True
    return is_over()
