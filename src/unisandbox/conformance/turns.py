"""Tests that have one of the event loops each, by turns, so that half of them tells about both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import pytest

_LOOPS: Final = ("asyncio", "trio")


def of_the_other_loop(items: Sequence[pytest.Item], takes_turns: Callable[[pytest.Item], bool]) -> list[pytest.Item]:
    """Those to leave out: of each test that runs on both loops and takes turns, the one whose turn it is not."""
    turns: dict[tuple[str, object], int] = {}
    left_out = []
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or "anyio_backend" not in callspec.params or not takes_turns(item):
            continue
        others = tuple((name, index) for name, index in sorted(callspec.indices.items()) if name != "anyio_backend")
        turn = turns.setdefault((item.nodeid.partition("[")[0], others), len(turns) % len(_LOOPS))
        if callspec.params["anyio_backend"] != _LOOPS[turn]:
            left_out.append(item)
    return left_out
