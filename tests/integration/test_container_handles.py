"""Handles of containers speak of their very container, and end it whatever happens to who holds them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox import Container, Engine, NotFoundError, Resources

pytestmark = [pytest.mark.anyio, pytest.mark.root]

SMALL = Resources(memory="64M")


async def test_a_container_is_ended_by_a_cancellation_of_those_who_use_it(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        with anyio.CancelScope() as scope:
            async with sandbox.containers.add(argv=["sleep", "1000"]):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert await sandbox.containers.list() == []
        container = await sandbox.containers.add(argv=["sleep", "1000"])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await container.kill()
        assert (await container.wait()).signal == signal.SIGKILL
        await container.remove()


async def test_a_handle_that_was_got_while_its_container_was_made_is_of_that_one(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        early: list[Container] = []

        async def add() -> None:
            await sandbox.containers.add(argv=["sleep", "1000"], name="c")

        async with anyio.create_task_group() as group:
            group.start_soon(add)
            while not early:
                await anyio.lowlevel.checkpoint()
                with contextlib.suppress(NotFoundError):
                    early.append(await sandbox.containers.get("c"))
        assert (await early[0].status()).state == "running"
        await early[0].remove()
        assert await sandbox.containers.list() == []
        assert (await early[0].wait()).signal == signal.SIGKILL


@asynccontextmanager
async def replaced(directory: Path, *argv: str) -> AsyncIterator[tuple[Container, Container]]:
    """A handle of another process, of a container that is gone, and the one of `argv` that has its name now."""
    async with Engine.open(directory) as engine, Engine.attach(directory) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        first = await sandbox.containers.add(argv=["sleep", "1000"], name="c")
        stale = await (await other.get("w")).containers.get("c")
        await first.remove()
        yield stale, await sandbox.containers.add(argv=argv, name="c")


async def test_a_handle_of_another_process_does_not_speak_of_a_namesake(tmp_path: Path) -> None:
    async with replaced(tmp_path, "sh", "-c", "echo new; sleep 1000") as (stale, second):
        await anext(second.follow())
        for call in (stale.status, stale.logs, lambda: stale.signal(signal.SIGTERM)):
            with pytest.raises(NotFoundError):
                await call()
        assert (await second.status()).state == "running"


async def test_a_handle_of_another_process_ends_no_namesake(tmp_path: Path) -> None:
    async with replaced(tmp_path, "sleep", "1000") as (stale, second):
        with contextlib.suppress(NotFoundError):
            await stale.kill()
        await stale.remove()
        assert (await second.status()).state == "running"
