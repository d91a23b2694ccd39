"""Several processes on one state directory: what one sees of the others' work, and what stays when one is killed."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from tests.keepers import wait_ended
from tests.programs import program

from unisandbox import (
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    Sandbox,
    UnavailableError,
)
from unisandbox.api import StartedSandbox
from unisandbox.conformance.waiting import until
from unisandbox.engine.sharing import Sharing
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.keeper import Keeper
from unisandbox.oci import starting
from unisandbox.oci.processes import Container

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


async def test_what_fails_in_a_sandbox_whose_ttl_was_taken_away_is_told_without_waiting_for_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL, ttl=600) as sandbox:
        entry = sandbox._entry
        await entry.sharing.set_expiry(None)  # as whoever removes it does, while its record still says a time

        async def clients(_: Keeper) -> list[int]:
            raise AssertionError("it waits for what will not come")

        with monkeypatch.context() as patched:
            patched.setattr(Keeper, "clients", clients)
            with pytest.raises(UnavailableError, match="this"):
                async with entry.programs.beginning():
                    raise UnavailableError("this")


async def test_end_of_a_launched_program_is_known_without_waiting(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as owner:
        sandbox = await owner.create(resources=SMALL)
        exit = await (await sandbox.launch(["sh", "-c", "exit 3"])).wait()
        async with Engine.attach(tmp_path / "state") as engine:
            [status] = await engine.list()
            [main] = status.containers
            assert (main.state, main.exit and main.exit.code) == ("stopped", 3)
            assert main.exit is not None
            assert abs(main.exit.exited_at - exit.exited_at) < 2
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


async def test_what_an_owner_only_reports_is_freed_by_nobody_who_attaches(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as kept:
        await kept.create(name="other", resources=SMALL)
        with program(HALFWAY, str(tmp_path)) as maker:
            told = maker.heard()
            maker.kill()
    async with Engine.open(tmp_path, policy="keep", on_recover="report"):
        async with Engine.attach(tmp_path) as engine:
            assert not engine.recovery
            assert {status.name for status in await engine.list()} == {"other", "half"}
        with program(HALFWAY.replace('"half"', '"mine"'), str(tmp_path)) as maker:
            later = maker.heard()
            maker.kill()
        async with Engine.attach(tmp_path) as engine:
            assert [found.sandbox_id for found in engine.recovery.sandboxes] == [later["id"]]
    async with Engine.attach(tmp_path) as engine:
        assert not engine.recovery, "it is still only reported, with no owner there"
    async with Engine.open(tmp_path) as engine:
        actions = {found.sandbox_id: found.action for found in engine.recovery.sandboxes}
        assert actions.pop(told["id"]) == "removed"
        assert list(actions.values()) == ["adopted"]
        assert await engine._core.host.keeper.notes.read("engine/left/") == {}


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


async def test_what_has_expired_with_nobody_there_does_not_keep_the_keeper(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with Engine.open(state, policy="keep") as engine:
        keeper = engine._core.host.keeper.pid
        sandbox = await engine.create(resources=SMALL, ttl=5)
        process = await sandbox.launch(["sleep", "1000"])
    wait_ended(process.pid)
    async with Engine.attach(state) as engine:
        assert await engine.list() == []
    wait_ended(keeper)


async def test_a_container_whose_sandbox_is_gone_is_left_and_removed_without_an_error(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL, ttl=8) as sandbox:
        async with sandbox.containers.add(argv=["sleep", "1000"]) as container:
            await container.wait()
            with pytest.raises(NotFoundError):
                await sandbox.status()
        await container.remove()


@pytest.mark.parametrize("policy", ["keep", "stop"])
async def test_a_container_is_left_without_an_error_when_its_engine_is_closed(
    tmp_path: Path, policy: Literal["keep", "stop"]
) -> None:
    async with Engine.open(tmp_path, policy=policy) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        async with sandbox.containers.add(argv=["sleep", "1000"]) as container:
            await engine.close()
    if policy == "stop":
        await container.remove()
        return
    with pytest.raises(FailedPreconditionError, match="is closed, and left it as it was"):
        await container.remove()
    async with Engine.attach(tmp_path) as other:
        assert [each.state for each in await (await other.get("w")).containers.list()] == ["running"]
        await other.remove("w")


@pytest.mark.parametrize("policy", ["keep", "stop"])
async def test_engine_is_closed_also_when_whoever_uses_it_is_cancelled(
    tmp_path: Path, policy: Literal["keep", "stop"]
) -> None:
    state = tmp_path / "state"
    with anyio.CancelScope() as scope:
        async with Engine.open(state, policy=policy) as engine:
            keeper = engine._core.host.keeper.pid
            async with Engine.attach(state) as attached:
                scope.cancel()
                async for _ in attached.events():
                    pytest.fail("nothing has happened")
    assert scope.cancelled_caught
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


async def test_a_reader_with_a_number_that_was_never_given_here_is_told_of_a_gap(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL):
        events = engine.events(after=1_000_000)
        with anyio.fail_after(10):
            gap, first = await anext(events), await anext(events)
        assert (gap.kind, gap.seq, first.kind, first.seq) == ("gap", 0, "sandbox.created", 1)


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
    with pytest.raises(InvalidArgumentError, match="Not a directory"):
        await Engine.attach(file)
    with pytest.raises(InvalidArgumentError, match="Not a directory"):
        await Engine.attach(file / "below")
    with pytest.raises(FailedPreconditionError, match="not this user's alone"):
        await Engine.attach(open_to_all)
    with pytest.raises(UnavailableError) as missing:
        await Engine.attach(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UnavailableError) as unused:
        await Engine.attach(empty)
    assert missing.value.hint == unused.value.hint == "Open an engine on this directory first."
    assert sorted(tmp_path.iterdir()) == [empty, file, open_to_all]


async def test_what_is_no_directory_is_not_called_open_to_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o666)
    with pytest.raises(InvalidArgumentError, match="Not a directory"):
        await Engine.attach(file)


async def test_an_end_that_several_see_is_told_once(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as owner, Engine.attach(tmp_path) as other:
        sandbox = await owner.create(name="w", ttl=5)
        await (await other.get("w")).status()
        with anyio.fail_after(20):
            while await owner.list() or await other.list():
                await anyio.sleep(0.05)
        await owner.create(name="last")
        kinds = []
        async for event in owner.events():
            kinds += [event.kind] if event.sandbox_id == sandbox.id else []
            if event.kind == "sandbox.started" and event.sandbox_id != sandbox.id:
                break
        assert kinds.count("sandbox.removed") == 1


async def test_what_another_process_has_made_is_known_at_the_first_use(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as owner, Engine.attach(tmp_path) as first, Engine.attach(tmp_path) as second:
        await owner.create(name="w", resources=SMALL)
        await (await first.get("w")).files.write("/tmp/a", b"hello")
        assert await (await second.get("w")).files.read("/tmp/a") == b"hello"
        async with Engine.attach(tmp_path) as third:
            assert (await (await third.get("w")).metrics()).memory_bytes is not None


@pytest.mark.parametrize("looked", [True, False])
async def test_what_another_process_has_removed_is_not_found(tmp_path: Path, looked: bool) -> None:
    async with Engine.open(tmp_path) as owner, Engine.attach(tmp_path) as other:
        sandbox = await owner.create(name="w", resources=SMALL)
        seen = await other.get("w")
        if looked:
            await seen.status()
        await sandbox.remove()
        for call in (
            lambda: seen.files.write("/tmp/a", b"x"),
            lambda: seen.files.read("/tmp/a"),
            lambda: seen.files.exists("/tmp/a"),
            lambda: seen.files.list("/"),
            seen.metrics,
            seen.processes,
            lambda: seen.containers.get("main"),
            lambda: seen.run(["true"]),
        ):
            with pytest.raises(NotFoundError, match="'w' was removed"):
                await call()


async def test_no_program_is_launched_in_the_place_of_what_another_process_may_be_starting(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as owner:
        sandbox = await owner.create(name="w", resources=SMALL)
        async with Engine.attach(tmp_path) as other:
            assert (await (await other.get("w")).run(["true"])).exit_code == 0
            with pytest.raises(FailedPreconditionError, match="another process may be about to use it"):
                await sandbox.launch(["sleep", "60"])
        keeper = owner._core.host.keeper

        async def alone() -> bool:
            return await keeper.clients() == {keeper.hello.client}

        await until(alone, "the other one has left")
        launched = await sandbox.launch(["sh", "-c", "exit 3"])
        assert (await launched.wait()).code == 3
        await sandbox.remove()


async def test_a_stop_is_past_when_a_start_was_written_down_that_did_not_live_to_say_so_to_the_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path) as owner:
        sandbox = await owner.create(name="w", resources=SMALL)
        await sandbox.stop(grace=0)
        await sandbox._entry.sharing.note_stop()  # as on a full disk
        monkeypatch.setattr(Sharing, "forget_stop", lambda self: None)  # killed there
        await sandbox.start()
        monkeypatch.undo()
        async with Engine.attach(tmp_path) as other:
            assert (await (await other.get("w")).status()).state == "ready"


async def test_reading_events_asks_for_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(resources=SMALL)
        for _ in range(30):
            await sandbox.run(["true"])
        await sandbox.remove()
        keeper, asked = other._core.host.keeper, 0
        after = keeper.events.after

        async def counted(seq: int, **options: Any) -> Any:
            nonlocal asked
            asked += 1
            return await after(seq, **options)

        monkeypatch.setattr(keeper.events, "after", counted)
        for _ in range(2):
            seen = 0
            async for event in other.events():
                assert event.seq == (seen := seen + 1)
                if event.kind == "sandbox.removed":
                    break
            assert seen > 60
        assert asked < 10


async def test_a_handle_of_a_closed_engine_does_not_say_that_it_has_ended_what_lives_on(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as owner:
        sandbox = await owner.create(name="w", resources=SMALL)
        async with Engine.attach(tmp_path) as other:
            seen = await other.get("w")
            process = await seen.exec(["sleep", "1000"])
        for call in (seen.remove, seen.kill, seen.stop, lambda: seen.stop(grace=0)):
            with pytest.raises(FailedPreconditionError, match="is closed"):
                await call()
        os.kill(process.pid, 0)
    for call in (sandbox.remove, sandbox.kill, sandbox.stop):
        await call()  # it ended with its engine


# Makes a sandbox, and waits in the middle of that until it hears something.
SLOW_MAKER = """
from unisandbox.host import boundary

def hold(name, of):
    if name == "after file.rename" and "/sandboxes/" in of:
        boundary.watch(None)
        tell(at=name)
        os.read(int(sys.argv[2]), 1)

async def main():
    async with Engine.attach(sys.argv[1]) as engine:
        boundary.watch(hold)
        await engine.create(name="w", resources=Resources(memory="64M"))
        tell(made=True)
anyio.run(main)
"""


async def test_what_another_process_is_making_is_waited_for_when_it_is_used(tmp_path: Path) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        async with Engine.open(tmp_path) as engine:
            maker = stack.enter_context(program(SLOW_MAKER, str(tmp_path), str(reading), pass_fds=(reading,)))
            maker.heard()
            found: list[object] = []

            async def use(call: Callable[[Sandbox], Awaitable[object]]) -> None:
                found.append(await call(await engine.get("w")))

            async with anyio.create_task_group() as group:
                group.start_soon(use, lambda sandbox: sandbox.processes())
                group.start_soon(use, lambda sandbox: sandbox.files.exists("/etc"))
                await anyio.sleep(0.1)  # both have looked by now; if not, less is shown
                assert found == []
                os.write(writing, b"x")
            assert sorted(map(str, found)) == ["True", "[]"]
            assert maker.heard() == {"made": True}
            assert maker.finish()[0] == 0


@pytest.mark.parametrize("shared", [True, False])
async def test_what_another_task_is_making_is_waited_for_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    begun, go = anyio.Event(), anyio.Event()
    async with Engine.open(tmp_path if shared else None) as engine:
        sandboxer = await engine._core.sandboxer("runc")
        start = sandboxer.start

        async def slow(sandbox_id: str) -> StartedSandbox:
            begun.set()
            await go.wait()
            return await start(sandbox_id)

        found: list[object] = []

        async def make() -> None:
            await engine.create(name="w", isolation="runc", resources=SMALL)

        async def use(call: Callable[[Sandbox], Awaitable[object]]) -> None:
            found.append(await call(await engine.get("w")))

        monkeypatch.setattr(sandboxer, "start", slow)
        async with anyio.create_task_group() as group:
            group.start_soon(make)
            await begun.wait()
            group.start_soon(use, lambda sandbox: sandbox.processes())
            group.start_soon(use, lambda sandbox: sandbox.files.exists("/etc"))
            group.start_soon(use, lambda sandbox: sandbox.sh("exit 3", check=False))
            await anyio.sleep(0.1)  # all have looked by now; if not, less is shown
            assert found == []
            go.set()
        assert sorted(str(getattr(each, "exit_code", each)) for each in found) == ["3", "True", "[]"]


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("again", [True, False])
async def test_a_start_that_meets_an_end_by_another_process_says_so_or_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, made: bool
) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        same = await other.get("w")
        make = starting._cgroup_for

        async def overtaken(container: Container, name: str) -> Cgroup:
            monkeypatch.setattr(starting, "_cgroup_for", make)
            cgroup = await make(container, name) if made else None
            await same.stop(grace=0)
            if again:
                await same.start()
            return cgroup or await make(container, name)

        monkeypatch.setattr(starting, "_cgroup_for", overtaken)
        if again:
            assert (await sandbox.sh("exit 3")).exit_code == 3
        else:
            with pytest.raises(FailedPreconditionError, match="is stopped"):
                await sandbox.run(["true"])
