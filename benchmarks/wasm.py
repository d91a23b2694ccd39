"""Wasm sandboxes against wasmtime-py alone and against a process for each program. See `cases` for the units."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, cast

import anyio

from benchmarks.bare_wasm import PROGRAMS, BareWasm
from benchmarks.measure import Case, Contender, Times
from benchmarks.memory import private_bytes
from unisandbox import Engine, Process, Resources, Sandbox

OURS: Final = "unisandbox"
BARE: Final = "wasmtime-py alone"
PROCESS: Final = "subprocess"
_STARTS: Final = 200
_QUICK_STARTS: Final = 40
_PROCESSES: Final = 4  # each takes as long as a hundred guests
_SPINNING: Final = 4 * (os.cpu_count() or 1)
_LOOKS: Final = 10
_MEMORY_SECONDS: Final = 120.0
_BARE_GUESTS: Final = 100  # each more of them makes wasmtime's own calls for files slower, in the whole process
_AT_ONCE: Final = 8


@contextlib.asynccontextmanager
async def wasm_cases(engine: Engine, *, quick: bool) -> AsyncIterator[list[Case]]:
    """The cases, with what they need there while this is open."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "root")
        _make_root(root)
        bare = BareWasm(PROGRAMS["hello"])
        compiled = _compiled(bare, directory)
        async with engine.create(isolation="wasm", rootfs=root, resources=Resources(pids=1000)) as sandbox:
            yield [
                _first(engine, root, bare, Path(directory), compiled),
                _starts(sandbox, bare, Path(directory), compiled, _QUICK_STARTS if quick else _STARTS),
                _kill(sandbox),
                _busy(sandbox),
            ]


def _make_root(root: Path) -> None:
    root.mkdir()
    for name, text in PROGRAMS.items():
        (root / f"{name}.wat").write_text(text)


def _compiled(bare: BareWasm, directory: str) -> Path:
    path = Path(directory, "hello.compiled")
    path.write_bytes(bare.serialized())
    return path


def _first(engine: Engine, root: Path, bare: BareWasm, directory: Path, compiled: Path) -> Case:
    async def ours() -> Times:
        begun = time.perf_counter()
        sandbox = await engine.create(isolation="wasm", rootfs=root)
        created = time.perf_counter()
        try:
            process = await sandbox.exec(["hello.wat"])
            await _first_output(process)
            said = time.perf_counter()
            await process.wait()
            await process.aclose()
        finally:
            removing = time.perf_counter()
            await sandbox.remove()
        removed = time.perf_counter()
        return {
            OURS: (said - begun) * 1e3,
            f"{OURS}: create": (created - begun) * 1e3,
            f"{OURS}: exec to output": (said - created) * 1e3,
            f"{OURS}: remove": (removed - removing) * 1e3,
        }

    async def alone() -> Times:
        output = directory / "output"
        begun = time.perf_counter()
        bare.run(str(root), str(output))
        assert output.read_bytes() == b"hello\n"
        return {BARE: (time.perf_counter() - begun) * 1e3}

    async def process() -> Times:
        return {PROCESS: _in_processes(compiled, 1)}

    contenders = [Contender(ours), Contender(alone), Contender(process)]
    return Case("wasm-first", "Wasm: create to the first output of a module that is known", contenders)


def _in_processes(compiled: Path, number: int) -> float:
    """Milliseconds for each of them, as many at the same time as there are processors."""
    argv = [sys.executable, "-m", "benchmarks.bare_wasm", str(compiled)]
    begun = time.perf_counter()
    running: list[subprocess.Popen[bytes]] = []
    for _ in range(number):
        if len(running) >= (os.cpu_count() or 1):
            assert running.pop(0).communicate()[0] == b"hello\n"
        running.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
    for each in running:
        assert each.communicate()[0] == b"hello\n"
    return (time.perf_counter() - begun) / number * 1e3


def _starts(sandbox: Sandbox, bare: BareWasm, directory: Path, compiled: Path, number: int) -> Case:
    async def ours() -> Times:
        async def some() -> None:
            for _ in range(number // _AT_ONCE):
                await sandbox.run(["hello.wat"], check=True)

        begun = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(_AT_ONCE):
                group.start_soon(some)
        return {OURS: (time.perf_counter() - begun) / (number // _AT_ONCE * _AT_ONCE) * 1e3}

    async def alone() -> Times:
        begun = time.perf_counter()
        for _ in range(number):
            bare.run(str(directory / "root"), str(directory / "output"))
        return {BARE: (time.perf_counter() - begun) / number * 1e3}

    async def process() -> Times:
        return {PROCESS: _in_processes(compiled, _PROCESSES)}

    contenders = [Contender(ours), Contender(alone), Contender(process)]
    title = f"Wasm: {number} runs in one sandbox, {_AT_ONCE} at a time; for each of them"
    return Case("wasm-starts", title, contenders, share=0.3, warm_ups=1)


def _kill(sandbox: Sandbox) -> Case:
    async def ours() -> Times:
        return {OURS: await _killed(sandbox)}

    async def process() -> Times:
        return {PROCESS: _process_killed()}

    return Case("wasm-kill", "Wasm: kill to the known end, of one that waits for input",
                [Contender(ours), Contender(process)], share=4)  # fmt: skip


def _busy(sandbox: Sandbox) -> Case:
    async def ours() -> Times:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(_SPINNING):
                spinning = await stack.enter_async_context(sandbox.exec(["spin.wat"]))
                await _first_output(spinning)
            killed = await _killed(sandbox)
            slowest = max([await _timed(sandbox.status) for _ in range(_LOOKS)])
        return {f"{OURS}: kill": killed, f"{OURS}: slowest of {_LOOKS} status()": slowest}

    async def process() -> Times:
        with contextlib.ExitStack() as stack:
            for _ in range(_SPINNING):
                stack.enter_context(_spinning_process())
            return {f"{PROCESS}: kill": _process_killed()}

    title = f"Wasm: kill and status while {_SPINNING} others spin"
    return Case("wasm-busy", title, [Contender(ours), Contender(process)], share=2)


async def _first_output(process: Process) -> None:
    assert process.stdout is not None
    assert await process.stdout.receive() == b"hello\n"


async def _killed(sandbox: Sandbox) -> float:
    async with sandbox.exec(["wait.wat"], stdin="pipe") as process:
        await _first_output(process)
        begun = time.perf_counter()
        await process.kill()
        assert (await process.wait()).signal == signal.SIGKILL
        return (time.perf_counter() - begun) * 1e3


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await work()
    return (time.perf_counter() - begun) * 1e3


def _process_killed() -> float:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        begun = time.perf_counter()
        process.kill()
        process.wait()
        return (time.perf_counter() - begun) * 1e3


@contextlib.contextmanager
def _spinning_process() -> Iterator[None]:
    with subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure_guests(count: int) -> dict[str, float]:
    """kB of private memory for each guest that waits for its input, in host processes of their own.

    Args:
        count: of guests at the same time.
    """
    found: dict[str, float] = {}
    for who in (OURS, BARE):
        # Not in this process: its heap has room from all that was measured before, and would seem to need nothing.
        command = [sys.executable, "-m", "benchmarks.wasm", who, str(count)]
        done = subprocess.run(command, capture_output=True, check=True, timeout=_MEMORY_SECONDS)
        found[who] = cast("float", json.loads(done.stdout))
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)  # it runs
        found["a process (cat)"] = private_bytes(process.pid) / 1e3
        process.kill()
    return found


async def _ours(count: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "root")
        _make_root(root)
        async with (
            Engine.open() as engine,
            engine.create(isolation="wasm", rootfs=root, resources=Resources(pids=2 * count, memory=None)) as sandbox,
        ):

            async def wait() -> None:
                await _first_output(await sandbox.exec(["wait.wat"], stdin="pipe"))

            await wait()
            before = private_bytes(os.getpid())
            for _ in range(count):
                await wait()
            after = private_bytes(os.getpid())
            await sandbox.kill()
            return (after - before) / count / 1e3


def _alone(count: int) -> float:
    bare = BareWasm(PROGRAMS["wait"])
    with tempfile.TemporaryDirectory() as directory:
        before = private_bytes(os.getpid())
        bare.blocked(count, directory)
        return (private_bytes(os.getpid()) - before) / count / 1e3


def main() -> None:
    """Measure one of them: OURS or BARE, and how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    who, count = sys.argv[1], int(sys.argv[2])
    each = anyio.run(_ours, count) if who == OURS else _alone(min(count, _BARE_GUESTS))
    sys.stdout.write(json.dumps(each))
    sys.stdout.flush()
    if who == BARE:
        os._exit(0)  # nothing ends its guests


if __name__ == "__main__":
    main()
