"""Serving connections: one task per call, so that no call waits for another one, and the reader waits for none."""

from __future__ import annotations

import logging
import socket
from typing import Final, Protocol

import anyio
import anyio.abc
import anyio.lowlevel
import attrs

from unisandbox.api.errors import GrpcStatus
from unisandbox.wire.accepting import accept
from unisandbox.wire.status import Status, StatusError, status_of
from unisandbox.wire.ttrpc.envelope import Request
from unisandbox.wire.ttrpc.link import MUCH, Link, take
from unisandbox.wire.ttrpc.server import Broken, Called, Event, ServerProtocol
from unisandbox.wire.ttrpc.shapes import LIMITS, Inbox, Limits, Messages, Shape

_logger: Final = logging.getLogger("unisandbox.wire")

_TOO_LATE: Final = Status(GrpcStatus.DEADLINE_EXCEEDED, "the time that the caller gave is over")
_NOTHING_SAID: Final = Status(GrpcStatus.INTERNAL, "the call ended without its reply message")


class Handlers(Protocol):
    """What a server answers with.

    What the two coroutines raise is told to the caller by `status.status_of`; they are cancelled when the time that the
    caller gave is over, when he breaks the protocol and when the connection ends.
    """

    def shape(self, service: str, method: str) -> Shape | None:
        """The shape of a method; None when there is none of that name."""
        ...

    async def answer(self, request: Request) -> bytes:
        """Handle a unary call: the reply to its request."""
        ...

    async def converse(self, request: Request, messages: Messages) -> None:
        """Handle a call of any other shape; its end is the end of this coroutine.

        The message of a caller that does not stream is `messages.receive`'s first, and the reply of a server that does
        not stream is what it sends.
        """
        ...


async def serve(listener: socket.socket, handlers: Handlers, *, limits: Limits = LIMITS) -> None:
    """Accept connections and serve them, until cancelled.

    Args:
        listener: a listening socket, the caller's to close.
        handlers: what answers.
        limits: what one peer may make us hold.
    """
    async with anyio.create_task_group() as group:
        await accept(listener, lambda sock: group.start_soon(serve_alone, sock, handlers, limits))


async def serve_alone(sock: socket.socket, handlers: Handlers, limits: Limits = LIMITS) -> None:
    """The same as `serve_connection`, where an error is a line in the log."""
    try:
        await serve_connection(sock, handlers, limits)
    except Exception as error:
        status_of(error, "serving a connection")  # for its line in the log; the other connections go on


async def serve_connection(sock: socket.socket, handlers: Handlers, limits: Limits = LIMITS) -> None:
    """Serve one connection until its other end closes it, then cancel what is still at work for it.

    Args:
        sock: a connected stream socket; it is closed in the end.
        handlers: what answers.
        limits: what the peer may make us hold.
    """
    connection = _Connection(Link(sock), handlers, ServerProtocol(handlers.shape, limits))
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(connection.write)
            await connection.read(group)
            group.cancel_scope.cancel()
    finally:
        connection.link.close()


@attrs.define
class _Handler:
    """A call in progress: how to end it, and how to tell it of messages."""

    scope: anyio.CancelScope
    arrived: anyio.Event


class _Connection:
    def __init__(self, link: Link, handlers: Handlers, protocol: ServerProtocol) -> None:
        self.link = link
        self._handlers = handlers
        self._protocol = protocol
        self._at_work: dict[int, _Handler] = {}
        self._stuck = anyio.Event()
        self._drained = anyio.Event()

    async def read(self, group: anyio.abc.TaskGroup) -> None:
        """Take what comes, until the end."""
        while (data := self.link.read()) != b"":
            if data is None:
                await self.link.readable()
                continue
            for event in self._protocol.receive(data):
                self._handle(event, group)
            # A peer that sends and does not read has to wait, or what is said to it would fill the memory.
            self.push()
            await self.drained()
            await anyio.lowlevel.checkpoint()

    async def write(self) -> None:
        """Write what the kernel would not take at once."""
        while True:
            await self._stuck.wait()
            while self.link.pending:
                await self.link.writable()
                self.link.flush()
                if self.link.pending <= MUCH:
                    self._drained.set()
            self._stuck = anyio.Event()

    def push(self) -> None:
        """Write what the protocol has to say."""
        self.link.write(self._protocol.outgoing())
        if self.link.pending:
            self._stuck.set()

    async def drained(self) -> None:
        """Wait until no more than a little waits to be written."""
        while self.link.pending > MUCH:
            if self._drained.is_set():
                self._drained = anyio.Event()
            await self._drained.wait()

    async def next(self, stream: int, inbox: Inbox) -> bytes | None:
        """The next message of a call."""
        while not inbox:
            if inbox.closed:
                return None
            await self._at_work[stream].arrived.wait()
        return await take(inbox)

    async def send(self, stream: int, message: bytes) -> None:
        """Send one message of a call."""
        self._protocol.send(stream, message)
        self.push()
        await self.drained()

    def _handle(self, event: Event, group: anyio.abc.TaskGroup) -> None:
        if isinstance(event, Called):
            handler = _Handler(anyio.CancelScope(), anyio.Event())
            self._at_work[event.stream] = handler
            group.start_soon(self._work, event, handler)
        elif (handler_at_work := self._at_work.get(event.stream)) is not None:
            if isinstance(event, Broken):
                handler_at_work.scope.cancel()
            handler_at_work.arrived.set()
            handler_at_work.arrived = anyio.Event()

    async def _work(self, called: Called, handler: _Handler) -> None:
        stream, request = called.stream, called.request
        try:
            if request.timeout_nano < 0:
                raise StatusError(_TOO_LATE)
            with handler.scope:
                with anyio.move_on_after(request.timeout_nano / 1e9 if request.timeout_nano else None) as timed:
                    await self._answer(called)
                if timed.cancelled_caught:
                    self._protocol.fail(stream, _TOO_LATE)
        except Exception as error:
            self._protocol.fail(stream, status_of(error, f"{request.service}/{request.method}"))
        finally:
            del self._at_work[stream]
        self.push()
        await self.drained()

    async def _answer(self, called: Called) -> None:
        if called.shape.unary:
            self._protocol.reply(called.stream, await self._handlers.answer(called.request))
            return
        messages = _Messages(self, called)
        await self._handlers.converse(called.request, messages)
        if called.shape.server_streams:
            self._protocol.finish(called.stream)
        elif messages.reply is not None:
            self._protocol.reply(called.stream, messages.reply)
        else:
            raise StatusError(_NOTHING_SAID)


class _Messages:
    """The messages of one call.

    Attributes:
        reply: what a server that does not stream has sent.
    """

    def __init__(self, connection: _Connection, called: Called) -> None:
        self._connection = connection
        self._called = called
        self.reply: bytes | None = None

    async def receive(self) -> bytes | None:
        return await self._connection.next(self._called.stream, self._called.inbox)

    async def send(self, message: bytes) -> None:
        if self._called.shape.server_streams:
            await self._connection.send(self._called.stream, message)
        elif self.reply is None:
            self.reply = message
        else:
            raise ValueError("a second reply to a call that has one")
