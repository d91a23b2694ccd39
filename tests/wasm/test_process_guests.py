"""Guests in processes of their own, through the SDK: what they may, what they may not, and how they end."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from tests.wasm.sandboxes import ITS_OWN, OPENS, pids_of

from unisandbox import (
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    Network,
    Resources,
    Rootfs,
    Sandbox,
    Terminal,
    UnsupportedError,
)
from unisandbox.api import ContainerSpec, CreateTask, ExecTask, Exit, ProcessSpec, SandboxError
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.wasm.process import WasmProcessBackend, pool
from unisandbox.backends.wasm.process.report import new_report, told
from unisandbox.backends.wasm.process.task import WasmProcessTasks
from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.engine.registry import Backend
from unisandbox.sandbox import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MIB = 1 << 20

# Writes its memory's size in pages as its exit code after asking for 100 more, none of which it touches.
GROWS = """
(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
  (func (export "_start")
    (if (i32.eq (memory.grow (i32.const 10000)) (i32.const -1)) (then (unreachable))) (call $exit (i32.const 3))))
"""
LIBRARY = '(module (func (export "answer") (result i32) i32.const 42))'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with guests in it."""
    directory = tmp_path / "root"
    directory.mkdir()
    GuestPrograms().make_root(directory)
    (directory / "bin" / "grows.wat").write_text(GROWS)
    (directory / "bin" / "library.wat").write_text(LIBRARY)
    return directory


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    """One with this backend and the one that it builds on."""
    async with Engine.open(backends={"wasm+process": WasmProcessBackend(), "runc": RuncBackend()}) as opened:
        yield opened


@pytest.fixture
async def sandbox(engine: Engine, root: Path) -> Sandbox:
    """One with the usual limits."""
    return await engine.create(isolation="wasm+process", rootfs=root)


async def test_ends_are_exact(sandbox: Sandbox) -> None:
    for code in (0, 1, 7, 126, 134, 137, 255):
        end = (await sandbox.run(["exit", str(code)])).exit
        assert (end.code, end.signal, end.reason, end.detail) == (code, None, "exited", "")
    end = (await sandbox.run(["abort"])).exit
    assert (end.code, end.signal, end.reason) == (134, None, "trap")
    assert end.detail.startswith("unreachable\n")
    assert "do_abort" in end.detail
    end = (await sandbox.run(["divide"])).exit
    assert (end.code, end.reason) == (134, "trap")
    assert end.detail.startswith("integer_division_by_zero\n")


async def test_each_deadly_signal_ends_a_guest_with_its_number(sandbox: Sandbox) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        async with sandbox.exec(["do", "out", "go", ";", "sleep", "1000"]) as process:
            assert await process.stdout.receive() == b"go"
            await process.signal(number)
            end = await process.wait()
            assert (end.code, end.signal, end.reason) == (128 + number, number, "signaled")


async def test_a_spinning_guest_is_killed_at_once_and_its_timeout_holds(sandbox: Sandbox) -> None:
    async with sandbox.exec(["do", "out", "go", ";", "spin"]) as process:
        assert await process.stdout.receive() == b"go"
        begun = time.monotonic()
        await process.kill()
        assert (await process.wait()).signal == signal.SIGKILL
        assert time.monotonic() - begun < 20


async def test_memory_that_is_refused_and_memory_that_the_kernel_takes_are_both_oom(engine: Engine, root: Path) -> None:
    small = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(memory="96M"))
    refused = (await small.run(["grows.wat"])).exit  # 640 MB: more than all that there may be
    assert (refused.code, refused.signal, refused.reason, refused.oom_kills) == (137, None, "oom", 1)
    assert refused.detail.startswith("unreachable\n")
    killed = (await small.run(["eat"])).exit
    assert (killed.code, killed.reason) == (137, "oom")
    both = [await small.exec(["do", "fit", str(40 * MIB), ";", "sleep", "1000"]) for _ in range(2)]
    ends = []
    with anyio.move_on_after(20):
        async with anyio.create_task_group() as group:

            async def first_end(index: int) -> None:
                ends.append(await both[index].wait())
                group.cancel_scope.cancel()

            group.start_soon(first_end, 0)
            group.start_soon(first_end, 1)
    assert [(end.signal, end.reason) for end in ends][:1] == [(9, "oom")]
    for process in both:
        await process.aclose()
    assert (await small.run(["true"])).exit_code == 0


async def test_processor_time_is_limited_for_each_guest(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(cpu_seconds=0.3))
    begun = time.monotonic()
    end = (await sandbox.run(["spin"], timeout=30)).exit
    assert (end.code, end.signal, end.reason) == (137, None, "cpu")
    assert time.monotonic() - begun > 0.3
    assert (await sandbox.run(["sleep", "0.4"])).exit_code == 0


async def test_fuel_ends_a_guest(root: Path) -> None:
    backends: dict[str, Backend] = {"wasm+process": WasmProcessBackend(fuel=50_000_000), "runc": RuncBackend()}
    async with Engine.open(backends=backends) as engine:
        sandbox = await engine.create(isolation="wasm+process", rootfs=root)
        assert (await sandbox.run(["echo", "x"])).stdout == b"x\n"
        end = (await sandbox.run(["spin"])).exit
        assert (end.code, end.reason) == (137, "fuel")


async def test_streams_carry_everything_and_a_closed_output_ends_the_writer(sandbox: Sandbox) -> None:
    data = os.urandom(3 * MIB)
    assert (await sandbox.run(["cat"], input=data, max_output=4 * MIB)).stdout == data
    done = await sandbox.run(["do", "out", "one", ";", "err", "two", ";", "exit", "4"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"one", b"two", 4)
    async with sandbox.exec(["flood"]) as process:
        await process.stdout.receive()
        await process.stdout.aclose()
        assert (await process.wait()).signal == signal.SIGPIPE


async def test_guests_share_files_with_each_other_and_with_us(sandbox: Sandbox, root: Path) -> None:
    await sandbox.files.write("/tmp/a", b"ours")
    assert (await sandbox.run(["cat", "/tmp/a"])).stdout == b"ours"
    async with sandbox.exec(["do", "read", ";", "cat", "/tmp/b"], stdin="pipe") as reader:
        assert (await sandbox.run(["store", "/tmp/b", "theirs"])).exit_code == 0
        await reader.stdin.send(b"go\n")
        assert (await reader.wait()).code == 0
        written = b"".join([output.data async for output in reader])
        assert written.endswith(b"theirs")
    assert await sandbox.files.read("/tmp/b") == b"theirs"
    assert not (root / "tmp" / "b").exists()
    assert (await sandbox.run(["pwd"], cwd="/tmp")).stdout.strip() == b"/tmp"


async def test_mounts_are_as_asked_for_wherever_they_are(engine: Engine, root: Path, tmp_path: Path) -> None:
    for name in ("read", "write", "usr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here").write_text(name)
    mounts = [
        Mount.bind(tmp_path / "read", "/data/read"),
        Mount.bind(tmp_path / "write", "/data/write", readonly=False),
        # Where the worker's own container has its programs.
        Mount.bind(tmp_path / "usr", "/usr/share"),
        Mount.tmpfs("/run", size="1M"),
    ]
    sandbox = await engine.create(isolation="wasm+process", rootfs=root, mounts=mounts)
    for name, path in (("read", "/data/read/here"), ("write", "/data/write/here"), ("usr", "/usr/share/here")):
        assert (await sandbox.run(["cat", path])).text == name
    assert (await sandbox.run(["store", "/data/write/new", "x"])).exit_code == 0
    assert (tmp_path / "write" / "new").read_text() == "x"
    refused = await sandbox.run(["store", "/data/read/new", "x"])
    assert refused.exit_code != 0
    assert not (tmp_path / "read" / "new").exists()
    assert (await sandbox.run(["ls", "/run"])).stdout == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["read", "root", "usr", "write"]
    assert sorted(path.name for path in (tmp_path / "usr").iterdir()) == ["here"]


async def test_a_read_only_root_is_one(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm+process", rootfs=Rootfs.dir(root, readonly=True))
    assert (await sandbox.run(["store", "/bin/new", "x"])).exit_code != 0
    assert (await sandbox.run(["store", "/tmp/new", "x"])).exit_code == 0


async def test_a_guest_sees_nothing_of_its_container(sandbox: Sandbox) -> None:
    for path in ("/proc", "/sys", "/dev", "/usr"):
        assert (await sandbox.run(["ls", path])).stdout == b""
    for path in ("/run/unisandbox", "/proc/self", "/unisandbox", "/../run/unisandbox", "/lib/x86_64-linux-gnu"):
        assert (await sandbox.run(["ls", path])).exit_code != 0
    assert (await sandbox.run(["env"])).stdout.split(b"\0") == [
        b"PATH=/usr/local/bin:/usr/bin:/bin",
        b"HOME=/home",
        b"LANG=C.UTF-8",
        b"",
    ]


async def test_what_cannot_be_started_says_why_and_leaves_nothing_running(sandbox: Sandbox) -> None:
    for argv, cwd, code in (
        (["missing"], None, 127),
        (["/etc/passwd"], None, 126),
        (["/usr"], None, 126),
        (["true"], "/no/such", 126),
        (["library.wat"], None, 126),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            await sandbox.run(argv, cwd=cwd)
        assert caught.value.exit_code == code
    assert (await sandbox.metrics()).pids == 0
    assert (await sandbox.run(["true"])).exit_code == 0


async def test_without_a_user_namespace_files_are_of_the_hosts_root(engine: Engine, root: Path, tmp_path: Path) -> None:
    mount = Mount.bind(tmp_path, "/d", readonly=False, idmap=False)
    async with engine.create(isolation="wasm+process", rootfs=root, mounts=[mount], userns="host") as sandbox:
        assert (await sandbox.run(["store", "/d/new", "made"])).exit_code == 0
        assert (await sandbox.run(["cat", "/d/new"])).stdout == b"made"
    assert (tmp_path / "new").stat().st_uid == 0


async def test_what_wasm_cannot_is_refused_before_anything_is_done(engine: Engine, root: Path, tmp_path: Path) -> None:
    async def create(**options: object) -> None:
        await engine.create(isolation="wasm+process", **{"rootfs": root, **options})  # type: ignore[arg-type]

    for options in (
        {"rootfs": "host"},
        {"network": Network.host()},
        {"user": "1000"},
        {"hostname": "x"},
        {"share_pid": True},
        {"resources": Resources(core=1)},
    ):
        with pytest.raises(UnsupportedError):
            await create(**options)
    assert await engine.list() == []
    sandbox = await engine.create(isolation="wasm+process", rootfs=root)
    with pytest.raises(UnsupportedError):
        await sandbox.exec(["true"], tty=Terminal())
    with pytest.raises(UnsupportedError):
        await sandbox.run(["true"], user=1000)


async def test_pids_counts_guests_and_no_worker_that_waits(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(pids=2))
    await sandbox.run(["true"])  # and a worker waits from now on
    assert (await sandbox.metrics()).pids == 0
    guests = [await sandbox.exec(["sleep", "1000"]) for _ in range(2)]
    metrics = await sandbox.metrics()
    assert (metrics.pids, metrics.pids_limit) == (2, 2)
    with pytest.raises(FailedPreconditionError, match="as many as its limit"):
        await sandbox.run(["true"])
    for guest in guests:
        await guest.kill()
        await guest.wait()
    assert (await sandbox.run(["true"])).exit_code == 0


async def test_no_more_guests_begin_at_once_than_pids_allows(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(pids=2))
    began: list[Process] = []
    refused = []

    async def begin() -> None:
        try:
            began.append(await sandbox.exec(["sleep", "1000"]))
        except FailedPreconditionError as error:
            refused.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(begin)
    assert (len(began), len(refused)) == (2, 3)
    for process in began:
        await process.kill()
        await process.wait()
    assert (await sandbox.run(["true"])).exit_code == 0


async def test_sandboxes_whose_workers_are_slow_hold_up_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PROCESSORS", 1)
    began = []

    async def begin(sandbox: Sandbox) -> None:
        await sandbox.run(["true"])
        began.append(sandbox)

    backends: dict[str, Backend] = {"wasm+process": WasmProcessBackend(), "runc": RuncBackend()}
    async with Engine.open(backends=backends) as engine, anyio.create_task_group() as group:
        other = await engine.create(isolation="wasm+process", rootfs=root)
        await other.run(["true"])  # its module is compiled from now on
        for _ in range(2):
            slow = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(cpu=0.01))
            for _ in range(4):
                group.start_soon(begin, slow)
        with anyio.fail_after(20):
            while len(pids_of("process/worker.py")) < 3:  # two are slow, and the other sandbox's waits
                await anyio.sleep(0.01)
        for _ in range(3):
            assert (await other.run(["true"])).exit_code == 0
        assert began == []
        group.cancel_scope.cancel()


@pytest.fixture
async def tasks(sandbox: Sandbox) -> WasmProcessTasks:
    """The task service of a sandbox with a container `c`."""
    assert sandbox._entry is not None
    task = sandbox._entry.task
    assert isinstance(task, WasmProcessTasks)
    await task.create(CreateTask("c", container=ContainerSpec("c")))
    await task.start("c")
    return task


async def test_of_two_starts_of_one_process_one_is_refused(tasks: WasmProcessTasks) -> None:
    await tasks.exec(ExecTask("c", "e", ProcessSpec(["exit", "7"])))
    refused = []

    async def start() -> None:
        try:
            await tasks.start("c", "e")
        except FailedPreconditionError as error:
            refused.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        group.start_soon(start)
    assert len(refused) == 1
    assert (await tasks.wait("c", "e")).code == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_what_was_killed_before_its_start_is_not_started(tasks: WasmProcessTasks, number: signal.Signals) -> None:
    await tasks.exec(ExecTask("c", "e", ProcessSpec(["sleep", "1000"])))
    await tasks.kill("c", "e", signal=signal.SIGWINCH)  # does nothing
    await tasks.kill("c", "e", signal=number)
    with pytest.raises(FailedPreconditionError, match="ended before its start"):
        await tasks.start("c", "e")
    assert await tasks.running() == 0


async def test_what_is_deleted_while_it_runs_is_ended(tasks: WasmProcessTasks) -> None:
    await tasks.exec(ExecTask("c", "e", ProcessSpec(["sleep", "1000"])))
    await tasks.start("c", "e")
    with anyio.fail_after(20):
        end = await tasks.delete("c", "e")
    assert end is not None
    assert (end.signal, end.reason) == (signal.SIGKILL, "signaled")
    assert await tasks.running() == 0
    assert await tasks.delete("c", "e") is None


@pytest.mark.parametrize("how", ["kill", "delete", "delete its container"])
async def test_an_end_that_comes_during_a_start_is_not_lost(tasks: WasmProcessTasks, how: str) -> None:
    inner = tasks._inner
    alone = len(await inner.pids("c"))
    for step in range(10):
        if "c" not in tasks.container_ids:
            await tasks.create(CreateTask("c", container=ContainerSpec("c")))
            await tasks.start("c")
        exec_id = f"e{step}"
        await tasks.exec(ExecTask("c", exec_id, ProcessSpec(["sleep", "1000"])))

        async def start(exec_id: str = exec_id) -> None:
            with contextlib.suppress(SandboxError):  # it was overtaken
                await tasks.start("c", exec_id)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(start)
                await anyio.sleep(0.02 * step)  # another moment of it each time
                if how == "kill":
                    await tasks.kill("c", exec_id, signal=signal.SIGTERM)
                else:
                    await tasks.delete("c", exec_id if how == "delete" else "")
            while await tasks.running():
                await anyio.sleep(0.01)
    with anyio.fail_after(20):
        tasks.release_idle()
        while "c" in tasks.container_ids and len(await inner.pids("c")) > alone:
            await anyio.sleep(0.01)


async def test_guests_are_paused_and_go_on(sandbox: Sandbox) -> None:
    async with sandbox.exec(["cat"], stdin="pipe") as process:
        await process.stdin.send(b"1")
        assert await process.stdout.receive() == b"1"
        await sandbox.pause()
        await process.stdin.send(b"2")
        with anyio.move_on_after(0.3) as scope:
            await process.stdout.receive()
        assert scope.cancelled_caught
        await sandbox.resume()
        assert await process.stdout.receive() == b"2"


async def test_a_launched_guest_is_the_main_process_with_its_logs(sandbox: Sandbox) -> None:
    container = await sandbox.launch(["do", "out", "said", ";", "exit", "9"])
    assert (await container.wait()).code == 9
    assert await container.logs() == b"said"


async def test_a_cancelled_start_leaves_no_guest(sandbox: Sandbox) -> None:
    await sandbox.run(["true"])
    for step in range(12):
        with anyio.move_on_after(0.003 * step):
            await sandbox.run(["sleep", "1000"])
    with anyio.fail_after(10):
        while (await sandbox.metrics()).pids:
            await anyio.sleep(0.01)
    assert (await sandbox.run(["echo", "well"])).stdout == b"well\n"


@pytest.mark.parametrize(
    "words",
    [
        *(b"", b"{", b"[]", b'{"reason": "trap"}', b'{"reason": ["trap"], "detail": ""}', b"[" * 30_000),
        *(b'{"reason": "lost", "detail": ""}', b'{"reason": "oom", "detail": ""}'),
        b'{"reason": "signaled", "detail": "x"}',
    ],
)
def test_a_report_that_does_not_go_with_the_end_says_nothing(words: bytes) -> None:
    report = new_report()
    try:
        os.pwrite(report, words, 0)
        for end in (Exit(code=134), Exit(code=7), Exit(code=137, signal=9, reason="signaled")):
            assert told(end, report) == end
        with pytest.raises(OSError, match="permitted"):
            os.ftruncate(report, 1 << 30)
    finally:
        os.close(report)


async def test_open_files_are_limited(engine: Engine, root: Path) -> None:
    (root / "opens.wat").write_text(OPENS)
    for nofile, most in ((16, 16), (4096, 256)):
        limits = Resources(nofile=nofile)
        async with engine.create(isolation="wasm+process", rootfs=root, resources=limits) as sandbox:
            assert (await sandbox.run(["opens.wat"])).exit_code == most - ITS_OWN


def test_what_a_worker_imports_is_what_a_guest_needs() -> None:
    """Half of a worker's start are imports, and its container shows it these two packages alone."""
    program = (
        "import sys, unisandbox.backends.wasm.domain, unisandbox.backends.wasm.guest\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('anyio', 'asyncio', 'attr', 'unisandbox.'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    room = "unisandbox.backends.wasm"
    parts = (
        "budget",
        "calls",
        "config",
        "domain",
        "guest",
        "memory",
        "running",
        "spec",
        "streams",
        "thread",
        "threads",
    )
    assert imported == {
        "unisandbox.api",
        "unisandbox.api.errors",
        "unisandbox.backends",
        room,
        *(f"{room}.{part}" for part in (*parts, "trampoline", "waiting")),
    }
