"""Freeing what no record of a living engine speaks of, as one of its clients."""

from __future__ import annotations

from unisandbox.api import RecoveryReport
from unisandbox.engine.closing import close
from unisandbox.engine.opening import attach_engine
from unisandbox.engine.recovery import Recovery


async def free_unrecorded(state_dir: str) -> RecoveryReport:
    """Set aside the records there that are damaged, and free what none speaks of; all else goes on.

    Raises:
        UnavailableError: no engine lives there any more.
        SandboxError: it cannot be done.
    """
    core = await attach_engine(state_dir)
    try:
        return await Recovery(core, is_new=False, on_recover="adopt").free_unrecorded()
    finally:
        await close(core)
