"""Handles of containers speak of their very container, and end it whatever happens to who holds them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox import Container, DeadlineExceededError, Engine, NotFoundError, Resources, Sandbox
from unisandbox.api import Exit, TaskService
from unisandbox.conformance.waiting import until
from unisandbox.engine import sharing
from unisandbox.engine.programs import Programs
from unisandbox.host.pidfd import Identity, identity, lives

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


@pytest.mark.parametrize("how", ["kill", "remove"])
async def test_a_container_is_ended_by_a_task_that_is_cancelled_as_it_begins_to(
    tmp_path: Path, how: str, anyio_backend: str
) -> None:
    if anyio_backend != "asyncio":
        pytest.skip("asyncio alone cancels through a shield")
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        for turns in range(1, 10):
            container = await sandbox.containers.add(argv=["sleep", "1000"])
            main = identity(container.pid)
            task = asyncio.create_task(getattr(container, how)())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

            async def gone(main: Identity = main) -> bool:
                return not lives(main.pid, main.start_time)

            await until(gone, f"it ends though its task was cancelled after {turns} turns")
            await container.remove()


@pytest.mark.parametrize("shared", [False, True])
async def test_a_name_that_one_of_two_removals_has_freed_can_be_taken(
    tmp_path: Path, shared: bool, count: Callable[[int], int]
) -> None:
    async with Engine.open(tmp_path if shared else None) as engine, engine.create(resources=SMALL) as sandbox:
        for number in range(count(100)):
            first = await sandbox.containers.add(argv=["sleep", "1000"], name="c")
            same = await sandbox.containers.get("c")
            is_free = anyio.Event()

            async def remove(container: Container, turns: int, is_free: anyio.Event = is_free) -> None:
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                await container.remove()
                is_free.set()

            async with anyio.create_task_group() as group:
                group.start_soon(remove, first, 0)
                group.start_soon(remove, same, number * 8)
                await is_free.wait()
                second = await sandbox.containers.add(argv=["sleep", "1000"], name="c")
            assert (await second.status()).state == "running"
            await second.remove()


@asynccontextmanager
async def replaced(
    directory: Path, *argv: str, others: Callable[[Sandbox, Container], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[Container, Container]]:
    """A handle of another process, of a container that is gone, and the one of `argv` that has its name now."""
    async with Engine.open(directory) as engine, Engine.attach(directory) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        first = await sandbox.containers.add(argv=["sh", "-c", "echo old; sleep 1000"], name="c")
        seen = await other.get("w")
        stale = await seen.containers.get("c")
        if others is not None:
            await others(seen, stale)
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


@pytest.mark.parametrize("how", ["kill", "remove"])
async def test_a_handle_ends_no_namesake_while_its_process_waits_for_a_turn(tmp_path: Path, how: str) -> None:
    theirs: list[Sandbox] = []

    async def note(sandbox: Sandbox, _: Container) -> None:
        theirs.append(sandbox)

    async with replaced(tmp_path, "sleep", "1000", others=note) as (stale, second):
        async with anyio.create_task_group() as group:
            async with second._entry.sharing.changing():
                group.start_soon(theirs[0].update, SMALL)
                await anyio.wait_all_tasks_blocked()
                with contextlib.suppress(NotFoundError), anyio.move_on_after(2):
                    await getattr(stale, how)()
        assert (await second.status()).state == "running"


async def test_a_reader_of_what_a_container_writes_reads_nothing_of_a_namesake(tmp_path: Path) -> None:
    readers: list[AsyncIterator[bytes]] = []

    async def begin(_: Sandbox, stale: Container) -> None:
        readers.append(stale.follow())
        assert await anext(readers[0]) == b"old\n"

    async with replaced(tmp_path, "sh", "-c", "echo new and longer; sleep 1000", others=begin) as (stale, second):
        await anext(second.follow())
        assert [data async for data in readers[0]] == []
        with pytest.raises(NotFoundError):
            await anext(stale.follow())


async def test_a_container_is_removed_while_its_sandbox_waits_for_others_to_end(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        async with Engine.open(directory) as engine, engine.create(resources=SMALL) as sandbox:
            stubborn = await sandbox.containers.add(argv=["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"])
            await anext(stubborn.follow())
            container = await sandbox.containers.add(argv=["sleep", "1000"])
            async with anyio.create_task_group() as group:
                group.start_soon(sandbox.stop, 60)
                await anyio.wait_all_tasks_blocked()
                await container.remove()
                assert [status.name for status in await sandbox.containers.list()] == [stubborn.name]
                await sandbox.kill()


async def test_a_removal_says_that_somebody_else_has_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_REMOVE_LOCK_SECONDS", 0.3)
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        container = await sandbox.containers.add(argv=["sleep", "1000"])
        async with (await other.get("w"))._entry.sharing.changing():
            with pytest.raises(DeadlineExceededError, match="has been in use"):
                await container.remove()
        await container.remove()
        assert await sandbox.containers.list() == []


async def test_who_follows_a_container_comes_to_an_end_with_its_sandbox_s_time(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(ttl=1, resources=SMALL)
        container = await sandbox.containers.add(argv=["sh", "-c", "while echo .; do :; done"])
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(follow, container)


async def follow(container: Container) -> None:
    async for _ in container.follow():
        pass


@pytest.mark.parametrize("shared", [False, True])
async def test_what_is_run_while_another_program_is_launched_is_run_beside_it(tmp_path: Path, shared: bool) -> None:
    said: list[str] = []
    drop = Programs._drop_main

    async def run(sandbox: Sandbox, turns: int) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        said.append((await sandbox.run(["echo", "hi"])).text)

    async with Engine.open(tmp_path if shared else None) as engine, engine.create(resources=SMALL) as sandbox:
        for number in range(4):
            await sandbox.stop(grace=0)
            await sandbox.start()
            await sandbox.run(["true"])
            dropping = anyio.Event()

            async def dropped(self: Programs, task: TaskService, dropping: anyio.Event = dropping) -> Exit | None:
                dropping.set()
                return await drop(self, task)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Programs, "_drop_main", dropped)
                async with anyio.create_task_group() as group:
                    group.start_soon(sandbox.launch, ["sleep", "1000"])
                    await dropping.wait()
                    for turns in range(4):
                        group.start_soon(run, sandbox, 16 * number + 4 * turns)
    assert said == ["hi\n"] * 16


async def test_a_kill_of_one_that_has_ended_ends_what_it_had_left_before_it_returns(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        for _ in range(5):
            process = await sandbox.exec(["sh", "-c", "sleep 1000 & sleep 1000 & exit 3"])

            async def ended(pid: int = process.pid) -> bool:
                return pid not in sandbox._entry.task._containers["main"].plan.cgroup.pids()  # type: ignore[attr-defined]

            await until(ended, "it has ended")
            assert (await process.kill()).code == 3
            assert sandbox._entry.task._containers["main"].lingering == {}  # type: ignore[attr-defined]
