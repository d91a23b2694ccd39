"""Limits hold, can be changed while it runs, and are absent when that was asked for."""

from __future__ import annotations

import time

import pytest

from unisandbox import InvalidArgumentError, Resources, Sandbox
from unisandbox.conformance.conftest import Create

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

MIB = 1 << 20


def _allocate(size: int) -> list[str]:
    return ["python3", "-c", f"data = bytearray({size})\nfor i in range(0, {size}, 4096): data[i] = 1\nprint('fits')"]


async def test_memory_is_limited(create: Create) -> None:
    async with create(resources=Resources(memory="96M")) as sandbox:
        assert (await sandbox.run(_allocate(32 * MIB))).text == "fits\n"
        assert (await sandbox.run(_allocate(128 * MIB), timeout=60)).exit.reason == "oom"
        metrics = await sandbox.metrics()
        assert metrics.memory_limit_bytes == 96 * MIB
        assert 0 < (metrics.memory_bytes or 0) <= 96 * MIB


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


async def test_processor_time_is_limited(create: Create) -> None:
    script = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    async with create(resources=Resources(cpu=0.25)) as sandbox:
        used = float((await sandbox.run(["python3", "-c", script], timeout=60)).text)
        counted = (await sandbox.metrics()).cpu_seconds

    assert used < 1.2
    assert counted is None or counted > 0


async def test_the_disk_is_limited(create: Create) -> None:
    fill = "head -c 64M /dev/zero > {0}/fill; stat -c %s {0}/fill; rm {0}/fill"
    async with create(resources=Resources(memory="256M", disk="8M")) as sandbox:
        for place in ("/tmp", "/run", "/home"):
            done = await sandbox.sh(fill.format(place))
            assert int(done.text) <= 8 * MIB
            assert b"No space left" in done.stderr
        metrics = await sandbox.metrics()
        assert metrics.disk_limit_bytes in {None, 8 * MIB}


async def test_a_disk_larger_than_memory_allows_is_on_disk(create: Create) -> None:
    async with create(resources=Resources(memory="64M", disk="256M")) as sandbox:
        done = await sandbox.sh("head -c 128M /dev/zero > /tmp/fill && stat -c %s /tmp/fill", timeout=100)
        assert (done.exit_code, done.text) == (0, f"{128 * MIB}\n"), done.stderr
        done = await sandbox.sh("head -c 256M /dev/zero > /tmp/fill2", timeout=100)
        assert b"No space left" in done.stderr


async def test_the_number_of_files_is_limited(create: Create) -> None:
    script = (
        "import os\nn = 0\ntry:\n while n < 100000:\n  os.close(os.open(f'/tmp/f{n}', os.O_CREAT)); n += 1\n"
        "except OSError as e: print(n, e.errno)"
    )
    async with create(resources=Resources(memory="64M", disk="8M")) as sandbox:
        number, error = (await sandbox.run(["python3", "-c", script], timeout=100)).text.split()
        assert (int(error), int(number) < 50000) == (28, True)


async def test_open_files_and_core_dumps_are_limited(create: Create) -> None:
    async with create(resources=Resources(nofile=123, core=0)) as sandbox:
        assert (await sandbox.sh("ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc")).text.split() == [
            "123",
            "123",
            "0",
            "0",
        ]
        for user in (None, "1000"):
            with pytest.raises(Exception, match=r"."):
                await sandbox.sh("ulimit -Hn 124 && exit 0; exit 1", user=user, check=True)


@pytest.mark.needs("update")
async def test_limits_change_while_it_runs(create: Create) -> None:
    async with create(resources=Resources(memory="64M", disk="16M", pids=16)) as sandbox:
        assert (await sandbox.run(_allocate(128 * MIB), timeout=60)).exit.reason == "oom"
        await sandbox.update(Resources(memory="256M", disk="16M", pids=64))
        assert (await sandbox.run(_allocate(128 * MIB), timeout=60)).text == "fits\n"
        metrics = await sandbox.metrics()
        assert (metrics.memory_limit_bytes, metrics.pids_limit) == (256 * MIB, 64)
        await sandbox.update(Resources(memory="64M", disk="16M", pids=16))
        assert (await sandbox.run(_allocate(128 * MIB), timeout=60)).exit.reason == "oom"
        assert (await sandbox.sh("ulimit -n")).text == "4096\n"


@pytest.mark.needs("update")
async def test_a_changed_limit_outlives_a_stop(create: Create) -> None:
    async with create(resources=Resources(memory="64M", disk="16M")) as sandbox:
        await sandbox.update(Resources(memory="256M", disk="16M"))
        await sandbox.stop(grace=0)
        await sandbox.start()
        assert (await sandbox.run(_allocate(128 * MIB), timeout=60)).text == "fits\n"


async def test_unlimited_means_no_limit(create: Create) -> None:
    async with create(resources=Resources.unlimited()) as sandbox:
        metrics = await sandbox.metrics()
        assert (metrics.memory_limit_bytes, metrics.pids_limit, metrics.disk_limit_bytes) == (None, None, None)
        assert (await sandbox.run(_allocate(64 * MIB))).text == "fits\n"


async def test_there_are_limits_by_default(sandbox: Sandbox) -> None:
    await sandbox.run(["true"])
    metrics = await sandbox.metrics()
    assert metrics.memory_limit_bytes == 512 * MIB
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
async def test_limits_too_small_to_work_with_are_an_error_and_no_hang(create: Create, resources: Resources) -> None:
    from unisandbox import SandboxError

    begun = time.monotonic()
    try:
        async with create(resources=resources) as sandbox:
            await sandbox.run(["true"], timeout=20)
    except SandboxError as error:
        assert str(error)  # noqa: PT017 - either it works or it says why not
    assert time.monotonic() - begun < 40
