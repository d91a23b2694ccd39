"""How what runs in a sandbox is asked to end, before it is made to."""

from __future__ import annotations

import contextlib
import signal

import anyio

from unisandbox.api import NotFoundError
from unisandbox.oci.task import OciTaskService


async def ask_to_end(task: OciTaskService, grace: float) -> None:
    """SIGTERM to every process that was asked for, and wait a while for their ends."""
    running = await task.running()
    for container_id, exec_id in running:
        with contextlib.suppress(NotFoundError):  # it has ended, and whoever waited for it has deleted it
            await task.kill(container_id, exec_id, signal=signal.SIGTERM)
    for container_id in task.container_ids:
        with contextlib.suppress(NotFoundError):
            if (await task.state(container_id)).state == "paused":
                await task.resume(container_id)  # what is paused takes no signal
    with anyio.move_on_after(grace):
        for container_id, exec_id in running:
            with contextlib.suppress(NotFoundError):
                await task.wait(container_id, exec_id)
