"""`python -m benchmarks`: measure, and write the results to a directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import anyio

from benchmarks import report
from benchmarks.bare import Bare, ToolFailed
from benchmarks.cases import all_cases
from benchmarks.measure import Outcome, Series, measure
from benchmarks.memory import measure_idle, measure_imports
from benchmarks.phases import measure_phases
from benchmarks.wasm import measure_guests, wasm_cases
from unisandbox import Engine, SandboxError
from unisandbox.oci.features import find_runtimes

_ROUNDS: Final = 60
_QUICK_ROUNDS: Final = 8
_IDLE: Final = 100
_QUICK_IDLE: Final = 40
_GUESTS: Final = 1000
_QUICK_GUESTS: Final = 100
_DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PARTS: Final = ("phases", "imports", "idle", "guests")
"""What can be asked for beside the cases."""

Advance = Callable[[], None]


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Advance]:
    """Say on stderr how far it is: a bar for a person, a line for a file."""
    if not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield lambda: None
        return
    columns = (TextColumn("{task.description:<58}"), BarColumn(bar_width=24), MofNCompleteColumn())
    # No thread that refreshes: it would disturb what is measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(title, total=total)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


class _Selection:
    """What of it all is asked for."""

    def __init__(self, only: Sequence[str]) -> None:
        self._left = set(only)
        self._all = not only

    def takes(self, name: str) -> bool:
        """Whether this is to be measured."""
        found = {word for word in self._left if name == word or name.startswith(f"{word}-")}
        return self._all or bool(found)


async def run(rounds: int, *, quick: bool, only: Sequence[str]) -> report.Results:
    """Measure.

    Raises:
        SandboxError: this host has no sandboxes, or one failed.
    """
    selection = _Selection(only)
    outcomes: dict[str, Outcome] = {}
    phases: dict[str, Series] = {}
    imports: dict[str, Series] = {}
    idle: dict[str, float] = {}
    guests: dict[str, float] = {}
    with Bare(await find_runtimes()) as bare:
        programs = {name: program.version_text for name, program in bare.programs.items()}
        host = report.describe_host(programs)
        async with Engine.open() as engine:
            async with all_cases(engine, bare, quick=quick) as these, wasm_cases(engine, quick=quick) as those:
                cases = [*these, *those]
                known = [case.name for case in cases]
                for word in only:
                    if not any(name == word or name.startswith(f"{word}-") for name in (*known, *PARTS)):
                        raise SystemExit(f"nothing is called {word!r}; there are: {', '.join((*known, *PARTS))}")
                for case in cases:
                    if selection.takes(case.name):
                        with _progress(case.title, case.rounds(rounds) + case.warm_ups) as advance:
                            outcomes[case.name] = await measure(case, rounds, advance)
            if selection.takes("phases"):
                with _progress("phases", rounds + 2) as advance:
                    phases = await measure_phases(engine, rounds, advance)
        if selection.takes("idle"):
            with _progress("memory of idle sandboxes", 1) as advance:
                idle = measure_idle(_QUICK_IDLE if quick else _IDLE)
                advance()
        if selection.takes("guests"):
            with _progress("memory of waiting Wasm guests", 1) as advance:
                guests = measure_guests(_QUICK_GUESTS if quick else _GUESTS)
                advance()
        if selection.takes("imports"):
            times = 5 if quick else 15
            with _progress("imports", times + 1) as advance:
                imports = measure_imports(times, advance)
    return report.Results(host, outcomes, phases, imports, idle, guests)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure unisandbox against the bare tools, in turns, in one run."
    )
    parser.add_argument("--rounds", type=int, help=f"rounds of the short cases (default: {_ROUNDS})")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"a case, or one of {', '.join(PARTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: 20 s; shows that it works, and little more")
    parser.add_argument("--json", action="store_true", help="write the JSON to stdout instead of the table")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory (default: bench-results)")
    parser.add_argument("--publish", action="store_true", help="put table and picture into docs/ of this working copy")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio", help="event loop")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def main() -> int:
    """The command."""
    options = _arguments()
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    if os.geteuid() != 0:
        print("the benchmark needs root: it makes cgroups and namespaces as `crun run` does", file=sys.stderr)
        return 1

    async def measured() -> report.Results:
        return await run(rounds, quick=options.quick, only=options.only)

    try:
        results = anyio.run(measured, backend=options.backend)
    except (SandboxError, ToolFailed) as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    written = report.write(results, options.output)
    if options.publish:
        report.publish(results, _DOCS / "performance.md")
    try:
        from benchmarks import plot
    except ImportError:
        print("no picture: matplotlib is missing (pip install 'unisandbox[bench]')", file=sys.stderr)
        if options.publish:
            return 1
    else:
        written += plot.draw(results, options.output)
        if options.publish:
            shutil.copy(options.output / "bench.svg", _DOCS / "performance.svg")
    sys.stdout.write(report.to_json(results) if options.json else report.to_text(results))
    print("written:", ", ".join(str(path) for path in written), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
