"""Byte streams over the pipes and terminals of processes, on any event loop."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import anyio
import anyio.abc
import anyio.lowlevel

from unisandbox.api import FailedPreconditionError
from unisandbox.host.readiness import Descriptor


class ReceiveStream(anyio.abc.ByteReceiveStream):
    """What a process writes. Unread, it blocks that process and nothing else.

    Attributes:
        kept: what was read before from it, and comes first.
    """

    def __init__(self, source: Descriptor, kept: bytes = b"") -> None:
        """Args: source: our end."""
        self._source = source
        self.kept: bytes = kept

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one.

        Raises:
            anyio.EndOfStream: everybody who could write has closed it.
        """
        await anyio.lowlevel.checkpoint()
        while (data := self.receive_nowait(max_bytes)) is None:
            await self._source.readable()
        if not data:
            raise anyio.EndOfStream
        return data

    def receive_nowait(self, max_bytes: int = 65536) -> bytes | None:
        """What is there now; b"" at the end, None when nothing is there yet."""
        if self.kept and not self._source.closed:
            data, self.kept = self.kept[:max_bytes], self.kept[max_bytes:]
            return data
        return self._source.read(max_bytes)

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

    async def send(self, item: bytes) -> None:
        """Write all of it, waiting while the process does not read.

        Raises:
            anyio.BrokenResourceError: the process has closed its end.
        """
        await anyio.lowlevel.checkpoint()
        view = memoryview(item)
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
