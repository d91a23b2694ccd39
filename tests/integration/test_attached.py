"""Several processes on one state directory: what one sees of the others' work, and what stays when one is killed."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from tests.keepers import wait_ended
from tests.programs import program

from unisandbox import Engine, FailedPreconditionError, NotFoundError, Resources, UnavailableError
from unisandbox.api import BackendError

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")

# Stops for ever in the middle of a creation: the sandbox is half made.
HALFWAY = """
import unisandbox.engine.entry as entry

async def main():
    async with Engine.attach(sys.argv[1]) as engine:
        def stop(self, phase, **changes):
            tell(id=self.sandbox_id)
            signal.pause()
        entry.Entry._write = stop
        await engine.create(name="half", resources=Resources(memory="64M"))
anyio.run(main)
"""


async def test_end_of_a_launched_program_is_known_without_waiting(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as owner:
        sandbox = await owner.create(resources=SMALL)
        exit = await (await sandbox.launch(["sh", "-c", "exit 3"])).wait()
        async with Engine.attach(tmp_path / "state") as engine:
            [status] = await engine.list()
            [main] = status.containers
            assert (main.state, main.exit and main.exit.code) == ("stopped", 3)
            assert main.exit is not None
            assert abs(main.exit.exited_at - exit.exited_at) < 0.1
        await sandbox.remove()


async def test_sandbox_that_another_process_makes_is_listed_and_freed_when_that_is_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with Engine.open(state, policy="keep") as owner:
        other = await owner.create(name="other", resources=SMALL)
        with program(HALFWAY, str(state)) as maker:
            told = maker.heard()
            async with Engine.attach(state) as engine:
                assert not engine.recovery
                listed = {status.name: status.state for status in await engine.list()}
                assert listed == {"other": "ready", "half": "created"}
            maker.kill()
        async with Engine.attach(state) as engine:
            assert [found.sandbox_id for found in engine.recovery.sandboxes] == [told["id"]]
            assert engine.recovery.sandboxes[0].action == "removed"
            assert "creation was cut" in engine.recovery.sandboxes[0].reason
            assert [status.name for status in await engine.list()] == ["other"]
        async with Engine.attach(state) as engine:
            assert not engine.recovery
        assert (await other.run(["true"])).exit_code == 0  # its handle is still good
        await other.remove()


async def test_keeper_ends_with_the_last_of_many_that_leave_at_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    engines = [await Engine.open(state, policy="keep")]
    engines += [await Engine.attach(state) for _ in range(7)]
    keeper = engines[0]._core.host.keeper.pid
    async with anyio.create_task_group() as group:
        for engine in engines:
            group.start_soon(engine.close)
    wait_ended(keeper)
    with pytest.raises(UnavailableError):
        await Engine.attach(state)


async def test_tail_of_the_logs_and_what_follows(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as engine:
        sandbox = await engine.create(resources=SMALL)
        container = await sandbox.launch(["sh", "-c", "seq 5; while [ ! -e /tmp/go ]; do sleep 0.01; done; printf 6"])
        seen = b""
        async for piece in container.follow():
            seen += piece
            if seen.endswith(b"5\n"):
                break
        assert await container.logs(tail=2) == b"4\n5\n"
        assert await container.logs(tail=0) == b""
        assert await container.logs(tail=9) == b"1\n2\n3\n4\n5\n"
        followed = container.follow(tail=2)
        assert await anext(followed) == b"4\n5\n"
        await sandbox.files.write("/tmp/go", b"")
        assert b"".join([piece async for piece in followed]) == b"6"
        assert await container.logs(tail=1) == b"6"
        await sandbox.remove()


async def test_output_that_is_not_kept_is_not_found(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as engine:
        sandbox = await engine.create(resources=SMALL)
        await sandbox.run(["true"])
        container = await sandbox.containers.get("main")
        with pytest.raises(NotFoundError, match="no output of container 'main'"):
            await container.logs()
        with pytest.raises(NotFoundError, match="no output of container 'main'"):
            await anext(container.follow())
        await sandbox.remove()


async def test_directory_that_cannot_be_attached_to_says_why(tmp_path: Path) -> None:
    file, open_to_all = tmp_path / "file", tmp_path / "open"
    file.touch()
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(BackendError, match="Not a directory"):
        await Engine.attach(file)
    with pytest.raises(BackendError, match="Not a directory"):
        await Engine.attach(file / "below")
    with pytest.raises(FailedPreconditionError, match="not this user's alone"):
        await Engine.attach(open_to_all)
    with pytest.raises(UnavailableError):
        await Engine.attach(tmp_path / "missing")
    assert sorted(tmp_path.iterdir()) == [file, open_to_all]
