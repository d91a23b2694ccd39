"""A keeper that is suspended holds nobody up for ever: whoever needs it is told which process it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from tests.keepers import keeper_at

from unisandbox import DeadlineExceededError, Engine, Resources
from unisandbox.host.keeper import Keeper, link

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")


@contextmanager
def little_patience(seconds: float = 0.5) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(link, "_ANSWER_SECONDS", seconds)
        patched.setattr(link, "_SILENT_SECONDS", seconds / 4)
        yield


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        with little_patience():
            yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_whoever_comes_to_a_suspended_keeper_is_told_its_process(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        process = await (await engine.create(name="w", resources=SMALL)).exec(["sleep", "1000"])
        keeper = engine._core.host.keeper.pid
    with suspended(keeper), anyio.fail_after(20):
        with pytest.raises(DeadlineExceededError, match=f"keeper {keeper} .*kill -CONT {keeper}"):
            await Engine.attach(tmp_path)
        with pytest.raises(DeadlineExceededError, match=f"keeper {keeper} "):
            await Engine.open(tmp_path, policy="keep")
        with pytest.raises(DeadlineExceededError, match=f"keeper {keeper} "):
            await Engine.open(tmp_path, policy="stop")
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
        os.kill(process.pid, 0)


async def test_whoever_uses_a_sandbox_whose_keeper_is_suspended_is_told_its_process(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        keeper = engine._core.host.keeper.pid
        uses: dict[str, Callable[[], Awaitable[object]]] = {
            "create": lambda: engine.create(resources=SMALL),
            "run": lambda: sandbox.run(["true"]),
            "remove": sandbox.remove,
        }
        with suspended(keeper):
            for name, use in uses.items():
                with anyio.fail_after(30), pytest.raises(DeadlineExceededError) as caught:
                    await use()
                assert f"process {keeper}" in str(caught.value) or f"keeper {keeper}" in str(caught.value), name
        async with engine.create(resources=SMALL) as another:
            assert (await another.run(["true"])).exit_code == 0


async def test_a_late_answer_is_waited_for_while_the_keeper_answers_others(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        # The keeper itself may be slow here: it is asked twice, and then it has answered.
        with little_patience(2.0), anyio.fail_after(20):
            assert (await keeper.events.after(0, wait=4.5)).events == []
        await keeper.close()


async def test_a_full_queue_of_a_suspended_keeper_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        with suspended(keeper.pid), anyio.fail_after(20), pytest.raises(DeadlineExceededError, match="not answered"):
            await _fill(keeper)
        assert await keeper.clients()
        await keeper.close()


async def _fill(keeper: Keeper) -> None:
    for number in range(10_000):
        await keeper.notes.write(f"n{number}", "x" * 4096)
