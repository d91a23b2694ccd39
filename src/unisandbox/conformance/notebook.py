"""An event loop as a notebook has it: it goes on between cells, when nobody awaits anything."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")

_DEADLINE: Final = 60.0
_QUIET_SECONDS: Final = 0.1
# A loop that is kept busy looks thousands of times in that time.
_MOST_LOOKS: Final = 5
_SETTLED_SECONDS: Final = 10.0


class _Selector(selectors.DefaultSelector):
    """Counts how often the loop looks for something to do."""

    looks = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks += 1
        return super().select(timeout)


class Notebook:
    """A loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._selector = _Selector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._own = self._watched()

    def _watched(self) -> set[FileDescriptorLike]:
        return {key.fd for key in self._selector.get_map().values()}

    def begin(self, code: Callable[[], Awaitable[T]]) -> Future[T]:
        """Run a cell. Cancelling what this returns interrupts it."""

        async def cell() -> T:
            return await code()

        return asyncio.run_coroutine_threadsafe(cell(), self._loop)

    def cell(self, code: Callable[[], Awaitable[T]]) -> T:
        """Run a cell, and wait for its end."""
        return self.begin(code).result(_DEADLINE)

    def check_rest(self) -> None:
        """Between cells: no task is left, nothing is waited for, and nothing keeps the loop busy.

        Raises:
            AssertionError: it is not so.
        """

        # What a cell has ended with may still be on its way: a loop that never rests is told from that by its patience.
        deadline = time.monotonic() + _SETTLED_SECONDS
        while (restless := self._restless()) and time.monotonic() < deadline:
            pass
        assert not restless, restless

    def _restless(self) -> str:
        """Why it is not at rest; empty when it is."""

        async def tasks() -> set[asyncio.Task[object]]:
            return asyncio.all_tasks() - {asyncio.current_task()}

        if left := self.cell(tasks):
            return f"tasks are left: {left}"
        if self._watched() != self._own:
            return f"it watches {self._watched()}, by itself {self._own}"
        before = self._selector.looks
        time.sleep(_QUIET_SECONDS)  # that nothing comes cannot be waited for
        looks = self._selector.looks - before
        return f"it has looked {looks} times in {_QUIET_SECONDS:g} s" if looks > _MOST_LOOKS else ""

    def run(self) -> None:
        """What its thread does."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def end(self) -> None:
        """End the loop as a kernel that is shut down."""
        self.cell(self._loop.shutdown_asyncgens)
        self._loop.call_soon_threadsafe(self._loop.stop)


@contextmanager
def notebook() -> Iterator[Notebook]:
    """One that runs for the block."""
    made = Notebook()
    thread = threading.Thread(target=made.run, name="the notebook's loop")
    thread.start()
    try:
        yield made
    finally:
        made.end()
        thread.join()
