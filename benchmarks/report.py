"""The results as data, as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import attrs

from benchmarks.cases import OURS
from benchmarks.measure import Outcome, Series
from benchmarks.wasm import BARE

SCHEMA: Final = 1
_TAIL_ROUNDS: Final = 100  # fewer do not say what one in a hundred is like


@attrs.frozen
class Aim:
    """What we want to reach, and what was reached.

    Attributes:
        name: what is measured.
        unit: "x" for a ratio of medians.
        limit: at most this.
        value: measured; None: it could not be.
    """

    name: str
    unit: str
    limit: float
    value: float | None

    @property
    def reached(self) -> bool | None:
        """None when it could not be measured."""
        return None if self.value is None else self.value <= self.limit


@attrs.frozen
class Results:
    """All of one run.

    Attributes:
        host: what it ran on.
        outcomes: of the cases, by name.
        phases: milliseconds from create to the first result; empty when not measured.
        imports: milliseconds and MB, by statement.
        idle: kB per idle sandbox.
        guests: kB per Wasm guest that waits for input.
    """

    host: Mapping[str, object]
    outcomes: Mapping[str, Outcome]
    phases: Mapping[str, Series]
    imports: Mapping[str, Series]
    idle: Mapping[str, float]
    guests: Mapping[str, float]

    def median(self, case: str, part: str) -> float | None:
        """Of one part of a case."""
        series = self._series(case)
        return series[part].median if part in series else None

    def worst(self, case: str, part: str) -> float | None:
        """What 1 percent of its rounds were above."""
        series = self._series(case)
        return series[part].quantile(99) if part in series else None

    def _series(self, case: str) -> Mapping[str, Series]:
        return self.outcomes[case].series if case in self.outcomes else {}

    def ratio(self, case: str, ours: str, theirs: str) -> float | None:
        """Our median by theirs."""
        series = self._series(case)
        return series[ours].median / series[theirs].median if ours in series and theirs in series else None

    def aims(self) -> list[Aim]:
        """The aims that this run says something about."""
        aims = [
            Aim("create to first result / crun run", "x", 0.8, self.ratio("first", OURS, "crun run")),
            Aim("another run / crun exec", "x", 0.5, self.ratio("again", OURS, "crun exec")),
            Aim("50 in parallel / 50 crun run", "x", 1.0, self.ratio("parallel-50", OURS, "crun run")),
        ]
        median = {name: series.median for name, series in self.imports.items()}
        for statement in ("import unisandbox", "from unisandbox import Engine, Sandbox"):
            aims += [
                Aim(statement, "ms", 60.0, median.get(f"{statement}: ms")),
                Aim(f"{statement}, resident", "MB", 20.0, median.get(f"{statement}: MB")),
            ]
        aims += [
            Aim("idle sandbox, host process and keeper", "kB", 30.0, self.idle.get("together")),
        ]
        first, alone = self.median("wasm-first", OURS), self.median("wasm-first", BARE)
        above = None if first is None or alone is None else first - alone
        aims += [
            Aim("Wasm: create to first output", "ms", 1.0, first),
            Aim("Wasm: create to first output, above wasmtime-py alone", "ms", 0.5, above),
            Aim("Wasm: one of many starts", "ms", 1.0, self.median("wasm-starts", OURS)),
            Aim("Wasm: kill, p99", "ms", 10.0, self.worst("wasm-kill", OURS)),
            Aim("Wasm: kill while others spin, p99", "ms", 10.0, self.worst("wasm-busy", f"{OURS}: kill")),
            Aim("Wasm: guest that waits for input", "kB", 80.0, self.guests.get(OURS)),
        ]
        return [aim for aim in aims if aim.value is not None]


def describe_host(programs: Mapping[str, str]) -> dict[str, object]:
    """What a reader needs to compare with a run of his own; no names."""
    tools = dict(programs)
    for name in ("bwrap", "podman"):
        path = shutil.which(name)
        if path is not None:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip()
            tools[name] = said.rpartition(" ")[2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "unisandbox": version("unisandbox"),
        "python": platform.python_version(),
        "anyio": version("anyio"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "tools": tools,
        "implementation": sys.implementation.name,
    }


def short_kernel(host: Mapping[str, object]) -> str:
    """The kernel's version without its builder's suffix."""
    return str(host["kernel"]).partition("-")[0]


def to_json(results: Results) -> str:
    """Everything, the single values too. `schema` rises when a reader of the former would be misled."""

    def series(found: Mapping[str, Series]) -> dict[str, object]:
        return {name: _numbers(each) for name, each in found.items()}

    data = {
        "schema": SCHEMA,
        "host": dict(results.host),
        "aims": [{**attrs.asdict(aim), "reached": aim.reached} for aim in results.aims()],
        "cases": {
            name: {
                "title": outcome.case.title,
                "unit": outcome.case.unit,
                "rounds": outcome.rounds,
                "missing": list(outcome.missing),
                "series": series(outcome.series),
            }
            for name, outcome in results.outcomes.items()
        },
        "phases": series(results.phases),
        "imports": series(results.imports),
        "idle": dict(results.idle),
        "guests": dict(results.guests),
    }
    return json.dumps(data, indent=1) + "\n"


def _numbers(series: Series) -> dict[str, object]:
    return {
        "median": round(series.median, 4),
        "p10": round(series.quantile(10), 4),
        "p90": round(series.quantile(90), 4),
        "p99": round(series.quantile(99), 4),
        "values": [round(value, 4) for value in series.values],
    }


def to_text(results: Results) -> str:
    """The same as Markdown tables."""
    host = results.host
    tools = host["tools"]
    assert isinstance(tools, Mapping)
    lines = [
        f"unisandbox {host['unisandbox']}, Python {host['python']}, Linux {short_kernel(host)} ({host['machine']}), "
        f"{host['cpus']} CPUs, load {host['load']}; " + ", ".join(f"{name} {text}" for name, text in tools.items()),
        "",
    ]
    if results.aims():
        rows = [
            [aim.name, f"<= {aim.limit:g} {aim.unit}", f"{aim.value:.2f} {aim.unit}", "yes" if aim.reached else "no"]
            for aim in results.aims()
        ]
        lines += [*_table(["aim", "limit", "measured", "reached"], rows), ""]
    for outcome in results.outcomes.values():
        lines += [*_case(outcome), ""]
    if results.phases:
        whole = sum(series.median for series in results.phases.values())
        rows = [[name, *_cells(series), f"{series.median / whole:.0%}"] for name, series in results.phases.items()]
        lines += ["**Where the time from create to the first result goes** (ms)", ""]
        lines += [*_table(["phase", "median", "p10", "p90", "share"], rows), ""]
    if results.imports:
        rows = [[name, *_cells(series)] for name, series in results.imports.items()]
        lines += [*_table(["import, in a fresh interpreter", "median", "p10", "p90"], rows), ""]
    if results.idle:
        rows = [[name, f"{value:.1f}"] for name, value in results.idle.items() if name != "sandboxes"]
        heading = f"private memory of an idle sandbox (slope over 0..{results.idle['sandboxes']:.0f})"
        lines += [*_table([heading, "kB"], rows), ""]
    if results.guests:
        rows = [[name, f"{value:.1f}"] for name, value in results.guests.items()]
        lines += [*_table(["private memory of a Wasm guest that waits for input", "kB"], rows), ""]
    return "\n".join(lines)


def _case(outcome: Outcome) -> list[str]:
    base = next((name for name in ("crun run", "crun exec", "subprocess.Popen", BARE) if name in outcome.series), "")
    tail = outcome.rounds >= _TAIL_ROUNDS
    rows = []
    for name, series in outcome.series.items():
        ratio = f"{series.median / outcome.series[base].median:.2f}" if base and ": " not in name else ""
        worst = [_short(series.quantile(99))] if tail else []
        rows.append([name, *_cells(series), *worst, *([ratio] if base else [])])
    lines = [f"**{outcome.case.title}** ({outcome.case.unit}, {outcome.rounds} rounds)", ""]
    lines += _table(["", "median", "p10", "p90", *(["p99"] if tail else []), *([f"/ {base}"] if base else [])], rows)
    lines += [f"not measured: {reason}" for reason in outcome.missing]
    return lines


def _cells(series: Series) -> list[str]:
    return [_short(series.median), _short(series.quantile(10)), _short(series.quantile(90))]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    widths = [max(width, 2) for width in widths]
    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [line(heading), "| " + " | ".join(rule) + " |", *(line(row) for row in rows)]


def write(results: Results, directory: Path) -> list[Path]:
    """Write bench.json and bench.md; the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "bench.json", directory / "bench.md"]
    written[0].write_text(to_json(results))
    written[1].write_text(to_text(results))
    return written


BEGIN: Final = "<!-- results: written by python -m benchmarks --publish -->"
END: Final = "<!-- end of the results -->"


def publish(results: Results, page: Path) -> None:
    """Put the tables between the marks of a page of the documentation.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for results between {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{begin}\n\n{to_text(results).strip()}\n\n{end}{after}")
