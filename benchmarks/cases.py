"""What is compared with what. Times in milliseconds, throughput in MB/s (10**6 bytes)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Final

import anyio

from benchmarks.bare import Bare, Tool
from benchmarks.measure import Case, Contender, Times
from unisandbox import Engine, Sandbox

OURS: Final = "unisandbox"
TRUE: Final = ("/bin/true",)
_PAUSE: Final = 0.1
_STREAM_BYTES: Final = 256 << 20
_QUICK_STREAM_BYTES: Final = 32 << 20
_FILE: Final = b"x" * 4096


@contextlib.asynccontextmanager
async def all_cases(engine: Engine, bare: Bare, *, quick: bool) -> AsyncIterator[list[Case]]:
    """The cases, with what they need running while this is open."""
    async with engine.create(rootfs="host") as sandbox:
        with contextlib.ExitStack() as stack:
            containers = {name: stack.enter_context(bare.running(name)) for name in bare.programs if name != "youki"}
            yield [
                _first(engine, bare),
                _first(engine, bare, repeat=True),
                _first(engine, bare, pause=_PAUSE),
                _again(sandbox, bare, containers),
                _again(sandbox, bare, containers, pause=_PAUSE),
                _terminal(sandbox, bare, containers),
                _stream(sandbox, bare, _QUICK_STREAM_BYTES if quick else _STREAM_BYTES),
                _files(sandbox),
                *(_parallel(engine, bare, number) for number in ((10,) if quick else (10, 50, 100))),
            ]


def _bare(bare: Bare, tool: Tool, *, at_once: int = 1, tty: bool = False) -> Contender:
    async def once() -> Times:
        return {tool.label: bare.run(tool, at_once=at_once, tty=tty)[0] * 1e3}

    return Contender(once)


async def _timed(work: Awaitable[object]) -> float:
    begun = time.perf_counter()
    await work
    return (time.perf_counter() - begun) * 1e3


def _subprocess(argv: Sequence[str]) -> Contender:
    async def once() -> Times:
        begun = time.perf_counter()
        subprocess.run(argv, capture_output=True, check=True)  # noqa: ASYNC221 (nothing else runs in this loop)
        return {"subprocess.run": (time.perf_counter() - begun) * 1e3}

    return Contender(once)


def _tools(bare: Bare) -> list[Tool]:
    tools: list[Tool | None] = []
    if "crun" in bare.programs:
        tools += [
            bare.runtime("crun", TRUE),
            bare.runtime("crun", TRUE, how="bpf", label="crun run, BPF ready"),
        ]
    if "runc" in bare.programs:
        tools.append(bare.runtime("runc", TRUE))
    tools += [bare.podman(TRUE), bare.bwrap(TRUE), bare.plain(TRUE)]
    return [tool for tool in tools if tool is not None]


def _first(engine: Engine, bare: Bare, *, pause: float = 0.0, repeat: bool = False) -> Case:
    async def once() -> Times:
        begun = time.perf_counter()
        sandbox = await engine.create(rootfs="host")
        created = time.perf_counter()
        try:
            await sandbox.run(TRUE, check=True)
            ended = time.perf_counter()
        finally:
            await sandbox.remove()
        removed = time.perf_counter()
        return {
            OURS: (ended - begun) * 1e3,
            f"{OURS}: create": (created - begun) * 1e3,
            f"{OURS}: first run": (ended - created) * 1e3,
            f"{OURS}: remove": (removed - ended) * 1e3,
            f"{OURS} with remove": (removed - begun) * 1e3,
        }

    contenders = [Contender(once), *(_bare(bare, tool) for tool in _tools(bare)), _subprocess(TRUE)]
    if pause:
        return Case(
            "first-after-pause", "create to first result, after 100 ms of idleness", contenders, pause=pause, share=0.5
        )
    if repeat:
        title = "create to first result, right after one of the same kind"
        return Case("first-in-a-row", title, contenders, repeat=True, share=0.5)
    return Case("first", "create to the first result of /bin/true", contenders)


def _again(sandbox: Sandbox, bare: Bare, containers: dict[str, str], pause: float = 0.0) -> Case:
    async def once() -> Times:
        return {OURS: await _timed(sandbox.run(TRUE, check=True))}

    contenders = [Contender(once)]
    contenders += [_bare(bare, bare.executed(name, container, TRUE)) for name, container in containers.items()]
    contenders += [_bare(bare, bare.plain(TRUE)), _subprocess(TRUE)]
    if pause:
        return Case(
            "again-after-pause",
            "another run in a running sandbox, after 100 ms of idleness",
            contenders,
            pause=pause,
            share=0.5,
        )
    return Case("again", "another run of /bin/true in a running sandbox", contenders)


def _terminal(sandbox: Sandbox, bare: Bare, containers: dict[str, str]) -> Case:
    async def session() -> None:
        async with sandbox.exec(TRUE, tty=True) as process:
            async for _ in process:
                pass
            await process.wait()

    async def once() -> Times:
        return {OURS: await _timed(session())}

    contenders = [Contender(once)]
    contenders += [
        _bare(bare, bare.executed(name, container, TRUE, tty=True), tty=True) for name, container in containers.items()
    ]
    return Case("terminal", "exec of /bin/true with a terminal", contenders, share=0.5)


def _stream(sandbox: Sandbox, bare: Bare, size: int) -> Case:
    argv = ("/usr/bin/head", "-c", str(size), "/dev/zero")

    async def ours() -> Times:
        begun = time.perf_counter()
        got = 0
        async with sandbox.exec(argv) as process:
            async for output in process:
                got += len(output.data)
            await process.wait()
        return {OURS: _rate(got, size, begun)}

    async def pipe() -> Times:
        begun = time.perf_counter()
        got = 0
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 (nothing else runs here)
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                got += len(piece)
        return {"subprocess.Popen": _rate(got, size, begun)}

    contenders = [Contender(ours), Contender(pipe)]
    if "crun" in bare.programs:
        tool = bare.runtime("crun", argv)

        async def crun() -> Times:
            seconds, got = bare.run(tool)
            return {tool.label: got / 1e6 / seconds}

        contenders.append(Contender(crun))
    return Case(
        "stream", f"output of {size >> 20} MiB, start and end included", contenders, unit="MB/s", most=10, warm_ups=1
    )


def _rate(got: int, size: int, begun: float) -> float:
    assert got == size, f"{size} bytes were written, {got} came"
    return got / 1e6 / (time.perf_counter() - begun)


def _files(sandbox: Sandbox) -> Case:
    async def ours() -> Times:
        return {
            f"{OURS}: write": await _timed(sandbox.files.write("/tmp/bench", _FILE)),
            f"{OURS}: read": await _timed(sandbox.files.read("/tmp/bench")),
        }

    async def plain() -> Times:
        # What an atomic write is: a temporary file, renamed.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            path = os.path.join(directory, "bench")
            begun = time.perf_counter()
            with open(f"{path}.new", "wb") as file:  # noqa: ASYNC230 (in memory)
                file.write(_FILE)
            os.rename(f"{path}.new", path)
            written = time.perf_counter()
            with open(path, "rb") as file:  # noqa: ASYNC230
                file.read()
            read = time.perf_counter()
        return {"plain file: write": (written - begun) * 1e3, "plain file: read": (read - written) * 1e3}

    return Case("files", "4 KiB to and from a file", [Contender(ours), Contender(plain)])


def _parallel(engine: Engine, bare: Bare, number: int) -> Case:
    async def ours() -> Times:
        sandboxes: list[Sandbox] = []

        async def one() -> None:
            sandbox = await engine.create(rootfs="host")
            sandboxes.append(sandbox)
            await sandbox.run(TRUE, check=True)

        begun = time.perf_counter()
        try:
            await _at_once(one, number)
            ended = time.perf_counter()
        finally:
            async with anyio.create_task_group() as group:
                for sandbox in sandboxes:
                    group.start_soon(sandbox.remove)
        removed = time.perf_counter()
        return {OURS: (ended - begun) * 1e3, f"{OURS} with remove": (removed - begun) * 1e3}

    contenders = [Contender(ours)]
    contenders += [
        _bare(bare, bare.runtime(name, TRUE), at_once=number) for name in ("crun", "runc") if name in bare.programs
    ]
    return Case(
        f"parallel-{number}",
        f"{number} at the same time, to the last result",
        contenders,
        share=0.2 if number <= 10 else 0.1,
        warm_ups=1,
        most=20,
    )


async def _at_once(work: Callable[[], Coroutine[None, None, object]], number: int) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(number):
            group.start_soon(work)
