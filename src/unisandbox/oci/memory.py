"""Waiting until the kernel kills something of a container for memory."""

from __future__ import annotations

import contextlib
import os
from typing import Final

import anyio

from unisandbox.host.readiness import readable
from unisandbox.oci.processes import Container, all_oom_kills_of

_LOOK_SECONDS: Final = 0.01
_NOTICES: Final = 4096


async def more_oom_kills(container: Container, than: int) -> int:
    """See `SupportsOomNotice.more_oom_kills`."""
    notice, late = container.plan.cgroup.watch_oom()
    try:
        while (kills := all_oom_kills_of(container)) <= than:
            await readable(notice)
            with contextlib.suppress(BlockingIOError):
                os.read(notice, _NOTICES)
            # Nothing tells when the kill is counted that this was the notice of, or that there was none.
            with anyio.move_on_after(late):
                while all_oom_kills_of(container) <= than:
                    await anyio.sleep(_LOOK_SECONDS)
        return kills
    finally:
        os.close(notice)
