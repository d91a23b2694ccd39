"""The judge of events after a crash complains of each kind of untruth, and of nothing else."""

from __future__ import annotations

import attrs
import pytest
from tests.crash.told import Telling, untrue

from unisandbox.api import Event, EventKind, Exit, RecoveryReport, SandboxRecovered


def event(kind: EventKind, sandbox_id: str = "a", container_id: str = "", exec_id: str = "", **more: object) -> Event:
    """One that is not numbered yet."""
    ended = Exit(7, exited_at=1.0) if kind == "process.exited" else None
    return attrs.evolve(Event(0, 1.0, kind, sandbox_id, container_id, exec_id, ended), **more)  # type: ignore[arg-type]


CREATED, REMOVED = event("sandbox.created"), event("sandbox.removed")
BEGUN, ENDED = event("process.started", "a", "main", "p"), event("process.exited", "a", "main", "p")
MADE = event("container.created", "a", "box")
RUNS, RAN = event("container.started", "a", "box"), event("container.exited", "a", "box")
RECOVERED = event("sandbox.recovered", at=9.0, detail={"action": "removed"})
LOST = attrs.evolve(ENDED, exit=Exit.lost(exited_at=1.0))
FOUND = SandboxRecovered("a", "a", "runc", "removed", "it was to be stopped", 1)


def complaints(*events: Event, found: tuple[SandboxRecovered, ...] = ()) -> list[str]:
    """About events that get their numbers here, if they have none."""
    numbered = [attrs.evolve(event, seq=event.seq or number) for number, event in enumerate(events, 1)]
    return untrue([Telling(5.0, RecoveryReport("adopted", found), numbered)])


@pytest.mark.parametrize(
    "events",
    [
        [],
        [CREATED, BEGUN, ENDED, REMOVED],
        [CREATED, ENDED, REMOVED],  # the host died before it told the begin
        [CREATED, RUNS, RAN, RUNS, RAN, REMOVED],
        [CREATED, MADE, RUNS, RAN, MADE, REMOVED],
        [CREATED, BEGUN, REMOVED, LOST],
        [event("gap", "", seq=100), attrs.evolve(CREATED, seq=101), attrs.evolve(REMOVED, seq=102)],
    ],
)
def test_what_may_be_is_no_reason_to_complain(events: list[Event]) -> None:
    assert complaints(*events) == []


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([CREATED], "was not told to be removed"),
        ([CREATED, REMOVED, REMOVED], "removed 2 times"),
        ([CREATED, CREATED, REMOVED], "created 2 times"),
        ([CREATED, REMOVED, BEGUN, ENDED], "after the end of a"),
        ([CREATED, BEGUN, ENDED, ENDED, REMOVED], "of process a/main/p"),
        ([CREATED, BEGUN, REMOVED], "of process a/main/p"),
        ([CREATED, BEGUN, BEGUN, ENDED, REMOVED], "of process a/main/p"),
        ([CREATED, RUNS, RAN, RAN, REMOVED], "of container a/box"),
        ([CREATED, RUNS, REMOVED], "of container a/box"),
        ([CREATED, MADE, RUNS, RAN, MADE, RUNS, REMOVED], "of container a/box"),
        ([attrs.evolve(CREATED, seq=2), attrs.evolve(REMOVED, seq=2)], "event 2 came after 2"),
        ([CREATED, event("gap", ""), REMOVED], "are lost"),
        ([CREATED, REMOVED, RECOVERED], "and told"),
    ],
)
def test_each_untruth_is_complained_of(events: list[Event], words: str) -> None:
    [complaint] = complaints(*events)
    assert words in complaint


def test_a_recovery_has_to_tell_what_it_did_once() -> None:
    assert complaints(REMOVED, RECOVERED, found=(FOUND,)) == []
    assert "and told {}" in complaints(REMOVED, found=(FOUND,))[0]
    assert "and told" in complaints(REMOVED, RECOVERED, RECOVERED, found=(FOUND,))[0]
    assert "was not told to be removed" in complaints(RECOVERED, found=(FOUND,))[0]
    earlier = attrs.evolve(RECOVERED, at=1.0)
    assert complaints(earlier, REMOVED, found=(FOUND,)) == [], "the one before it had done so, and was killed"
    assert "and told" in complaints(earlier, REMOVED, RECOVERED, found=(FOUND,))[0]


def test_what_a_recovery_adopts_was_told_to_be_created() -> None:
    adopted = attrs.evolve(FOUND, action="adopted")
    told = attrs.evolve(RECOVERED, detail={"action": "adopted"})
    assert complaints(CREATED, told, REMOVED, found=(adopted,)) == []
    assert "created 0 times" in complaints(told, REMOVED, found=(adopted,))[0]


def test_nobody_can_tell_the_end_of_what_has_no_readable_record() -> None:
    assert untrue([Telling(5.0, RecoveryReport("adopted"), [attrs.evolve(CREATED, seq=1)])], unreadable=1) == []
