"""`unisandbox bench`: how long sandboxes take on this host, against plain processes measured in the same run."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Final

import anyio.lowlevel
import attrs

from unisandbox.api import BackendError
from unisandbox.sandbox import Engine

BASELINE: Final = "plain process"
"""What every ratio is against."""

_PROGRAM: Final = ("/bin/echo", "ready")
_EXPECTED: Final = b"ready\n"
_BWRAP: Final = ("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-all", "--die-with-parent")


@attrs.frozen
class Measurement:
    """The times of one piece of work.

    Attributes:
        name: what was done.
        seconds: one time per round, in order.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds took longer."""
        return statistics.median(self.seconds)


@attrs.frozen
class Results:
    """What was measured.

    Attributes:
        rounds: how often each piece of work was done, in turns, after one more that was not counted.
        backend: who ran the sandboxes.
        engine_seconds: opening the engine, once: its helper process starts.
        measurements: of all work.
    """

    rounds: int
    backend: str
    engine_seconds: float
    measurements: Sequence[Measurement]

    def ratio(self, measurement: Measurement) -> float:
        """How many times the baseline's median."""
        base = next(m for m in self.measurements if m.name == BASELINE)
        return measurement.median / base.median

    def as_json(self) -> dict[str, object]:
        """For `--json`; times are in seconds."""
        return {
            "rounds": self.rounds,
            "backend": self.backend,
            "program": list(_PROGRAM),
            "engine_open": self.engine_seconds,
            "baseline": BASELINE,
            "measurements": [
                {
                    "name": m.name,
                    "median": m.median,
                    "least": min(m.seconds),
                    "most": max(m.seconds),
                    "ratio": self.ratio(m),
                }
                for m in self.measurements
            ],
        }

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(m.name) for m in self.measurements)
        lines = [f"{'':{width}}    median     least      most    times {BASELINE}"]
        lines += [
            f"{m.name:{width}}  {_ms(m.median)} {_ms(min(m.seconds))} {_ms(max(m.seconds))}    {self.ratio(m):6.1f}"
            for m in self.measurements
        ]
        return [
            *lines,
            "",
            f"{self.rounds} rounds of each in turns, after one that was not counted; backend {self.backend}; "
            f"program: {' '.join(_PROGRAM)}.",
            f"Opening the engine took {self.engine_seconds * 1000:.1f} ms once.",
        ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:6.1f} ms"


async def measure(*, rounds: int, isolation: str = "auto") -> Results:
    """Measure in an engine of its own.

    Args:
        rounds: how often; one more comes first and is not counted.
        isolation: a backend's name, or "auto".

    Raises:
        BackendError: a program did not write what it should have.
        SandboxError: as of `Sandbox.create`.
    """
    plain: list[tuple[str, Sequence[str]]] = [(BASELINE, _PROGRAM)]
    bwrap = shutil.which("bwrap")
    if bwrap is not None:
        plain.append(("bwrap, new sandbox", (bwrap, *_BWRAP, *_PROGRAM)))
    times: dict[str, list[float]] = {}
    begun = time.perf_counter()
    async with Engine.open() as engine:
        opened = time.perf_counter() - begun
        backend = ""
        for number in range(rounds + 1):
            lap = _Lap()
            for name, argv in plain:
                _plain(argv)
                lap.add(name)
            backend = await _sandbox(engine, isolation, lap)
            if number > 0:
                for name, seconds in lap.times.items():
                    times.setdefault(name, []).append(seconds)
            await anyio.lowlevel.checkpoint()
    measurements = [Measurement(name, tuple(seconds)) for name, seconds in times.items()]
    return Results(rounds, backend, opened, measurements)


class _Lap:
    """The times of one round."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._since = time.perf_counter()

    def restart(self) -> None:
        """What follows is a piece of work of its own."""
        self._since = time.perf_counter()

    def add(self, name: str) -> None:
        """A piece of work is done; the next one begins."""
        self.times[name] = time.perf_counter() - self._since
        self.restart()


async def _sandbox(engine: Engine, isolation: str, lap: _Lap) -> str:
    """One sandbox from beginning to end; the name of its backend."""
    async with engine.create(isolation=isolation) as sandbox:
        async with sandbox.exec(_PROGRAM) as process:
            _check(await process.stdout.receive())
            lap.add("sandbox, create to first output")
            await process.wait()
        lap.restart()
        _check((await sandbox.run(_PROGRAM)).stdout)
        lap.add("sandbox, a further run in it")
        await sandbox.remove()
        lap.add("sandbox, remove")
        return sandbox.backend


def _plain(argv: Sequence[str]) -> None:
    # Synchronous on purpose: an event loop's own way to start a process would only make the baseline look slow.
    _check(subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False).stdout)


def _check(output: bytes) -> None:
    if output != _EXPECTED:
        raise BackendError(f"{' '.join(_PROGRAM)!r} wrote {output!r} instead of {_EXPECTED!r}")
