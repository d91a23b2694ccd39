"""The task service, spoken to as an engine would: bundles of somebody else, and the verbs that the SDK does not use."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import pytest

from unisandbox import (
    BackendError,
    Engine,
    FailedPreconditionError,
    NotFoundError,
    Resources,
    Sandbox,
    UnsupportedError,
)
from unisandbox.api import (
    ContainerSpec,
    CreateTask,
    ExecTask,
    ProcessSpec,
    Stdio,
    SupportsPause,
    SupportsUpdate,
    TaskService,
    Terminal,
)
from unisandbox.backends.runc import RuncBackend
from unisandbox.oci import starting
from unisandbox.oci.features import find_runtimes
from unisandbox.oci.runtime import Runtime

pytestmark = [pytest.mark.anyio, pytest.mark.root]

RUNTIMES: Final = [program.name for program in find_runtimes()]


@pytest.fixture(params=[pytest.param(name) for name in ("crun", "runc", "youki")])
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    name = str(request.param)
    if name not in RUNTIMES:
        pytest.skip(f"{name} is not installed")
    async with Engine.open(backends={"runc": RuncBackend(name)}) as engine:
        yield await engine.create(isolation="runc", rootfs="host", resources=Resources(memory="128M"))


def task_of(sandbox: Sandbox) -> TaskService:
    return sandbox._entry.task


def bundle(directory: Path, *args: str, env: str = "A=1") -> str:
    """A bundle as an engine would make it: this machine's programs, no namespaces but pid and mount."""
    for name in ("rootfs", *(f"rootfs/{name}" for name in ("proc", "dev", "usr", "tmp"))):
        (directory / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (directory / "rootfs" / name).symlink_to(f"usr/{name}")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/bin:/bin", env],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro", "nosuid", "nodev"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


async def read_to_end(fd: int) -> bytes:
    os.set_blocking(fd, False)
    got = b""
    with anyio.fail_after(20):
        while True:
            await anyio.wait_readable(fd)
            piece = os.read(fd, 65536)
            if not piece:
                return got
            got += piece


async def test_a_bundle_of_somebody_else_runs_as_it_is(sandbox: Sandbox, tmp_path: Path) -> None:
    task = task_of(sandbox)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        request = CreateTask(
            "b1", bundle=bundle(tmp_path, "sh", "-c", "echo $$ $A; exit 7"), stdio=Stdio(stdout=writer)
        )
        await task.create(request)
        assert (await task.state("b1")).state == "created"
        started = await task.start("b1")
        os.close(writer)
        writer = -1
        assert await read_to_end(reader) == b"1 1\n", "its program is PID 1: no init of ours in somebody else's bundle"
        exit = await task.wait("b1")
        assert (exit.code, exit.reason) == (7, "exited")
        assert started.pid
        assert (await task.state("b1")).pid is None, "an ended process has no pid any more"
        await task.delete("b1")
        with pytest.raises(NotFoundError):
            await task.state("b1")
    finally:
        for fd in (reader, writer):
            if fd >= 0:
                os.close(fd)


@pytest.mark.parametrize("init_of_ours", [True, False], ids=["init", "runtime"])
async def test_a_deletion_waits_for_a_start_and_ends_what_it_has_started(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init_of_ours: bool
) -> None:
    task = task_of(sandbox)
    if init_of_ours:
        await sandbox.run(["true"])
        name = "main"
    else:
        name = "b1"
        await task.create(CreateTask(name, bundle=bundle(tmp_path, "sleep", "60")))
        await task.start(name)
    await task.exec(ExecTask(name, "e1", ProcessSpec(["sleep", "60"])))
    place, word = (starting, "spawn") if init_of_ours else (Runtime, "exec")
    start = getattr(place, word)
    has_begun, may_end = anyio.Event(), anyio.Event()

    async def slow(*args: Any, **options: Any) -> object:
        started = await start(*args, **options)
        has_begun.set()
        await may_end.wait()
        return started

    monkeypatch.setattr(place, word, slow)
    async with anyio.create_task_group() as group:
        group.start_soon(task.start, name, "e1")
        await has_begun.wait()
        group.start_soon(task.delete, name)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(FailedPreconditionError, match="was started before"):
            await task.start(name, "e1")
        may_end.set()
    # and what is left open is found after each test


@pytest.mark.parametrize("init_of_ours", [True, False], ids=["init", "bundle"])
async def test_a_container_that_is_deleted_while_it_is_made_leaves_nothing(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init_of_ours: bool
) -> None:
    task = task_of(sandbox)
    make = Runtime.create

    async def deleted_meanwhile(*args: Any, **options: Any) -> object:
        made = await make(*args, **options)
        await task.delete("c1")
        return made

    monkeypatch.setattr(Runtime, "create", deleted_meanwhile)
    request = CreateTask("c1", bundle=bundle(tmp_path, "sleep", "60"))
    if init_of_ours:
        request = CreateTask("c1", container=ContainerSpec("c1", process=ProcessSpec(["sleep", "60"])))
    with pytest.raises(BackendError, match="'c1'"):
        await task.create(request)
    # and what is left is found after each test


async def test_exec_in_a_bundle_goes_through_the_runtime_and_is_exact(sandbox: Sandbox, tmp_path: Path) -> None:
    task = task_of(sandbox)
    await task.create(CreateTask("b1", bundle=bundle(tmp_path, "sleep", "60")))
    await task.start("b1")
    for code in (0, 255):
        await task.exec(ExecTask("b1", f"e{code}", ProcessSpec(["sh", "-c", f"exit {code}"])))
        await task.start("b1", f"e{code}")
        assert (await task.wait("b1", f"e{code}")).code == code
        await task.delete("b1", f"e{code}")
    with pytest.raises(UnsupportedError, match="terminal"):
        await task.exec(ExecTask("b1", "t", ProcessSpec(["sh"], terminal=Terminal())))
    await task.kill("b1", signal=signal.SIGKILL)
    assert (await task.wait("b1")).signal == signal.SIGKILL


async def test_a_terminal_for_a_bundle_is_refused_before_anything_is_done(sandbox: Sandbox, tmp_path: Path) -> None:
    task = task_of(sandbox)
    with pytest.raises(UnsupportedError, match="terminal"):
        await task.create(CreateTask("b1", bundle=bundle(tmp_path, "true"), terminal=True))
    assert list(task.container_ids) == []


async def test_pause_stops_every_process_and_resume_lets_them_go_on(sandbox: Sandbox) -> None:
    task = task_of(sandbox)
    assert isinstance(task, SupportsPause)
    async with sandbox.exec(["sh", "-c", "while read x; do echo got $x; done"], stdin="pipe") as process:
        await process.stdin.send(b"1\n")
        assert await process.stdout.receive() == b"got 1\n"
        await task.pause("main")
        assert (await task.state("main")).state == "paused"
        await process.stdin.send(b"2\n")
        with anyio.move_on_after(0.2) as waited:
            await process.stdout.receive()
        assert waited.cancelled_caught, "a paused process answers nothing"
        with pytest.raises(FailedPreconditionError, match="paused"):
            await task.exec(ExecTask("main", "another", ProcessSpec(["true"])))
        await task.resume("main")
        assert await process.stdout.receive() == b"got 2\n"


async def test_pids_and_stats_tell_of_a_container(sandbox: Sandbox) -> None:
    task = task_of(sandbox)
    async with sandbox.exec(["sleep", "60"]) as process:
        assert list(await task.pids("main")) == [process.pid]
        stats = await task.stats("main")
        assert stats.pids is not None and stats.pids >= 2, "the program, and init"  # noqa: PT018
        assert stats.memory_bytes


async def test_a_limit_that_no_cgroup_has_cannot_be_changed_and_nothing_is(sandbox: Sandbox) -> None:
    task = task_of(sandbox)
    assert isinstance(task, SupportsUpdate)
    limits = Resources(memory="64M", nofile=64)
    async with sandbox.containers.add(name="c", argv=["sleep", "60"], resources=limits):
        before = (await task.stats("c")).memory_limit_bytes
        changed: list[dict[str, Any]] = [{"disk": "64M"}, {"nofile": 32}, {"core": 1}, {"cpu_seconds": 5}]
        for change in changed:
            with pytest.raises(UnsupportedError, match=next(iter(change))):
                await task.update("c", attrs.evolve(limits, memory="96M", **change))
        with pytest.raises(UnsupportedError, match="disk, nofile, core"):
            await task.update("c", Resources.unlimited())
        assert (await task.stats("c")).memory_limit_bytes == before
        await task.update("c", attrs.evolve(limits, memory="96M"))
        assert (await task.stats("c")).memory_limit_bytes == 96 << 20


async def test_kill_all_signals_all_that_a_process_has_started_and_nobody_else(sandbox: Sandbox) -> None:
    task = task_of(sandbox)
    script = (
        "trap 'echo parent' TERM; (trap 'echo child; exit' TERM; echo up; while :; do sleep 0.05; done) & wait; wait"
    )
    async with sandbox.exec(["sleep", "60"]) as other, sandbox.exec(["sh", "-c", script]) as process:
        assert await process.stdout.receive() == b"up\n"
        await task.kill("main", process._exec_id, signal=signal.SIGTERM, all=True)
        said = b""
        async for output in process:
            said += output.data if output.stream == "stdout" else b""
        assert sorted(said.split()) == [b"child", b"parent"]
        assert other.exit is None
        assert (await task.state("main", other._exec_id)).state == "running"
