"""Who has attached meets what others do and how they end: recoveries, takings over, removals that were cut."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from tests.crash.points import kill_keeper
from tests.programs import program

from unisandbox import Engine, FailedPreconditionError, Resources

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")

# Opens the directory as its owner, and is held up in the middle of its recovery until it hears something.
SLOW_OWNER = """
from unisandbox.host import boundary

STATE, HEARS = sys.argv[1], int(sys.argv[2])

def hold(name, of):
    if name == "before file.unlink":
        boundary.watch(None)
        tell(at=name)
        os.read(HEARS, 1)

async def main():
    boundary.watch(hold)
    engine = await Engine.open(STATE, policy="keep")
    tell(recovered=len(engine.recovery.sandboxes))
    os.read(HEARS, 1)
    await engine.close()

anyio.run(main)
"""

# Removes a sandbox, and is killed when its processes have ended and nothing of it is gone yet.
CUT_REMOVER = """
from unisandbox.host import boundary

def die(name, of):
    if (name, of) == ("before keeper.*", "drop"):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = await Engine.attach(sys.argv[1])
    sandbox = await engine.get("a")
    boundary.watch(die)
    await sandbox.remove()

anyio.run(main)
"""


# Recovers a kept directory by ending all, and is killed at a moment of the removal of the first record.
CUT_RECOVERY = """
from unisandbox.host import boundary

def die(name, of):
    if name == sys.argv[2] and "/sandboxes/" in of:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    boundary.watch(die)
    await Engine.open(sys.argv[1], policy="keep", on_recover="stop")

anyio.run(main)
"""


# Starts what writes when nobody reads any more: its own end is the keeper's word that it does.
STARTER = """
async def main():
    engine = await Engine.open(sys.argv[1], policy="keep")
    sandbox = await engine.create(name="a", resources=Resources(memory="64M"))
    process = await sandbox.exec(["sh", "-c", "echo kept and more; cat"], stdin="pipe")
    tell(id=process.id)
    signal.pause()

anyio.run(main)
"""


# Reads a stream to its end of a process that goes on.
READER = """
async def main():
    engine = await Engine.open(sys.argv[1], policy="keep")
    sandbox = await engine.create(name="a", resources=Resources(memory="64M"))
    process = await sandbox.exec(["sh", "-c", "echo out; exec >&-; read line; exit 3"], stdin="pipe")
    try:
        while True:
            await process.stdout.receive()
    except anyio.EndOfStream:
        tell(id=process.id)
    signal.pause()

anyio.run(main)
"""


async def story(engine: Engine, sandbox_id: str, last: str) -> list[str]:
    """What is told of a sandbox, up to the end."""
    told: list[str] = []
    with anyio.fail_after(10):
        async for event in engine.events():
            if event.sandbox_id == sandbox_id:
                told.append(event.kind)
            elif told and event.sandbox_id == last:
                break
    return told


@pytest.mark.parametrize("moment", ["before file.unlink", "after file.unlink"])
async def test_what_a_recovery_has_removed_is_told_once_also_when_it_is_killed(tmp_path: Path, moment: str) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        sandbox = await engine.create(name="a", resources=SMALL)
    with program(CUT_RECOVERY, str(tmp_path), moment) as recoverer:
        assert recoverer.finish()[0] == -9
    async with Engine.open(tmp_path) as engine:
        last = await engine.create(name="last", resources=SMALL)
        told = await story(engine, sandbox.id, last.id)
        assert told == ["sandbox.created", "sandbox.started", "sandbox.recovered", "sandbox.removed"]


async def test_what_who_attaches_frees_is_told_as_recovered(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        sandbox = await engine.create(name="a", resources=SMALL)
        with program(CUT_REMOVER, str(tmp_path)) as remover:
            assert remover.finish()[0] == -9
        async with Engine.attach(tmp_path) as other:
            assert [found.action for found in other.recovery.sandboxes] == ["removed"]
        last = await engine.create(name="last", resources=SMALL)
        assert (await story(engine, sandbox.id, last.id))[-2:] == ["sandbox.recovered", "sandbox.removed"]
        await last.remove()


async def test_who_attaches_sees_nothing_of_a_former_keeper_while_the_owner_recovers(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    engine = await Engine.open(state, policy="keep")
    await engine.create(name="a", resources=SMALL)
    kill_keeper(state)
    await engine.close()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with program(SLOW_OWNER, state, str(reading), pass_fds=(reading,)) as owner:
        try:
            assert owner.heard() == {"at": "before file.unlink"}
            with anyio.move_on_after(0.3) as waited:
                await Engine.attach(state)
            assert waited.cancelled_caught, "it did not wait for the recovery"
            os.write(writing, b"1")
            assert owner.heard() == {"recovered": 1}
            async with Engine.attach(state) as other:
                assert await other.list() == []
            os.write(writing, b"2")
            assert owner.finish()[0] == 0
        finally:
            os.close(reading)
            os.close(writing)


async def test_one_sandbox_whose_removal_was_cut_keeps_nobody_from_listing_the_others(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    async with Engine.open(state) as engine:
        a = await engine.create(name="a", resources=SMALL)
        await engine.create(name="b", resources=SMALL)
        with program(CUT_REMOVER, state) as remover:
            assert remover.finish()[0] == -9
        assert {status.name for status in await engine.list()} == {"a", "b"}
        await a.remove()
        assert {status.name for status in await engine.list()} == {"b"}


async def test_who_has_attached_goes_on_with_what_another_owner_has_taken_over(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = await Engine.open(state, policy="keep")
    await first.create(name="a", resources=SMALL)
    async with Engine.attach(state) as other:
        old = await other.get("a")
        assert (await old.status()).generation == 1
        await first.close()
        async with Engine.open(state):
            assert [status.generation for status in await other.list()] == [2]
            assert (await (await other.get("a")).run(["echo", "hello"])).text == "hello\n"
            with pytest.raises(FailedPreconditionError, match="taken over"):
                await old.run(["true"])


async def test_containers_that_nobody_names_are_named_apart_by_several_processes(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as owner, Engine.attach(tmp_path) as other:
        sandbox = await owner.create(name="a", resources=SMALL)
        seen = await other.get("a")
        await seen.status()  # before there is another container
        first = await sandbox.containers.add(argv=["sleep", "1000"], resources=Resources(memory="32M"))
        second = await seen.containers.add(argv=["sleep", "1000"], resources=Resources(memory="32M"))
        assert first.name != second.name


async def test_handles_of_what_another_owner_has_taken_over_do_nothing(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = await Engine.open(state, policy="keep")
    await first.create(name="a", resources=SMALL)
    async with Engine.attach(state) as other:
        old = await other.get("a")
        process = await old.exec(["sleep", "1000"])
        terminal = await old.exec(["sleep", "1000"], tty=True)
        container = await old.containers.add(argv=["sleep", "1000"], resources=Resources(memory="32M"))
        pids = [process.pid, terminal.pid, container.pid]
        await first.close()
        async with Engine.open(state):
            for call in (
                lambda: process.signal(9),
                process.kill,
                process.aclose,
                lambda: terminal.resize(10, 10),
                lambda: container.signal(9),
                container.kill,
                container.remove,
                lambda: old.stop(grace=0),
                lambda: old.stop(grace=1),
                old.kill,
                old.pause,
                old.start,
                lambda: old.update(SMALL),
                lambda: old.run(["true"]),
                lambda: old.files.write("/tmp/a", b""),
                lambda: old.launch(["true"]),
                old.remove,
            ):
                with pytest.raises(FailedPreconditionError, match="taken over"):
                    await call()
            for pid in pids:
                os.kill(pid, 0)
            again = await (await other.get("a")).containers.get(container.name)
            assert (await again.kill()).signal == 9


async def test_who_has_attached_goes_on_with_its_processes_when_another_owner_has_taken_over(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = await Engine.open(state, policy="keep")
    await first.create(name="a", resources=SMALL)
    async with Engine.attach(state) as other:
        old = await other.get("a")
        process = await old.exec(["sh", "-c", "echo before; cat; exit 3"], stdin="pipe")
        terminal = await old.exec(["sh", "-c", "read line; stty size; exit 4"], tty=True)
        async with anyio.create_task_group() as group:
            await first.close()
            async with Engine.open(state):
                group.start_soon(_expect_closed, process.stderr.receive)
                await anyio.wait_all_tasks_blocked()
                again, tty = await (await other.get("a")).processes()
                assert (again.id, again.pid, tty.id) == (process.id, process.pid, terminal.id)
                with pytest.raises(anyio.ClosedResourceError):
                    await process.stdin.send(b"by two")
                await again.stdin.send(b"after\n")
                await again.stdin.aclose()
                assert b"".join([output.data async for output in again]) == b"before\nafter\n"
                assert (await process.wait(), (await again.wait()).code) == (await again.wait(), 3)
                await tty.resize(11, 22)
                await tty.stdin.send(b"\n")
                assert b"11 22" in b"".join([output.data async for output in tty])
                assert ((await tty.wait()).code, (await terminal.wait()).code) == (4, 4)
                assert await (await other.get("a")).processes() == []
                await again.aclose()
                await tty.aclose()


async def test_what_was_kept_of_an_output_is_not_lost_by_a_second_take_over(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with program(STARTER, state) as starter:
        starter.heard()
        starter.kill()
    owner = await Engine.open(state, policy="keep")
    async with Engine.attach(state) as other:
        [process] = await (await other.get("a")).processes()
        assert await process.stdout.receive(4) == b"kept"
        await owner.close()
        async with Engine.open(state):
            [again] = await (await other.get("a")).processes()
            await again.stdin.aclose()
            assert b"".join([output.data async for output in again]) == b" and more\n"
            assert (await again.wait()).code == 0
            await again.aclose()


async def test_a_stream_that_was_read_to_its_end_has_ended_for_whoever_takes_over(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with program(READER, state) as reader:
        reader.heard()
        reader.kill()
    owner = await Engine.open(state, policy="keep")
    async with Engine.attach(state) as other:
        [process] = await (await other.get("a")).processes()
        with pytest.raises(anyio.EndOfStream):
            await process.stdout.receive()
        await owner.close()
        async with Engine.open(state):
            [again] = await (await other.get("a")).processes()
            with pytest.raises(anyio.EndOfStream):
                await again.stdout.receive()
            await again.stdin.send(b"go\n")
            assert (await again.wait()).code == 3
            await again.aclose()


async def _expect_closed(receive: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(anyio.ClosedResourceError):
        await receive()
