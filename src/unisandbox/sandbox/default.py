"""The default engine: one per event loop, opened at the first use, gone with the loop."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import AsyncGenerator

import anyio
from anyio.lowlevel import RunVar, checkpoint

from unisandbox.engine.closing import abandon
from unisandbox.engine.core import EngineCore
from unisandbox.engine.opening import open_engine


class _Default:
    """The default engine of one event loop."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.core: EngineCore | None = None
        self.end: AsyncGenerator[None] | None = None


# Generators of loops that ended without telling them (a notebook's, `run_until_complete`): closed with the interpreter.
_open: dict[EngineCore, AsyncGenerator[None]] = {}
_default: RunVar[_Default] = RunVar("unisandbox_default_engine")


async def default_core() -> EngineCore:
    """The running event loop's own engine, on a temporary state directory."""
    try:
        default = _default.get()
    except LookupError:
        default = _Default()
        _default.set(default)
    async with default.lock:
        # One whose keeper was killed can start nothing any more, and nobody has the engine, to close it. It goes on
        # telling that to those who have sandboxes of it, and is cleaned up when the loop ends.
        if default.core is None or default.core.closed or not default.core.host.keeper.alive:
            default.core = await open_engine()
            default.end = _close_with_the_loop(default.core)
            for core in [core for core in _open if core.closed]:
                del _open[core]
            _open[default.core] = default.end
            await anext(default.end)
    return default.core


async def _close_with_the_loop(core: EngineCore) -> AsyncGenerator[None]:
    """Asyncio and trio close every started asynchronous generator when the loop ends: there the engine ends too.

    The end is synchronous, since a loop that ends gives no time any more. Source: asyncio `shutdown_asyncgens`,
    trio's reference on async generators.
    """
    try:
        yield
        await checkpoint()
    finally:
        abandon(core)


@atexit.register
def _close_with_the_interpreter() -> None:
    for end in tuple(_open.values()):
        # Its end needs no event loop: it runs up to its last line at once.
        with contextlib.suppress(StopIteration, RuntimeError):
            end.aclose().send(None)
