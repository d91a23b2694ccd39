"""What can be done to the processes of a paused sandbox: each can be ended alone, and how it ended is known at once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox import DeadlineExceededError, Engine, Resources, Sandbox
from unisandbox.engine import opening
from unisandbox.host.cgroups import Cgroups

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")
BOUND = 20.0


@pytest.fixture(params=["by default", "without unified tree"])
async def sandbox(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> AsyncIterator[Sandbox]:
    if request.param == "without unified tree":
        detect, found = Cgroups.detect, Cgroups.detect("unisandbox-x")
        if found.version == "v2":
            pytest.skip("this host has no hierarchies of cgroup v1")
        # The runtime shall not see it either.
        hidden = opening._hidden(found)
        monkeypatch.setattr(opening, "_hidden", lambda _: hidden)
        monkeypatch.setattr(Cgroups, "detect", lambda name, **options: detect(name, **options, use_unified=False))
    async with Engine.open() as engine, engine.create(isolation="runc", resources=SMALL) as made:
        yield made


async def _state(sandbox: Sandbox) -> list[str]:
    return [container.state for container in (await sandbox.status()).containers]


async def test_one_process_is_ended_and_the_others_stay_paused(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sh", "-c", "sleep 1000 & wait"])
    other = await sandbox.exec(["cat"], stdin="pipe")
    await sandbox.pause()
    with anyio.fail_after(BOUND):
        exit = await process.kill()
        assert (exit.signal, exit.reason, await process.wait()) == (9, "signaled", exit)
        await process.aclose()
        assert await _state(sandbox) == ["paused"]
        await other.stdin.send(b"x")
        with anyio.move_on_after(0.1) as scope:  # that nothing comes cannot be waited for
            await other.stdout.receive()
        assert scope.cancelled_caught
        await sandbox.resume()
        assert await other.stdout.receive() == b"x"
        assert not await _runs(sandbox, "sleep")
        await other.stdin.aclose()
        assert (await other.wait()).code == 0
        await other.aclose()


async def test_a_deadly_signal_ends_one_process_of_a_group_and_the_rest_stays_paused(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sh", "-c", "sleep 1000 & echo ready; wait"])
    assert await process.stdout.receive() == b"ready\n"
    await sandbox.pause()
    with anyio.fail_after(BOUND):
        await process.signal(9)
        assert (await process.wait()).signal == 9
        assert await _state(sandbox) == ["paused"]
    await sandbox.resume()
    assert await _runs(sandbox, "sleep")
    await process.aclose()


async def test_who_waits_since_before_the_pause_is_told(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sleep", "1000"])
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(process.wait)
            await anyio.wait_all_tasks_blocked()
            await sandbox.pause()
            os.kill(process.pid, 0)
            assert (await process.kill()).signal == 9
    await sandbox.resume()
    await process.aclose()


async def test_leaving_a_process_and_giving_up_a_run_are_no_matter_of_the_pause(sandbox: Sandbox) -> None:
    with anyio.fail_after(BOUND):
        async with sandbox.exec(["sh", "-c", "echo ready; sleep 1000"]) as process, anyio.create_task_group() as group:
            assert await process.stdout.receive() == b"ready\n"

            async def run() -> None:
                with pytest.raises(DeadlineExceededError):
                    await sandbox.run(["sleep", "1001"], timeout=5)

            group.start_soon(run)
            while not await _runs(sandbox, "sleep 1001"):
                await anyio.lowlevel.checkpoint()
            await sandbox.pause()
        assert process.exit is not None
        await sandbox.resume()
        assert not await _runs(sandbox, "sleep")


async def _runs(sandbox: Sandbox, command: str) -> bool:
    """Whether something inside has this in its command line."""
    return command in (await sandbox.sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")).text


async def test_the_end_of_what_is_killed_in_a_pause_is_told_once(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(isolation="runc", resources=SMALL) as sandbox:
        process = await sandbox.exec(["sleep", "1000"])
        await sandbox.pause()
        await process.kill()
        await process.aclose()
        await sandbox.resume()
        await sandbox.stop(grace=0)
        told = []
        async for event in engine.events():
            told.append((event.kind, event.exec_id))
            if event.kind == "sandbox.stopped":
                break
        assert told.count(("process.exited", process.id)) == 1
