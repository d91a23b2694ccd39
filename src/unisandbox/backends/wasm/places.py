"""Lines in which work of the engine waits that takes long, so that nobody's work holds up everybody else's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio


class Turns:
    """So many at once for each name; who has another name does not wait for them.

    Args:
        each: for one name.
    """

    def __init__(self, each: int = 1) -> None:
        self._each = each
        self._lines: dict[str, anyio.Semaphore] = {}

    @contextlib.asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn, which lasts as long as this is open."""
        line = self._lines.setdefault(name, anyio.Semaphore(self._each))
        try:
            async with line:
                yield
        finally:
            is_unused = line.value == self._each and not line.statistics().tasks_waiting
            if is_unused and self._lines.get(name) is line:
                del self._lines[name]


class Place:
    """One of so many, held until it is given back."""

    __slots__ = ("_held",)

    def __init__(self, held: anyio.Semaphore) -> None:
        self._held: anyio.Semaphore | None = held

    def give_back(self) -> None:
        """Let the next one have it. Repeating is harmless."""
        held, self._held = self._held, None
        if held is not None:
            held.release()

    def move(self, places: anyio.Semaphore) -> bool:
        """Give it back for one of `places`, if one is free now."""
        try:
            places.acquire_nowait()
        except anyio.WouldBlock:
            return False
        self.give_back()
        self._held = places
        return True


@contextlib.asynccontextmanager
async def place_in(places: anyio.Semaphore) -> AsyncIterator[Place]:
    """Wait for a place; it is given back at the end of this at the latest."""
    await places.acquire()
    place = Place(places)
    try:
        yield place
    finally:
        place.give_back()


async def in_place(places: anyio.Semaphore, turn: float, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for a place, and do `work` in it; after `turn` seconds of that the next one has the place."""
    failure: Exception | None = None
    async with place_in(places) as place, anyio.create_task_group() as group:

        async def end_turn() -> None:
            await anyio.sleep(turn)
            place.give_back()

        group.start_soon(end_turn)
        try:
            await work()
        except Exception as error:
            failure = error  # raised below: a task group would wrap it
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
