"""What a crash costs: how long adopting, ending and freeing takes by the number of sandboxes; what durability costs.

    python -m benchmarks.recovery [--counts 1,50,500] [--json]

Every crash is a real one: a process of its own opens the engine and is ended by SIGKILL. Each sandbox runs one process.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Final

import anyio

from benchmarks.memory import private_bytes
from unisandbox import Engine, Resources

_HOST: Final = """
import anyio, sys
from unisandbox import Engine, Resources

async def main():
    engine = await Engine.open(sys.argv[1], policy=sys.argv[2])
    limit = anyio.CapacityLimiter(8)

    async def one(number):
        async with limit:
            sandbox = await engine.create(name=f"s{number}", resources=Resources(memory="64M"))
            await sandbox.exec(["sleep", "100000"])

    async with anyio.create_task_group() as group:
        for number in range(int(sys.argv[3])):
            group.start_soon(one, number)
    print(engine._core.host.keeper.pid, flush=True)
    await anyio.sleep_forever()

anyio.run(main)
"""
_CREATES: Final = 40
_GONE_SECONDS: Final = 120.0


class _Host:
    """A process with an engine and `count` sandboxes."""

    def __init__(self, state: str, policy: str, count: int) -> None:
        command = [sys.executable, "-c", _HOST, state, policy, str(count)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the host program with {count} sandboxes ended with {self.process.wait()}")
        self.keeper = int(line)
        self.keeper_pidfd = os.pidfd_open(self.keeper)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill_keeper(self) -> None:
        signal.pidfd_send_signal(self.keeper_pidfd, signal.SIGKILL)
        self.wait_keeper()

    def wait_keeper(self) -> None:
        poll = select.poll()
        poll.register(self.keeper_pidfd, select.POLLIN)
        if not poll.poll(_GONE_SECONDS * 1000):
            raise TimeoutError(f"keeper {self.keeper} did not end")

    def close(self) -> None:
        os.close(self.keeper_pidfd)


def _place() -> str:
    return tempfile.mkdtemp(prefix="recovery-", dir="/var/tmp")


async def _open_and_close(state: str) -> tuple[float, int]:
    """Seconds that opening takes with its recovery, and how many sandboxes live afterwards; all are removed then."""
    begun = time.perf_counter()
    async with Engine.open(state) as engine:
        took = time.perf_counter() - begun
        return took, len(await engine.list())


def measure(count: int) -> dict[str, float]:
    """All crashes with so many sandboxes: seconds, and bytes."""
    row: dict[str, float] = {}
    state = _place()
    try:
        host = _Host(state, "keep", count)
        row["keeper_private_bytes"] = float(private_bytes(host.keeper))
        host.kill()
        row["adopt"], alive = anyio.run(_open_and_close, state)
        if alive != count:
            raise RuntimeError(f"{alive} of {count} sandboxes were adopted")
        host.close()

        host = _Host(state, "keep", count)
        host.kill()
        host.kill_keeper()
        row["free_after_both"], alive = anyio.run(_open_and_close, state)
        host.close()

        host = _Host(state, "stop", count)
        begun = time.perf_counter()
        host.kill()
        host.wait_keeper()
        row["gone_by_policy_stop"] = time.perf_counter() - begun
        host.close()
        row["open_after_that"], alive = anyio.run(_open_and_close, state)
        if alive:
            raise RuntimeError(f"{alive} sandboxes were left")
    finally:
        shutil.rmtree(state, ignore_errors=True)
    return row


async def _creates(engine: Engine, number: int) -> float:
    begun = time.perf_counter()
    sandbox = await engine.create(name=f"d{number}", resources=Resources(memory="64M"))
    took = time.perf_counter() - begun
    await sandbox.remove()
    return took


async def measure_durability() -> dict[str, float]:
    """Medians of create, in turns: state on a disk with fsync, on the same disk without, and a private engine."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as synced, tempfile.TemporaryDirectory(dir="/var/tmp") as plain:
        async with Engine.open(synced) as first, Engine.open(plain) as second, Engine.open() as third:
            second._core.records._durable = False
            times: dict[str, list[float]] = {"with fsync": [], "without fsync": [], "private engine": []}
            for number in range(_CREATES + 2):
                for name, engine in zip(times, (first, second, third), strict=True):
                    took = await _creates(engine, number)
                    if number >= 2:  # the first ones make what all share
                        times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def _text(rows: dict[int, dict[str, float]], durability: dict[str, float]) -> str:
    columns = {
        "adopt": "adopted after kill -9 of the host, s",
        "free_after_both": "freed after kill -9 of host and keeper, s",
        "gone_by_policy_stop": "gone by policy stop after kill -9 of the host, s",
        "open_after_that": "next open after that, s",
    }
    lines = [f"| sandboxes | {' | '.join(columns.values())} | keeper, private MB |"]
    lines.append("| ---: |" + " ---: |" * (len(columns) + 1))
    for count, row in rows.items():
        cells = [f"{row[name]:.2f}" for name in columns]
        lines.append(f"| {count} | {' | '.join(cells)} | {row['keeper_private_bytes'] / 1e6:.1f} |")
    base = durability["without fsync"]
    lines += ["", "| create | ms | / without fsync |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {took * 1e3:.1f} | {took / base:.2f} |" for name, took in durability.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", default="1,50,500", help="numbers of sandboxes (default: 1,50,500)")
    parser.add_argument("--json", action="store_true", help="write JSON instead of the tables")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the benchmark needs root", file=sys.stderr)
        return 1
    counts = [int(count) for count in options.counts.split(",")]
    rows = {}
    for count in counts:
        print(f"{count} sandboxes ...", file=sys.stderr)
        rows[count] = measure(count)
    print("durability ...", file=sys.stderr)
    durability = anyio.run(measure_durability)
    if options.json:
        json.dump({"recovery": {str(count): row for count, row in rows.items()}, "create": durability}, sys.stdout)
        print()
    else:
        sys.stdout.write(_text(rows, durability))
    return 0


if __name__ == "__main__":
    sys.exit(main())
