"""Lives: names, ids, states, and endings that may be repeated, may race and may meet the dead."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Process,
    Sandbox,
    SandboxError,
)
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.waiting import until

pytestmark: pytest.MarkDecorator = pytest.mark.anyio
of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")


async def test_ids_are_generated_of_one_length_and_never_reused(create: Create, count: Callable[[int], int]) -> None:
    ids = []
    for _ in range(count(100)):
        async with create(name="again") as sandbox:
            ids.append(sandbox.id)

    assert len(set(ids)) == len(ids)
    assert len({len(identity) for identity in ids}) == 1
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", identity) for identity in ids)


async def test_a_sandbox_is_found_by_name_and_by_id(engine: Engine, create: Create) -> None:
    async with create(name="web", labels={"who": "me"}) as sandbox:
        assert (await engine.get("web")).id == sandbox.id
        assert (await engine.get(sandbox.id)).name == "web"
        status = await sandbox.status()
        assert (status.id, status.name, status.state, status.labels) == (sandbox.id, "web", "ready", {"who": "me"})
        assert [other.id for other in await engine.list()] == [sandbox.id]

    with pytest.raises(NotFoundError):
        await engine.get("web")
    assert await engine.list() == []


async def test_a_name_is_taken_while_its_sandbox_lives(create: Create, programs: Programs) -> None:
    async with create(name="web"):
        with pytest.raises(AlreadyExistsError):
            await create(name="web")
    async with create(name="web") as second:
        assert (await second.run(programs.nothing())).exit_code == 0


async def test_of_two_that_race_for_a_name_one_gets_it(engine: Engine, create: Create) -> None:
    outcomes: list[str] = []

    async def make() -> None:
        try:
            await create(name="one")
            outcomes.append("made")
        except AlreadyExistsError:
            outcomes.append("refused")

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(make)

    assert sorted(outcomes) == ["made", "refused", "refused", "refused"]
    assert len(await engine.list()) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "a b", "a\n", "a" * 77, "ä", "a\0"])
async def test_a_name_that_could_be_a_path_is_refused(create: Create, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        await create(name=name)


async def test_stop_keeps_the_files_and_start_goes_on_with_them(sandbox: Sandbox, programs: Programs) -> None:
    await sandbox.run(programs.stores("/tmp/kept", "kept"), check=True)
    process = await sandbox.exec(programs.sleeps(60))

    await sandbox.stop(grace=0)

    assert (await sandbox.status()).state == "stopped"
    assert await sandbox.files.read("/tmp/kept") == b"kept\n"
    with pytest.raises(FailedPreconditionError):
        await sandbox.run(programs.nothing())
    await sandbox.start()
    assert (await sandbox.status()).state == "ready"
    assert (await sandbox.run(programs.shows("/tmp/kept"))).stdout == b"kept\n"
    assert (await process.wait()).signal is not None
    await process.aclose()


@of_processes
async def test_stop_ends_every_process_and_start_has_none_of_them(sandbox: Sandbox) -> None:
    await sandbox.sh("echo kept > /tmp/kept; sleep 60 &", check=True)
    process = await sandbox.exec(["sleep", "60"])

    await sandbox.stop(grace=0)

    assert (await sandbox.status()).state == "stopped"
    assert not await anyio.Path(f"/proc/{process.pid}").exists()
    assert await sandbox.files.read("/tmp/kept") == b"kept\n"
    with pytest.raises(FailedPreconditionError):
        await sandbox.run(["true"])
    await sandbox.start()
    assert (await sandbox.status()).state == "ready"
    assert (await sandbox.run(["cat", "/tmp/kept"])).stdout == b"kept\n"
    assert (await sandbox.sh("ls -d /proc/[0-9]* | wc -l")).text.strip() in {"3", "4"}
    await process.aclose()


@of_processes
async def test_stop_asks_first_and_is_patient(sandbox: Sandbox) -> None:
    script = "trap 'echo asked > /tmp/asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = await sandbox.exec(["sh", "-c", script])
    assert await process.stdout.receive() == b"ready\n"
    begun = time.monotonic()

    await sandbox.stop(grace=20)

    assert time.monotonic() - begun < 15
    assert await sandbox.files.read("/tmp/asked") == b"asked\n"
    await process.aclose()


@of_processes
@pytest.mark.needs("pause")
async def test_stop_lets_a_paused_sandbox_go_on_so_that_it_can_end(sandbox: Sandbox) -> None:
    script = "trap 'echo asked > /tmp/asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = await sandbox.exec(["sh", "-c", script])
    assert await process.stdout.receive() == b"ready\n"
    await sandbox.pause()

    with anyio.fail_after(15):
        await sandbox.stop(grace=20)

    assert await sandbox.files.read("/tmp/asked") == b"asked\n"
    assert (await process.wait()).code == 3
    await process.aclose()


@of_processes
async def test_stop_does_not_wait_longer_than_it_was_told(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
    assert await process.stdout.receive() == b"ready\n"
    begun = time.monotonic()

    await sandbox.stop(grace=0.3)

    assert 0.2 < time.monotonic() - begun < 10
    await process.aclose()


async def test_stop_while_somebody_waits_tells_him_the_end(sandbox: Sandbox, programs: Programs) -> None:
    ends = []
    process = await sandbox.exec(programs.sleeps(60))

    async def wait() -> None:
        ends.append(await process.wait())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await sandbox.stop(grace=10)

    assert [(end.signal, end.reason) for end in ends] == [(signal.SIGTERM, "signaled")]
    await process.aclose()


@pytest.mark.parametrize("used", [False, True])
async def test_endings_may_be_repeated_in_any_order(create: Create, programs: Programs, used: bool) -> None:
    sandbox = await create()
    if used:
        await sandbox.run(programs.nothing())
    for end in (sandbox.stop, sandbox.kill, sandbox.stop, sandbox.kill, sandbox.remove, sandbox.remove):
        await end()
    await sandbox.stop()
    await sandbox.kill()
    with pytest.raises(NotFoundError):
        await sandbox.status()
    with pytest.raises(NotFoundError):
        await sandbox.run(programs.nothing())
    with pytest.raises(NotFoundError):
        await sandbox.start()
    with pytest.raises(SandboxError):
        await sandbox.files.read("/etc/passwd")


async def test_endings_may_race(create: Create, programs: Programs, count: Callable[[int], int]) -> None:
    for _ in range(count(20)):
        sandbox = await create()
        process = await sandbox.exec(programs.stubborn())
        async with anyio.create_task_group() as group:
            for end in (sandbox.kill, sandbox.remove, sandbox.stop, sandbox.remove, process.aclose, process.aclose):
                group.start_soon(end)
        with pytest.raises(NotFoundError):
            await sandbox.status()


@of_processes
async def test_a_stop_does_not_mind_who_else_waits_for_a_process(create: Create) -> None:
    """What has ended is forgotten by whoever waited for it, while the stop still waits for another one."""
    async with create() as sandbox:
        slow = await sandbox.exec(
            ["sh", "-c", "trap 'sleep 0.3; exit 3' TERM; echo ready; while :; do sleep 0.05; done"]
        )
        quick = [await sandbox.exec(["sleep", "60"]) for _ in range(3)]
        assert await slow.stdout.receive() == b"ready\n"
        async with anyio.create_task_group() as group:
            for process in quick:
                group.start_soon(process.wait)
            group.start_soon(sandbox.stop, 20)
        assert [process.exit and process.exit.signal for process in quick] == [signal.SIGTERM] * 3
        assert (await slow.wait()).code == 3
        assert (await sandbox.status()).state == "stopped"


async def test_a_removal_ends_whoever_waits(create: Create, programs: Programs) -> None:
    sandbox = await create()
    process = await sandbox.exec(programs.sleeps(60))
    outcomes: list[str] = []

    async def watch(what: Callable[[], Awaitable[object]]) -> None:
        try:
            outcomes.append(repr(await what()))
        except (SandboxError, anyio.ClosedResourceError, anyio.EndOfStream) as error:
            outcomes.append(type(error).__name__)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(watch, process.wait)
            group.start_soon(watch, process.stdout.receive)
            group.start_soon(watch, lambda: sandbox.run(programs.sleeps(60)))
            await anyio.wait_all_tasks_blocked()
            await sandbox.remove()

    assert len(outcomes) == 3


async def test_a_removal_at_any_moment_of_a_start_ends(
    create: Create, programs: Programs, count: Callable[[int], int]
) -> None:
    for number in range(count(100)):
        sandbox = await create()
        process = await sandbox.exec(programs.sleeps(60))

        async def read(process: Process = process) -> None:
            with contextlib.suppress(SandboxError, anyio.ClosedResourceError, anyio.EndOfStream):
                await process.stdout.receive()

        async def run(sandbox: Sandbox = sandbox) -> None:
            with contextlib.suppress(SandboxError):
                await sandbox.run(programs.sleeps(60))

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                group.start_soon(run)
                await anyio.sleep(number % 10 / 1000)  # from before the start to after it
                await sandbox.remove()


async def test_iterating_output_ends_when_the_sandbox_is_removed(create: Create, programs: Programs) -> None:
    sandbox = await create()
    process = await sandbox.exec(programs.sleeps(60))

    async def read() -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            async for _ in process:
                pass

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await sandbox.remove()


@of_processes
async def test_what_ran_in_a_sandbox_whose_processes_were_all_killed_can_be_run_again(sandbox: Sandbox) -> None:
    await sandbox.sh("echo kept > /tmp/kept")
    process = await sandbox.exec(["sleep", "60"])
    # The worst that can come from outside: also the container's first process is gone, where there is one.
    os.kill(_first_beside(process.pid), signal.SIGKILL)

    end = await process.wait()
    assert end.reason in {"signaled", "lost"}
    assert (await sandbox.run(["cat", "/tmp/kept"])).stdout == b"kept\n"
    await process.aclose()


def _first_beside(pid: int) -> int:
    """The first process of the pid namespace that `pid` is in; `pid` itself when it has none of its own."""
    inside = os.stat(f"/proc/{pid}/ns/pid").st_ino
    if inside == os.stat("/proc/self/ns/pid").st_ino:
        return pid
    for other in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError, PermissionError
        ):  # ended meanwhile, or no business of ours
            status = Path(f"/proc/{other}/status").read_text(errors="replace")
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if numbers[-1] == "1" and os.stat(f"/proc/{other}/ns/pid").st_ino == inside:
                return int(other)
    raise AssertionError(f"the pid namespace of process {pid} has no first process")


async def test_leaving_the_context_removes_also_after_an_error(
    engine: Engine, create: Create, programs: Programs
) -> None:
    async def fail() -> None:
        async with create() as sandbox:
            await sandbox.exec(programs.sleeps(60))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await engine.list() == []


async def test_closing_the_engine_removes_everything(create: Create, engine: Engine, programs: Programs) -> None:
    sandboxes = [await create() for _ in range(3)]
    for sandbox in sandboxes:
        await sandbox.exec(programs.sleeps(60))
    await engine.close()
    await engine.close()

    with pytest.raises(FailedPreconditionError):
        await create()
    with pytest.raises(FailedPreconditionError):
        await sandboxes[0].run(programs.nothing())


async def test_closing_the_engine_from_two_tasks_is_one_end(create: Create, engine: Engine, programs: Programs) -> None:
    await (await create()).exec(programs.sleeps(60))
    async with anyio.create_task_group() as group:
        group.start_soon(engine.close)
        group.start_soon(engine.close)


@of_processes
async def test_status_never_waits_for_a_stop(sandbox: Sandbox) -> None:
    process = await sandbox.exec(["sh", "-c", "trap '' TERM; echo ready; sleep 60; sleep 60"])
    assert await process.stdout.receive() == b"ready\n"
    async with anyio.create_task_group() as group:
        group.start_soon(sandbox.stop, 50)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(20):
            await sandbox.status()
        await sandbox.kill()
    await process.aclose()


async def test_events_tell_the_life_in_order(engine: Engine, create: Create, programs: Programs) -> None:
    async with create() as sandbox:
        await sandbox.run(programs.exits(4))
    await engine.close()

    events = [event async for event in engine.events()]

    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert all(event.sandbox_id == sandbox.id for event in events)
    kinds = [event.kind for event in events]
    assert kinds[:2] == ["sandbox.created", "sandbox.started"]
    assert kinds[-1] == "sandbox.removed"
    ended = next(event for event in events if event.kind == "process.exited")
    assert ended.exit is not None
    assert ended.exit.code == 4


async def test_a_process_outlives_the_task_that_started_it(sandbox: Sandbox, programs: Programs) -> None:
    found = []

    async def start() -> None:
        found.append(await sandbox.exec(programs.asks(9), stdin="pipe"))

    async with anyio.create_task_group() as group:
        group.start_soon(start)
    await found[0].stdin.send(b"\n")

    assert (await found[0].wait()).code == 9
    await found[0].aclose()


async def test_many_processes_at_once_each_have_their_own_end(sandbox: Sandbox, programs: Programs) -> None:
    ends: dict[int, int] = {}

    async def one(number: int) -> None:
        ends[number] = (await sandbox.run(programs.exits(number))).exit_code

    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(one, number)

    assert ends == {number: number for number in range(40)}


@of_processes
async def test_a_closed_process_leaves_nothing_running(sandbox: Sandbox) -> None:
    async with sandbox.exec(["sh", "-c", "setsid sleep 1061 & echo ready; sleep 1062"]) as process:
        assert await process.stdout.receive() == b"ready\n"

    async def gone() -> bool:
        return "sleep 106" not in (await sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).text

    await until(gone, "both sleeps are gone")
