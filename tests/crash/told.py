"""What readers of events were told before and after a crash, and what of it cannot be true. Looks at data only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from itertools import pairwise

import attrs

from unisandbox.api import Event, RecoveryReport


@attrs.define
class Telling:
    """The events that one engine's readers got, from its opening to its close.

    Attributes:
        opened_at: seconds since the epoch, before it was opened.
        report: what its recovery did.
        events: all from the first that is kept on, or those after the last one of the engine before.
    """

    opened_at: float
    report: RecoveryReport
    events: list[Event] = attrs.field(factory=list)


def untrue(tellings: Sequence[Telling], *, unreadable: int = 0) -> list[str]:
    """What is wrong with the events of engines that came one after the other; the last one has removed everything.

    Args:
        tellings: of those engines, in order.
        unreadable: so many sandboxes had a record that nobody could read: nobody can tell the end of these.
    """
    events = [event for telling in tellings for event in telling.events]
    return [
        *_numbers(events),
        *(line for telling in tellings for line in _recoveries(telling, events)),
        *_sandboxes(tellings, events, unreadable),
        *_ends(events, {found.sandbox_id for found in tellings[0].report.sandboxes if found.action == "removed"}),
    ]


def _numbers(events: Sequence[Event]) -> list[str]:
    """Numbers grow; nothing is lost but what a keeper that died had told, and that is said first."""
    pairs = pairwise(event.seq for event in events)
    wrong = [f"event {later} came after {earlier}" for earlier, later in pairs if later <= earlier]
    return wrong + [f"events up to {event.seq} are lost" for event in events[1:] if event.kind == "gap"]


def _recoveries(telling: Telling, events: Sequence[Event]) -> list[str]:
    """A recovery tells what it has done, once, and nothing of what others did.

    But for removals: one that was killed in the middle may have told of what the next one finds, and finishes.
    """
    told_before = {
        event.sandbox_id
        for event in events
        if event.kind == "sandbox.recovered" and event.detail["action"] == "removed" and event.at < telling.opened_at
    }
    told = Counter(
        (event.sandbox_id, event.detail["action"])
        for event in telling.events
        if event.kind == "sandbox.recovered" and event.at >= telling.opened_at
    )
    done = Counter(
        (found.sandbox_id, str(found.action))
        for found in telling.report.sandboxes
        if found.action != "removed" or found.sandbox_id not in told_before
    )
    return [] if told == done else [f"the recovery did {dict(done)}, and told {dict(told)}"]


def _sandboxes(tellings: Sequence[Telling], events: Sequence[Event], unreadable: int) -> list[str]:
    """Every sandbox that there was is told to be removed, once, and nothing of it afterwards but what recovery did."""
    wrong, untold = [], []
    adopted = {found.sandbox_id for found in tellings[0].report.sandboxes if found.action == "adopted"}
    found = {found.sandbox_id for telling in tellings for found in telling.report.sandboxes}
    for sandbox_id in sorted(({event.sandbox_id for event in events} | found) - {""}):
        # An end that nobody saw, since its init died with it, is told up to 0.25 s later.
        kinds = [event.kind for event in events if event.sandbox_id == sandbox_id and not _is_lost(event)]
        created, removed = kinds.count("sandbox.created"), kinds.count("sandbox.removed")
        if not removed:
            untold.append(f"{sandbox_id} is gone, and was not told to be removed: {kinds}")
        elif removed > 1 or created > 1 or (sandbox_id in adopted and not created):
            wrong.append(f"{sandbox_id} is told to be created {created} times and removed {removed} times: {kinds}")
        elif rest := set(kinds[kinds.index("sandbox.removed") + 1 :]) - {"sandbox.recovered"}:
            wrong.append(f"after the end of {sandbox_id} was told: {sorted(rest)}")
    return wrong + untold[unreadable:]


def _ends(events: Sequence[Event], freed: Set[str]) -> list[str]:
    """Whatever is told to have started is told to have ended, once, and after that; nothing ends twice.

    Args:
        events: all.
        freed: sandboxes that a recovery has removed. What ran in them may have died with its init; that is told up to
            0.25 s later, when there may be neither a keeper nor a reader any more.
    """
    wrong = []
    for (sandbox_id, name), of_container in _containers(events).items():
        kinds = [event.kind for event in of_container if event.kind.startswith("container.")]
        # It may have been made and started again under its name; what was only made has no end.
        told_again = any(earlier == later == "container.exited" for earlier, later in pairwise(kinds))
        lives = [kind for kind in kinds if kind != "container.created"]
        if told_again or ("container.started" in lives and lives[-1] != "container.exited"):
            wrong.append(f"of container {sandbox_id}/{name} is told {kinds}")
        # The init of a launched program takes with it what was started beside it, which comes to the same.
        was_launched = any(event.kind == "container.exited" and event.exit is not None for event in of_container)
        may_lack_end = was_launched or sandbox_id in freed
        for exec_id in sorted({event.exec_id for event in of_container} - {""}):
            kinds = [event.kind for event in of_container if event.exec_id == exec_id and event.kind != "process.oom"]
            # Whoever started it may have been killed before that was told.
            possible = [["process.started", "process.exited"], ["process.exited"]]
            if kinds not in possible and not (may_lack_end and kinds == ["process.started"]):
                wrong.append(f"of process {sandbox_id}/{name}/{exec_id} is told {kinds}")
    return wrong


def _containers(events: Sequence[Event]) -> dict[tuple[str, str], list[Event]]:
    """The events of each container and of what ran in it."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if event.container_id:
            found.setdefault((event.sandbox_id, event.container_id), []).append(event)
    return found


def _is_lost(event: Event) -> bool:
    return event.kind == "process.exited" and event.exit is not None and event.exit.reason == "lost"
