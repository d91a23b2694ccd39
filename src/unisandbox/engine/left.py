"""What is written down of sandboxes that cannot be had in this engine."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from unisandbox.api import FailedPreconditionError, SandboxStatus
from unisandbox.api.status import SandboxState
from unisandbox.engine.record import Record, status_of


class Left(NamedTuple):
    """A sandbox that is written down and cannot be had in this engine.

    Attributes:
        record: of it.
        why: it cannot; "" when it was only to be reported.
        hint: what to do.
        lived: its keeper has not ended since it was written down.
    """

    record: Record
    why: str = ""
    hint: str = ""
    lived: bool = True

    @property
    def status(self) -> SandboxStatus:
        """As it is written down."""
        state: SandboxState = "created" if self.record.phase == "creating" else "stopped"
        if self.record.phase == "ready" and self.lived:
            state = "ready"
        return attrs.evolve(status_of(self.record, state), unusable=". ".join(filter(None, [self.why, self.hint])))

    def refusal(self, ref: str) -> FailedPreconditionError:
        """What to raise when somebody asks for it by this name or id."""
        if self.why:
            return FailedPreconditionError(f"sandbox {ref!r} cannot be used here: {self.why}", hint=self.hint)
        return FailedPreconditionError(
            f"sandbox {ref!r} was left by a former engine and not taken over",
            hint="Open the engine with on_recover='adopt' or 'stop'.",
        )
