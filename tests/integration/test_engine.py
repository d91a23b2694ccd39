"""Engines: their sandboxes, names and directories, and two of them beside each other."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import json
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
import pytest
from tests.programs import program

from unisandbox import (
    AlreadyExistsError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Process,
    Resources,
    Sandbox,
    UnsupportedError,
)
from unisandbox.api import Sandboxer
from unisandbox.backends.runc import RuncBackend
from unisandbox.engine.runtime_directory import RUNTIME_DIRECTORY
from unisandbox.host.services import Host

pytestmark = pytest.mark.root
SMALL = Resources(memory="64M")


def state(root: Path) -> list[str]:
    """What an engine that is closed has left in its directory: what it needs to be known again, and nothing else."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.anyio
async def test_a_sandbox_is_found_by_id_and_by_name_until_it_is_removed(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine:
        first = await engine.create(name="one", resources=SMALL)
        second = await engine.create(resources=SMALL)
        assert [status.id for status in await engine.list()] == [first.id, second.id]
        assert (await engine.get("one")).id == first.id
        assert (await engine.get(second.id)).id == second.id
        with pytest.raises(AlreadyExistsError, match="'one'"):
            await engine.create(name="one", resources=SMALL)
        with pytest.raises(AlreadyExistsError):
            await engine.create(name=second.id, resources=SMALL)
        await first.remove()
        with pytest.raises(NotFoundError):
            await engine.get("one")
        async with engine.create(name="one", resources=SMALL) as again:
            assert again.id != first.id
    with pytest.raises(FailedPreconditionError):
        await engine.create(resources=SMALL)
    with pytest.raises(FailedPreconditionError, match="closed"):
        await engine.list()


@pytest.mark.anyio
@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_the_loop_of_another_thread_is_refused_and_harms_nothing(other: str, tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine:
        sandbox = await engine.create(name="one", resources=SMALL)
        process = await sandbox.exec(["cat"], stdin="pipe")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: sandbox.run(["true"]),
            lambda: sandbox.exec(["true"]),
            lambda: sandbox.files.read("/etc/passwd"),
            sandbox.status,
            sandbox.metrics,
            sandbox.processes,
            sandbox.stop,
            sandbox.kill,
            sandbox.remove,
            process.wait,
            process.kill,
            lambda: process.signal(15),
            engine.list,
            lambda: engine.get("one"),
            lambda: engine.create(resources=SMALL),
            lambda: engine.remove("one"),
            engine.close,
        ]

        async def all_refused() -> None:
            for call in calls:
                with pytest.raises(FailedPreconditionError, match="another thread"):
                    await call()

        await anyio.to_thread.run_sync(lambda: anyio.run(all_refused, backend=other))
        assert [status.name for status in await engine.list()] == ["one"]
        await process.stdin.aclose()
        assert (await process.wait()).code == 0


@pytest.mark.parametrize(("kind", "other"), [("asyncio", "trio"), ("trio", "asyncio")])
def test_an_engine_goes_on_in_another_loop_when_its_own_has_ended(kind: str, other: str, tmp_path: Path) -> None:
    async def begin() -> tuple[Engine, Sandbox, Process]:
        engine = await Engine.open(tmp_path / "state")
        sandbox = await engine.create(resources=SMALL)
        return engine, sandbox, await sandbox.exec(["cat"], stdin="pipe")

    engine, sandbox, process = anyio.run(begin, backend=kind)

    async def be_refused() -> None:
        for call in (lambda: sandbox.run(["true"]), engine.list, engine.close):
            with pytest.raises(FailedPreconditionError, match=f"opened under {kind}, and this is {other}"):
                await call()

    async def go_on() -> None:
        assert (await sandbox.run(["echo", "on"])).text == "on\n"
        await process.stdin.send(b"word")
        assert await process.stdout.receive() == b"word"
        await process.kill()
        await engine.close()

    anyio.run(be_refused, backend=other)
    anyio.run(go_on, backend=kind)


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["stop", "keep"])
async def test_a_backend_that_is_opened_while_its_engine_closes_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Literal["stop", "keep"]
) -> None:
    class Slow(RuncBackend):
        async def open(self, host: Host) -> Sandboxer:
            begun.set()
            await closed.wait()
            made = await super().open(host)
            monkeypatch.setattr(made, "abandon", lambda: abandoned.append(made))
            return made

    async def create() -> None:
        with pytest.raises(FailedPreconditionError, match="the engine is closed"):
            await engine.create(isolation="runc", resources=SMALL)

    begun, closed = anyio.Event(), anyio.Event()
    abandoned: list[Sandboxer] = []
    async with anyio.create_task_group() as group:
        async with Engine.open(tmp_path / "state", policy=policy, backends={"runc": Slow()}) as engine:
            group.start_soon(create)
            await begun.wait()
        closed.set()
    assert len(abandoned) == 1


@pytest.mark.anyio
async def test_a_runtime_directory_that_was_made_for_this_user_alone_is_opened_so_far_that_sandboxes_start() -> None:
    """As by a service manager with RuntimeDirectoryMode=0700."""
    runtime = Path(RUNTIME_DIRECTORY)
    runtime.mkdir(0o711, exist_ok=True)
    runtime.chmod(0o700)
    async with Engine.open() as engine, engine.create(resources=SMALL) as sandbox:
        assert (await sandbox.run(["true"])).exit_code == 0
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o711


@pytest.mark.anyio
async def test_a_sandbox_can_be_made_after_another_process_has_removed_the_engines_empty_cgroup() -> None:
    async with Engine.open() as engine:
        async with engine.create(resources=SMALL):
            host = engine._core.host
        assert host.cgroups.root().remove(timeout=20)
        async with engine.create(resources=SMALL) as sandbox:
            assert (await sandbox.run(["/bin/true"])).exit_code == 0


@pytest.mark.anyio
async def test_two_creates_of_one_name_at_once_make_one_sandbox() -> None:
    made: list[str] = []
    refused: list[str] = []
    async with Engine.open() as engine:

        async def create() -> None:
            try:
                made.append((await engine.create(name="same", resources=SMALL)).id)
            except AlreadyExistsError as error:
                refused.append(error.message)

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(create)
        assert (len(made), len(refused)) == (1, 4)
        assert [status.id for status in await engine.list()] == made


@pytest.mark.anyio
async def test_what_is_no_name_names_no_sandbox(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine, engine.create(resources=SMALL) as nameless:
        async with Engine.attach(tmp_path / "state") as attached:
            for one in (engine, attached):
                refs: tuple[Any, ...] = (nameless.name, 5, b"w")
                for ref in refs:
                    with pytest.raises(InvalidArgumentError, match="id or name"):
                        await one.get(ref)
                    for operation in (None, "op"):
                        with pytest.raises(InvalidArgumentError, match="id or name"):
                            await one.remove(ref, operation_id=operation)
                with pytest.raises(NotFoundError):
                    await one.get("")
        assert [status.id for status in await engine.list()] == [nameless.id]


@pytest.mark.anyio
@pytest.mark.parametrize("directory", ["", b"", "a\0b", 5], ids=repr)
async def test_what_is_no_directory_is_refused(directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opening in (Engine.open, Engine.attach):
        with pytest.raises(InvalidArgumentError, match="directory"):
            await opening(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_an_engine_keeps_its_id_and_directory_over_reopening(tmp_path: Path) -> None:
    place = tmp_path / "state"
    async with Engine.open(place) as first, first.create(name="w", resources=SMALL) as sandbox:
        assert (await sandbox.run(["true"])).exit_code == 0
    left = state(place)
    async with Engine.open(place) as second, second.create(name="w", resources=SMALL):
        assert second.id == first.id
    assert state(place) == left
    assert not [name for name in left if name.endswith((".json", ".tmp", ".img"))], left


@pytest.mark.anyio
async def test_a_directory_has_one_engine_and_the_error_names_its_process(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        with pytest.raises(FailedPreconditionError, match=rf"in use by process {os.getpid()}\b"):
            await Engine.open(tmp_path)
        code = """
async def main():
    try:
        await Engine.open(sys.argv[1])
    except SandboxError as error:
        tell(kind=type(error).__name__, text=str(error))
anyio.run(main)
"""
        with program(code, str(tmp_path)) as other:
            told = other.heard()
            assert other.finish()[0] == 0
        assert told["kind"] == "FailedPreconditionError"
        assert f"process {os.getpid()} " in told["text"]
        assert (await sandbox.run(["true"])).exit_code == 0


@pytest.mark.anyio
async def test_a_directory_can_be_opened_as_soon_as_its_process_was_killed(tmp_path: Path) -> None:
    code = """
async def main():
    engine = await Engine.open(sys.argv[1])
    for _ in range(5):
        await (await engine.create(resources=Resources(memory="64M"))).exec(["sleep", "1000"])
    tell(ready=True)
    await anyio.sleep_forever()
anyio.run(main)
"""
    with program(code, str(tmp_path)) as host:
        host.heard()
        host.kill()
        async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
            assert (await sandbox.run(["echo", "mine"])).text == "mine\n"
            assert len(await engine.list()) == 1


@pytest.mark.anyio
async def test_engines_may_open_and_close_at_the_same_time(count: Callable[[int], int]) -> None:
    """They share one directory above theirs, which the last of them removes."""
    code = """
async def main():
    for _ in range(int(sys.argv[1])):
        async with Engine.open():
            pass
anyio.run(main)
"""
    with program(code, str(count(200))) as one, program(code, str(count(200))) as two:
        limit = max(60, count(600))  # seconds; the machine may have other things to do
        assert (one.finish(limit), two.finish(limit)) == ((0, "", ""), (0, "", ""))


@pytest.mark.anyio
async def test_two_engines_do_not_touch_each_others_things(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "b") as second:
        keep = await second.create(name="same", resources=SMALL)
        await keep.files.write("/tmp/mine", b"second")
        async with Engine.open(tmp_path / "a") as first:
            async with first.create(name="same", resources=SMALL) as sandbox:
                await sandbox.files.write("/tmp/mine", b"first")
                ours, theirs = await sandbox.status(), await keep.status()
                assert not set(ours.namespaces.values()) & set(theirs.namespaces.values())
                assert (await keep.run(["cat", "/tmp/mine"])).stdout == b"second"
                with pytest.raises(NotFoundError):
                    await first.get(keep.id)
            unclosed = await first.create(resources=SMALL)
            await unclosed.run(["true"])
        assert (await keep.sh("cat /tmp/mine; echo; exit 3")).exit_code == 3
        assert [status.id for status in await second.list()] == [keep.id]


@pytest.mark.anyio
async def test_the_record_of_a_sandbox_says_what_was_asked_before_it_is_there(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL, labels={"a": "b"})
        [path] = (tmp_path / "sandboxes").glob("*.json")
        assert path.stat().st_mode & 0o777 == 0o600
        record = json.loads(path.read_text())["record"]
        assert (record["sandbox_id"], record["name"], record["phase"]) == (sandbox.id, "w", "ready")
        assert record["owner"][0] == os.getpid()
        assert record["spec"]["resources"]["memory"] == 64 << 20, "what a recovery needs is in the record"
        assert record["spec"]["labels"] == {"a": "b"}
        await sandbox.stop()
        assert json.loads(path.read_text())["record"]["phase"] == "stopped"
        await sandbox.remove()
        assert not path.exists()


@pytest.mark.anyio
async def test_explain_says_why_and_creates_nothing(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        choice = await engine.explain()
        assert (choice.backend, "rank" in choice.because) == ("runc", True)
        assert "by name" in (await engine.explain(isolation="runc")).because
        with pytest.raises(InvalidArgumentError, match="'nosuch' is not known"):
            await engine.explain(isolation="nosuch")
        assert await engine.list() == []


@pytest.mark.anyio
async def test_events_are_numbered_and_tell_the_life_of_a_sandbox() -> None:
    async with Engine.open() as engine:
        async with engine.create(resources=SMALL) as sandbox:
            await sandbox.run(["true"])
        kinds: list[str] = []
        numbers: list[int] = []
        async for event in engine.events():
            kinds.append(event.kind)
            numbers.append(event.seq)
            if event.kind == "sandbox.removed":
                break  # and nothing else is needed to end the reading
    assert numbers == list(range(1, len(numbers) + 1))
    wanted = ["sandbox.created", "sandbox.started", "container.started", "process.started", "process.exited"]
    assert [kind for kind in kinds if kind in wanted] == wanted


@pytest.mark.anyio
async def test_sixty_mounts_of_the_host(tmp_path: Path) -> None:
    """As many as there may be, in the sandbox and again in a container with a root of its own."""
    mounts = [Mount.bind(tmp_path, f"/data{number}") for number in range(60)]
    command = ["sh", "-c", "ls -d /data* | wc -l"]
    async with Engine.open() as engine, engine.create(resources=SMALL, mounts=mounts) as sandbox:
        assert (await sandbox.run(command)).text == "60\n"
        container = await sandbox.containers.add(rootfs="host", argv=command)
        assert (await container.wait()).code == 0
        assert await container.logs() == b"60\n"
        more, refused = Mount.bind(tmp_path, "/more"), r"more than 60 mounts of the host.*\. Mount a directory"
        with pytest.raises(UnsupportedError, match=refused):
            await sandbox.containers.add(rootfs="host", argv=command, mounts=[more])
        with pytest.raises(UnsupportedError, match=refused):
            await engine.create(mounts=[*mounts, more])
