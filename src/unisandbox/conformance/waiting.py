"""Waiting for what gives no event: asking again until a deadline, never sleeping for luck."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from unisandbox import Process


async def until(ready: Callable[[], Awaitable[bool]], what: str, timeout: float = 20.0) -> None:
    """Ask until the answer is True.

    Raises:
        AssertionError: it was not within `timeout` seconds; `what` says what was waited for.
    """
    with anyio.move_on_after(timeout):
        while not await ready():
            await anyio.sleep(0.005)
        return
    raise AssertionError(f"not within {timeout:g} s: {what}")


async def line(process: Process) -> bytes:
    """The next line of a process's output, with its end; it may come in pieces."""
    got = b""
    with anyio.fail_after(20):
        while not got.endswith(b"\n"):
            got += await process.stdout.receive()
    return got
