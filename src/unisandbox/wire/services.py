"""Methods and what handles them, whatever carries the calls: the one way from bytes to a handler and back.

A handler sees only valid messages and, where its method needs one, a valid containerd namespace. What it raises is told
to the caller by `status.status_of`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

import attrs
from betterproto2 import Message

from unisandbox.api.errors import FailedPreconditionError
from unisandbox.api.names import check_name
from unisandbox.api.rpc import Method
from unisandbox.wire import codec
from unisandbox.wire.ttrpc.envelope import Metadata, Request
from unisandbox.wire.ttrpc.shapes import UNARY, Messages, Shape

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

NAMESPACE_KEYS: Final = ("containerd-namespace-ttrpc", "containerd-namespace")
"""How containerd says its namespace, by ttrpc and by gRPC. Source: containerd, pkg/namespaces/{ttrpc,grpc}.go."""


@attrs.frozen
class Call:
    """What came with a request.

    Attributes:
        namespace: containerd's; empty when the method was added as one that needs none.
        metadata: all that the caller says.
    """

    namespace: str
    metadata: Metadata


class Stream(Generic[Q, R]):
    """The messages of a call in which either side sends any number."""

    def __init__(self, method: Method[Q, R], messages: Messages) -> None:
        self._method = method
        self._messages = messages

    async def receive(self) -> Q | None:
        """The next message of the caller; None when he sends no more.

        Raises:
            InvalidArgumentError: it is no valid one.
        """
        data = await self._messages.receive()
        return None if data is None else codec.decode(self._method.request, data)

    async def send(self, message: R) -> None:
        """Send one to the caller.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, it is too long for what carries it; nothing was sent.
        """
        await self._messages.send(codec.encode(message))


@attrs.frozen
class _Unary:
    method: Method[Any, Any]
    namespaced: bool
    handler: Callable[[Any, Call], Awaitable[Any]]


@attrs.frozen
class _Streaming:
    method: Method[Any, Any]
    namespaced: bool
    handler: Callable[[Stream[Any, Any], Call], Awaitable[None]]


class Services:
    """A table of methods. Serve it by `ttrpc.serve`, or by `grpc.GrpcServer`, or both."""

    def __init__(self) -> None:
        self._unary: dict[tuple[str, str], _Unary] = {}
        self._streaming: dict[tuple[str, str], _Streaming] = {}

    @property
    def methods(self) -> list[Method[Any, Any]]:
        """All that were added."""
        unary = [bound.method for bound in self._unary.values()]
        return unary + [bound.method for bound in self._streaming.values()]

    def add(self, method: Method[Q, R], handler: Callable[[Q, Call], Awaitable[R]], *, namespaced: bool = True) -> None:
        """Add a method that has one message each way.

        Args:
            method: one that was not added before.
            handler: from the request to the reply.
            namespaced: calls without a containerd namespace are refused.
        """
        self._unary[self._key(method, streams=False)] = _Unary(method, namespaced, handler)

    def add_stream(
        self, method: Method[Q, R], handler: Callable[[Stream[Q, R], Call], Awaitable[None]], *, namespaced: bool = True
    ) -> None:
        """Add a method of any other shape; the call ends when the handler does."""
        self._streaming[self._key(method, streams=True)] = _Streaming(method, namespaced, handler)

    def _key(self, method: Method[Any, Any], *, streams: bool) -> tuple[str, str]:
        if self.shape(method.service, method.name) is not None:
            raise ValueError(f"{method} has a handler already")
        if method.streams != streams:
            raise ValueError(f"{method} has another shape")
        return method.service, method.name

    def shape(self, service: str, method: str) -> Shape | None:
        """The shape of a method; None when it was not added."""
        if (service, method) in self._unary:
            return UNARY
        if bound := self._streaming.get((service, method)):
            return Shape(bound.method.client_streams, bound.method.server_streams)
        return None

    async def answer(self, request: Request) -> bytes:
        """Handle a call that has one message each way, of a method that was added as such: the bytes of its reply.

        Raises:
            SandboxError: what the handler raises, and what is wrong with the request.
        """
        bound = self._unary[request.service, request.method]
        call = _call(request, namespaced=bound.namespaced)
        message = codec.decode(bound.method.request, request.payload)
        return codec.encode(await bound.handler(message, call))

    async def converse(self, request: Request, messages: Messages) -> None:
        """Handle a call of any other shape, until its handler ends; raises what `answer` does."""
        bound = self._streaming[request.service, request.method]
        call = _call(request, namespaced=bound.namespaced)
        await bound.handler(Stream(bound.method, messages), call)


def _call(request: Request, *, namespaced: bool) -> Call:
    return Call(_namespace(request.metadata) if namespaced else "", request.metadata)


def namespace_of(metadata: Metadata) -> str:
    """containerd's namespace as a caller says it; empty when he says none. Raises InvalidArgumentError."""
    for key in NAMESPACE_KEYS:
        if values := metadata.get(key):
            return check_name(values[0], "containerd namespace")
    return ""


def _namespace(metadata: Metadata) -> str:
    if namespace := namespace_of(metadata):
        return namespace
    raise FailedPreconditionError("namespace is required", hint=f"Send one as metadata {' or '.join(NAMESPACE_KEYS)}.")
