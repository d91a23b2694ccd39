"""What everything that opens returns: awaitable, and an async context manager."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class Leavable(Protocol):
    """A thing with an end: what leaving the context does."""

    async def _leave(self) -> None: ...


T_co = TypeVar("T_co", bound=Leavable, covariant=True)


class Opening(Awaitable[T_co], AbstractAsyncContextManager[T_co, None], Generic[T_co]):
    """Something that will be opened: `x = await opening`, or `async with opening as x`.

    Awaited, the caller ends it; entered, leaving the context does. It opens once. Used neither way it warns with
    ResourceWarning, since then nothing was opened at all.
    """

    def __init__(self, what: str, open: Callable[[], Coroutine[Any, Any, T_co]]) -> None:
        self._what = what
        self._open: Callable[[], Coroutine[Any, Any, T_co]] | None = open
        self._value: T_co | None = None

    def __await__(self) -> Generator[Any, Any, T_co]:
        if self._open is None:
            raise RuntimeError(f"{self._what} has been awaited already; it opens once")
        open, self._open = self._open, None
        return open().__await__()

    async def __aenter__(self) -> T_co:
        self._value = value = await self
        return value

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._value is not None:
            value, self._value = self._value, None
            await value._leave()

    def __del__(self) -> None:
        if getattr(self, "_open", None) is not None:
            warnings.warn(f"{self._what} was neither awaited nor entered", ResourceWarning, source=self, stacklevel=2)
