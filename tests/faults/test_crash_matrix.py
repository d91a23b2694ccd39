"""kill -9 at every boundary of everything that an engine does: the host process, its keeper, or both.

The points are gathered from the source and from a run of the stories in `tests/crash`: one that no story reaches fails
the suite; so do the moments in the middle of each request that changes something in a keeper. After each kill another
engine opens the state directory, and finds what was promised, and nothing else; so do the readers of its events.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import pytest
from tests.crash.points import Point, Victim, names_in_source

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(3600)]

WORKERS: Final = 3
SEED: Final = 20261124
# The part of the points that a second run of a story may not come by; one may be missed in any case.
MISSED: Final = 0.05
# How often a name is tried again that all of its cases have missed.
TRIES: Final = 3

# What no story reaches, each with its reason. Nothing else may be missing.
UNREACHED: Final = {
    "keeper.cancel_spawn": "only after a runtime call that takes longer than its deadline",
    "keeper.exits_after": "only for a process of a bundle that ends before it can be looked at",
    "keeper.lock_holder": "only for the words of an error: who keeps a lock for too long",
    "network.start": "only for a network in user mode: tests/integration/test_user_network.py kills there",
    "layer.start": "only for layers that a program serves: tests/integration/test_served_layers.py kills there",
    "mount.fuse, within the keeper": "as layer.start; what it makes ends with its mount namespace",
    "step.read, within the keeper": "as layer.start; it changes nothing",
    "step.no_attributes, within the keeper": "as layer.start; it changes nothing",
    "step.cable, within the keeper": "as network.start; what it makes ends with the namespaces that it joins",
    "step.detached, within the keeper": "only for the file system of a Wasm program",
    "step.give, within the keeper": "only for a user who is not root",
    "guard.kill_process, within the keeper": "only where there is no cgroup to write",
    "guard.umount, within the keeper": "what the keeper mounts ends with it: nothing of ours asks for this guard",
    "expiry.unlink, within the keeper": "only in a keeper that nobody has used for 5 s",
}


@functools.cache
def reached() -> tuple[Point, ...]:
    """Every point of every story, in order."""
    return tuple(Point(**json.loads(line)) for line in ask("points", ""))


def ask(what: str, cases: str) -> list[str]:
    """What a worker answers."""
    worker = start(what)
    out, err = worker.communicate(cases)
    assert worker.returncode == 0, err[-3000:]
    return out.splitlines()


def start(what: str) -> subprocess.Popen[str]:
    """A worker; it ends after its case when we are killed."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash", what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{root}".strip(":")},
        text=True,
    )


def test_every_boundary_is_reached_by_a_story() -> None:
    missing = names_in_source() - {point.name for point in reached()}
    unexpected = sorted(name for name in missing if name.partition(" ")[2] not in UNREACHED)
    assert unexpected == [], "give the scenario a step that reaches it"
    stale = [name for name in UNREACHED if f"before {name}" not in missing]
    assert stale == [], "these are reached by now, or are gone"


@attrs.frozen
class Round:
    """One way to crash.

    Attributes:
        victim: who is killed.
        policy: of the engine.
        on_recover: what the next engine does.
        sample: what has a case each: every name and every step, every step, or every story; with `--long` every point
            for the first, and every name in every step for the others.
    """

    victim: Victim
    policy: Literal["stop", "keep"]
    on_recover: Literal["adopt", "stop"]
    sample: Literal["names", "steps", "stories"]

    def fits(self, point: Point) -> bool:
        """Whether this can be done at a point."""
        if point.is_inside and self.victim != "keeper":
            return False
        if self.victim == "keeper" and point.name.startswith("after keeper."):
            return False  # whether it has seen the request by then is chance; "before" and "done" are not
        if point.story == "private":
            return self.victim == "host" and self.policy == "keep"
        # The points were met under policy "keep". With "stop" an engine closes in another way, which "private" shows.
        return self.policy == "keep" or (point.story not in {"recovered", "turned"} and point.step != "close")

    def case(self, point: Point, number: int) -> dict[str, object]:
        """What a worker is asked to play; every other number on the other event loop."""
        return {
            "point": attrs.asdict(point),
            "victim": self.victim,
            "policy": self.policy,
            "on_recover": self.on_recover,
            "backend": ("asyncio", "trio")[number % 2],
        }


ROUNDS: Final = (
    Round("host", "keep", "adopt", "names"),
    Round("keeper", "keep", "adopt", "names"),
    Round("both", "keep", "adopt", "steps"),
    Round("host", "keep", "stop", "stories"),
    Round("host", "stop", "adopt", "stories"),
)


def always_missed(answers: Sequence[dict[str, Any]]) -> set[str]:
    """The names at which no case has killed anybody."""
    names = {answer["point"]["name"] for answer in answers}
    return names - {answer["point"]["name"] for answer in answers if not answer["missed"]}


def chosen(points: Sequence[Point], how: Round, *, is_long: bool) -> list[Point]:
    """Some of them; see `Round.sample`. Each round has others."""
    print(f"seed {SEED}")
    dice = random.Random(f"{SEED} {how}")
    names: set[str] = set()
    steps: set[tuple[str, ...]] = set()
    taken: list[Point] = []
    for point in dice.sample(points, len(points)):
        step: tuple[str, ...] = (point.story,)
        if is_long or how.sample != "stories":
            step += (point.step, point.name) if is_long else (point.step,)
        by_name = how.sample == "names" and not (
            point.is_within and how.victim == "host"
        )  # there it is about the keeper
        if (point.name in names or not by_name) and step in steps:
            continue
        names.add(point.name)
        steps.add(step)
        taken.append(point)
    return taken


@pytest.mark.parametrize("how", ROUNDS, ids=lambda how: f"{how.victim}-{how.policy}-{how.on_recover}")
def test_after_a_kill_at_any_boundary_all_is_as_promised(
    how: Round, count: Callable[[int], int], record_property: Callable[[str, object], None]
) -> None:
    fitting = [point for point in reached() if how.fits(point)]
    is_long = count(10) > 1
    points = fitting if is_long and how.sample == "names" else chosen(fitting, how, is_long=is_long)
    cases = [how.case(point, number) for number, point in enumerate(points)]
    record_property("cases", len(cases))
    answers = play(cases)
    assert len(answers) == len(cases)
    # Looks at what takes its time come more or less often; whatever else a step goes by without was never tested.
    missed = [Point(**answer["point"]) for answer in answers if answer["missed"]]
    record_property("missed", [str(point) for point in missed])
    assert len(missed) <= max(1, len(cases) * MISSED), missed
    for number in range(TRIES):
        again = [min(point for point in fitting if point.name == name) for name in sorted(always_missed(answers))]
        answers += play([how.case(point, number) for point in again])
    assert always_missed(answers) == set(), "nobody was ever killed there"
    bad = [answer for answer in answers if answer["complaints"]]
    assert bad == [], "\n\n".join(explained(answer) for answer in bad[:5])


def play(cases: Sequence[object]) -> list[dict[str, Any]]:
    """Play cases, several at a time: each worker is given the next one when it has answered."""
    lines = [json.dumps(case) for case in cases]
    workers = [start("cases") for _ in lines[:WORKERS]]
    try:
        # Small shares, so that a pipe never fills: a worker reads all its cases before it begins.
        for number, worker in enumerate(workers):
            assert worker.stdin is not None
            worker.stdin.write("\n".join(lines[number :: len(workers)]) + "\n")
            worker.stdin.close()
        answers = []
        for worker in workers:
            assert worker.stdout is not None and worker.stderr is not None  # noqa: PT018
            answers += [json.loads(line) for line in worker.stdout]
            assert worker.wait() == 0, worker.stderr.read()[-3000:]
        return answers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout, worker.stderr):
                if pipe is not None and not pipe.closed:
                    pipe.close()


def explained(answer: dict[str, Any]) -> str:
    """A failure, and how to play it again."""
    case = {name: answer[name] for name in ("point", "victim", "policy", "on_recover", "backend")}
    return (
        f"{Point(**answer['point'])}, {answer['victim']} killed:\n"
        + "\n".join(f"- {complaint}" for complaint in answer["complaints"])
        + f"\nagain: echo '{json.dumps(case)}' | python -m tests.crash cases\n"
        + f"said:\n{answer.get('promises', '')}\nkeeper.log:\n{answer.get('log', '')}"
    )


def test_a_removal_is_told_also_by_a_host_that_dies_when_the_record_is_gone() -> None:
    points = [Point("life", step, "after file.unlink", 1) for step in ("remove by operation", "remove")]
    case = {"victim": "host", "policy": "keep", "on_recover": "adopt", "backend": "asyncio"}
    answers = play([{**case, "point": attrs.asdict(point)} for point in points])
    assert [(answer["missed"], answer["complaints"]) for answer in answers] == [(False, [])] * len(points)
