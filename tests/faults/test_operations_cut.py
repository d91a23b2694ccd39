"""What is asked for under an operation id is done once: whoever dies in the middle, however many ask again at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.programs import program

from unisandbox import Engine, FailedPreconditionError, NotFoundError, Process, Resources, Sandbox
from unisandbox.api import ProcessSpec
from unisandbox.api.plain import plain
from unisandbox.conformance.waiting import until
from unisandbox.engine.operations import digest_of
from unisandbox.host.init import has_told
from unisandbox.host.pidfd import has_ended
from unisandbox.oci import restore

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")
COUNTED = ["sh", "-c", "echo started >> /tmp/starts; exit 7"]

# Attached, it kills itself at a point, or where an operation would be finished.
HOST = """
from unisandbox.engine.core import EngineCore
from unisandbox.engine.operations import OperationLog
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
async def main():
    engine = await Engine.attach(sys.argv[2])
    await DO(engine)
anyio.run(main, backend=sys.argv[1])
"""


def killed(do: str, backend: str, state: Path) -> None:
    with program(f"async def DO(engine):\n{do}\n{HOST}", backend, str(state)) as host:
        code, _, trouble = host.finish()
        assert code == -9, trouble


async def starts(sandbox: Sandbox) -> int:
    return (await sandbox.files.read("/tmp/starts")).count(b"started")


async def test_a_creation_that_was_cut_is_done_by_one_of_many_who_ask_again(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as first, Engine.attach(tmp_path) as second, Engine.attach(tmp_path) as third:
        killed("    EngineCore._create = die\n    await engine.create(operation_id='make')", anyio_backend, tmp_path)
        assert await first.list() == []
        made: list[str] = []

        async def make(engine: Engine) -> None:
            with contextlib.suppress(FailedPreconditionError):  # "in progress: ask again in a moment"
                made.append((await engine.create(operation_id="make")).id)

        async with anyio.create_task_group() as group:
            for engine in (first, second, third, first):
                group.start_soon(make, engine)
        assert len(set(made)) == 1
        assert [status.id for status in await first.list()] == made[:1]
        assert (await third.create(operation_id="make")).id == made[0]


async def test_a_creation_whose_end_was_not_noted_is_not_done_again(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as engine:
        killed("    OperationLog.finish = die\n    await engine.create(operation_id='make')", anyio_backend, tmp_path)
        [made] = await engine.list()
        sandbox = await engine.create(operation_id="make")
        assert sandbox.id == made.id
        await sandbox.remove()
        with pytest.raises(NotFoundError):
            await engine.create(operation_id="make")


@pytest.mark.parametrize("before", ["OperationLog.finish", "OciTaskService.delete", "HeldProcesses.forget"])
async def test_a_process_whose_end_was_not_noted_is_not_started_again(
    before: str, tmp_path: Path, anyio_backend: str
) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        killed(
            f"""
    from unisandbox.oci.task import OciTaskService
    from unisandbox.engine.held import HeldProcesses
    process = await (await engine.get("w")).exec({COUNTED!r}, operation_id="job")
    {before} = die
    await process.wait()
""",
            anyio_backend,
            tmp_path,
        )
        again = await sandbox.exec(COUNTED, operation_id="job")
        assert (await again.wait()).code == 7
        assert await starts(sandbox) == 1


def first_of(pid: int) -> int:
    """The first process of the pid namespace of this one."""
    namespace = os.readlink(f"/proc/{pid}/ns/pid")
    for other in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            inside = next(line for line in Path(f"/proc/{other}/status").read_text().splitlines() if "NSpid" in line)
            if os.readlink(f"/proc/{other}/ns/pid") == namespace and inside.split()[-1] == "1":
                return int(other)
    raise AssertionError(f"nobody is the first beside {pid}")


@pytest.mark.parametrize("how", ["remove", "run", "start"])
@pytest.mark.parametrize(("then", "code"), [("exit 7", 7), ("exec >&-; sleep 1000", 137)])
async def test_a_process_whose_container_somebody_else_has_dropped_is_not_started_again(
    then: str, code: int, how: str, tmp_path: Path, anyio_backend: str
) -> None:
    argv = ["sh", "-c", f"echo started >> /tmp/starts; {then}"]
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL, share_pid=how == "start")
        killed(
            f"""
    process = await (await engine.get("w")).exec({argv!r}, operation_id="job")
    async for _ in process.stdout:
        pass
    die()
""",
            anyio_backend,
            tmp_path,
        )
        main = await sandbox.containers.get("main")
        if how == "remove":
            await main.remove()
        else:
            created = sandbox._entry.task._containers["main"].created  # type: ignore[attr-defined]
            os.kill(first_of(created.pid), signal.SIGKILL)
            assert has_ended(created.pidfd, 20)
            await (sandbox.run(["true"]) if how == "run" else sandbox.start())
        again = await sandbox.exec(argv, operation_id="job")
        assert (await again.wait()).code == code
        assert await starts(sandbox) == 1


async def test_what_was_created_and_removed_by_another_is_not_created_again(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as engine:
        killed("    OperationLog.finish = die\n    await engine.create(operation_id='make')", anyio_backend, tmp_path)
        [made] = await engine.list()
        await engine.remove(made.id)
        with pytest.raises(NotFoundError):
            await engine.create(operation_id="make")
        assert await engine.list() == []


@pytest.mark.parametrize("code", [7, 127])
@pytest.mark.parametrize("seen", [False, True])
async def test_a_process_that_ends_as_it_is_looked_for_is_not_started_again(
    seen: bool, code: int, tmp_path: Path, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def just_before(life: socket.socket) -> bool:
        while not has_told(life):
            time.sleep(0.001)
        return seen

    counted = ["sh", "-c", f"echo started >> /tmp/starts; exit {code}"]

    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        killed(
            f"""
    from unisandbox.oci.ledger import Ledger
    note = Ledger.process
    def until_it_has_begun(self, facts, *held):
        return die() if facts.started else note(self, facts, *held)
    Ledger.process = until_it_has_begun
    await (await engine.get("w")).exec({counted!r}, operation_id="job")
""",
            anyio_backend,
            tmp_path,
        )
        monkeypatch.setattr(restore, "has_told", just_before)
        again = await sandbox.exec(counted, operation_id="job")
        assert (await again.wait()).code == code
        assert await starts(sandbox) == 1


async def test_a_process_that_was_never_let_go_is_started(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        killed(
            f"""
    from unisandbox.oci.starting import Starter
    Starter._before_exec = die
    await (await engine.get("w")).exec({COUNTED!r}, operation_id="job")
""",
            anyio_backend,
            tmp_path,
        )
        again = await sandbox.exec(COUNTED, operation_id="job")
        assert (await again.wait()).code == 7
        assert await starts(sandbox) == 1


async def test_an_exec_that_was_cut_is_done_by_one_of_many_who_ask_again(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as first, Engine.attach(tmp_path) as second, Engine.attach(tmp_path) as third:
        sandbox = await first.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        cut = f"""
    from unisandbox.sandbox import process
    process.start = die
    await (await engine.get("w")).exec({COUNTED!r}, operation_id="job")
"""
        killed(cut, anyio_backend, tmp_path)
        codes: list[int] = []

        async def ask(engine: Engine) -> None:
            with contextlib.suppress(FailedPreconditionError):  # "in progress", or another one has its streams
                process = await (await engine.get("w")).exec(COUNTED, operation_id="job")
                codes.append((await process.wait()).code)

        async with anyio.create_task_group() as group:
            for engine in (first, second, third, first):
                group.start_soon(ask, engine)
        assert set(codes) == {7}
        assert await starts(sandbox) == 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("used", [False, True])
async def test_an_exec_that_is_asked_for_by_several_at_once_is_started_once_and_harmed_by_none(
    shared: bool, used: bool, tmp_path: Path
) -> None:
    async with Engine.open(tmp_path if shared else None) as engine, contextlib.AsyncExitStack() as stack:
        sandbox = await engine.create(name="w", resources=SMALL)
        sandboxes = [sandbox, sandbox]
        if shared:
            other = await stack.enter_async_context(Engine.attach(tmp_path))
            sandboxes.append(await other.get("w"))
        if used:
            await sandbox.run(["true"])
        had: list[Process] = []

        async def ask(sandbox: Sandbox) -> None:
            with contextlib.suppress(FailedPreconditionError):
                process = await sandbox.exec(
                    ["sh", "-c", "echo started >> /tmp/starts; cat; exit 7"], stdin="pipe", operation_id="job"
                )
                had.append(process)

        async with anyio.create_task_group() as group:
            for each in sandboxes:
                group.start_soon(ask, each)
        assert had
        assert len({process.pid for process in had}) == 1
        await had[0].stdin.aclose()
        with anyio.fail_after(20):
            assert {(await process.wait()).code for process in had} == {7}
        assert await starts(sandbox) == 1
        assert (
            await (
                await sandbox.exec(
                    ["sh", "-c", "echo started >> /tmp/starts; cat; exit 7"], stdin="pipe", operation_id="job"
                )
            ).wait()
        ).code == 7


async def test_a_cancelled_wait_loses_nothing(tmp_path: Path) -> None:
    many = ["sh", "-c", "for i in $(seq 60); do sleep 100 & done; echo r; wait"]
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        for number in range(5):
            process = await sandbox.exec(many, operation_id=f"job{number}")
            await process.stdout.receive()
            async with anyio.create_task_group() as group:
                group.start_soon(process.kill)
                while process.exit is None:
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            await process.wait()
            await process.aclose()
            known = sandbox._entry.operations.find(f"job{number}")
            assert known is not None
            assert known.state == "finished"
        assert await sandbox._entry.held.read() == []
        ends = []
        with anyio.move_on_after(20):
            async for event in engine.events():
                ends += [event.exec_id] if event.kind == "process.exited" else []
                if len(ends) == 5:
                    break
        assert len(set(ends)) == len(ends) == 5


async def test_an_orphan_is_taken_by_one_of_many_who_look(tmp_path: Path, anyio_backend: str) -> None:
    async with Engine.open(tmp_path) as first, Engine.attach(tmp_path) as second, Engine.attach(tmp_path) as third:
        await (await first.create(name="w", resources=SMALL)).run(["true"])
        sandboxes = [await engine.get("w") for engine in (first, second, third)]
        for _ in range(5):
            killed("    await (await engine.get('w')).exec(['cat'], stdin='pipe'); die()", anyio_backend, tmp_path)
            found: list[Process] = []

            async def look(sandbox: Sandbox, found: list[Process] = found) -> None:
                found += await sandbox.processes()

            with anyio.fail_after(20):
                while not found:  # the keeper learns of the death a moment later
                    async with anyio.create_task_group() as group:
                        for sandbox in sandboxes:
                            group.start_soon(look, sandbox)
            assert len(found) == 1
            await found[0].stdin.aclose()
            assert (await found[0].wait()).code == 0
            await found[0].aclose()


async def test_what_a_former_version_has_noted_is_done_once(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL, operation_id="make")
        process = await sandbox.exec(COUNTED, operation_id="job")
        await process.wait()
        log = engine._core.operations
        create, start = plain(sandbox._entry.spec), plain(ProcessSpec(COUNTED))
        formers = {"make": [create], "job": [start, {**start, "stdin": "null"}]}
        for operation_id, requests in formers.items():
            for request in requests:
                noted = log.find(operation_id)
                assert noted is not None
                log.forget(operation_id)
                assert log.begin(operation_id, noted.kind, noted.target, digest_of(request)) is None
                log.finish(operation_id, noted.result)
                assert (await engine.create(name="w", resources=SMALL, operation_id="make")).id == sandbox.id
                assert (await (await sandbox.exec(COUNTED, operation_id="job")).wait()).code == 7
        assert await starts(sandbox) == 1


@pytest.mark.parametrize("ttl", [None, 1])
async def test_a_sandbox_whose_operation_id_was_used_again_goes_and_leaves_the_later_one_alone(
    ttl: float | None, tmp_path: Path
) -> None:
    async with Engine.open(tmp_path) as engine:
        first = await engine.create(operation_id="make", ttl=ttl, resources=SMALL)
        engine._core.operations.forget("make")  # as after many others
        second = await engine.create(operation_id="make", resources=SMALL)
        if ttl is None:
            await first.remove()

        async def alone() -> bool:
            return [status.id for status in await engine.list()] == [second.id]

        await until(alone, "the first has gone")
        await engine.create(name="third", resources=SMALL)
        assert (await engine.create(operation_id="make", resources=SMALL)).id == second.id


async def test_an_init_that_does_not_answer_holds_up_no_removal_of_what_was_started_under_an_operation_id(
    tmp_path: Path,
) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.exec(["sleep", "1000"], operation_id="job")
        main = await sandbox.containers.get("main")
        os.kill(sandbox._entry.task._containers["main"].created.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        with anyio.fail_after(9):  # a removal that is cut short takes ten
            await main.remove()
        assert (await (await sandbox.exec(["sleep", "1000"], operation_id="job")).wait()).signal == signal.SIGKILL
        assert (await sandbox.run(["echo", "hi"])).text == "hi\n"
