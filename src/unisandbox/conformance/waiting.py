"""Waiting with a deadline: for what gives no event, asking again and again, and for the test as a whole."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import pytest

from unisandbox import Process
from unisandbox.api import Exit

# Linux 6.15 tells the end of a process whose parent is gone to whoever holds its pidfd (PIDFD_INFO_EXIT).
_ENDS_STAY_READABLE: Final = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15)


def killed(end: Exit) -> bool:
    """Whether this is the end of a process that another one has killed, with all around it: exact where it can be."""
    return end.signal == 9 or (end.reason == "lost" and not _ENDS_STAY_READABLE)


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


def bound(test: pytest.Function) -> None:
    """Cancel an async test ten seconds before pytest-timeout, where that is used, would give it up.

    pytest-timeout can only raise in the main thread. Under trio that is not where the test is: it would hold up the
    fixtures' ends, and so the whole run, for ever.
    """
    marker = test.get_closest_marker("timeout")
    seconds = marker.args[0] if marker and marker.args else test.config.getoption("timeout", None)
    if seconds is None and test.config.pluginmanager.hasplugin("timeout"):
        seconds = test.config.getini("timeout")
    function = test.obj
    if not seconds or not inspect.iscoroutinefunction(function):
        return

    @functools.wraps(function)
    async def bounded(**arguments: object) -> None:
        with anyio.fail_after(max(float(seconds) - 10, 1)):
            await function(**arguments)

    test.obj = bounded
