"""What importing costs, and what an idle sandbox costs the host process and the keeper together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Final, cast

import anyio

from benchmarks.measure import Series
from unisandbox import Engine

# What a program does that uses the library: the package, the two names that it opens things with, and a sandbox. What
# the last one imports is imported by name, without the sandbox, whose own time is told elsewhere.
_IMPORT: Final = """
import json, time
begun = time.process_time()
{statement}
seconds = time.process_time() - begun
rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
print(json.dumps([seconds * 1e3, int(rss) * 1024 / 1e6]))
"""
_STATEMENTS: Final = {
    "import unisandbox": "import unisandbox",
    "import anyio, attrs (what we need)": "import anyio, attrs",
    "from unisandbox import Engine, Sandbox": "from unisandbox import Engine, Sandbox",
    "anyio with asyncio, attrs (what a sandbox needs)": "import attrs, anyio._backends._asyncio",
    "all that a first sandbox imports": "import importlib\nfor name in {modules}: importlib.import_module(name)",
}
_FIRST: Final = """
import asyncio, json, sys
from unisandbox import Engine

async def main():
    async with Engine.open() as engine, engine.create(rootfs="host") as sandbox:
        await sandbox.run(["/bin/true"], check=True)

asyncio.run(main())
print(json.dumps([name for name, module in sys.modules.items() if getattr(module, "__spec__", None)]))
"""
_WARM_UPS: Final = 5
_IDLE_SECONDS: Final = 120.0


def measure_imports(rounds: int, advance: Callable[[], None]) -> dict[str, Series]:
    """Milliseconds of CPU and MB of resident memory of a fresh interpreter, by statement; the byte code is there."""
    found: dict[str, list[float]] = {}
    modules = json.loads(subprocess.run([sys.executable, "-c", _FIRST], capture_output=True, check=True).stdout)
    with tempfile.TemporaryDirectory() as cache:
        # As after an installation by pip, which compiles; a working copy may never have been allowed to.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = cache
        for number in range(-1, rounds):
            for label, statement in _STATEMENTS.items():
                program = _IMPORT.format(statement=statement.format(modules=modules))
                command = [sys.executable, "-c", program]
                done = subprocess.run(command, capture_output=True, check=True, env=env)
                milliseconds, megabytes = json.loads(done.stdout)
                if number >= 0:
                    found.setdefault(f"{label}: ms", []).append(milliseconds)
                    found.setdefault(f"{label}: MB", []).append(megabytes)
            advance()
    return {name: Series(tuple(values)) for name, values in found.items()}


def private_bytes(pid: int) -> int:
    """Memory that this process alone has. Source: proc(5), /proc/PID/smaps_rollup."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(fields[1]) * 1024 for fields in lines)


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes per sandbox, by least squares."""
    found = statistics.linear_regression([float(number) for number, _ in points], [float(size) for _, size in points])
    return found.slope


def measure_idle(count: int) -> dict[str, float]:
    """kB per sandbox that is only created, of the host process and of the keeper, in a host process of its own.

    Args:
        count: of sandboxes, made one after the other.
    """
    # Not in this process: its heap has room from all that was measured before, and would seem to need nothing.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(count)], capture_output=True, check=True, timeout=_IDLE_SECONDS
    )
    return cast("dict[str, float]", json.loads(done.stdout))


async def _idle(count: int) -> dict[str, float]:
    points: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    async with Engine.open() as engine:
        # What the first ones load and cache belongs to none of them.
        for _ in range(_WARM_UPS):
            await (await engine.create(rootfs="host")).remove()
        pids = (os.getpid(), engine._core.host.keeper.pid)
        for number in range(count + 1):
            if number:
                await engine.create(rootfs="host")
            for pid, found in zip(pids, points, strict=True):
                found.append((number, private_bytes(pid)))
    host, keeper = (slope(found) / 1e3 for found in points)
    return {"host process": host, "keeper": keeper, "together": host + keeper, "sandboxes": float(count)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(anyio.run(_idle, int(sys.argv[1]))))
