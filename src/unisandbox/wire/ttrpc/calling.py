"""Calls over a connection: many at the same time, from any task, with no task of its own.

Whoever waits for an answer reads for all others (`host/turns.py`). So a client may be opened in one task and closed in
another, on asyncio and trio, and nothing runs when nobody waits.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Final, Self

import anyio

from unisandbox.api.errors import DeadlineExceededError, FailedPreconditionError, GrpcStatus, UnavailableError
from unisandbox.host.turns import Turns
from unisandbox.wire.status import Status, StatusError, error_of
from unisandbox.wire.ttrpc.client import Call, ClientProtocol
from unisandbox.wire.ttrpc.envelope import NO_METADATA, Metadata, Request
from unisandbox.wire.ttrpc.link import MUCH, Link, take
from unisandbox.wire.ttrpc.shapes import LIMITS, UNARY, Limits, Shape

_LONGEST: Final = 9e9
"""About 285 years, in seconds: what nanoseconds of 64 bits can say."""

_GONE: Final = Status(GrpcStatus.UNAVAILABLE, "the connection was closed by its other end")
_CLOSED: Final = Status(GrpcStatus.UNAVAILABLE, "the connection was closed here")


class Client:
    """A connection to a ttrpc server.

    Args:
        sock: a connected stream socket, this object's from now on.
        limits: what the server may make us hold.
    """

    def __init__(self, sock: socket.socket, *, limits: Limits = LIMITS) -> None:
        self._link = Link(sock)
        self._protocol = ClientProtocol(limits)
        self._turns = Turns()
        self._reading: anyio.CancelScope | None = None

    @classmethod
    async def connect(cls, path: str, *, limits: Limits = LIMITS) -> Client:
        """Connect to a unix socket.

        Raises:
            UnavailableError: nobody listens there.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(path)
                    return cls(sock, limits=limits)
                except BlockingIOError:
                    # The listener's queue is full, and of a unix socket nothing tells when it is not any more.
                    await anyio.sleep(0.005)
        except OSError as error:
            sock.close()
            raise UnavailableError(f"cannot connect to {path}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection: every call that waits fails with UnavailableError. Repeating is harmless."""
        self._protocol.close(_CLOSED)
        self._link.close()
        self._turns.notify()

    async def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        metadata: Metadata = NO_METADATA,
        timeout: float | None = None,
    ) -> bytes:
        """Call a method that has one message there and one back.

        Args:
            service: the full name of the service.
            method: the method's own name.
            payload: the message.
            metadata: what else the server is to know; keys in lower case.
            timeout: seconds after which nobody waits any more; the server is told. None: for ever.

        Returns:
            The server's message.

        Raises:
            DeadlineExceededError: there was no answer in time. The server may still be at it; there is no cancelling.
            UnavailableError: the connection has ended.
            SandboxError: the server's status, as the error that means it; a StatusError where none does.
        """
        nanoseconds = 0 if timeout is None else max(1, int(min(timeout, _LONGEST) * 1e9))
        with self._begun(Request(service, method, payload, nanoseconds, metadata), UNARY) as call:
            with anyio.move_on_after(timeout):
                await self._until(lambda: bool(call.inbox) or call.over)
            if not (call.inbox or call.over):
                raise DeadlineExceededError(f"{service}/{method} has not answered within {timeout} s")
            return await _next(call) or b""

    @asynccontextmanager
    async def stream(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        shape: Shape,
        metadata: Metadata = NO_METADATA,
    ) -> AsyncIterator[ClientStream]:
        """Call a method of which either side sends any number of messages.

        What the server sends waits in memory up to a limit, beyond which the call fails: ttrpc has no flow control.

        Args:
            service: the full name of the service.
            method: the method's own name.
            payload: the one message of a client that does not stream.
            shape: which sides send any number.
            metadata: what else the server is to know; keys in lower case.

        Raises:
            UnavailableError: the connection has ended.
            SandboxError: what the stream's methods raise.
        """
        with self._begun(Request(service, method, payload, 0, metadata), shape) as call:
            yield ClientStream(call, self._protocol, self._push, self._until, self._drained)

    @contextmanager
    def _begun(self, request: Request, shape: Shape) -> Iterator[Call]:
        try:
            call = self._protocol.call(request, shape)
        except StatusError as error:
            raise error_of(error.status) from None
        try:
            self._push()
            yield call
        finally:
            self._protocol.forget(call)
            self._push()

    def _push(self) -> None:
        self._link.write(self._protocol.outgoing())
        if self._link.pending and self._reading is not None:
            self._reading.cancel()  # whoever reads has to see to the writing too

    async def _drained(self) -> None:
        await self._until(lambda: self._link.pending <= MUCH)

    async def _until(self, ready: Callable[[], bool]) -> None:
        await self._turns.until(ready, self._turn)

    async def _turn(self) -> None:
        try:
            if self._link.pending:
                await self._either()
            else:
                with anyio.CancelScope() as self._reading:
                    await self._link.readable()
        except anyio.ClosedResourceError:
            return  # `close` has ended every call
        finally:
            self._reading = None
        self._link.flush()
        data = self._link.read()
        if data:
            self._protocol.receive(data)
        elif data is not None:
            self._protocol.close(_GONE)
            self._link.give_up()

    async def _either(self) -> None:
        """Wait until it can be written or read: a server that writes may not read before it has been read."""
        async with anyio.create_task_group() as group:

            async def first(ready: Callable[[], Awaitable[None]]) -> None:
                with suppress(anyio.ClosedResourceError):
                    await ready()
                group.cancel_scope.cancel()

            group.start_soon(first, self._link.readable)
            group.start_soon(first, self._link.writable)


class ClientStream:
    """The messages of a call that streams; made by `Client.stream`, and good until the end of its block."""

    def __init__(
        self,
        call: Call,
        protocol: ClientProtocol,
        push: Callable[[], None],
        until: Callable[[Callable[[], bool]], Awaitable[None]],
        drained: Callable[[], Awaitable[None]],
    ) -> None:
        self._call = call
        self._protocol = protocol
        self._push = push
        self._until = until
        self._drained = drained

    async def receive(self) -> bytes | None:
        """The next message of the server; None when the call has ended well.

        Raises:
            SandboxError: it ended with this error.
        """
        await self._until(lambda: bool(self._call.inbox) or self._call.over)
        return await _next(self._call)

    async def send(self, message: bytes) -> None:
        """Send a message; returns when no more than a little waits to be written.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, it is too long for the protocol; nothing was sent.
            FailedPreconditionError: our side has said that it sends no more, or the server has ended the call.
            SandboxError: the call has ended with this error.
        """
        if self._call.over or self._call.closed:
            if self._call.status is not None:
                raise error_of(self._call.status)
            raise FailedPreconditionError("nothing can be sent on this stream any more")
        self._protocol.send(self._call, message)
        self._push()
        await self._drained()

    async def close(self) -> None:
        """Say that our side sends no more; the server goes on. Repeating is harmless."""
        self._protocol.half_close(self._call)
        self._push()
        await self._drained()


async def _next(call: Call) -> bytes | None:
    if call.inbox:
        return await take(call.inbox)
    if call.status is not None:
        raise error_of(call.status)
    return None
