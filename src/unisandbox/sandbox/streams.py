"""Byte streams over the pipes and terminals of processes, on any event loop."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import anyio
import anyio.abc
import anyio.lowlevel

from unisandbox.api import FailedPreconditionError, InvalidArgumentError
from unisandbox.host.readiness import Descriptor
from unisandbox.sandbox.pipes import End


def bytes_of(data: object, what: str) -> memoryview:
    """The bytes of anything that has some, one item each: pieces of it count bytes, whatever its own items are.

    Raises:
        InvalidArgumentError: it has none.
    """
    try:
        view = memoryview(data)  # type: ignore[arg-type] # this asks
    except TypeError as error:
        raise InvalidArgumentError(f"{what} must be bytes, got {type(data).__name__}") from error
    return view if view.format == "B" and view.c_contiguous and view.ndim == 1 else memoryview(view.tobytes())


class ReceiveStream(anyio.abc.ByteReceiveStream):
    """What a process writes. Unread, it blocks that process and nothing else.

    Attributes:
        kept: what was read before from it, and comes first.
    """

    def __init__(self, source: End, kept: bytes = b"", *, reopens: bool = False) -> None:
        """See the class.

        Args:
            source: our end.
            kept: what was read before.
            reopens: more may come after its end, as when a slave of a terminal is opened again.
        """
        self._source = source
        self.kept: bytes = kept
        self._reopens = reopens

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one.

        Raises:
            anyio.EndOfStream: everybody who could write has closed it.
            InvalidArgumentError: `max_bytes` is not above 0.
        """
        await anyio.lowlevel.checkpoint()
        while (data := self.receive_nowait(max_bytes)) is None:
            try:
                await self._source.readable()
            except anyio.ClosedResourceError:
                if not self._source.ended:  # by another task, which has read it to its end
                    raise
        if not data:
            raise anyio.EndOfStream
        return data

    def receive_nowait(self, max_bytes: int = 65536) -> bytes | None:
        """What is there now; b"" at the end, None when nothing is there yet."""
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise InvalidArgumentError(f"max_bytes must be > 0, got {max_bytes!r}")
        if self.kept and not self._source.closed:
            kept, self.kept = self.kept[:max_bytes], self.kept[max_bytes:]
            return kept
        data = self._source.read(max_bytes)
        if data == b"" and not self._reopens:
            self._source.finish()
        return data

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._source.fileno()

    async def aclose(self) -> None:
        """Close our end; the process gets SIGPIPE when it writes."""
        self._source.close()
        await anyio.lowlevel.checkpoint()


class SendStream(anyio.abc.ByteSendStream):
    """What a process reads."""

    def __init__(self, sink: Descriptor, close: Callable[[], None] | None = None) -> None:
        self._sink = sink
        self._close = close or sink.close
        self._turn = anyio.ResourceGuard("sending to")

    async def send(self, item: bytes) -> None:
        """Write all of it, waiting while the process does not read.

        Raises:
            anyio.BrokenResourceError: the process has closed its end.
            anyio.BusyResourceError: another task is sending; nothing was written.
            InvalidArgumentError: it is not bytes.
        """
        view = bytes_of(item, "what is sent")
        with self._turn:
            await anyio.lowlevel.checkpoint()
            while view:
                try:
                    view = view[os.write(self._sink.fileno(), view) :]
                except BlockingIOError:
                    await self._sink.writable()
                except (BrokenPipeError, OSError) as error:
                    if isinstance(error, BrokenPipeError) or error.errno == errno.EIO:
                        raise anyio.BrokenResourceError from error
                    raise

    async def aclose(self) -> None:
        """Close our end; the process reads the end of the file."""
        self._close()
        await anyio.lowlevel.checkpoint()


class MissingReceiveStream(anyio.abc.ByteReceiveStream):
    """Stands where a process has no such stream, so that it need not be None."""

    def __init__(self, why: str) -> None:
        self._why = why

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Always raises FailedPreconditionError."""
        raise FailedPreconditionError(self._why)

    async def aclose(self) -> None:
        """Nothing to close."""
        await anyio.lowlevel.checkpoint()


class MissingSendStream(anyio.abc.ByteSendStream):
    """Stands where a process has no input, so that it need not be None."""

    def __init__(self, why: str) -> None:
        self._why = why

    async def send(self, item: bytes) -> None:
        """Always raises FailedPreconditionError."""
        raise FailedPreconditionError(self._why, hint="Start it with stdin='pipe'.")

    async def aclose(self) -> None:
        """Nothing to close."""
        await anyio.lowlevel.checkpoint()
