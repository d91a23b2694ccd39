"""Which process and event loop an engine is used in: one at a time, and whoever is in another one is told so."""

from __future__ import annotations

import os
import sys
from typing import Any

from unisandbox.api import FailedPreconditionError


class OwnLoop:
    """The event loop of one engine: that of its first use, and another one of its kind when that does not run."""

    def __init__(self) -> None:
        self._loop: object = None
        self._process = os.getpid()

    @property
    def is_of_fork(self) -> bool:
        """Whether this process is a fork of the engine's: what the engine has is not this one's to end."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Have the loop that runs here as the engine's own. Outside of any there is nothing to check.

        Raises:
            FailedPreconditionError: the engine's own runs in another thread, or is of another kind. What its tasks wait
                for cannot be waited for here, nor can they be woken. Or the engine is another process's.
        """
        if self.is_of_fork:
            raise FailedPreconditionError(
                f"the engine belongs to process {self._process}, of which this is a fork", hint="Open another one."
            )
        here = _running()
        if here is None or here is self._loop:
            return
        if _runs(self._loop):
            raise FailedPreconditionError(
                "the engine is used in the event loop of another thread",
                hint="Call it there (asyncio.run_coroutine_threadsafe, anyio.from_thread.run), or open another engine.",
            )
        if self._loop is not None and _is_asyncio(here) != _is_asyncio(self._loop):
            kinds = ("asyncio", "trio") if _is_asyncio(self._loop) else ("trio", "asyncio")
            raise FailedPreconditionError(
                f"the engine was opened under {kinds[0]}, and this is {kinds[1]}", hint="Open another engine."
            )
        self._loop = here


def _running() -> object:
    """The event loop that runs in this thread; None: none."""
    # Whichever runs was imported, and the other one need not be.
    for name, current in (("asyncio", "get_running_loop"), ("trio.lowlevel", "current_trio_token")):
        module = sys.modules.get(name)
        if module is not None:
            try:
                return getattr(module, current)()
            except RuntimeError:
                continue
    return None


def _runs(loop: Any) -> bool:
    if loop is None:
        return False
    if _is_asyncio(loop):
        return bool(loop.is_running())
    try:
        loop.run_sync_soon(_nothing, idempotent=True)
    except RuntimeError:  # trio.RunFinishedError
        return False
    return True


def _is_asyncio(loop: object) -> bool:
    return hasattr(loop, "is_running")


def _nothing() -> None:
    """Only to be asked for."""
