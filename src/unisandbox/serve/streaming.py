"""Streams of processes over the pod's own socket, for engines that want no FIFOs (containerd's io_type "streaming").

A process has pipes, whose outer ends the keeper holds; a stream moves bytes between a pipe and whoever asks for it by
its id, for as long as he stays. Nobody is sent more than he has said that he takes (the credit rule), and meanwhile the
process waits. Source: containerd, core/transfer/streaming and internal/cri/io/streaming.go.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from typing import Final, TypeVar

import anyio
import anyio.abc
import attrs
from betterproto2 import Message

from unisandbox.api import InvalidArgumentError, NotFoundError, SandboxError
from unisandbox.api.proto.containerd.services.streaming.v1 import StreamInit
from unisandbox.api.proto.containerd.types.transfer import Data, WindowUpdate
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import StreamingV1
from unisandbox.serve.pods import POD_KEY, Pods
from unisandbox.serve.stdio import LAST_OUTPUT_SECONDS, End, Streams, ends_of
from unisandbox.wire import codec
from unisandbox.wire.services import Call, Services, Stream

M = TypeVar("M", bound=Message)

_PIECE: Final = 32 << 10
_WINDOW: Final = 2 * _PIECE
_MOST_CREDIT: Final = 1 << 30
_LONGEST_ID: Final = 256

_Stream = Stream[AnyMessage, AnyMessage]


@attrs.define(eq=False)
class _Known:
    """A stream that somebody has asked for, or a process has.

    Attributes:
        end: of which process; None until there is one.
        made: set when there is, or never will be.
        asked: whoever has asked last.
        finishing: there while what came before he went away is still written.
    """

    end: End | None = None
    made: anyio.Event = attrs.field(factory=anyio.Event)
    asked: anyio.CancelScope | None = None
    finishing: anyio.Event | None = None


class Streaming:
    """The streams of all pods; add it to a table by `add_to`.

    Args:
        pods: whose.
        group: where what has come is written when whoever sent it is gone.
    """

    def __init__(self, pods: Pods, group: anyio.abc.TaskGroup) -> None:
        self._pods = pods
        self._group = group
        self._known: dict[tuple[str, str], _Known] = {}

    def add_to(self, services: Services) -> None:
        """Add its one method. containerd says no namespace with it."""
        services.add_stream(StreamingV1.STREAM, self.stream, namespaced=False)

    def made(self, sandbox_id: str, container: str, exec_id: str, streams: Streams) -> None:
        """A process is there: whoever waits for its streams gets them."""
        for name, end in ends_of(container, exec_id, streams).items():
            known = self._known.setdefault((sandbox_id, name), _Known())
            known.end = end
            known.made.set()

    def forget(self, beginning: Sequence[str]) -> None:
        """Processes are gone. What their pipes still hold is read to its end by whoever is at it.

        With a whole pod its streams end: those of processes that never came at once, and those that nobody reads soon.
        """
        sandbox_id, *process = beginning
        for key, known in list(self._known.items()):
            if key[0] != sandbox_id:
                continue
            if not process or (known.end is not None and [*known.end[:2]][: len(process)] == process):
                del self._known[key]
            if not process:
                known.made.set()
                if known.asked is not None and known.end is not None:
                    seconds = 0 if known.end.number == 0 else LAST_OUTPUT_SECONDS
                    known.asked.deadline = anyio.current_time() + seconds

    async def stream(self, stream: _Stream, call: Call) -> None:
        """Move bytes of one stream. It may be asked for before its process is there."""
        first = await stream.receive()
        name = "" if first is None else _inside(StreamInit, first).id
        if not 0 < len(name) <= _LONGEST_ID:
            raise InvalidArgumentError(f"a stream's id has 1 to {_LONGEST_ID} characters, got {name!r:.300}")
        place = self._pods.place(await self._pods.entry(call.metadata[POD_KEY][0], None))
        key = (place.entry.sandbox_id, name)
        known = self._known.setdefault(key, _Known())
        if known.asked is not None:
            known.asked.cancel()  # an engine that has been restarted asks again
        known.asked = scope = anyio.CancelScope()
        try:
            with scope:
                await stream.send(AnyMessage())
                # One of a process that was there before this server is known to the keeper alone.
                found = None if known.end else await place.streams.end_of(name)
                known.end = known.end or found
                if known.end is None:
                    await known.made.wait()
                if known.end is None:
                    raise NotFoundError(f"pod {key[0]!r} was removed before there was a stream {name!r}")
                try:
                    fd = await place.streams.take(known.end)
                except FileNotFoundError:
                    return  # closed by CloseIO, or freed
                try:
                    await (self._write(stream, known, fd) if known.end.number == 0 else _read(stream, fd))
                finally:
                    os.close(fd)
        finally:
            if known.asked is scope:
                known.asked = None
                if known.end is None and self._known.get(key) is known:
                    del self._known[key]

    async def _write(self, stream: _Stream, known: _Known, fd: int) -> None:
        """From the stream to a pipe, until the engine says that no more comes, or nobody reads."""
        if known.finishing is not None:
            await known.finishing.wait()
        data = bytearray()
        window = 0
        try:
            while True:
                if window < _WINDOW:
                    await stream.send(_wrapped(WindowUpdate(update=_WINDOW)))
                    window += _WINDOW
                message = await stream.receive()
                if message is None:
                    return
                data += _inside(Data, message).data
                if len(data) > window:
                    raise InvalidArgumentError(f"{len(data)} bytes came when {window} were allowed")
                window -= len(data)
                await _write_all(fd, data)
        except anyio.get_cancelled_exc_class():
            # An engine closes its connection right after its last word: what it has said before counts.
            with contextlib.suppress(SandboxError), anyio.move_on_after(0, shield=True):
                while window > 0 and (message := await stream.receive()) is not None:
                    piece = _inside(Data, message).data
                    window -= max(1, len(piece))  # empty ones have an end, too
                    data += piece
            if data:
                known.finishing = anyio.Event()
                self._group.start_soon(self._finish, known, os.dup(fd), data)
            raise

    async def _finish(self, known: _Known, fd: int, data: bytearray) -> None:
        try:
            await _write_all(fd, data)
        finally:
            os.close(fd)
            if known.finishing is not None:
                known.finishing.set()
            known.finishing = None


async def _read(stream: _Stream, fd: int) -> None:
    """From a pipe to the stream, until the pipe's end or until nobody wants any more."""
    credit = 0
    news = anyio.Event()
    fault: SandboxError | None = None

    async def take_credit() -> None:
        nonlocal credit, fault
        try:
            while (message := await stream.receive()) is not None:
                update = _inside(WindowUpdate, message).update
                if not 0 < update <= _MOST_CREDIT - credit:
                    raise InvalidArgumentError(f"a window cannot be changed by {update} when it is {credit}")
                credit += update
                news.set()
        except SandboxError as error:
            fault = error
        group.cancel_scope.cancel()

    async def see_the_end() -> None:
        # Without credit it cannot be looked for by reading. With no event asked for, epoll tells of the writers' end.
        with select.epoll() as hangup:
            hangup.register(fd, 0)
            await anyio.wait_readable(hangup.fileno())
        news.set()

    async with anyio.create_task_group() as group:
        group.start_soon(take_credit)
        group.start_soon(see_the_end)
        while True:
            while not credit and not _is_at_its_end(fd):
                news = anyio.Event()
                await news.wait()
            await anyio.wait_readable(fd)
            try:
                piece = os.read(fd, min(credit, _PIECE)) if credit else b""
            except BlockingIOError:
                continue
            if not piece:
                break
            credit -= len(piece)
            await stream.send(_wrapped(Data(data=piece)))
        group.cancel_scope.cancel()
    if fault is not None:
        raise fault


def _is_at_its_end(pipe: int) -> bool:
    """Nothing is in it, and nobody can write any more."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return poll.poll(0) == [(pipe, select.POLLHUP)]


async def _write_all(fd: int, data: bytearray) -> None:
    """Write and forget it; what nobody can read any more is forgotten at once."""
    while data:
        try:
            del data[: os.write(fd, data)]
        except BlockingIOError:
            await anyio.wait_writable(fd)
        except BrokenPipeError:
            data.clear()


def _wrapped(message: Data | WindowUpdate) -> AnyMessage:
    return AnyMessage(type_url=f"containerd.types.transfer.{type(message).__name__}", value=codec.encode(message))


def _inside(kind: type[M], message: AnyMessage) -> M:
    if message.type_url.rpartition(".")[2] != kind.__name__:
        raise InvalidArgumentError(f"expected a {kind.__name__} on the stream, got {message.type_url!r:.200}")
    return codec.decode(kind, message.value)
