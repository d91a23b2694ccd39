"""Takes times in turns, in another order each round, so that whatever disturbs the host disturbs all alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import attrs

from benchmarks.bare import ToolFailed
from unisandbox import SandboxError

Times = Mapping[str, float]


@attrs.frozen
class Contender:
    """One of those that do the same work.

    Attributes:
        once: does it once; what it took, by the names of the measured parts.
    """

    once: Callable[[], Awaitable[Times]]


@attrs.frozen
class Case:
    """A piece of work and who does it.

    Attributes:
        name: short, for --only and JSON.
        title: what was measured, for people.
        contenders: they take turns.
        unit: "ms", "MB/s".
        pause: seconds of idleness before each.
        repeat: do it once more before, uncounted, so that each comes right after one of its own kind.
        share: which part of the asked rounds.
        most: rounds at most.
        warm_ups: rounds before, which are thrown away.
    """

    name: str
    title: str
    contenders: Sequence[Contender]
    unit: str = "ms"
    pause: float = 0.0
    repeat: bool = False
    share: float = 1.0
    most: int = 1_000_000
    warm_ups: int = 2

    def rounds(self, asked: int) -> int:
        """How many rounds it gets; never less than three."""
        return max(3, min(self.most, round(asked * self.share)))


@attrs.frozen
class Series:
    """The measured values of one part of one contender, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds were above."""
        return statistics.median(self.values)

    def quantile(self, percent: int) -> float:
        """So many percent of the rounds were not above."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


@attrs.frozen
class Outcome:
    """What a case gave.

    Attributes:
        case: which.
        series: by part.
        missing: why a contender could not do it.
        rounds: how many counted.
    """

    case: Case
    series: Mapping[str, Series]
    missing: Sequence[str]
    rounds: int


async def measure(case: Case, asked: int, advance: Callable[[], None]) -> Outcome:
    """Do the rounds. A contender that fails, even once, is left out, and it is said why.

    Args:
        case: what to do.
        asked: rounds that were asked for.
        advance: called after each round, warm-ups too.
    """
    rounds = case.rounds(asked)
    alive = list(range(len(case.contenders)))
    missing: list[str] = []
    values: list[dict[str, list[float]]] = [{} for _ in case.contenders]
    for number in range(-case.warm_ups, rounds):
        # Nobody always comes after the same one, whose remains the kernel may still be freeing. Every run has the same
        # orders.
        for index in random.Random(number).sample(alive, len(alive)):  # noqa: S311 (no secret)
            if case.pause:
                await anyio.sleep(case.pause)
            try:
                if case.repeat:
                    await case.contenders[index].once()
                times = await case.contenders[index].once()
            except (ToolFailed, SandboxError) as error:
                alive.remove(index)
                missing.append(str(error))
                continue
            if number >= 0:
                for part, value in times.items():
                    values[index].setdefault(part, []).append(value)
        advance()
    series = {part: Series(tuple(found)) for index in alive for part, found in values[index].items()}
    return Outcome(case, series, missing, rounds)
