"""Cleaning that must not be lost: what a cancellation cuts is finished by the next call that concerns the same thing.

A shield holds off anyio's cancellation, but not a second `task.cancel()` of asyncio, nor the end of the event loop. So
an action is remembered before it begins, and forgotten when it is done. Actions may be run again from any point.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from unisandbox.api import SandboxError

Action = Callable[[], Awaitable[object]]

# What cleaning may take before it is left to the next call, the engine's close and the keeper's guards.
CLEANING_SECONDS: Final = 10.0


class Cleaning:
    """The unfinished actions of one sandbox: what is stuck there is nobody else's business."""

    def __init__(self) -> None:
        self._pending: list[Action] = []

    async def run(self, action: Action, *, seconds: float = CLEANING_SECONDS) -> bool:
        """Run an action that may be repeated, shielded, for at most `seconds`; whether it was finished."""
        self._pending.append(action)
        return await self._attempt(action, seconds, shield=True)

    async def catch_up(self, *, seconds: float = CLEANING_SECONDS) -> None:
        """Try once to finish what was cut. Costs nothing when nothing was; may be cancelled.

        Args:
            seconds: for each action; one that takes longer is left for another time.
        """
        for action in reversed(self._pending.copy()):
            try:
                await self._attempt(action, seconds, shield=False)
            except SandboxError:
                continue  # its own caller was told what matters; see `_attempt`
            except OSError:
                continue  # no file descriptor is left, say: it stays for another time

    async def _attempt(self, action: Action, seconds: float, *, shield: bool) -> bool:
        with anyio.move_on_after(seconds, shield=shield) as scope:
            try:
                await action()
            except SandboxError:
                # It will not go better a second time; the engine's close and the guards end it by force.
                self._forget(action)
                raise
            self._forget(action)
        return not scope.cancelled_caught

    def _forget(self, action: Action) -> None:
        if action in self._pending:
            self._pending.remove(action)
