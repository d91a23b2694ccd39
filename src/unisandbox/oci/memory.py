"""Waiting until the kernel kills something of a container for memory.

A container's processes are counted each in a cgroup of its own, and one that is short of memory gives notice many times
a second. So a notice costs one look where the kernel says that nothing was killed (cgroup v2), and whoever has counted
rests for so much longer that a container with many processes does not hold up the others.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

import anyio

from unisandbox.host.cgroups import Cgroup
from unisandbox.host.readiness import readable
from unisandbox.oci.processes import Container, all_oom_kills_of

_LOOK_SECONDS: Final = 0.01
_NOTICES: Final = 4096
_REST: Final = 20
"""How many times as long as a count took nothing is counted after it."""


async def more_oom_kills(container: Container, than: int) -> int:
    """See `SupportsOomNotice.more_oom_kills`."""
    cgroup = container.plan.cgroup
    notice, late = cgroup.watch_oom()
    try:
        while True:
            # Before the count: what is killed in between costs one count more, and is not lost.
            below = cgroup.oom_kills_below()
            kills, rest = _count(container)
            if kills > than:
                return kills
            await anyio.sleep(rest)
            await _more(cgroup, notice, below)
            # Nothing tells when the kill is counted that this was the notice of, or that there was none.
            with anyio.move_on_after(late):
                while late and kills <= than:
                    await anyio.sleep(max(rest, _LOOK_SECONDS))
                    kills, rest = _count(container)
    finally:
        os.close(notice)


def _count(container: Container) -> tuple[int, float]:
    """How many were killed, and how long to rest after having found out, in seconds."""
    began = time.thread_time()
    kills = all_oom_kills_of(container)
    return kills, _REST * (time.thread_time() - began)


async def _more(cgroup: Cgroup, notice: int, below: int | None) -> None:
    """Wait for a notice behind which there is a kill, or may be one."""
    while True:
        await readable(notice)
        with contextlib.suppress(BlockingIOError):
            os.read(notice, _NOTICES)
        if below is None or cgroup.oom_kills_below() != below:
            return
