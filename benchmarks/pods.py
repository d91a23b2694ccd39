"""What pods cost that a real containerd asks for: ours beside its own shim, and beside a sandboxer that does nothing.

    python -m benchmarks.pods [--rounds 30] [--parallel 50] [--counts 1,10,50] [--quick] [--json] [--out DIR]

All take turns on one containerd, by crictl, with pods on the host's network. What the sandboxer that does nothing takes
is the floor: containerd and its client. Needs root and a laboratory script (UNISANDBOX_CONTAINERD_LAB).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import attrs

from benchmarks.bare import ToolFailed
from benchmarks.measure import Case, Contender, Outcome, Times, measure
from benchmarks.node import FLOOR, OURS, OURS_CRUN, SHIM, Node, Pod, node, pss

_STEPS: Final = ("run the pod", "create the container", "start the container")
_WHOLE: Final = "pod and container"
_END: Final = "stop and remove"
_EXEC: Final = "exec"
_PARTS: Final = (_WHOLE, *_STEPS, _END, _EXEC)


@attrs.frozen
class Memory:
    """What management costs with so many pods.

    Attributes:
        pods: how many.
        proportional: bytes, Pss of all management processes.
        private: bytes of them that nobody shares.
        processes: how many there are.
    """

    pods: int
    proportional: int
    private: int
    processes: int


@attrs.frozen
class Results:
    """All of one run.

    Attributes:
        serial: milliseconds of each part by who: "who: part".
        parallel: milliseconds until all of them run, by who.
        together: how many that were.
        memory: by who.
    """

    serial: Outcome
    parallel: Outcome
    together: int
    memory: Mapping[str, Sequence[Memory]]


def _serial(place: Node) -> Case:
    def contender(who: str) -> Contender:
        async def once() -> Times:
            times: dict[str, float] = {}
            pod = await place.start(who, times)
            times[_WHOLE] = sum(times[step] for step in _STEPS)
            if who != FLOOR:
                begun = time.perf_counter()
                await place.crictl("exec", "--sync", pod.container, "true")
                times[_EXEC] = (time.perf_counter() - begun) * 1e3
            begun = time.perf_counter()
            await place.remove(pod)
            times[_END] = (time.perf_counter() - begun) * 1e3
            return {f"{who}: {part}": value for part, value in times.items()}

        return Contender(once)

    return Case("pod", "a pod with one container", [contender(who) for who in place.handlers])


def _parallel(place: Node, together: int) -> Case:
    def contender(who: str) -> Contender:
        async def once() -> Times:
            pods: list[Pod] = []
            failed: list[ToolFailed] = []

            async def one() -> None:
                try:
                    pods.append(await place.start(who))
                except ToolFailed as error:
                    failed.append(error)

            begun = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(together):
                    group.start_soon(one)
            took = (time.perf_counter() - begun) * 1e3
            await place.remove(*pods)
            if failed:
                raise failed[0]
            return {who: took}

        return Contender(once)

    title = f"{together} pods at the same time"
    return Case("parallel", title, [contender(who) for who in place.handlers], warm_ups=0)


async def _memory(place: Node, who: str, counts: Sequence[int]) -> list[Memory]:
    """With more and more pods."""
    pods: list[Pod] = []
    found = []
    for count in counts:
        while len(pods) < count:
            pods.append(await place.start(who))
        processes = place.management(who)
        found.append(Memory(count, *pss(processes), len(processes)))
    await place.remove(*pods)
    return found


async def run(lab: str, rounds: int, together: int, parallel_rounds: int, counts: Sequence[int]) -> Results:
    """Measure all. Raises ToolFailed."""
    with node(lab) as place:
        serial = await measure(_serial(place), rounds, _say(f"pods one after the other, {rounds} rounds"))
        parallel = await measure(_parallel(place, together), parallel_rounds, _say(f"{together} pods at once"))
        memory = {}
        for who in place.handlers:
            if who != FLOOR:
                _say(f"memory of {who}")
                memory[who] = await _memory(place, who, counts)
    return Results(serial, parallel, together, memory)


def _say(text: str) -> Callable[[], None]:
    print(f"{text} ...", file=sys.stderr, flush=True)
    return lambda: None


def text(results: Results) -> str:
    """The tables."""
    series = results.serial.series
    shown = [who for who in (FLOOR, SHIM, OURS, OURS_CRUN) if f"{who}: {_WHOLE}" in series]
    lines = ["| ms | " + " | ".join(f"{who}, p50 (p99)" for who in shown) + " | above the floor, ours / shim's |"]
    lines.append("| --- |" + " ---: |" * (len(shown) + 1))
    for part in _PARTS:
        cells = [series.get(f"{who}: {part}") for who in shown]
        told = [f"{cell.median:.0f} ({cell.quantile(99):.0f})" if cell is not None else "" for cell in cells]
        ratio = _above(results, part)
        lines.append(f"| {part} | " + " | ".join(told) + (f" | {ratio:.2f} x |" if ratio is not None else " | |"))
    cells = [results.parallel.series.get(who) for who in shown]
    told = [f"{cell.median:.0f}" if cell is not None else "" for cell in cells]
    lines += [f"| {results.together} at the same time, until all run | " + " | ".join(told) + " | |"]
    lines += ["", "| pods | " + " | ".join(f"{who}: Pss, private MB (processes)" for who in results.memory) + " |"]
    lines.append("| ---: |" + " ---: |" * len(results.memory))
    for rows in zip(*results.memory.values(), strict=True):
        told = [f"{row.proportional / 1e6:.1f}, {row.private / 1e6:.1f} ({row.processes})" for row in rows]
        lines.append(f"| {rows[0].pods} | " + " | ".join(told) + " |")
    lines += [
        "",
        "| aim | limit | measured | reached |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | <= {limit:g} {unit} | {value:.2f} {unit} | {'yes' if value <= limit else 'no'} |"
            for name, unit, limit, value in aims(results)
        ),
    ]
    lines += [f"\n{missing}" for missing in (*results.serial.missing, *results.parallel.missing)]
    return "\n".join(lines) + "\n"


def _above(results: Results, part: str, who: str = OURS) -> float | None:
    """What ours takes above the floor, in parts of what the shim takes above it."""
    series = results.serial.series
    values = [series[name].median for name in (f"{by}: {part}" for by in (who, SHIM, FLOOR)) if name in series]
    if len(values) < 3 or values[1] <= values[2]:
        return None
    return (values[0] - values[2]) / (values[1] - values[2])


def aims(results: Results) -> list[tuple[str, str, float, float]]:
    """What we want to reach: name, unit, limit, measured."""
    series, parallel = results.serial.series, results.parallel.series
    found: list[tuple[str, str, float, float]] = []

    def ratio(name: str, limit: float, ours: str, shim: str, of: Mapping[str, Any]) -> None:
        if ours in of and shim in of:
            found.append((name, "x", limit, of[ours].median / of[shim].median))

    ratio("pod and container / shim", 0.6, f"{OURS}: {_WHOLE}", f"{SHIM}: {_WHOLE}", series)
    ratio("many at the same time / shim", 0.6, OURS, SHIM, parallel)
    ratio("stop and remove / shim", 0.9, f"{OURS}: {_END}", f"{SHIM}: {_END}", series)
    above = _above(results, _WHOLE)
    if above is not None:
        found.append(("time above the floor / shim's", "x", 0.5, above))
    if {OURS, SHIM} <= results.memory.keys():
        ours, shim = results.memory[OURS], results.memory[SHIM]
        most = len(ours) - 1
        found.append(
            (f"Pss with {ours[most].pods} pods / shims'", "x", 0.12, ours[most].proportional / shim[most].proportional)
        )
        if most:
            more = (ours[most].proportional - ours[0].proportional) / (ours[most].pods - ours[0].pods)
            found.append(("Pss of each further pod", "kB", 60.0, more / 1e3))
            processes = (ours[most].processes - ours[0].processes) / (ours[most].pods - ours[0].pods)
            found.append(("processes of each further pod", "", 0.0, processes))
    return found


def _plain(results: Results) -> dict[str, Any]:
    return {
        "serial_ms": {name: list(found.values) for name, found in results.serial.series.items()},
        "parallel_ms": {name: list(found.values) for name, found in results.parallel.series.items()},
        "together": results.together,
        "memory": {who: [attrs.asdict(row) for row in rows] for who, rows in results.memory.items()},
        "missing": [*results.serial.missing, *results.parallel.missing],
    }


def draw(results: Results, directory: Path) -> list[Path]:
    """Write pods.svg and pods.png: memory over pods, and how the times are spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for who, rows in results.memory.items():
        left.plot([row.pods for row in rows], [row.proportional / 1e6 for row in rows], marker="o", label=who)
    left.set(title="Memory of all management processes", xlabel="pods", ylabel="Pss, MB")
    for who in (FLOOR, SHIM, OURS, OURS_CRUN):
        if (found := results.serial.series.get(f"{who}: {_WHOLE}")) is not None:
            values = sorted(found.values)
            right.step(values, [(number + 1) / len(values) for number in range(len(values))], where="post", label=who)
    right.set(title="From the first call to the running container", xlabel="ms", ylabel="share of the pods")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.set_ylim(bottom=0)
    written = [directory / "pods.svg", directory / "pods.png"]
    figure.savefig(written[0], metadata={"Date": None})
    figure.savefig(written[1], dpi=150)
    return written


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="pods of each, one after the other (default: 30)")
    parser.add_argument("--parallel", type=int, default=50, help="pods at the same time (default: 50)")
    parser.add_argument("--counts", default="1,10,50", help="numbers of pods for the memory (default: 1,10,50)")
    parser.add_argument("--quick", action="store_true", help="few of all: shows that it works")
    parser.add_argument("--json", action="store_true", help="write JSON instead of the tables")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where pods.svg and pods.png go")
    options = parser.parse_args()
    lab = os.environ.get("UNISANDBOX_CONTAINERD_LAB", "")
    if os.geteuid() != 0 or not lab:
        print("the benchmark needs root, and UNISANDBOX_CONTAINERD_LAB: see tools/test_serve.sh", file=sys.stderr)
        return 1
    counts = [1, 3] if options.quick else [int(count) for count in options.counts.split(",")]
    rounds, together, parallel_rounds = (3, 4, 1) if options.quick else (options.rounds, options.parallel, 5)
    try:
        results = anyio.run(run, lab, rounds, together, parallel_rounds, counts)
    except ToolFailed as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    written = draw(results, options.out)
    (options.out / "pods.json").write_text(json.dumps(_plain(results)))
    sys.stdout.write(json.dumps(_plain(results)) + "\n" if options.json else text(results))
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
