"""What the tests of the keeper share: a place for one, and looks at it from outside."""

# ruff: noqa: ASYNC230 - a test may block its own event loop

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio

from unisandbox import Engine
from unisandbox.host.cgroups import ending
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


async def publish(keeper: Keeper, *events: Mapping[str, object]) -> None:
    """Publish events; the keeper has numbered them then."""
    for number, event in enumerate(events):
        keeper.events.publish(event)
        if number % 200 == 199:
            await keeper.held()
    await keeper.held()


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
    return [child for child in children_of(pid) if name_of(child) == name_of(pid)]


def end_workers(pid: int) -> None:
    """Kill a keeper's workers, before what it has is compared with another time.

    What is asked of the keeper after that is answered when it has closed what belonged to them.
    """
    for worker in workers_of(pid):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        until(lambda pid=pid, worker=worker: worker not in children_of(pid), "the worker is reaped")  # type: ignore[misc]


def name_of(pid: int) -> str:
    """What a process is called; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
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


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid: int) -> int:
    """The memory that a process has for itself."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(line[1]) for line in lines) * 1024


def raw_client(place: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(f"{place}/state/keeper.sock")
    sock.settimeout(DEADLINE)
    return sock


_HOST = """
import anyio, os, signal, sys, time
from unisandbox.host.keeper import Guard, Keeper
place = sys.argv[1]
async def main():
    if sys.argv[3] == "attach":
        keeper = await Keeper.attach(place + "/state")
    else:
        keeper = await Keeper.start(place + "/state", workdir=place + "/work", policy=sys.argv[3])
    print(keeper.pid, flush=True)
    {body}
anyio.run(main, backend=sys.argv[2])
"""


@contextmanager
def host(place: Path, backend: str, policy: str, body: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A host program that has a keeper (policy "attach": that is a client of the one there), and the keeper's pid."""
    argv = [sys.executable, "-c", _HOST.format(body=body), str(place), backend, policy]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        try:
            yield program, pid
        finally:
            program.kill()
            program.wait()


def said(program: subprocess.Popen[str]) -> str:
    """The next line of a host program."""
    assert program.stdout is not None
    return program.stdout.readline().strip()


async def adopt(place: Path) -> Keeper:
    """Own a keeper whose former owner is gone, also if the keeper has not heard of that."""
    with anyio.fail_after(DEADLINE):
        return await Keeper.attach(f"{place}/state", own=True)


@asynccontextmanager
async def client_of(place: Path) -> AsyncIterator[Keeper]:
    """A client beside the owner."""
    keeper = await Keeper.attach(f"{place}/state")
    try:
        yield keeper
    finally:
        keeper.abandon()


def keeper_of(engine: Engine) -> int:
    """The process id of an engine's keeper."""
    return engine._core.host.keeper.pid


@contextmanager
def cgroup_of_tests() -> Iterator[str]:
    """A cgroup directory below our own, where `cgroup.kill` or the freezer is."""
    with open("/proc/self/cgroup", encoding="ascii") as file:
        own = dict(line.strip().split(":")[1:] for line in file)
    trees = {"": "/sys/fs/cgroup/unified", "freezer": "/sys/fs/cgroup/freezer"}
    where = next((f"{root}{own[name]}" for name, root in trees.items() if name in own and os.path.isdir(root)), None)
    path = f"{where or '/sys/fs/cgroup' + own['']}/unisandbox-test-{os.getpid()}"
    os.mkdir(path)
    try:
        yield path
    finally:
        ending.kill([path])
        assert ending.remove([path], DEADLINE)
