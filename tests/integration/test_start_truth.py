"""Start tells the truth: the namespaces of every sandbox are its own and the pinned ones, also on a busy machine.

A system that trusts what a child reports about itself pins the host's namespaces now and then, under load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from unisandbox import Engine, Sandbox
from unisandbox.host.pidfd import start_time

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1800)]

# Made with the sandbox and pinned; the others (mnt, pid, cgroup) come with its container.
PINNED = ("user", "net", "ipc", "uts")
OWN = (*PINNED, "mnt", "pid", "cgroup")
STARTS = 2000  # a quarter each: one by one and at once, on asyncio and on trio
AT_ONCE = 50


@pytest.fixture
def busy_processors() -> Iterator[None]:
    """Every processor has something else to do."""
    burn = [sys.executable, "-c", "import signal; signal.alarm(1800)\nwhile True: pass"]
    children = [subprocess.Popen(burn) for _ in os.sched_getaffinity(0)]
    yield
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    async with Engine.open() as opened:
        yield opened


def namespaces_of(pid: int | str) -> dict[str, str]:
    """What the kernel of the host says about a process."""
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in OWN}


async def check(sandbox: Sandbox, hosts: dict[str, str]) -> dict[str, str]:
    """Compare what we say, what the host sees and what is seen inside; the namespaces of the sandbox."""
    said = {kind: f"{kind}:[{number}]" for kind, number in (await sandbox.status()).namespaces.items()}
    assert sorted(said) == sorted(PINNED)
    script = "read line; for kind in user net ipc uts mnt pid cgroup; do readlink /proc/self/ns/$kind; done"
    async with sandbox.exec(["sh", "-c", script], stdin="pipe") as process:
        seen = namespaces_of(process.pid)
        began = start_time(process.pid)
        await process.stdin.send(b"\n")
        inside = b""
        async for output in process:
            inside += output.data
        assert (await process.wait()).code == 0
    assert began > 0
    for kind in OWN:
        assert seen[kind] != hosts[kind], f"{kind} is the host's"
    for kind in PINNED:
        assert seen[kind] == said[kind], f"{kind} is not the pinned one"
    told = dict(line.split(":", 1) for line in inside.decode().splitlines())
    assert {kind: f"{kind}:{rest}" for kind, rest in told.items()} == seen
    assert (await sandbox.status()).namespaces == {kind: int(seen[kind].split("[")[1][:-1]) for kind in PINNED}
    return seen


@pytest.mark.usefixtures("busy_processors")
async def test_one_after_the_other(engine: Engine, count: Callable[[int], int]) -> None:
    hosts = namespaces_of("self")
    async with engine.create(isolation="runc") as first:
        before = await check(first, hosts)
        for _ in range(count(STARTS) // 4):
            async with engine.create(isolation="runc") as sandbox:
                now = await check(sandbox, hosts)
            assert not set(now.values()) & set(before.values()), "shared with a sandbox that lives"


@pytest.mark.usefixtures("busy_processors")
async def test_fifty_at_once(engine: Engine, count: Callable[[int], int]) -> None:
    hosts = namespaces_of("self")
    for _ in range(max(1, count(STARTS) // 4 // AT_ONCE)):
        found: list[dict[str, str]] = []
        all_made = anyio.Event()
        arrived = 0

        async def one(found: list[dict[str, str]] = found, all_made: anyio.Event = all_made) -> None:
            nonlocal arrived
            async with engine.create(isolation="runc") as sandbox:
                found.append(await check(sandbox, hosts))
                # All of them live at the same time, so that an inode number cannot be used again.
                arrived += 1
                if arrived == AT_ONCE:
                    all_made.set()
                await all_made.wait()

        async with anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(one)
        for kind in OWN:
            assert len({spaces[kind] for spaces in found}) == AT_ONCE, f"two sandboxes share a {kind} namespace"


async def test_the_processes_of_one_sandbox_are_in_the_same_namespaces(engine: Engine) -> None:
    async with engine.create(isolation="runc") as sandbox:
        async with sandbox.exec(["sleep", "60"]) as one, sandbox.exec(["sleep", "60"]) as two:
            assert namespaces_of(one.pid) == namespaces_of(two.pid)
        container = await sandbox.containers.add(argv=["sleep", "60"])
        assert {k: v for k, v in namespaces_of(container.pid).items() if k in PINNED} == {
            kind: f"{kind}:[{number}]" for kind, number in (await sandbox.status()).namespaces.items()
        }


async def test_a_restart_keeps_the_pinned_ones(engine: Engine) -> None:
    async with engine.create(isolation="runc") as sandbox:
        await sandbox.run(["true"])
        before = (await sandbox.status()).namespaces
        await sandbox.stop(grace=0)
        await sandbox.start()
        assert (await check(sandbox, namespaces_of("self")))["net"] == f"net:[{before['net']}]"


async def test_an_idle_sandbox_is_no_process(engine: Engine) -> None:
    async with engine.create(isolation="runc") as sandbox:
        assert (await sandbox.status()).containers == ()
        assert (await sandbox.metrics()).pids == 0


async def test_a_process_is_in_a_cgroup_of_its_sandbox_before_it_runs(
    engine: Engine, count: Callable[[int], int]
) -> None:
    async with engine.create(isolation="runc") as one, engine.create(isolation="runc") as two:
        groups: dict[str, set[str]] = {one.id: set(), two.id: set()}
        for _ in range(count(100)):
            for sandbox in (one, two):
                async with sandbox.exec(["sleep", "60"]) as process:
                    text = await anyio.Path(f"/proc/{process.pid}/cgroup").read_text()
                    groups[sandbox.id].add(
                        next(line for line in text.splitlines() if ":pids:" in line or line[0] == "0")
                    )
                    assert Path("/proc/self/cgroup").read_text() != text  # noqa: ASYNC240
        assert not groups[one.id] & groups[two.id]
