"""Cancellation at every await, found automatically: whatever is cut off wherever, nothing is left and all goes on.

An operation is driven through `Cut`, which counts how often it suspends and cancels at the n-th time. It is repeated
with n = 1, 2, 3 ... until it completes, so that a new await in the code is a new case here without a new line.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from tests.keepers import end_workers, files_of, workers_of

from unisandbox import Container, Engine, Process, Sandbox
from unisandbox.conformance.inventory import Inventory, settle

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.timeout(300)]

# More suspensions than any operation has: then something waits in a loop.
MOST = 400


class Cut:
    """Awaits a coroutine, and calls `cancel` when it suspends for the `at`-th time."""

    def __init__(self, coroutine: Coroutine[Any, Any, object], at: int, cancel: Callable[[], object]) -> None:
        self._coroutine = coroutine
        self._at = at
        self._cancel = cancel
        self.suspended = 0

    def __await__(self) -> Generator[Any, Any, object]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                asked = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration as end:
                return end.value
            self.suspended += 1
            if self.suspended == self._at:
                self._cancel()
            try:
                value, error = (yield asked), None
            except BaseException as thrown:
                value, error = None, thrown


@attrs.define
class World:
    """What the operations work on: one engine, one sandbox in it with its main container, a directory of the host."""

    engine: Engine
    sandbox: Sandbox
    local: Path
    made: list[Sandbox | Process | Container] = attrs.field(factory=list)

    async def residue(self) -> list[str]:
        """What the engine holds in its keeper and on disk, beside what the inventory of the host shows."""
        keeper = self.engine._core.host.keeper
        end_workers(keeper.pid)
        found = [f"held: {name}" for name in await keeper.held("")]
        found += [f"keeper's fd: {path}" for path in files_of(keeper.pid)]
        mounts = Path(f"/proc/{keeper.pid}/mountinfo").read_text().splitlines()  # noqa: ASYNC240
        found += [f"keeper's mount: {line.split()[4]}" for line in mounts]
        state_dir = self.engine._core.host.state_dir
        for directory, _, files in os.walk(state_dir):
            found += [os.path.join(directory, name) for name in files]
        found += [f"container: {status.name}" for status in await self.sandbox.containers.list()]
        found += [f"sandbox: {status.id}" for status in await self.engine.list()]
        found += [f"in /tmp: {info.name}" for info in await self.sandbox.files.list("/tmp")]
        found += [f"local: {path}" for path in sorted(self.local.rglob("*"))]
        return sorted(found)


@pytest.fixture
async def world(anyio_backend: str, tmp_path: Path) -> AsyncIterator[World]:
    async with Engine.open() as engine, engine.create(isolation="runc", rootfs="host") as sandbox:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "data").write_bytes(bytes(3 << 20))
        await sandbox.files.write("/tmp/kept", bytes(3 << 20))
        await sandbox.run(["true"])
        yield World(engine, sandbox, tmp_path)


async def create(world: World) -> None:
    world.made.append(await world.engine.create(isolation="runc"))


async def create_and_run(world: World) -> None:
    async with world.engine.create(isolation="runc") as sandbox:
        await sandbox.run(["true"])


async def run(world: World) -> None:
    await world.sandbox.run(["sh", "-c", "sleep 0.01 & cat; wait"], input=b"x" * 200_000, timeout=30)


async def execute(world: World) -> None:
    async with world.sandbox.exec(["sh", "-c", "cat; echo >&2"], stdin="pipe") as process:
        await process.stdin.send(b"x")
        await process.stdin.aclose()
        async for _ in process:
            pass
        await process.wait()


async def execute_and_keep(world: World) -> None:
    process = await world.sandbox.exec(["sh", "-c", "read line"], stdin="pipe", tty=False)
    world.made.append(process)
    await process.stdin.send(b"\n")
    await process.wait()


async def terminal(world: World) -> None:
    async with world.sandbox.exec(["sh", "-c", "echo x"], tty=True) as process:
        await process.resize(10, 20)
        await process.stdout.receive()
        await process.wait()


async def files(world: World) -> None:
    files = world.sandbox.files
    await files.mkdir("/tmp/a/b")
    await files.write("/tmp/a/f", bytes(3 << 20))
    await files.read("/tmp/a/f")
    await files.rename("/tmp/a/f", "/tmp/a/g")
    await files.upload(world.local / "in", "/tmp/a/up")
    await files.download("/tmp/a", world.local / "out")
    await files.list("/tmp/a")
    await files.stat("/tmp/a/g")
    await files.remove("/tmp/a", recursive=True)


async def add(world: World) -> None:
    container = await world.sandbox.containers.add(argv=["sh", "-c", "echo x"])
    world.made.append(container)
    await container.wait()
    await container.logs()


async def add_and_leave(world: World) -> None:
    async with world.sandbox.containers.add(argv=["sleep", "60"]) as container:
        await container.status()


async def whole_life(world: World) -> None:
    sandbox = await world.engine.create(isolation="runc")
    world.made.append(sandbox)
    await sandbox.exec(["sleep", "60"])
    await sandbox.stop(grace=5)
    await sandbox.start()
    await sandbox.run(["true"])
    await sandbox.kill()
    await sandbox.remove()


OPERATIONS = (create, create_and_run, run, execute, execute_and_keep, terminal, files, add, add_and_leave, whole_life)


async def clean(world: World) -> None:
    """What a user does with what he was given, and with files that were half done."""
    for made in world.made:
        await (made.aclose() if isinstance(made, Process) else made.remove())
    world.made.clear()
    for status in await world.engine.list():
        if status.id != world.sandbox.id:
            # Removed half way by a cut `remove`, or never handed over: the engine still knows it, and can end it.
            await (await world.engine.get(status.id)).remove()
    if await world.sandbox.files.exists("/tmp/a"):
        await world.sandbox.files.remove("/tmp/a", recursive=True)
    for path in sorted((world.local / "out").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if (world.local / "out").exists():
        (world.local / "out").rmdir()


def settled(world: World, before: Inventory, kind: str = "") -> list[str]:
    """See `settle`; without the keeper's workers, which stay a while after jobs, also after those that clean up."""
    keeper = world.engine._core.host.keeper.pid
    end_workers(keeper)
    left = settle(before, kind=kind)
    # A job that waited for the death of a cancelled one may have begun meanwhile.
    return [line for line in left if not any(f": process {worker} " in line for worker in workers_of(keeper))]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_cut_at_every_await_nothing_is_left(
    world: World, operation: Callable[[World], Coroutine[Any, Any, None]], count: Callable[[int], int]
) -> None:
    await operation(world)
    await clean(world)
    held, before = await world.residue(), Inventory.take()
    # In a short run a part of the awaits, each time others: the first and the last few always.
    step = 1 if count(10) == 10 else 3
    at = 1
    while True:
        with anyio.CancelScope() as scope:
            cut = Cut(operation(world), at, scope.cancel)
            await cut
        await clean(world)
        with anyio.fail_after(20):
            assert (await world.sandbox.run(["echo", "works"])).stdout == b"works\n"

        left = settled(world, before)
        after = await world.residue()
        assert not left, f"cancelled at suspension {at}: {left}"
        assert after == held, f"cancelled at suspension {at}: {sorted(set(after) ^ set(held))}"
        if cut.suspended < at:
            break
        assert at < MOST, "it never completes"
        at += 1 if at < 8 else step


async def test_closing_the_engine_cut_at_every_await_leaves_nothing(anyio_backend: str) -> None:
    before = Inventory.take()
    at = 1
    while True:
        engine = await Engine.open()
        sandbox = await engine.create(isolation="runc")
        await sandbox.exec(["sleep", "60"])
        with anyio.CancelScope() as scope:
            cut = Cut(engine.close(), at, scope.cancel)
            await cut
        await engine.close()
        left = settle(before, timeout=10)
        assert not left, f"cancelled at suspension {at}: {left}"
        if cut.suspended < at:
            break
        assert at < MOST
        at += 1 if at < 8 else 4


async def test_opening_an_engine_cut_at_every_await_leaves_nothing(anyio_backend: str) -> None:
    before = Inventory.take()
    at = 1
    while True:
        opened: list[Engine] = []

        async def open_it(opened: list[Engine] = opened) -> None:
            opened.append(await Engine.open())

        with anyio.CancelScope() as scope:
            cut = Cut(open_it(), at, scope.cancel)
            await cut
        for engine in opened:
            await engine.close()
        left = settle(before, timeout=10)
        assert not left, f"cancelled at suspension {at}: {left}"
        if cut.suspended < at:
            break
        assert at < MOST
        at += 1


async def test_a_cancelled_run_ends_what_it_started_at_once(world: World) -> None:
    async def running() -> bool:
        return "sleep 4242" in (await world.sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).text

    async with anyio.create_task_group() as group:
        group.start_soon(world.sandbox.sh, "setsid sleep 4242 & sleep 4243")
        with anyio.fail_after(20):
            while not await running():
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()

    assert not await running()


async def test_a_call_in_a_scope_that_was_cancelled_says_so_also_when_there_is_nothing_to_wait_for() -> None:
    async with Engine.open() as engine:
        sandbox = await engine.create()
        container = await sandbox.containers.add(argv=["true"])
        await container.wait()
        for call in (container.wait, container.kill, container.remove, container.remove, sandbox.processes):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught, call
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.get(sandbox.id)
        assert scope.cancelled_caught
        assert await sandbox.containers.list() == []


async def _cancelled_twice(operation: Coroutine[Any, Any, None], at: int) -> int:
    """Run it in a task that is cancelled natively when it suspends for the `at`-th time, and again while it cleans."""
    loop = asyncio.get_running_loop()

    def cancel_twice() -> None:
        task.cancel()
        loop.call_soon(lambda: loop.call_soon(task.cancel))

    cut = Cut(operation, at, cancel_twice)

    async def drive() -> object:
        return await cut

    task = loop.create_task(drive())
    await asyncio.wait([task])
    assert task.cancelled() or task.exception() is None, task
    return cut.suspended


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("operation", [create, run, execute, add_and_leave], ids=lambda operation: operation.__name__)
async def test_cancelled_twice_by_asyncio_nothing_is_left(
    world: World, operation: Callable[[World], Coroutine[Any, Any, None]], count: Callable[[int], int]
) -> None:
    """The second one cuts the cleaning, which no shield holds off; then the next calls finish it."""
    await operation(world)
    await clean(world)
    held, before = await world.residue(), Inventory.take()
    step = 1 if count(10) == 10 else 5
    at = 1
    while True:
        suspended = await _cancelled_twice(operation(world), at)
        processes = settled(world, before, "process")
        assert not processes, f"cancelled at suspension {at}: {processes}"
        await clean(world)
        assert (await world.sandbox.run(["true"])).exit_code == 0
        assert not (left := settled(world, before)), f"cancelled at suspension {at}: {left}"
        after = await world.residue()
        assert after == held, f"cancelled at suspension {at}: {sorted(set(after) ^ set(held))}"
        if suspended < at:
            break
        at += 1 if at < 5 else step


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_wait_for_of_asyncio_works(world: World) -> None:
    held, before = await world.residue(), Inventory.take()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(world.sandbox.run(["sleep", "60"]), 0.2)
    process = await world.sandbox.exec(["sleep", "60"])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.1)
    assert (await process.kill()).signal == 9
    await process.aclose()

    assert settle(before) == []
    assert await world.residue() == held


async def test_cutting_one_waiter_does_not_disturb_the_other(world: World) -> None:
    process = await world.sandbox.exec(["sh", "-c", "read line; exit 5"], stdin="pipe")
    ends: list[int] = []

    async def wait() -> None:
        ends.append((await process.wait()).code)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.05):
            await process.wait()
        await process.stdin.send(b"\n")
    await process.aclose()

    assert ends == [5]


async def test_cancelling_a_create_in_a_crowd_harms_no_other(world: World) -> None:
    made: list[Sandbox] = []

    async def one(number: int) -> None:
        with anyio.move_on_after(0.02 if number % 2 else 60):
            made.append(await world.engine.create(isolation="runc"))

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(one, number)
    assert len(made) >= 5
    for sandbox in made:
        assert (await sandbox.run(["true"])).exit_code == 0
        await sandbox.remove()
    assert [status.id for status in await world.engine.list()] == [world.sandbox.id]
