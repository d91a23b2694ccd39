"""What engines of tests have left behind, as `engine.leftovers` finds and removes it."""

from __future__ import annotations

from unisandbox.engine import leftovers
from unisandbox.engine.leftovers import Leftover


def left_of(engine_id: str) -> list[Leftover]:
    """What is found of one engine: others may have crashed on this machine too."""
    return [leftover for leftover in leftovers.find() if leftover.engine_id == engine_id]


def kinds(found: list[Leftover]) -> list[str]:
    """Their kinds, each once, in order."""
    return list(dict.fromkeys(leftover.kind for leftover in found))


def remove_all(engine_id: str) -> None:
    """Remove what an engine has left, each twice, and the file of numbers if it was the last to lease any."""
    for leftover in [*left_of(engine_id), *left_of("")]:
        if leftover.engine_id or leftover.kind == "file":
            leftovers.remove(leftover)
            leftovers.remove(leftover)
    assert left_of(engine_id) == []
