"""Several processes on one state directory: one owns, others attach, none gets into another's way, and time goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    BackendError,
    Engine,
    FailedPreconditionError,
    NotFoundError,
    Sandbox,
    SandboxError,
    UnavailableError,
)
from unisandbox.api import Exit
from unisandbox.conformance import selection
from unisandbox.conformance.hosts import Hosts, Watched, keeper_pid, pids
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.waiting import killed, until

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

attach: pytest.MarkDecorator = pytest.mark.needs("attach")

TTL_SECONDS = 1.0


@attach
async def test_who_attaches_can_do_what_the_owner_can(
    hosts: Hosts, state: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    with hosts.start(state, 'await create(name="his", labels={"who": "him"})', policy="stop") as owner:
        assert "ready" in owner.heard()
        async with Engine.attach(state) as engine:
            assert not engine.recovery
            assert [status.labels for status in await engine.list()] == [{"who": "him"}]
            his = await engine.get("his")
            assert (await his.run(programs.exits(3))).exit_code == 3
            async with his.exec(programs.copies(), stdin="pipe") as process:
                await process.stdin.send(b"word")
                assert await process.stdout.receive() == b"word"
            with pytest.raises(AlreadyExistsError):
                await engine.create(**(selection.options(backend, rootfs) | {"name": "his"}))
            mine = await engine.create(**(selection.options(backend, rootfs) | {"name": "mine"}))
            await mine.run(programs.stores("/tmp/mine", "mine"), check=True)
        # The end of one that has attached ends nothing.
        async with Engine.attach(state) as engine:
            assert sorted(str(status.name) for status in await engine.list()) == ["his", "mine"]
            assert (await (await engine.get("mine")).run(programs.shows("/tmp/mine"))).stdout == b"mine\n"
            await engine.remove("his")
            with pytest.raises(NotFoundError):
                await engine.get("his")
        with Watched(await keeper_pid(state)) as keeper:
            owner.kill()
            assert keeper.ended()
    async with Engine.open(state) as after:
        assert await after.list() == []


@attach
async def test_each_sees_what_the_other_has_done(
    state: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    async with Engine.open(state) as owner, Engine.attach(state) as other:
        sandbox = await owner.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        same = await other.get("w")
        await sandbox.run(programs.stores("/tmp/a", "one"), check=True)
        assert (await same.run(programs.shows("/tmp/a"))).stdout == b"one\n"
        await same.stop(grace=0)
        assert (await sandbox.status()).state == "stopped"
        with pytest.raises(FailedPreconditionError):
            await sandbox.run(programs.nothing())
        await sandbox.start()
        assert (await same.run(programs.shows("/tmp/a"))).stdout == b"one\n"
        await same.remove()
        with pytest.raises(NotFoundError):
            await sandbox.run(programs.nothing())
        await sandbox.remove()
        assert await owner.list() == []


@attach
async def test_a_process_is_read_by_one_at_a_time(
    state: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    async with Engine.open(state) as owner:
        sandbox = await owner.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        async with Engine.attach(state) as other:
            same = await other.get("w")
            process = await sandbox.exec(programs.copies(), stdin="pipe")
            assert await same.processes() == []
            assert [known.id for known in await sandbox.processes()] == [process.id]
            await process.stdin.send(b"word")
            assert await process.stdout.receive() == b"word"
            await process.aclose()


@attach
async def test_what_a_killed_one_has_started_can_be_gone_on_with(
    hosts: Hosts, state: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    body = f"""
        sandbox = await engine.get("w")
        process = await sandbox.exec({programs.asks(7, before="before", after="after")}, stdin="pipe")
        tell(id=process.id)
    """
    async with Engine.open(state) as owner:
        sandbox = await owner.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        with hosts.start(state, body, attach=True) as other:
            told = other.heard()
            assert "ready" in other.heard()
            assert await sandbox.processes() == []
            other.kill()

        async def orphaned() -> bool:
            return len(await sandbox.processes()) == 1

        await until(orphaned, "the keeper has seen the end of the other process")
        [process] = await sandbox.processes()
        assert process.id == told["id"]
        await process.stdin.send(b"word\n")
        data = b""
        async for output in process:
            data += output.data
        assert (data, (await process.wait()).code) == (b"before\nafter word\n", 7)


async def test_two_owners_are_refused_and_the_first_is_named(hosts: Hosts, state: Path) -> None:
    with hosts.start(state, policy="stop") as owner:
        assert "ready" in owner.heard()
        with pytest.raises(FailedPreconditionError, match=str(owner.pid)):
            await Engine.open(state)
        async with Engine.attach(state) as engine:
            assert await engine.list() == []
        with Watched(await keeper_pid(state)) as keeper:
            owner.kill()
            assert keeper.ended()
    async with Engine.open(state) as engine:
        assert await engine.list() == []


async def test_where_no_engine_is_nobody_can_attach(tmp_path: Path) -> None:
    for directory in (tmp_path / "missing", tmp_path):
        with pytest.raises(UnavailableError):
            await Engine.attach(directory)


async def test_engines_of_two_directories_do_not_touch_each_other(
    hosts: Hosts, state: Path, tmp_path: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    async with Engine.open(tmp_path / "other") as engine:
        sandbox = await engine.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        async with sandbox.exec(programs.copies(), stdin="pipe") as process:
            with hosts.start(
                state, f'await (await create(name="w")).run({programs.nothing()})', policy="stop"
            ) as other:
                assert "ready" in other.heard()
                async with Engine.attach(state) as attached:
                    assert sandbox.id not in [status.id for status in await attached.list()]
                with Watched(await keeper_pid(state)) as keeper:
                    other.kill()
                    assert keeper.ended()
            async with Engine.open(state, on_recover="stop") as after:
                assert await after.list() == []
            await process.stdin.send(b"word")
            assert await process.stdout.receive() == b"word"
        assert [status.id for status in await engine.list()] == [sandbox.id]


@attach
async def test_many_who_change_one_sandbox_at_once_end_well(
    state: Path, backend: selection.Candidate, rootfs: str, programs: Programs, count: Callable[[int], int]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(Engine.open(state))
        await owner.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        engines = [owner, *[await stack.enter_async_context(Engine.attach(state)) for _ in range(2)]]
        handles = [await engine.get("w") for engine in engines]
        answered: list[Exit] = []

        async def change(sandbox: Sandbox) -> None:
            for _ in range(count(50)):
                # Another one has just stopped it, or does while it is being started. No other error may come of that.
                with contextlib.suppress(FailedPreconditionError, BackendError):
                    answered.append((await sandbox.run(programs.exits(4))).exit)
                await sandbox.stop(grace=0)
                await sandbox.start()

        with anyio.fail_after(100):
            async with anyio.create_task_group() as group:
                for handle in handles:
                    group.start_soon(change, handle)
        assert all(end.code == 4 or killed(end) for end in answered)
        for handle in handles:
            assert (await handle.status()).state == "ready"
            assert (await handle.run(programs.nothing())).exit_code == 0


@pytest.mark.needs("ttl", "survives_host_crash")
async def test_a_ttl_ends_a_sandbox_when_nobody_is_there(hosts: Hosts, state: Path, programs: Programs) -> None:
    told, dead = hosts.leave(
        state,
        f"""
        for name, ttl in (("short", {TTL_SECONDS}), ("long", 1000.0)):
            sandbox = await create(name=name, ttl=ttl)
            process = await sandbox.exec({programs.stubborn()})
            tell(pid=pid(process))
        """,
    )
    with contextlib.ExitStack() as stack:
        other = [stack.enter_context(Watched(number)) for number in pids(told[1:])]
        for number in pids(told[:1]):
            with contextlib.suppress(ProcessLookupError), Watched(number) as process:  # it may be over already
                assert process.ended()
        if not pids(told):  # then only the time tells that it is over
            await anyio.sleep(max(0.0, dead + TTL_SECONDS - time.time()))
        async with Engine.open(state) as engine:
            assert {str(found.name): found.action for found in engine.recovery.sandboxes} == {
                "short": "removed",
                "long": "adopted",
            }
            assert [status.name for status in await engine.list()] == ["long"]
            assert not any(process.ended(0) for process in other)


@pytest.mark.needs("ttl", "attach")
async def test_a_ttl_ends_a_sandbox_under_the_hands_of_its_user(
    state: Path, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    async with Engine.open(state) as engine, Engine.attach(state) as other:
        options = selection.options(backend, rootfs)
        sandbox = await engine.create(**(options | {"name": "w", "ttl": TTL_SECONDS}))
        expires = (await sandbox.status()).expires_at
        assert expires is not None
        same = await other.get("w")
        with anyio.fail_after(30):
            # Where all is slow its time may be over before its program has started.
            with contextlib.suppress(SandboxError):
                async with await sandbox.exec(programs.sleeps(1000)) as process:
                    assert killed(await process.wait())

            async def gone(engine: Engine) -> bool:
                return await engine.list() == []

            for opened in (engine, other):
                await until(lambda opened=opened: gone(opened), "it is gone")  # type: ignore[misc]
        for handle in (sandbox, same):
            with pytest.raises(NotFoundError):
                await handle.run(programs.nothing())
        async with engine.create(**(options | {"name": "w"})) as successor:
            assert (await successor.run(programs.nothing())).exit_code == 0
