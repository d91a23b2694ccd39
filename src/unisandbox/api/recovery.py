"""What an engine found of a former one when it was opened."""

from __future__ import annotations

from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields

RecoveryAction = Literal["adopted", "removed", "left", "failed"]


@attrs.frozen
@by_fields
class SandboxRecovered:
    """What became of one sandbox that a former engine had left.

    Attributes:
        sandbox_id, name, backend: from its record; empty and None where that was damaged.
        action: "adopted" (it lives on, with this generation), "removed" (what was left of it was freed), "left" (not
            touched, as was asked for), "failed" (it could be neither; `reason` says why, and its record stays).
        reason: why, in one sentence.
        generation: of the sandbox now; handles of an older one are refused.
    """

    sandbox_id: str
    name: str | None
    backend: str
    action: RecoveryAction
    reason: str
    generation: int = 0


@attrs.frozen
@by_fields
class DamagedRecord:
    """A record that could not be read.

    Attributes:
        path: where it was.
        reason: what is wrong with it.
        kept_as: where it is kept now; `path` itself when it was not moved.
        later: a later version of unisandbox has written it. Where its keeper lives, only that version or an owner who
            opens the engine anew frees what it describes.
    """

    path: str
    reason: str
    kept_as: str = ""
    later: bool = False


@attrs.frozen
@by_fields
class RecoveryReport:
    """What `Engine.open` or `Engine.attach` found and did.

    Attributes:
        keeper: "new" (none was running), "adopted" (a former engine's ran on and is this one's now), "attached" (it is
            another engine's; only what was half made or half removed by a process that is gone was freed).
        sandboxes: one entry each, the oldest first.
        damaged: records that could not be read. One that has attached leaves them where they are.
        rebooted: the machine was started anew since a record was written.
    """

    keeper: Literal["new", "adopted", "attached"]
    sandboxes: tuple[SandboxRecovered, ...] = ()
    damaged: tuple[DamagedRecord, ...] = ()
    rebooted: bool = False

    def __bool__(self) -> bool:
        """Whether there was anything to recover."""
        return bool(self.sandboxes or self.damaged)
