"""All processes of a sandbox stop for a while, or none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from unisandbox.api import FailedPreconditionError, NotFoundError, SupportsPause, UnsupportedError

if TYPE_CHECKING:
    from unisandbox.engine.entry import Entry


async def pause(entry: Entry) -> None:
    """Stop every process of it until `resume`; all or none. Repeating is harmless.

    Raises:
        FailedPreconditionError: nothing runs in it.
        UnavailableError: the keeper has ended.
    """
    await entry.programs.check_usable()
    async with entry.sharing.changing():
        task, running = await _pausing(entry)
        if not running:
            raise FailedPreconditionError(
                f"nothing runs in sandbox {entry.label!r} that could be paused", hint="stop() keeps it from running."
            )
        try:
            for container_id in running:
                await task.pause(container_id)
        except BaseException:
            await entry.cleaning.run(lambda: _resume(task, running))
            raise
    entry.telling.emit("sandbox.paused")


async def resume(entry: Entry) -> None:
    """Let its processes go on; those that run do.

    Raises:
        UnavailableError: the keeper has ended.
    """
    await entry.programs.check_usable(catch_up=False)  # what was cut before may wait for what is frozen
    async with entry.sharing.changing():
        await _resume(*await _pausing(entry))
    entry.telling.emit("sandbox.resumed")


async def _pausing(entry: Entry) -> tuple[SupportsPause, list[str]]:
    """Who can pause it, and the containers in which something runs."""
    entry.check_started()
    task = entry.task
    if not isinstance(task, SupportsPause):
        raise UnsupportedError("pause", entry.backend)
    return task, [name for name in task.container_ids if (await task.state(name)).state != "stopped"]


async def _resume(task: SupportsPause, containers: list[str]) -> None:
    for container_id in containers:
        with contextlib.suppress(NotFoundError):  # it was removed meanwhile
            await task.resume(container_id)
