"""Byte streams over the pipes and terminals of processes, on any event loop."""

from __future__ import annotations

import errno
import os
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel

from unisandbox.api import FailedPreconditionError, InvalidArgumentError
from unisandbox.host.readiness import Descriptor
from unisandbox.sandbox.pipes import End

# More is not read at once, whatever is asked for: the kernel wants the memory first.
_MOST_AT_ONCE: Final = 1 << 20
_END_OF_INPUT: Final = b"\x04"  # what a terminal's line discipline takes for the end of input; source: termios(3) VEOF
_LINE_ENDS: Final = b"\n\r" + _END_OF_INPUT


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


class Kept:
    """What somebody else has read of a stream before us.

    Args:
        data: these bytes.
        taken: hears how many of them are left, whenever some are taken.
    """

    def __init__(self, data: bytes = b"", taken: Callable[[int], None] = lambda left: None) -> None:
        self._left = memoryview(data)
        self._taken = taken

    def take(self, limit: int) -> bytes:
        """The next ones; b"" when none is left."""
        taken, self._left = self._left[:limit], self._left[limit:]
        if not taken:
            return b""
        self._taken(len(self._left))
        data = bytes(taken)
        if not self._left:
            self._left = memoryview(b"")  # an empty piece would keep the memory of all
        return data


class ReceiveStream(anyio.abc.ByteReceiveStream):
    """What a process writes. Unread, it blocks that process and nothing else.

    Attributes:
        kept: what comes first.
    """

    def __init__(self, source: End, kept: Kept | None = None, *, reopens: bool = False) -> None:
        """See the class.

        Args:
            source: our end.
            kept: what was read before.
            reopens: more may come after its end, as when a slave of a terminal is opened again.
        """
        self._source = source
        self.kept: Kept = kept or Kept()
        self._reopens = reopens

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one and at most 1 MiB.

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
        if not self._source.closed and (kept := self.kept.take(max_bytes)):
            return kept
        data = self._source.read(min(max_bytes, _MOST_AT_ONCE))
        if data == b"" and not self._reopens:
            self._source.finish()
        return data

    @property
    def closed(self) -> bool:
        """Whether it was closed here; the end of what it reads is no closing."""
        return self._source.closed

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._source.fileno()

    async def aclose(self) -> None:
        """Close our end; the process gets SIGPIPE when it writes."""
        self._source.close()
        await anyio.lowlevel.checkpoint()


class SendStream(anyio.abc.ByteSendStream):
    """What a process reads."""

    def __init__(self, sink: Descriptor) -> None:
        self._sink = sink
        self._turn = anyio.Lock()

    async def send(self, item: bytes) -> None:
        """Write all of it, waiting while the process does not read.

        Raises:
            anyio.BrokenResourceError: the process has closed its end.
            anyio.BusyResourceError: another task is sending; nothing was written.
            InvalidArgumentError: it is not bytes.
        """
        view = bytes_of(item, "what is sent")
        try:
            self._turn.acquire_nowait()
        except anyio.WouldBlock as error:
            raise anyio.BusyResourceError("sending to") from error
        try:
            await anyio.lowlevel.checkpoint()
            while view:
                view = view[await self._write(view) :]
        finally:
            self._turn.release()

    async def _write(self, view: memoryview) -> int:
        """Write some of it, or wait until there is room; how many bytes were written."""
        written = self._write_now(view)
        if not written:
            await self._sink.writable()
        return written

    def _write_now(self, view: memoryview) -> int:
        """How many bytes of it were written; 0 when there is no room."""
        try:
            return os.write(self._sink.fileno(), view)
        except BlockingIOError:
            return 0
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.errno == errno.EIO:
                raise anyio.BrokenResourceError from error
            raise

    async def aclose(self) -> None:
        """Close our end; the process reads the end of the file."""
        self._sink.close()
        await anyio.lowlevel.checkpoint()


class TypingStream(SendStream):
    """What is typed at the terminal of a process. The terminal outlives its closing: output is read from it."""

    def __init__(self, sink: Descriptor) -> None:
        super().__init__(sink)
        self._closed = False
        self._end_typed = False
        self._within_line = False

    async def send(self, item: bytes) -> None:
        """As `SendStream.send`; anyio.BrokenResourceError is raised, too, when no process has the terminal any more."""
        if self._closed:
            raise anyio.ClosedResourceError
        await super().send(item)

    def _write_now(self, view: memoryview) -> int:
        # The kernel takes what is written to a terminal that nobody has until it is full, and then does not let us
        # wait: POLLHUP counts as ready.
        if self._sink.hung_up():
            raise anyio.BrokenResourceError
        written = super()._write_now(view)
        if written:
            self._within_line = view[written - 1] not in _LINE_ENDS
        return written

    async def aclose(self) -> None:
        """Type the end of the input (Ctrl-D) after what is being sent, waiting while the terminal is full.

        Who reads lines reads the end of the file, once. Who reads keys (raw mode: an editor, a shell that edits its
        lines) gets the key, and does with it what he does. If the waiting is cut, closing again types it.
        """
        self._closed = True
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # nobody is there who could read it
            # First without waiting: so it is typed in a scope that was cancelled, too.
            if self._turn.locked() or not self._type_end():
                async with self._turn:
                    while not self._type_end():
                        await self._sink.writable()
        await anyio.lowlevel.checkpoint()

    def _type_end(self) -> bool:
        """Whether it is typed; False when there is no room."""
        while not self._end_typed:
            # Within a line, where there are any, the first passes on what there is of it. Source: termios(3), VEOF.
            within_line = self._within_line and self._has_lines()
            if not self._write_now(memoryview(_END_OF_INPUT)):
                return False
            self._end_typed = not within_line
        return True

    def _has_lines(self) -> bool:
        """Whether who reads gets lines at this moment. Linux tells the slave's mode by the master, too."""
        flags: int = termios.tcgetattr(self._sink.fileno())[3]
        return bool(flags & termios.ICANON)


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
