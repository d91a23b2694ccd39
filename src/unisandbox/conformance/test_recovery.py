"""Crash only: whoever is killed, and whenever, what lives is adopted, the rest is freed, and nothing is invented."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import anyio
import attrs
import pytest

from unisandbox import (
    Engine,
    Event,
    Exit,
    FailedPreconditionError,
    NotFoundError,
    Process,
    Resources,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api import Capabilities
from unisandbox.conformance import selection
from unisandbox.conformance.hosts import Hosts, Victim, Watched, keeper_pid, pids
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.waiting import until
from unisandbox.engine.records import RecordStore

pytestmark: pytest.MarkDecorator = pytest.mark.anyio
of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")
survives: pytest.MarkDecorator = pytest.mark.needs("survives_host_crash")

# The promise is a second for fifty sandboxes; here are three, on a machine that may be busy.
GONE_SECONDS = 5.0
EAT = "data = bytearray()\\nwhile True: data += bytes(1 << 20)"


@pytest.fixture
def crowd(capabilities: Capabilities, programs: Programs) -> str:
    """Three sandboxes that will not end by themselves: what a host process does."""
    return f"""
        for number in range(3):
            sandbox = await create(name=f"s{{number}}")
            process = await sandbox.exec({programs.stubborn()})
            await sandbox.files.write("/tmp/a", b"a") if {capabilities.files} else None
            tell(pid=pid(process))
    """


def watch(stack: contextlib.ExitStack, host: Victim) -> list[Watched]:
    """The processes of the crowd, as far as they are processes of their own."""
    return [stack.enter_context(Watched(number)) for number in pids([host.heard() for _ in range(3)])]


async def test_a_killed_host_process_takes_its_sandboxes_with_it(hosts: Hosts, state: Path, crowd: str) -> None:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(hosts.start(state, crowd, policy="stop"))
        watched = watch(stack, host)
        assert "ready" in host.heard()
        watched.append(stack.enter_context(Watched(await keeper_pid(state))))
        host.kill()
        begun = time.monotonic()
        assert all(process.ended() for process in watched)
        assert time.monotonic() - begun < GONE_SECONDS
    async with Engine.open(state) as engine:
        assert all(found.action == "removed" for found in engine.recovery.sandboxes)
        assert await engine.list() == []
    async with Engine.open(state) as again:
        assert not again.recovery


@survives
async def test_what_ended_by_itself_while_nobody_was_there_is_told_exactly(
    hosts: Hosts, state: Path, programs: Programs
) -> None:
    """They end one second after they were started, and that is after the death of their host process."""
    told, dead = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w")
        for argv in {[programs.lingers(1.0, "late", code) for code in (0, 5, 137)]}:
            tell(id=(await sandbox.exec(argv)).id)
        """,
    )
    await anyio.sleep(max(0.0, dead + 1.5 - time.time()))
    async with Engine.open(state) as engine:
        found = {process.id: process for process in await (await engine.get("w")).processes()}
        assert set(found) == {words["id"] for words in told}
        for words, code in zip(told, (0, 5, 137), strict=True):
            output, end = await whole(found[words["id"]])
            assert (output, end.code, end.signal, end.reason) == (b"late\n", code, None, "exited")
            assert dead - 1 < end.exited_at <= time.time() + 1


@of_processes
@survives
@pytest.mark.needs("limits:memory")
async def test_what_ended_while_nobody_was_there_is_told_exactly(hosts: Hosts, state: Path) -> None:
    """The code, the signal, the memory that ran out: with the time of the end and all that was written before it."""
    told, dead = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w", resources=Resources(memory="64M"))
        wait = "echo ready; while :; do sleep 0.05; done"
        for script in (f"trap 'echo late; exit 5' USR1; {{wait}}", f"trap 'exec python3 -c \\"{EAT}\\"' USR1; {{wait}}",
                       wait):
            process = await sandbox.exec(["sh", "-c", script])
            assert await process.stdout.receive() == b"ready\\n"
            tell(pid=process.pid, id=process.id)
        """,
    )
    exits, memory, killed = told
    with contextlib.ExitStack() as stack:
        for number, words in ((signal.SIGUSR1, exits), (signal.SIGUSR1, memory), (signal.SIGKILL, killed)):
            watched = stack.enter_context(Watched(words["pid"]))
            watched.signal(number)
            assert watched.ended()
    ended = time.time()
    async with Engine.open(state) as engine:
        found = {process.id: process for process in await (await engine.get("w")).processes()}
        assert set(found) == {words["id"] for words in told}
        output, end = await whole(found[exits["id"]])
        assert (output, end.code, end.signal, end.reason) == (b"late\n", 5, None, "exited")
        _, end = await whole(found[memory["id"]])
        assert (end.signal, end.reason) == (9, "oom")
        _, end = await whole(found[killed["id"]])
        assert (end.signal, end.reason) == (9, "signaled")
        for process in found.values():
            assert dead - 1 < (await process.wait()).exited_at <= ended + 1
            assert process.lost == 0


async def whole(process: Process) -> tuple[bytes, Exit]:
    """All that a process wrote to its standard output, and its end."""
    data = b""
    async for output in process:
        data += output.data if output.stream == "stdout" else b""
    return data, await process.wait()


@survives
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_what_runs_is_adopted_and_goes_on(
    hosts: Hosts, state: Path, capabilities: Capabilities, programs: Programs
) -> None:
    told, _ = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w", labels={{"who": "me"}}, resources=Resources(memory="96M", pids=64))
        process = await sandbox.exec({programs.asks(7, before="before", after="after", patient=True)}, stdin="pipe")
        await sandbox.run({programs.stores("/tmp/kept", "kept")})
        tell(sandbox=sandbox.id, pid=pid(process), id=process.id)
        """,
    )
    async with Engine.open(state, policy="keep") as engine:
        [found] = engine.recovery.sandboxes
        assert (found.action, found.name, found.sandbox_id) == ("adopted", "w", told[0]["sandbox"])
        sandbox = await engine.get("w")
        status = await sandbox.status()
        assert (status.id, status.state, status.labels) == (told[0]["sandbox"], "ready", {"who": "me"})
        assert status.generation == found.generation == 2
        metrics = await sandbox.metrics()
        assert metrics.memory_limit_bytes == 96 << 20
        if capabilities.processes:
            assert metrics.pids_limit == 64

        [process] = await sandbox.processes()
        assert (process.id, process.exit) == (told[0]["id"], None)
        if pids(told):
            assert process.pid == told[0]["pid"]
        await process.stdin.send(b"word\n")
        output, end = await whole(process)
        assert (output, end.code, end.reason) == (b"before\nafter word\n", 7, "exited")
        assert await sandbox.processes() == []
        assert (await sandbox.run(programs.shows("/tmp/kept"))).stdout == b"kept\n"
        if capabilities.files:
            assert await sandbox.files.read("/tmp/kept") == b"kept\n"
    async with Engine.open(state) as again:
        assert [found.action for found in again.recovery.sandboxes] == ["adopted"]
        assert (await (await again.get("w")).run(programs.nothing())).exit_code == 0
    async with Engine.open(state) as empty:
        assert not empty.recovery


@survives
@pytest.mark.parametrize("end", ["close", "kill"])
async def test_output_that_an_adopter_has_not_read_is_there_for_the_next_one(
    hosts: Hosts, state: Path, programs: Programs, end: str
) -> None:
    """Whether it has only looked, or has read a part; after the last part comes what is written then."""
    argv = programs.asks(7, before="before", after="after", patient=True)
    hosts.leave(state, f"""await (await create(name="w")).exec({argv}, stdin="pipe")""")
    for read in (0, 2, 3):
        body = f"""
            [process] = await (await engine.get("w")).processes()
            heard = b""
            while len(heard) < {read}:
                heard += await process.stdout.receive({read} - len(heard))
            tell(heard=heard.decode(), lost=process.lost)
            """
        if end == "kill":
            [words], _ = hosts.leave(state, body)
            assert words == {"heard": {0: "", 2: "be", 3: "for"}[read], "lost": 0}
            continue
        async with Engine.open(state, policy="keep") as engine:
            [process] = await (await engine.get("w")).processes()
            heard = b""
            while len(heard) < read:
                heard += await process.stdout.receive(read - len(heard))
            assert (heard, process.lost) == ({0: b"", 2: b"be", 3: b"for"}[read], 0)
    async with Engine.open(state) as engine:
        [process] = await (await engine.get("w")).processes()
        await process.stdin.send(b"word\n")
        output, exit = await whole(process)
        assert (output, exit.code, process.lost) == (b"e\nafter word\n", 7, 0)


@survives
@pytest.mark.needs("tty")
async def test_a_terminal_is_adopted(hosts: Hosts, state: Path) -> None:
    hosts.leave(
        state,
        """
        sandbox = await create(name="w")
        process = await sandbox.exec(["sh", "-c", "stty -echo; echo ready; read x; stty size; exit 3"],
                                     tty=Terminal(30, 100))
        heard = b""
        while heard != b"ready\\r\\n":  # a terminal may hand on a line in pieces
            heard += await process.stdout.receive()
        """,
    )
    async with Engine.open(state) as engine:
        [process] = await (await engine.get("w")).processes()
        await process.resize(31, 101)
        await process.stdin.send(b"\n")
        output, end = await whole(process)
        assert (output, end.code) == (b"31 101\r\n", 3)


@survives
@pytest.mark.needs("containers")
async def test_containers_are_adopted_with_their_ends(
    hosts: Hosts, state: Path, rootfs: str, programs: Programs
) -> None:
    argvs = {"ends": programs.says(("stdout", "ends\n"), code=4), "stays": programs.announces("stays")}
    hosts.leave(
        state,
        f"""
        sandbox = await create(name="w")
        for name, argv in {argvs!r}.items():
            container = await sandbox.containers.add(argv=argv, name=name, rootfs={rootfs!r})
            while await container.logs() == b"":
                await anyio.sleep(0.01)
        """,
    )
    async with Engine.open(state) as engine:
        sandbox = await engine.get("w")
        ends, stays = [await sandbox.containers.get(name) for name in ("ends", "stays")]
        assert (await ends.wait()).code == 4
        assert await ends.logs() == b"ends\n"
        assert (await stays.status()).state == "running"
        assert await stays.logs() == b"stays\n"
        assert (await stays.kill()).signal == signal.SIGKILL


@of_processes
@survives
@pytest.mark.needs("containers")
async def test_containers_are_adopted(hosts: Hosts, state: Path, rootfs: str) -> None:
    told, _ = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w")
        for name in ("ends", "stays"):
            script = f"trap 'echo late; exit 4' USR1; echo {{name}}; while :; do sleep 0.05; done"
            container = await sandbox.containers.add(argv=["sh", "-c", script], name=name, rootfs={rootfs!r})
            while await container.logs() == b"":
                await anyio.sleep(0.01)
            tell(pid=container.pid)
        """,
    )
    # A program's pid may be that of its init, which does not pass signals on: so all that is in it.
    async with Engine.open(state) as engine:
        sandbox = await engine.get("w")
        ends, stays = [await sandbox.containers.get(name) for name in ("ends", "stays")]
        assert (await stays.status()).state == "running"
        await ends.signal(signal.SIGUSR1)
        assert (await ends.wait()).code == 4

        async def logged() -> bool:
            return await ends.logs() == b"ends\nlate\n"

        await until(logged, "its last words are in the logs")
        assert await stays.logs() == b"stays\n"
        assert told[0]["pid"] != told[1]["pid"]
        assert (await stays.kill()).signal == signal.SIGKILL


@of_processes
@survives
async def test_a_launched_program_is_adopted_and_its_end_is_known(hosts: Hosts, state: Path) -> None:
    hosts.leave(
        state,
        """
        sandbox = await create(name="w")
        await sandbox.launch(["sh", "-c", "trap 'exit 6' USR1; echo launched; while :; do sleep 0.05; done"])
        while await (await sandbox.containers.get("main")).logs() == b"":
            await anyio.sleep(0.01)
        """,
    )
    async with Engine.open(state) as engine:
        sandbox = await engine.get("w")
        main = await sandbox.containers.get("main")
        assert await main.logs() == b"launched\n"
        assert (await sandbox.run(["echo", "beside"])).stdout == b"beside\n"
        await main.signal(signal.SIGUSR1)
        assert (await main.wait()).code == 6


@survives
@pytest.mark.parametrize("who", ["keeper", "both"])
async def test_without_its_keeper_what_was_kept_is_freed_and_told(
    hosts: Hosts, state: Path, crowd: str, who: str
) -> None:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(hosts.start(state, crowd))
        watched = watch(stack, host)
        assert "ready" in host.heard()
        keeper = stack.enter_context(Watched(await keeper_pid(state)))
        if who == "both":
            host.kill()
        keeper.signal(signal.SIGKILL)
        assert keeper.ended()
        host.kill()
        async with Engine.open(state) as engine:
            assert sorted(str(found.name) for found in engine.recovery.sandboxes) == ["s0", "s1", "s2"]
            assert all(found.action == "removed" and found.reason for found in engine.recovery.sandboxes)
            assert await engine.list() == []
            assert all(process.ended() for process in watched)
            events = [event async for event in _closed(engine)]
            assert [event.kind for event in events if event.detail.get("action")] == ["sandbox.recovered"] * 3
    async with Engine.open(state) as again:
        assert not again.recovery


async def _closed(engine: Engine) -> AsyncIterator[Event]:
    events = engine.events()
    await engine.close()
    async for event in events:
        yield event


async def test_every_ending_is_well_without_a_keeper(
    backend: selection.Candidate, rootfs: str, state: Path, programs: Programs
) -> None:
    engine = await Engine.open(state)
    sandbox = await engine.create(**selection.options(backend, rootfs))
    process = await sandbox.exec(programs.sleeps(1000))
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(Watched(await keeper_pid(state)))
        watched: list[Watched] = []
        with contextlib.suppress(UnsupportedError):
            watched.append(stack.enter_context(Watched(process.pid)))
        keeper.signal(signal.SIGKILL)
        assert keeper.ended()
        with anyio.fail_after(30):
            with pytest.raises(UnavailableError):
                await sandbox.run(programs.nothing())
            try:
                end = await process.wait()
            except UnavailableError:
                pass  # it cannot be known, and is not guessed
            else:
                assert end.signal == 9 or end.reason == "lost"
            for ending in (sandbox.stop, sandbox.kill, sandbox.remove, sandbox.remove, process.aclose, engine.close):
                with contextlib.suppress(SandboxError):
                    await ending()
            await engine.close()
        assert all(process.ended() for process in watched)
    async with Engine.open(state) as after:
        assert await after.list() == []


@survives
@pytest.mark.parametrize("wish", ["stop", "report"])
async def test_what_is_found_is_stopped_or_only_told_as_one_wishes(
    hosts: Hosts, state: Path, programs: Programs, wish: Literal["stop", "report"]
) -> None:
    told, _ = hosts.leave(
        state,
        f"""
        sandbox = await create(name="w")
        process = await sandbox.exec({programs.sleeps(1000)})
        tell(pid=pid(process))
        """,
    )
    with contextlib.ExitStack() as stack:
        watched = [stack.enter_context(Watched(number)) for number in pids(told)]
        async with Engine.open(state, policy="keep", on_recover=wish) as engine:
            [found] = engine.recovery.sandboxes
            assert found.action == ("removed" if wish == "stop" else "left")
            with pytest.raises(NotFoundError if wish == "stop" else FailedPreconditionError):
                await engine.get("w")
            if wish == "stop":
                assert all(process.ended() for process in watched)
        assert wish == "stop" or not any(process.ended(0) for process in watched)
        async with Engine.open(state) as after:
            assert [found.action for found in after.recovery.sandboxes] == ([] if wish == "stop" else ["adopted"])
        assert all(process.ended() for process in watched)


@survives
async def test_a_record_of_another_boot_is_told_and_freed(hosts: Hosts, state: Path, crowd: str) -> None:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(hosts.start(state, crowd))
        watched = watch(stack, host)
        assert "ready" in host.heard()
        keeper = stack.enter_context(Watched(await keeper_pid(state)))
        host.kill()
        keeper.signal(signal.SIGKILL)
        assert keeper.ended()
        store = RecordStore(str(state / "sandboxes"), durable=False)
        for record in store.read_all(repair=False).records:
            store.write(record._replace(boot_id="6b1a60c5-0000-4000-8000-000000000000"))
        async with Engine.open(state) as engine:
            assert engine.recovery.rebooted
            assert len(engine.recovery.sandboxes) == 3
            assert {found.action for found in engine.recovery.sandboxes} == {"removed"}
            assert all("machine" in found.reason for found in engine.recovery.sandboxes)
        assert all(process.ended() for process in watched)


@survives
@pytest.mark.parametrize("keeper_lives", [True, False])
async def test_a_damaged_record_is_kept_aside_and_what_it_described_is_freed(
    hosts: Hosts, state: Path, programs: Programs, keeper_lives: bool
) -> None:
    told, _ = hosts.leave(
        state,
        f"""
        for name in ("good", "bad"):
            sandbox = await create(name=name)
            process = await sandbox.exec({programs.sleeps(1000)})
            tell(sandbox=sandbox.id, pid=pid(process))
        """,
    )
    good, bad = told
    record = state / "sandboxes" / f"{bad['sandbox']}.json"
    whole_record = record.read_bytes()
    record.write_bytes(whole_record[: len(whole_record) // 2])
    with contextlib.ExitStack() as stack:
        lives, ends = ([stack.enter_context(Watched(pid)) for pid in pids([words])] for words in (good, bad))
        if not keeper_lives:
            with Watched(await keeper_pid(state)) as keeper:
                keeper.signal(signal.SIGKILL)
                assert keeper.ended()
        async with Engine.open(state) as engine:
            [damaged] = engine.recovery.damaged
            assert damaged.path == str(record)
            assert damaged.reason
            assert _content(damaged.kept_as) == whole_record[: len(whole_record) // 2]
            assert all(process.ended() for process in ends)
            actions = {found.sandbox_id: found.action for found in engine.recovery.sandboxes}
            assert actions[good["sandbox"]] == ("adopted" if keeper_lives else "removed")
            assert not any(process.ended(0) is keeper_lives for process in lives)
            assert bad["sandbox"] not in [status.id for status in await engine.list()]
    assert os.listdir(state / "sandboxes") == []


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


@survives
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_times_and_limits_are_those_of_the_record_for_everybody(
    state: Path, capabilities: Capabilities, backend: selection.Candidate, rootfs: str, programs: Programs
) -> None:
    more = Resources(memory="96M", pids=40)
    async with Engine.open(state, policy="keep") as engine:
        sandbox = await engine.create(**(selection.options(backend, rootfs) | {"name": "w"}))
        if capabilities.update:
            await sandbox.update(more)
        first = await sandbox.status()
        process = await sandbox.exec(programs.exits(3))
        async with Engine.attach(state) as other:
            same = await other.get("w")
            ended = time.time()
            await anyio.sleep(0.5)
            exit = await process.wait()
            assert exit.code == 3
            assert exit.exited_at < ended + 0.4
            await sandbox.stop(grace=0)
            stopped = await sandbox.status()
            await anyio.sleep(0.05)
            seen = await same.status()
            assert (seen.started_at, seen.stopped_at) == (stopped.started_at, stopped.stopped_at)
    async with Engine.open(state) as engine:
        sandbox = await engine.get("w")
        found = await sandbox.status()
        assert (found.started_at, found.stopped_at) == (first.started_at, stopped.stopped_at)
        await sandbox.start()
        started = await sandbox.status()
        assert started.stopped_at is None
        assert started.started_at is not None
        assert stopped.stopped_at is not None
        assert started.started_at > stopped.stopped_at
        if capabilities.update:
            assert sandbox._entry.spec.resources == attrs.evolve(more, disk=sandbox._entry.spec.resources.disk)
            assert (await sandbox.metrics()).memory_limit_bytes == 96 << 20
