"""What the main process of a container writes, as the keeper keeps it: the last of each stream, and what comes next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Literal

from unisandbox.api import InvalidArgumentError, NotFoundError
from unisandbox.host.keeper import Keeper
from unisandbox.host.keeper.records import RingData

LogStream = Literal["stdout", "stderr"]
LOG_STREAMS: Final[tuple[LogStream, LogStream]] = ("stdout", "stderr")
LOG_BYTES: Final = 1 << 20
"""So much is kept of each output stream of a container."""

_PIECE: Final = 1 << 16
_WAIT_SECONDS: Final = 60.0


class LogReader(AsyncIterator[bytes]):
    """One stream, from the oldest that is kept on, until it ends or is removed.

    An object and no generator: it may be left at any point without cleaning.

    Args:
        keeper: who keeps it.
        name: of the ring.
        whose: what to call it in messages.
        is_replaced: whether the ring is, or is about to be, that of another container of the same name; asked with each
            piece that was read.
        offset: bytes since the beginning that are not wanted.
        tail: begin with so many lines, the last of those that are kept; None: all.
    """

    def __init__(
        self,
        keeper: Keeper,
        name: str,
        whose: str,
        *,
        is_replaced: Callable[[], Awaitable[bool]],
        offset: int = 0,
        tail: int | None = None,
    ) -> None:
        if tail is not None and (isinstance(tail, bool) or not isinstance(tail, int) or tail < 0):
            raise InvalidArgumentError(f"tail must be >= 0 lines, got {tail!r}")
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise InvalidArgumentError(f"offset must be >= 0 bytes, got {offset!r}")
        self._keeper = keeper
        self._name = name
        self._whose = whose
        self._is_replaced = is_replaced
        self._offset = offset
        self._tail = tail
        self._begun = False
        self._ended = False

    async def kept(self) -> bytes:
        """What is there now.

        Raises:
            NotFoundError: nothing is kept.
        """
        try:
            got = await self._read(0, LOG_BYTES)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"no output of {self._whose} is kept",
                hint="That is done for containers that were added and for launched programs, until they are removed.",
            ) from error
        data = _last_lines(got.data[max(0, self._offset - got.begin) :], self._tail)
        self._begun = True
        self._go_on(got)
        return data

    async def __anext__(self) -> bytes:
        """The next piece, waiting for it."""
        if not self._begun and (data := await self.kept()):
            return data
        while not self._ended:
            try:
                got = await self._read(self._offset, _PIECE, wait=_WAIT_SECONDS)
            except FileNotFoundError:
                break  # the container was removed
            self._go_on(got)
            if got.data:
                return got.data
        raise StopAsyncIteration

    async def _read(self, offset: int, limit: int, *, wait: float = 0.0) -> RingData:
        got = await self._keeper.spools.ring_read(self._name, offset, limit=limit, wait=wait)
        if await self._is_replaced():
            raise FileNotFoundError(self._name)
        return got

    def _go_on(self, got: RingData) -> None:
        self._offset = max(self._offset, got.next)
        self._ended = got.eof


def _last_lines(data: bytes, count: int | None) -> bytes:
    """The last lines; the very last need not be whole."""
    if count is None:
        return data
    if count == 0:
        return b""
    at = len(data) - data.endswith(b"\n")
    for _ in range(count):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return data
    return data[at + 1 :]
