"""The promises of the keeper's workers: a job has no trace of the one before it, and none waits for one that hangs."""

# ruff: noqa: ASYNC221 - a test may block its own event loop

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import anyio
import pytest
from tests.keepers import DEADLINE, children_of, fd_count, keeper_at, until, wait_ended

from unisandbox.api.errors import UnavailableError
from unisandbox.host.keeper import JobFailed, Keeper

pytestmark = [pytest.mark.anyio, pytest.mark.root]

NAMED: dict[str, object] = {"do": "dirfd", "path": "/usr", "name": "x"}


def mount_namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


def waiting(pid: int) -> bool:
    """Whether it sleeps in poll(2), as a worker does that waits for a job."""
    return "poll" in Path(f"/proc/{pid}/wchan").read_text()


def worker_of(keeper: Keeper) -> int:
    """The one worker, once it waits for a job and those before it are reaped."""
    until(lambda: len(children_of(keeper.pid)) == 1, "there is one worker")
    (worker,) = children_of(keeper.pid)
    until(lambda: waiting(worker), "the worker waits")
    return worker


@contextlib.asynccontextmanager
async def hanging_jobs(keeper: Keeper, number: int) -> AsyncIterator[list[int]]:
    """So many jobs that never end: their workers are stopped. At the end they are cancelled."""
    stopped: list[int] = []

    async def hang() -> None:
        await keeper.job([])

    try:
        async with anyio.create_task_group() as group:
            for _ in range(number):
                await keeper.job([{"do": "namespaces", "kinds": ["uts"]}])  # a worker has changed its ids once
                (worker,) = set(children_of(keeper.pid)) - set(stopped)
                until(lambda pid=worker: waiting(pid), "the worker waits")  # type: ignore[misc]
                os.kill(worker, signal.SIGSTOP)
                stopped.append(worker)
                group.start_soon(hang)
                await anyio.wait_all_tasks_blocked()
            yield stopped
            group.cancel_scope.cancel()
    finally:
        for worker in stopped:
            wait_ended(worker)


async def test_there_is_no_worker_before_the_first_job_and_one_after_many(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        assert children_of(keeper.pid) == []
        await keeper.job([NAMED])
        worker = worker_of(keeper)
        for _ in range(20):
            await keeper.job([NAMED])
            assert worker_of(keeper) == worker
    wait_ended(worker)


async def test_a_worker_has_nothing_open_of_the_keeper_and_nothing_of_its_jobs(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        await keeper.hold("pipe", writing)
        os.close(writing)
        steps: list[Mapping[str, object]] = [{"do": "mount_namespace"}, {"do": "namespaces", "kinds": ["uts", "net"]}]
        fd = os.open("/usr", os.O_PATH)
        for number in range(3):
            await keeper.job([*steps, {"do": "given", "fd": 0, "name": "y"}], hold={"y": f"y{number}"}, fds=[fd])
            worker = worker_of(keeper)
            # Its socket and its own mount namespace, beside the first three.
            assert fd_count(worker) == 5
            assert mount_namespace(worker) == mount_namespace(keeper.pid)
            assert os.getpgid(worker) == worker
            assert children_of(worker) == []
        os.close(fd)
        await keeper.drop(["pipe"])
        assert os.read(reading, 1) == b""  # the worker has no copy
        os.close(reading)


async def test_a_worker_that_is_killed_while_it_waits_is_replaced(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        fds = fd_count(keeper.pid)
        for _ in range(5):
            worker = worker_of(keeper)
            os.kill(worker, signal.SIGKILL)
            wait_ended(worker)
            await keeper.job([NAMED], hold={"x": "x"})
            assert worker_of(keeper) != worker
            await keeper.drop(["x"])
        exits, _ = await keeper.exits_after(0)
        assert exits == []
        assert fd_count(keeper.pid) == fds


async def test_a_job_whose_worker_is_killed_fails_and_the_next_one_works(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        worker = worker_of(keeper)
        os.kill(worker, signal.SIGSTOP)

        async def one() -> None:
            with pytest.raises(JobFailed) as caught:
                await keeper.job([NAMED], hold={"x": "x"})
            assert caught.value.errno == errno.EIO

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await anyio.wait_all_tasks_blocked()
            await keeper.held()  # so it has arrived
            os.kill(worker, signal.SIGKILL)
        await keeper.job([NAMED], hold={"x": "x"})


async def test_a_failed_job_leaves_the_next_one_a_fresh_worker(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        worker = worker_of(keeper)
        with pytest.raises(JobFailed):
            await keeper.job([{"do": "mount_namespace"}, {"do": "dirfd", "path": "/no/such", "name": "x"}])
        wait_ended(worker)
        await keeper.job([NAMED], hold={"x": "x"})
        assert worker_of(keeper) != worker
        assert mount_namespace(worker_of(keeper)) == mount_namespace(keeper.pid)
        assert list(await keeper.held()) == ["x"]


async def test_jobs_that_hang_keep_no_other_waiting_for_long(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, hanging_jobs(keeper, 4):
        with anyio.fail_after(DEADLINE):
            for _ in range(5):
                await keeper.job([NAMED])


async def test_a_job_that_is_cancelled_while_it_waits_never_begins(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        fds = fd_count(keeper.pid)
        fd = os.open("/usr", os.O_PATH)
        for _ in range(10):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    for number in range(20):
                        group.start_soon(_held_job, keeper, fd, f"x{number}")
                    await anyio.lowlevel.checkpoint()
                    await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await keeper.job([])
            assert await keeper.held() == {}
        os.close(fd)
        until(lambda: fd_count(keeper.pid) <= fds + 1, "what came with the jobs is closed")


async def _held_job(keeper: Keeper, fd: int, name: str) -> None:
    await keeper.job([{"do": "given", "fd": 0, "name": "x"}], hold={"x": name}, fds=[fd])
    with anyio.CancelScope(shield=True):
        await keeper.drop([name])  # it was quicker than the cancelling


async def test_a_stuck_job_is_killed_at_its_time_and_its_worker_with_it(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        worker = worker_of(keeper)
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(JobFailed) as caught:
            await keeper.job([NAMED], hold={"x": "x"}, timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT
        wait_ended(worker)
        await keeper.job([])
        assert await keeper.held() == {}


async def test_idle_workers_die_with_the_keeper(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([{"do": "namespaces", "kinds": ["uts"]}])  # which changes ids: the kernel forgets pdeathsig
        worker = worker_of(keeper)
        os.kill(keeper.pid, signal.SIGKILL)
        wait_ended(worker)


async def test_stuck_workers_die_with_the_keeper(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([{"do": "namespaces", "kinds": ["uts"]}])
        worker = worker_of(keeper)
        async with anyio.create_task_group() as group:

            async def one() -> None:
                with pytest.raises(UnavailableError):
                    await keeper.job([NAMED])

            os.kill(worker, signal.SIGSTOP)
            group.start_soon(one)
            await anyio.wait_all_tasks_blocked()
            os.kill(keeper.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it may be dead and reaped by now
            os.kill(worker, signal.SIGCONT)
        wait_ended(worker)


async def test_closing_ends_workers_that_wait(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        worker = worker_of(keeper)
        report = await keeper.close()
        assert report.failed == {}
        wait_ended(worker)


_ALONE = """\
import os
from unisandbox.host.keeper import workers
from unisandbox.host.keeper.loop import Loop

workers._IDLE_SECONDS = 0.05
said = []
loop = Loop()
pool = workers.Workers(loop, lambda: said.append("ready"))
first = pool.begin([], [], lambda packet: said.append(packet.message))
while "ready" not in said:
    loop.turn()
assert said == [{"result": {"steps": []}, "names": []}, "ready"], said
assert pool.begin([], [], lambda packet: None) == first
while said.count("ready") < 2:
    loop.turn()
assert not pool.are_busy
loop.turn()  # the end of its patience is all that there is to wait for
assert os.waitpid(first, 0) == (first, 0)
pool.reaped(first)
assert first not in pool
print("done")
"""


async def test_a_worker_without_jobs_ends_after_a_while() -> None:
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, timeout=DEADLINE, check=False)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
