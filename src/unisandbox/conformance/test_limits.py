"""Limits hold, can be changed while it runs, and are absent when that was asked for."""

from __future__ import annotations

import time

import anyio
import pytest

from unisandbox import InvalidArgumentError, Resources, Sandbox
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

MIB = 1 << 20


of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")


@pytest.mark.needs("limits:memory")
async def test_memory_is_limited(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="96M")) as sandbox:
        assert (await sandbox.run(programs.fits(32 * MIB))).text == "fits\n"
        assert (await sandbox.run(programs.fits(128 * MIB), timeout=60)).exit.reason == "oom"
        async with sandbox.exec(programs.copies(), stdin="pipe") as running:
            await running.stdin.send(b"x")
            assert await running.stdout.receive() == b"x"
            metrics = await sandbox.metrics()
        assert metrics.memory_limit_bytes == 96 * MIB
        assert 0 < (metrics.memory_bytes or 0) <= 96 * MIB


@pytest.mark.needs("limits:memory")
async def test_memory_is_limited_for_all_together(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="96M")) as sandbox:
        # Each alone would fit.
        ends = []

        async def run() -> None:
            ends.append((await sandbox.run(programs.fits(60 * MIB), timeout=60)).exit)

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(run)
        assert {(end.reason, end.code) for end in ends} <= {("exited", 0), ("oom", 137)}
        metrics = await sandbox.metrics()
        assert (metrics.memory_bytes or 0) <= 96 * MIB


@of_processes
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_processes_are_limited(create: Create) -> None:
    script = (
        "import os, time\nn = 0\ntry:\n while n < 100:\n"
        "  if os.fork() == 0: time.sleep(60)\n  n += 1\nexcept OSError as e: print(n, e.errno, flush=True)\n"
        "os.kill(0, 9)"
    )
    async with create(resources=Resources(pids=20)) as sandbox:
        done = await sandbox.run(["python3", "-c", script])
        number, error = done.text.split()
        # EAGAIN; those that run the sandbox itself count too.
        assert (int(error), 12 <= int(number) <= 19) == (11, True)
        assert (await sandbox.run(["true"])).exit_code == 0
        assert (await sandbox.metrics()).pids_limit == 20


@pytest.mark.needs("limits:cpu")
async def test_processor_time_is_limited(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(cpu=0.25)) as sandbox:
        told = (await sandbox.run(programs.works(2), timeout=60)).text
        counted = (await sandbox.metrics()).cpu_seconds

    assert counted is None or counted > 0
    # Who cannot ask how much it got has been counted by somebody else.
    used = float(told) if told else counted
    assert used is not None
    assert used < 1.2


@pytest.mark.needs("limits:memory")
async def test_the_disk_is_limited(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="256M", disk="8M")) as sandbox:
        for place in ("/tmp", "/run", "/home"):
            done = await sandbox.run(programs.fills(f"{place}/fill", 64 * MIB))
            assert int(done.text) <= 8 * MIB
            assert b"No space left" in done.stderr
        metrics = await sandbox.metrics()
        assert metrics.disk_limit_bytes in {None, 8 * MIB}


@pytest.mark.needs("limits:memory", "large_disks")
async def test_a_disk_larger_than_memory_allows_is_on_disk(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="64M", disk="256M")) as sandbox:
        done = await sandbox.run(programs.fills("/tmp/fill", 128 * MIB, keep=True), timeout=100)
        assert (done.exit_code, done.text) == (0, f"{128 * MIB}\n"), done.stderr
        done = await sandbox.run(programs.fills("/tmp/fill2", 256 * MIB, keep=True), timeout=100)
        assert b"No space left" in done.stderr


@pytest.mark.needs("limits:memory")
async def test_the_number_of_files_is_limited(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="64M", disk="8M")) as sandbox:
        number, error = (await sandbox.run(programs.makes_files("/tmp", 100_000), timeout=100)).text.split()
        assert (error, int(number) < 50000) == ("ENOSPC", True)


@of_processes
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_open_files_and_core_dumps_are_limited(create: Create, capabilities: Capabilities) -> None:
    async with create(resources=Resources(nofile=123, core=0)) as sandbox:
        assert (await sandbox.sh("ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc")).text.split() == [
            "123",
            "123",
            "0",
            "0",
        ]
        for user in (None, *["1000"] * capabilities.users):
            with pytest.raises(Exception, match=r"."):
                await sandbox.sh("ulimit -Hn 124 && exit 0; exit 1", user=user, check=True)


@pytest.mark.needs("update")
@pytest.mark.needs("limits:memory", "limits:pids")
async def test_limits_change_while_it_runs(create: Create, programs: Programs, capabilities: Capabilities) -> None:
    async with create(resources=Resources(memory="64M", disk="16M", pids=16)) as sandbox:
        assert (await sandbox.run(programs.fits(128 * MIB), timeout=60)).exit.reason == "oom"
        await sandbox.update(Resources(memory="256M", disk="16M", pids=64))
        assert (await sandbox.run(programs.fits(128 * MIB), timeout=60)).text == "fits\n"
        metrics = await sandbox.metrics()
        assert metrics.memory_limit_bytes == 256 * MIB
        if capabilities.processes:
            assert metrics.pids_limit == 64
        await sandbox.update(Resources(memory="64M", disk="16M", pids=16))
        assert (await sandbox.run(programs.fits(128 * MIB), timeout=60)).exit.reason == "oom"
        if capabilities.processes:
            assert (await sandbox.sh("ulimit -n")).text == "4096\n"


@pytest.mark.needs("update")
@pytest.mark.needs("limits:memory")
async def test_a_changed_limit_outlives_a_stop(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="64M", disk="16M")) as sandbox:
        await sandbox.update(Resources(memory="256M", disk="16M"))
        await sandbox.stop(grace=0)
        await sandbox.start()
        assert (await sandbox.run(programs.fits(128 * MIB), timeout=60)).text == "fits\n"


async def test_unlimited_means_no_limit(create: Create, programs: Programs) -> None:
    async with create(resources=Resources.unlimited()) as sandbox:
        metrics = await sandbox.metrics()
        assert (metrics.memory_limit_bytes, metrics.pids_limit, metrics.disk_limit_bytes) == (None, None, None)
        assert (await sandbox.run(programs.fits(64 * MIB))).text == "fits\n"


@pytest.mark.needs("limits:memory", "limits:pids")
async def test_there_are_limits_by_default(sandbox: Sandbox, programs: Programs, capabilities: Capabilities) -> None:
    await sandbox.run(programs.nothing())
    metrics = await sandbox.metrics()
    assert metrics.memory_limit_bytes == 512 * MIB
    if capabilities.processes:
        assert metrics.pids_limit == 256
    assert metrics.disk_limit_bytes == 256 * MIB


@pytest.mark.parametrize(
    "options",
    [{"memory": 0}, {"memory": -1}, {"memory": "many"}, {"memory": 1 << 63}, {"cpu": 0}, {"cpu": float("nan")},
     {"cpu": float("inf")}, {"pids": 0}, {"pids": 1.5}, {"nofile": -1}, {"core": -1}, {"disk": 1000}, {"disk": True}],
    ids=repr,
)  # fmt: skip
async def test_absurd_limits_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        Resources(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "resources", [Resources(memory=4096), Resources(pids=1), Resources(disk=65536), Resources(nofile=1)]
)
async def test_limits_too_small_to_work_with_are_an_error_and_no_hang(
    create: Create, programs: Programs, resources: Resources
) -> None:
    from unisandbox import SandboxError

    begun = time.monotonic()
    try:
        async with create(resources=resources) as sandbox:
            await sandbox.run(programs.nothing(), timeout=20)
    except SandboxError as error:
        assert str(error)  # noqa: PT017 - either it works or it says why not
    assert time.monotonic() - begun < 40
