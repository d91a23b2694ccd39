"""What the tests of the keeper share: a place for one, and looks at it from outside."""

# ruff: noqa: ASYNC230 - a test may block its own event loop

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio

from unisandbox.host.keeper import ExitRecord, Keeper, Spawned

DEADLINE = 20.0


@asynccontextmanager
async def keeper_at(place: Path, **options: object) -> AsyncIterator[Keeper]:
    """A keeper of our own, closed at the end if the test has not done it."""
    with anyio.fail_after(DEADLINE):
        keeper = await Keeper.start(f"{place}/state", workdir=f"{place}/work", **options)  # type: ignore[arg-type]
        await keeper.held()  # so what its greeting opened is closed
    try:
        yield keeper
    finally:
        keeper.abandon(wait=DEADLINE)


async def sh(keeper: Keeper, script: str, key: str = "", **options: object) -> Spawned:
    """Start a shell; its pidfd is closed."""
    argv = ["/bin/sh", "-c", script]
    env = {"PATH": "/usr/bin:/bin"}
    spawned = await keeper.spawn(key or script, argv, env=env, **options)  # type: ignore[arg-type]
    if spawned.pidfd >= 0:
        os.close(spawned.pidfd)
    return spawned


async def sh_exit(keeper: Keeper, script: str, key: str = "", **options: object) -> ExitRecord:
    """Run a shell to its end."""
    spawned = await sh(keeper, script, key, **options)
    return await keeper.wait_exit(spawned.pid, spawned.start_time)


async def sh_output(keeper: Keeper, script: str, key: str = "", **options: object) -> bytes:
    """What a shell writes."""
    reading, writing = os.pipe()
    try:
        await sh_exit(keeper, script, key, fds=[0, writing, writing], **options)
    finally:
        os.close(writing)
    with open(reading, "rb") as file:
        return file.read()


def until(happened: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Look again and again, for what has no event to wait for."""
    end = time.monotonic() + deadline
    while not happened():
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.002)


def wait_ended(pid: int, deadline: float = DEADLINE) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(deadline * 1000), f"process {pid} has not ended within {deadline:g} s"
    finally:
        os.close(pidfd)


def children_of(pid: int) -> list[int]:
    """The children of a process; none when it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def workers_of(pid: int) -> list[int]:
    """A keeper's workers: forks of it, which come and go with jobs."""
    return [child for child in children_of(pid) if _name_of(child) == _name_of(pid)]


def end_workers(pid: int) -> None:
    """Kill a keeper's workers, before what it has is compared with another time.

    What is asked of the keeper after that is answered when it has closed what belonged to them.
    """
    for worker in workers_of(pid):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        until(lambda pid=pid, worker=worker: worker not in children_of(pid), "the worker is reaped")  # type: ignore[misc]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def files_of(pid: int) -> list[str]:
    """What a process has open; what it closes meanwhile may be missing."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def fd_count(pid: int) -> int:
    """How many fds a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def private_bytes(pid: int) -> int:
    """The memory that a process has for itself."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(line[1]) for line in lines) * 1024
