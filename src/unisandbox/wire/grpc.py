"""The table of services over gRPC, by grpclib. So it runs on asyncio only; nothing else here does.

grpclib is given bytes in and out, and the reading of messages is ours: its own ends cut and compressed ones with a
traceback in the log, and takes any length.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine
from typing import Any, Final

import attrs
from grpclib.const import Cardinality, Handler
from grpclib.const import Status as GrpcLibStatus
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from grpclib.server import Server
from grpclib.server import Stream as GrpcStream

from unisandbox.api.errors import GrpcStatus, InvalidArgumentError
from unisandbox.api.rpc import Method
from unisandbox.wire.services import Services
from unisandbox.wire.status import Status, StatusError, status_of
from unisandbox.wire.ttrpc.envelope import NO_METADATA, Metadata, Request

MAX_MESSAGE: Final = 16 << 20
"""The longest message, in bytes. Source: containerd, defaults.DefaultMaxRecvMsgSize."""

_MAX_STATUS: Final = 4 << 10
"""The most bytes of an error's message: it travels as an HTTP header, at up to three times its length."""

_MOST_CALLS: Final = 1 << 16
"""The most calls on one connection at a time: an engine waits for the end of each of its pods, by one connection."""

_MAX_CONCURRENT_STREAMS: Final = 3  # source: RFC 9113, 6.5.2
_PREFIX: Final = struct.Struct(">?I")  # compressed, length


def server(services: Services) -> Server:
    """A gRPC server of all methods that were added to `services` before."""
    made = _Server([_Servable(services)], codec=_Bytes())
    made._mapping = _Table(made._mapping)
    return made


class _Server(Server):
    def _protocol_factory(self) -> H2Protocol:
        made = super()._protocol_factory()
        return _Connection(made.handler, made.config, made.h2_config)


class _Connection(H2Protocol):
    """Lets its caller wait for more than the 100 things at a time that are h2's default."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.connection._connection.update_settings({_MAX_CONCURRENT_STREAMS: _MOST_CALLS})
        self.connection.flush()


class _Bytes(CodecBase):
    """Hands on what is already bytes."""

    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: type[bytes]) -> bytes:
        return message

    def decode(self, data: bytes, message_type: type[bytes]) -> bytes:
        return data


class _Table(dict[str, Handler]):
    """Has a handler for methods that do not exist too.

    grpclib's own answer lacks the content type, and so gRPC's client in Go tells UNKNOWN instead of UNIMPLEMENTED.
    """

    def get(self, key: str, default: object = None) -> Handler:
        return super().get(key) or Handler(_unimplemented, Cardinality.UNARY_UNARY, bytes, bytes)


async def _unimplemented(stream: GrpcStream[bytes, bytes]) -> None:
    raise GRPCError(GrpcLibStatus.UNIMPLEMENTED, "no such method")


class _Servable:
    def __init__(self, services: Services) -> None:
        self._services = services

    def __mapping__(self) -> dict[str, Handler]:
        return {f"/{method}": self._handler(method) for method in self._services.methods}

    def _handler(self, method: Method[Any, Any]) -> Handler:
        return Handler(self._handle(method), _cardinality(method), bytes, bytes)

    def _handle(self, method: Method[Any, Any]) -> Callable[[GrpcStream[bytes, bytes]], Coroutine[Any, Any, None]]:
        async def handle(stream: GrpcStream[bytes, bytes]) -> None:
            try:
                await self._serve(method, stream)
            except (GRPCError, StreamTerminatedError):  # the second one: the caller is gone
                raise
            except Exception as error:
                status = status_of(error, str(method))
                message = status.message.encode(errors="replace")[:_MAX_STATUS].decode(errors="ignore")
                raise GRPCError(_code(status.code), message) from None

        return handle

    async def _serve(self, method: Method[Any, Any], stream: GrpcStream[bytes, bytes]) -> None:
        request = Request(method.service, method.name, metadata=_metadata(stream))
        messages = _Messages(stream)
        if method.streams:
            await self._services.converse(request, messages)
            return
        payload = await messages.receive()
        if payload is None:
            raise InvalidArgumentError("the request has no message")
        await messages.send(await self._services.answer(attrs.evolve(request, payload=payload)))


class _Messages:
    """The messages of one call."""

    def __init__(self, stream: GrpcStream[bytes, bytes]) -> None:
        self._stream = stream

    async def receive(self) -> bytes | None:
        prefix = await self._read(_PREFIX.size)
        if not prefix:
            return None
        compressed, length = _PREFIX.unpack(prefix)
        if compressed:
            text = "compressed messages are not understood here"
            raise StatusError(Status(GrpcStatus.UNIMPLEMENTED, text))
        _check_length(length)
        message = await self._read(length)
        if len(message) < length:
            raise InvalidArgumentError("a message is cut short after its prefix")
        return message

    async def _read(self, size: int) -> bytes:
        """So many bytes; b"" at the end."""
        # Below grpclib's surface, for the reasons above; the extra `serve` names the versions that were tested.
        try:
            return await self._stream._stream.recv_data(size)
        except AssertionError as error:  # how grpclib says that the stream ends within them
            raise InvalidArgumentError(f"a message is cut short: {error}") from error

    async def send(self, message: bytes) -> None:
        _check_length(len(message))
        await self._stream.send_message(message)


def _check_length(length: int) -> None:
    if length > MAX_MESSAGE:
        text = f"message length {length} exceed maximum message size of {MAX_MESSAGE}"
        raise StatusError(Status(GrpcStatus.RESOURCE_EXHAUSTED, text))


def _metadata(stream: GrpcStream[bytes, bytes]) -> Metadata:
    if stream.metadata is None:
        return NO_METADATA
    return {key: tuple(str(value) for value in stream.metadata.getall(key)) for key in stream.metadata}


def _cardinality(method: Method[Any, Any]) -> Cardinality:
    streams = method.client_streams, method.server_streams
    return next(cardinality for cardinality in Cardinality if cardinality.value == streams)


def _code(code: int) -> GrpcLibStatus:
    try:
        return GrpcLibStatus(code)
    except ValueError:  # from a peer of ours, and none that gRPC knows
        return GrpcLibStatus.UNKNOWN
