"""What an engine tells about its sandboxes while they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.exits import Exit

EventKind = Literal[
    "sandbox.created",
    "sandbox.started",
    "sandbox.stopped",
    "sandbox.removed",
    "container.created",
    "container.started",
    "container.exited",
    "process.started",
    "process.exited",
    "process.oom",
    "sandbox.paused",
    "sandbox.resumed",
    "sandbox.recovered",
    "gap",
]


@attrs.frozen
@by_fields
class Event:
    """One thing that happened.

    Attributes:
        seq: 1, 2, 3 ... within one engine; never reused, so a reader can resume after it.
        at: seconds since the epoch.
        kind: what happened; "gap" says that a slow reader lost the events before `seq`, or that it has asked for what
            follows a number that was never given here, and gets the oldest there is.
        sandbox_id: the sandbox; empty for a gap.
        container_id: the container, or empty.
        exec_id: the exec'd process, or empty.
        exit: how it ended, for the kinds that end.
        detail: more, by name.
    """

    seq: int
    at: float
    kind: EventKind
    sandbox_id: str = ""
    container_id: str = ""
    exec_id: str = ""
    exit: Exit | None = None
    detail: Mapping[str, str] = attrs.field(factory=dict)
