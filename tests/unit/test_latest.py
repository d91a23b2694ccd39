"""What is kept for those who ask late is bounded."""

from __future__ import annotations

from typing import Any

from unisandbox import Exit
from unisandbox.api import Event, EventKind
from unisandbox.backends.wasm.containers import Containers
from unisandbox.engine.events import EventLog
from unisandbox.engine.telling import ENDS_KEPT, Telling
from unisandbox.host.latest import EXITS_KEPT, Latest


def test_the_last_so_many_are_kept() -> None:
    kept: Latest[str, int] = Latest(2)
    kept["a"], kept["b"], kept["a"], kept["c"] = 1, 2, 3, 4
    assert kept == {"a": 3, "c": 4}
    assert kept.pop("a") == 3
    kept["d"] = 5
    assert kept == {"c": 4, "d": 5}


def test_an_end_is_told_once_and_what_was_told_is_not_remembered_for_ever() -> None:
    log = EventLog()
    telling = Telling(log, "s", lambda: None)
    for number in range(3 * ENDS_KEPT):
        for _ in range(2):
            telling.container_exited(f"c{number}", "1.1", Exit(0, exited_at=1.0))
    events: list[Event] = list(log._events)
    kinds: set[EventKind] = {event.kind for event in events}
    assert kinds == {"container.exited"}
    assert len({event.container_id for event in events}) == len(events) == 3 * ENDS_KEPT
    assert len(telling._told) == ENDS_KEPT


def test_ends_of_what_is_gone_are_kept_for_a_while() -> None:
    containers: Containers[Any] = Containers("s")
    for number in range(EXITS_KEPT + 1):
        containers.keep_exit(f"c{number}", "", Exit(number % 256, exited_at=1.0))
    assert containers.exit_of_gone("c0", "") is None
    assert containers.exit_of_gone("c1", "") == Exit(1, exited_at=1.0)
