"""One bad sandbox harms no other: whatever it does, another starts, answers and ends within a bound."""

from __future__ import annotations

import time
from typing import get_args

import anyio
import pytest

from unisandbox import Resources, Sandbox
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Bad, Programs
from unisandbox.conformance.waiting import until

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

# Generous for a loaded machine of two cores; a test fails at once where something waits for the bad one for ever.
BOUND = 20.0

BAD: tuple[Bad, ...] = get_args(Bad)
BAD_PROCESSES = {
    "a fork bomb": "b() { b | b & }; b; while :; do sleep 1; done",
    "endless processes": "while :; do true; done",
    "deaf to signals": "trap '' TERM INT HUP; while :; do sleep 1; done",
}


async def answers(create: Create, programs: Programs) -> None:
    """Another sandbox lives a whole life."""
    begun = time.monotonic()
    with anyio.fail_after(BOUND):
        async with create() as other:
            assert (await other.run(programs.echo("here"))).stdout == b"here\n"
            await other.files.write("/tmp/a", b"b")
            await other.status()
    assert time.monotonic() - begun < BOUND


async def _answers_beside(create: Create, programs: Programs, bad_program: list[str]) -> None:
    limits = Resources(memory="64M", pids=32, cpu=0.5)
    async with create(resources=limits) as bad:
        process = await bad.exec(bad_program)
        assert (await process.stdout.receive(8)).startswith(b"started")

        await answers(create, programs)

        with anyio.fail_after(BOUND):
            await bad.status()
            await process.kill()
        await process.aclose()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.needs("limits:memory", "limits:pids", "limits:cpu")
async def test_another_sandbox_answers_beside(create: Create, programs: Programs, what: Bad) -> None:
    await _answers_beside(create, programs, programs.bad(what))


@pytest.mark.needs("processes")
@pytest.mark.parametrize("what", BAD_PROCESSES)
@pytest.mark.needs("limits:memory", "limits:pids", "limits:cpu")
async def test_another_sandbox_answers_beside_bad_processes(create: Create, programs: Programs, what: str) -> None:
    await _answers_beside(create, programs, ["sh", "-c", f"echo started; {BAD_PROCESSES[what]}"])


@pytest.mark.needs("limits:memory")
async def test_a_sandbox_that_eats_its_memory_ends_alone(create: Create, programs: Programs) -> None:
    async with create() as other, create(resources=Resources(memory="64M")) as bad:
        async with other.exec(programs.copies(), stdin="pipe") as talk:
            done = await bad.run(programs.eats(), timeout=60)
            assert done.exit.reason == "oom"
            await talk.stdin.send(b"alive\n")
            assert await talk.stdout.receive() == b"alive\n"


@pytest.mark.needs("limits:memory", "limits:pids", "limits:cpu")
async def test_many_start_while_one_is_bad(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="64M", pids=32, cpu=0.5)) as bad:
        await bad.exec(programs.worst())
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(answers, create, programs)


@pytest.mark.needs("processes")
async def test_a_sandbox_sees_no_process_of_another(create: Create) -> None:
    async with create() as one, create() as two:
        async with one.exec(["sleep", "4242"]):
            listing = await two.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert "4242" not in listing.text
            assert (await two.sh("kill -9 -1; true")).exit_code in {0, 137}
            assert "4242" in (await one.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).text


async def test_a_sandbox_sees_no_file_of_another(create: Create, programs: Programs) -> None:
    async with create() as one, create() as two:
        for place in ("/tmp", "/run", "/home"):
            await one.run(programs.stores(f"{place}/mine", "x"), check=True)
            assert "mine" not in (await two.run(programs.lists(place), check=True)).text.split()
            assert "mine" in (await one.run(programs.lists(place), check=True)).text.split()


@pytest.mark.needs("processes")
async def test_a_sandbox_shares_no_memory_with_another(create: Create) -> None:
    async with create() as one, create() as two:
        await one.sh("echo x > /tmp/x; echo x > /dev/shm/x; mkdir /run/x", check=True)

        assert (await two.sh("ls /tmp /dev/shm; ls -d /run/x 2>/dev/null")).text.replace("\n", "") == "/dev/shm:/tmp:"


@pytest.mark.needs("processes")
async def test_a_process_may_kill_everybody_it_sees(sandbox: Sandbox) -> None:
    await sandbox.sh("kill -9 -1; true")

    async def answers_again() -> bool:
        return (await sandbox.run(["true"])).exit_code == 0

    await until(answers_again, "the sandbox runs programs again")


@pytest.mark.needs("processes")
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_the_limits_of_one_are_not_used_up_by_another(create: Create) -> None:
    async with create(resources=Resources(pids=16)) as one, create(resources=Resources(pids=16)) as two:
        await one.exec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do sleep 60 & done; wait"])
        done = await two.sh("for i in 1 2 3 4 5; do sleep 0 & done; wait")
        assert done.stderr == b""
