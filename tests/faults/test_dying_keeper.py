"""The keeper dies in the middle of a call: whoever called hears that, whatever it was that failed first."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import select
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import pytest

from unisandbox import Engine, Resources, Sandbox, UnavailableError
from unisandbox.host import boundary

pytestmark = [pytest.mark.root, pytest.mark.anyio, pytest.mark.timeout(900)]

SEED: Final = 20_261_130
SMALL: Final = Resources(memory="64M")


CALLS: Final[dict[str, Callable[[Engine, Sandbox], Awaitable[object]]]] = {
    "create": lambda engine, _: engine.create(name="b", resources=SMALL),
    "run": lambda _, sandbox: sandbox.run(["true"]),
    "launch": lambda _, sandbox: sandbox.launch(["sleep", "1000"]),
    "add": lambda _, sandbox: sandbox.containers.add(argv=["sleep", "1000"]),
    "update": lambda _, sandbox: sandbox.update(Resources(memory="32M")),
    "stop": lambda _, sandbox: sandbox.stop(grace=0),
    "remove": lambda _, sandbox: sandbox.remove(),
}


def is_written(points: list[str]) -> bool:
    """Whether the last record of the call is: who dies afterwards has not cut it."""
    return not any(name.startswith(("before file.", "after file.")) for name in points)


async def play(state: Path, call: str, at: int) -> list[str]:
    """Make a call in which the keeper is killed at its `at`-th point; all points that were reached.

    A creation whose keeper had ended before it was written down is not told as done.
    """
    points: list[str] = []
    engine = await Engine.open(state, policy="keep")
    try:
        sandbox = await engine.create(name="a", resources=SMALL)
        keeper = engine._core.host.keeper
        end = os.pidfd_open(keeper.pid)

        def kill(name: str, _of: str) -> None:
            points.append(name)
            if len(points) == at:
                signal.pidfd_send_signal(end, signal.SIGKILL)
                if at % 2:  # else it is only about to die
                    select.select([end], [], [])

        boundary.watch(kill)
        try:
            await CALLS[call](engine, sandbox)
            assert call != "create" or not at % 2 or is_written(points[at - 1 :]), points[at - 1]
        except UnavailableError:
            pass
        finally:
            boundary.watch(None)
            os.close(end)
    finally:
        await engine.close()
    async with Engine.open(state):
        pass
    return points


@pytest.mark.parametrize("call", CALLS)
async def test_its_death_is_told_as_such(call: str, tmp_path: Path, count: Callable[[int], int]) -> None:
    points = await play(tmp_path / "all", call, 0)
    assert points
    dice = random.Random(SEED)
    print(f"seed {SEED}, {len(points)} points")
    for at in sorted(dice.sample(range(1, len(points) + 1), min(len(points), count(60)))):
        await play(tmp_path / str(at), call, at)


@pytest.mark.parametrize("call", ["run", "launch", "add"])
async def test_a_process_that_dies_with_it_before_it_was_started_is_told_as_its_death(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawning: Any = importlib.import_module("unisandbox.host.init.spawn")  # beside it there is a function of that name
    look = spawning._pid_of
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="a", resources=SMALL)
        keeper = engine._core.host.keeper.pid

        def late(pidfd: int, inside: int, pid_namespace: int | None) -> int | None:
            os.kill(keeper, signal.SIGKILL)
            assert select.select([pidfd], [], [], 20.0)[0]
            found: int | None = look(pidfd, inside, pid_namespace)
            return found

        monkeypatch.setattr(spawning, "_pid_of", late)
        with pytest.raises(UnavailableError, match=r"keeper .*has ended"):
            await CALLS[call](engine, sandbox)


@pytest.mark.parametrize("whose", ["private", "owned"])
async def test_what_is_asked_of_a_sandbox_after_its_death_is_not_told_as_done(whose: str, tmp_path: Path) -> None:
    async with Engine.open(None if whose == "private" else tmp_path) as engine:
        sandbox = await engine.create(resources=SMALL)
        process = await sandbox.exec(["sleep", "60"])
        keeper = engine._core.host.keeper
        os.kill(keeper.pid, signal.SIGKILL)
        assert keeper.ends_within(20.0)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: sandbox.update(Resources(memory="32M")),
            sandbox.pause,
            sandbox.resume,
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match=r"keeper .*has ended"):
                await call()
        await process.signal(signal.SIGTERM)  # it has ended, which is seen without the keeper
        with contextlib.suppress(UnavailableError):
            await sandbox.stop(grace=0)
        with pytest.raises(UnavailableError, match=r"keeper .*has ended"):
            await process.signal(signal.SIGTERM)


@pytest.mark.parametrize("whose", ["private", "owned", "attached"])
async def test_who_reads_events_is_told_of_its_death(whose: str, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Engine.open(None if whose == "private" else tmp_path))
        if whose == "attached":
            engine = await stack.enter_async_context(Engine.attach(tmp_path))
        keeper = engine._core.host.keeper.pid
        await engine.create(resources=SMALL)
        events = engine.events()
        assert [(await anext(events)).kind for _ in range(2)] == ["sandbox.created", "sandbox.started"]
        told: list[str] = []

        async def read() -> None:
            with pytest.raises(UnavailableError, match=r"keeper .*has ended, and with it what ran") as error:
                await anext(events)
            told.append(error.value.message)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            os.kill(keeper, signal.SIGKILL)
        await read()
        assert told[0] == told[1]


@pytest.mark.parametrize("policy", ["keep", "stop"])
async def test_events_end_with_their_engine_also_when_its_keeper_is_dead(
    policy: Literal["keep", "stop"], tmp_path: Path
) -> None:
    async with Engine.open(tmp_path, policy=policy) as engine:
        os.kill(engine._core.host.keeper.pid, signal.SIGKILL)
        assert engine._core.host.keeper.ends_within(20.0)
        events = engine.events()
    assert [event async for event in events] == []
    async with Engine.open(tmp_path):  # frees what is left
        pass
