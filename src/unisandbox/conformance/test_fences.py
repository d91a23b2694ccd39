"""Fences: what may have been done is not done twice, a handle of yesterday changes nothing, and events are not lost."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from unisandbox import Engine, Event, FailedPreconditionError, NotFoundError, Sandbox
from unisandbox.api import Capabilities
from unisandbox.conformance import selection
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.hosts import Hosts
from unisandbox.conformance.programs import Programs
from unisandbox.sandbox import SandboxOptions

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

# As many as an engine keeps of its events.
KEPT = 4096
BOUND = 10.0
"""Seconds, generous; what a test fails for is a call that waits for another sandbox's end."""


@pytest.fixture
async def kept(state: Path, anyio_backend: str) -> AsyncIterator[Engine]:
    """An engine on the state directory."""
    async with Engine.open(state) as engine:
        yield engine


@pytest.fixture
def options(backend: selection.Candidate, rootfs: str) -> SandboxOptions:
    """What a sandbox of the backend is asked for at least."""
    return selection.options(backend, rootfs)


# --- operations ---


async def test_a_creation_that_is_repeated_gives_the_same_sandbox(kept: Engine, options: SandboxOptions) -> None:
    first = await kept.create(operation_id="make", **options)
    again = await kept.create(operation_id="make", **options)
    assert again.id == first.id
    assert len(await kept.list()) == 1

    with pytest.raises(FailedPreconditionError):
        await kept.create(operation_id="make", **(options | {"name": "another"}))
    other = await kept.create(operation_id="make-2", **options)
    assert other.id != first.id
    await first.remove()
    with pytest.raises(NotFoundError):
        await kept.create(operation_id="make", **options)


@pytest.mark.needs("attach")
async def test_a_creation_that_is_asked_for_twice_at_once_makes_one(
    kept: Engine, state: Path, options: SandboxOptions
) -> None:
    made: list[str] = []
    async with Engine.attach(state) as other:

        async def make(engine: Engine) -> None:
            with contextlib.suppress(FailedPreconditionError):  # "in progress: ask again in a moment"
                made.append((await engine.create(operation_id="make", **options)).id)

        async with anyio.create_task_group() as group:
            for engine in (kept, other, kept, other):
                group.start_soon(make, engine)
    assert len(set(made)) == 1
    assert [status.id for status in await kept.list()] == made[:1]


async def test_a_creation_that_failed_may_be_asked_for_again(kept: Engine, options: SandboxOptions) -> None:
    taken = await kept.create(**(options | {"name": "w"}))
    with pytest.raises(Exception, match="w"):
        await kept.create(operation_id="make", **(options | {"name": "w"}))
    await taken.remove()
    assert (await kept.create(operation_id="make", **(options | {"name": "w"}))).name == "w"


async def test_a_process_that_is_asked_for_again_is_not_started_again(
    kept: Engine, options: SandboxOptions, programs: Programs, capabilities: Capabilities
) -> None:
    sandbox = await kept.create(**options)
    script = programs.asks(7, log="/tmp/starts")
    first = await sandbox.exec(script, stdin="pipe", operation_id="work")
    again = await sandbox.exec(script, stdin="pipe", operation_id="work")
    assert again.id == first.id
    if capabilities.processes:
        assert again.pid == first.pid
    with pytest.raises(FailedPreconditionError):
        await sandbox.exec(programs.nothing(), operation_id="work")
    await first.stdin.send(b"\n")
    assert (await first.wait()).code == 7

    after = await sandbox.exec(script, stdin="pipe", operation_id="work")
    assert (await after.wait()) == (await first.wait())
    assert (await sandbox.run(programs.shows("/tmp/starts"))).stdout == b"started\n"


async def test_a_removal_that_is_repeated_leaves_a_namesake_alone(kept: Engine, options: SandboxOptions) -> None:
    await kept.create(**(options | {"name": "w"}))
    await kept.remove("w", operation_id="end")
    namesake = await kept.create(**(options | {"name": "w"}))
    await kept.remove("w", operation_id="end")
    assert [status.id for status in await kept.list()] == [namesake.id]
    with pytest.raises(FailedPreconditionError):
        await kept.remove(namesake.id, operation_id="end")
    await kept.remove("w", operation_id="end-2")
    assert await kept.list() == []


@pytest.mark.needs("survives_host_crash")
async def test_operations_are_known_after_a_crash(
    hosts: Hosts, state: Path, options: SandboxOptions, programs: Programs
) -> None:
    script = programs.asks(7, log="/tmp/starts")
    told, _ = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w", operation_id="make")
        process = await sandbox.exec({script!r}, stdin="pipe", operation_id="work")
        gone = await create(name="gone")
        await engine.remove("gone", operation_id="end")
        tell(sandbox=sandbox.id, process=process.id)
        """,
    )
    async with Engine.open(state) as engine:
        sandbox = await engine.create(operation_id="make", **(options | {"name": "w"}))
        assert sandbox.id == told[0]["sandbox"]
        process = await sandbox.exec(script, stdin="pipe", operation_id="work")
        assert process.id == told[0]["process"]
        await process.stdin.send(b"\n")
        assert (await process.wait()).code == 7
        assert (await sandbox.run(programs.shows("/tmp/starts"))).stdout == b"started\n"
        await engine.remove("gone", operation_id="end")


# --- generations ---


@pytest.mark.needs("survives_host_crash")
async def test_a_handle_of_an_older_generation_is_refused(hosts: Hosts, state: Path, programs: Programs) -> None:
    with hosts.start(state, f'await (await create(name="w")).run({programs.nothing()})') as owner:
        assert "ready" in owner.heard()
        async with Engine.attach(state) as attached:
            handle = await attached.get("w")
            assert (await handle.run(programs.nothing())).exit_code == 0
            [known] = await handle.containers.list()
            container = await handle.containers.get(known.name)
            owner.kill()
            async with Engine.open(state) as engine:
                assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
                running = await (await engine.get("w")).exec(programs.sleeps(60))
                calls: list[Callable[[], Awaitable[object]]] = [
                    lambda: handle.run(programs.nothing()),
                    handle.status,
                    container.status,
                    container.kill,
                    handle.stop,
                    handle.kill,
                    handle.remove,
                ]
                for call in calls:
                    with pytest.raises(FailedPreconditionError, match="generation"):
                        await call()
                with anyio.move_on_after(0.2) as scope:  # that nothing comes cannot be waited for
                    await running.wait()
                assert scope.cancelled_caught, "what the new owner runs was ended by the former one's handle"
                await running.kill()
                fresh = await attached.get("w")
                assert (await fresh.status()).generation == (await (await engine.get("w")).status()).generation == 2
                assert (await fresh.run(programs.nothing())).exit_code == 0


# --- one bad sandbox harms no other ---


async def _answers(sandbox: Sandbox, engine: Engine, programs: Programs) -> None:
    with anyio.fail_after(BOUND):
        assert (await sandbox.run(programs.echo("here"))).stdout == b"here\n"
        assert (await sandbox.status()).state == "ready"
        assert len(await engine.list()) == 2


@pytest.mark.needs("processes")
async def test_a_stop_with_a_long_grace_delays_nobody(engine: Engine, create: Create, programs: Programs) -> None:
    async with create() as bad, create() as other:
        deaf = await bad.exec(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"])
        assert await deaf.stdout.receive() == b"deaf\n"
        begun = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(bad.stop, 100.0)
            await anyio.wait_all_tasks_blocked()
            await _answers(other, engine, programs)
            async with create() as third:
                assert (await third.run(programs.nothing())).exit_code == 0
            assert (await bad.status()).state in {"ready", "stopped"}
            group.cancel_scope.cancel()
        assert time.monotonic() - begun < 60
        await deaf.aclose()


@pytest.mark.needs("pause")
async def test_a_paused_sandbox_delays_nobody_and_can_be_ended(
    engine: Engine, create: Create, programs: Programs
) -> None:
    async with create() as bad, create() as other:
        frozen = await bad.exec(programs.announces("ready"))
        assert await frozen.stdout.receive() == b"ready\n"
        await bad.pause()
        await _answers(other, engine, programs)
        with anyio.fail_after(BOUND):
            assert [status.state for status in (await bad.status()).containers] == ["paused"]
            await bad.remove()
        await frozen.aclose()


@pytest.mark.needs("pause")
async def test_nothing_is_started_in_a_paused_sandbox_and_nothing_waits(
    state: Path, options: SandboxOptions, programs: Programs, capabilities: Capabilities
) -> None:
    async with Engine.open(state) as owner, owner.create(**(options | {"name": "w"})) as sandbox:
        with pytest.raises(FailedPreconditionError, match="nothing runs"):
            await sandbox.pause()
        process = await sandbox.exec(programs.copies(), stdin="pipe")
        await sandbox.pause()
        async with Engine.attach(state) as other:
            seen = [sandbox] + ([await other.get("w")] if capabilities.attach else [])
            with anyio.fail_after(BOUND):
                for each in seen:
                    for ask in (
                        lambda each=each: each.run(programs.nothing()),
                        lambda each=each: each.exec(programs.nothing()),
                        lambda each=each: each.launch(programs.nothing()),
                        lambda each=each: each.containers.add(argv=programs.nothing(), name="second"),
                    ):
                        with pytest.raises(FailedPreconditionError, match=r"is paused.*resume"):
                            await ask()  # type: ignore[no-untyped-call]
            await seen[-1].pause()  # again: fine
            await seen[-1].resume()
            for each in seen:
                assert (await each.run(programs.exits(3))).exit_code == 3
        await process.stdin.send(b"goes on")
        assert await process.stdout.receive() == b"goes on"
        await process.aclose()


async def test_unread_output_of_one_delays_nobody(engine: Engine, create: Create, programs: Programs) -> None:
    async with create() as bad, create() as other:
        silent = await bad.exec(programs.floods())
        assert len(await silent.stdout.receive(10)) > 0
        for _ in range(5):
            await _answers(other, engine, programs)
        await silent.aclose()


# --- events ---


async def test_reading_events_goes_on_after_any_number(
    kept: Engine, state: Path, options: SandboxOptions, programs: Programs
) -> None:
    async with kept.create(**options) as sandbox:
        await sandbox.run(programs.exits(4))
    async with Engine.attach(state) as other:
        events = [event async for event in _until_removed(other)]
        numbers = [event.seq for event in events]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert [event.exit.code for event in events if event.kind == "process.exited" and event.exit] == [4]
        for after in numbers[:-1]:
            assert [event.seq async for event in _until_removed(other, after)] == [n for n in numbers if n > after]


@pytest.mark.needs("attach")
async def test_an_end_that_two_wait_for_is_told_once(
    kept: Engine, state: Path, options: SandboxOptions, programs: Programs
) -> None:
    async with Engine.attach(state) as other:
        async with kept.create(**options) as sandbox:
            process = await sandbox.exec(programs.exits(4))
            async with anyio.create_task_group() as group:
                group.start_soon(process.wait)
                group.start_soon(process.wait)
            assert (await sandbox.run(programs.exits(5))).exit_code == 5
        events = [event async for event in _until_removed(other)]
    ends = [event for event in events if event.kind == "process.exited"]
    assert [event.exit.code for event in ends if event.exit] == [4, 5]
    assert ends[0].exec_id == process.id


async def _until_removed(engine: Engine, after: int = 0) -> AsyncIterator[Event]:
    async for event in engine.events(after=after):
        yield event
        if event.kind == "sandbox.removed":
            return


async def test_a_slow_reader_is_told_of_the_gap_and_slows_nobody(
    engine: Engine, create: Create, capabilities: Capabilities
) -> None:
    if capabilities.start_seconds > 0.2:
        pytest.skip("thousands of starts take too long; the events are the engine's and the same for all backends")
    slow = engine.events()
    async with create() as sandbox:
        first = await anext(slow)
        for _ in range(KEPT // 2):
            await sandbox.stop(grace=0)
            await sandbox.start()
        gap = await anext(slow)
        assert (first.seq, first.kind, gap.kind) == (1, "sandbox.created", "gap")
        following = await anext(slow)
        assert following.seq == gap.seq + 1 > 2
        seen = [await anext(slow) for _ in range(100)]
        assert [event.seq for event in seen] == list(itertools.islice(itertools.count(following.seq + 1), 100))
