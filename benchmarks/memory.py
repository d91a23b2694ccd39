"""What importing costs, and what an idle sandbox costs the host process and the keeper together."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Final

from benchmarks.measure import Series
from unisandbox import Engine, Sandbox

# What a program does that uses the library: the package, and the two names that it opens things with.
_IMPORT: Final = """
import json, time
begun = time.perf_counter()
{statement}
seconds = time.perf_counter() - begun
rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
print(json.dumps([seconds * 1e3, int(rss) * 1024 / 1e6]))
"""
_STATEMENTS: Final = {
    "import unisandbox": "import unisandbox",
    "from unisandbox import Engine, Sandbox": "from unisandbox import Engine, Sandbox",
}


def measure_imports(rounds: int, advance: Callable[[], None]) -> dict[str, Series]:
    """Milliseconds and MB of resident memory of a fresh interpreter, by statement."""
    found: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        for label, statement in _STATEMENTS.items():
            done = subprocess.run(
                [sys.executable, "-c", _IMPORT.format(statement=statement)], capture_output=True, check=True
            )
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


async def measure_idle(
    engine: Engine, pids: tuple[int, int], count: int, advance: Callable[[], None]
) -> dict[str, float]:
    """kB per sandbox that is only created, of the host process and of the keeper.

    Args:
        engine: with nothing in it.
        pids: of the host process and of its keeper.
        count: of sandboxes, made one after the other.
        advance: called after each.
    """
    points: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    sandboxes: list[Sandbox] = []
    try:
        for number in range(count + 1):
            if number:
                sandboxes.append(await engine.create(rootfs="host"))
            for pid, found in zip(pids, points, strict=True):
                found.append((number, private_bytes(pid)))
            advance()
    finally:
        for sandbox in sandboxes:
            await sandbox.remove()
    host, keeper = (slope(found) / 1e3 for found in points)
    return {"host process": host, "keeper": keeper, "together": host + keeper, "sandboxes": float(count)}
