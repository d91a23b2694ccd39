"""What the keeper remembers of outputs is bounded, and told when it was dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from unisandbox.host.keeper.rings import Memory, Ring

Fill = Callable[[bytes], Ring]


@pytest.fixture
def memory() -> Memory:
    return Memory(limit=1000)


@pytest.fixture
def fill(memory: Memory) -> Iterator[Fill]:
    """A ring of at most 800 bytes that has taken these."""
    with ExitStack() as stack:

        def fill(data: bytes) -> Ring:
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            ring = Ring(reading, 800, memory)
            os.write(writing, data)
            os.close(writing)
            ring.drain()
            return ring

        yield fill


def test_rings_may_promise_more_than_there_is(fill: Fill) -> None:
    assert [fill(b"x" * 10).size for _ in range(100)] == [10] * 100


def test_over_the_bound_the_largest_ring_drops_its_oldest(memory: Memory, fill: Fill) -> None:
    large, small, new = fill(b"a" * 100 + b"b" * 600), fill(b"s" * 200), fill(b"n" * 200)
    assert (large.size, large.lost, large.read(0, 1000)) == (600, 100, (100, b"b" * 600))
    assert [(ring.size, ring.lost) for ring in (small, new)] == [(200, 0), (200, 0)]
    assert memory.used == 1000


def test_only_what_nobody_has_taken_is_lost_and_that_for_good(memory: Memory, fill: Fill) -> None:
    ring = fill(b"o" * 100 + b"x" * 800)
    assert (ring.lost, ring.offer()) == (100, b"x" * 800)
    assert ring.lost == 100  # offered is not taken: whoever had it may be gone
    ring.give(400)
    assert (ring.lost, ring.offer()) == (100, b"x" * 500)
    memory.limit = 100
    memory.trim()
    assert (ring.lost, ring.size) == (500, 100)
    ring.give(700)  # by him to whom it was offered before it was dropped
    assert (ring.lost, ring.first) == (200, 800)
    ring.give(900)
    assert (ring.lost, ring.size, memory.used) == (100, 0, 0)
    for wrong in (0, 900, 901):
        ring.give(wrong)
        assert (ring.lost, ring.first, ring.end) == (100, 900, 900)


def test_what_was_given_away_or_removed_makes_room(memory: Memory, fill: Fill) -> None:
    first, second = fill(b"1" * 700), fill(b"2" * 300)
    first.give(500)
    memory.remove(second)
    memory.remove(second)
    assert memory.used == 200
    third = fill(b"3" * 900)
    assert (first.size, third.size, third.lost, memory.used) == (200, 800, 100, 1000)
