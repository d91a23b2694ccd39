"""The table of services over gRPC, by grpclib. So it runs on asyncio only; nothing else here does.

grpclib is given bytes in and out, and the reading of messages is ours: its own ends cut and compressed ones with a
traceback in the log, and takes any length. Connections are accepted by us, who looks at their peers first. grpclib's
documentation has neither, so this module alone uses what lies below it: nothing with an underscore, and nothing else
than `tests/wire/test_grpclib.py` looks at. The extra `serve` names the versions that were tested.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

import attrs
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler
from grpclib.const import Status as GrpcLibStatus
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from grpclib.protocol import Stream as H2Stream
from grpclib.server import Handler as CallHandler
from grpclib.server import Server
from grpclib.server import Stream as GrpcStream
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes

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

_PREFIX: Final = struct.Struct(">?I")  # compressed, length

_logger: Final = logging.getLogger("unisandbox.wire")

_incoming: ContextVar[H2Stream] = ContextVar("_incoming")
"""The stream of a call below grpclib's own, in the task that handles it."""


class GrpcServer:
    """Serves all methods that were added to `services` before, on connections that others accept."""

    def __init__(self, services: Services) -> None:
        self._methods = _Table({f"/{method}": _handler(services, method) for method in services.methods})
        # Who listens to its events, which is nobody, is all that is left to a server that does not listen itself.
        self._server = Server([], codec=Bytes())
        self._connections: set[_Connection] = set()

    def connection(self) -> H2Protocol:
        """One more connection, as asyncio's `connect_accepted_socket` wants it."""
        calls = _Calls(self._methods, Bytes(), None, self._server.__dispatch__)
        return _Connection(calls, self._connections)

    async def end(self) -> None:
        """Close every connection, and wait until no call is at work."""
        connections = list(self._connections)
        for connection in connections:
            connection.end()
        for connection in connections:
            await connection.calls.wait_closed()


class _Calls(CallHandler):
    def accept(self, stream: H2Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        token = _incoming.set(stream)
        try:
            super().accept(stream, headers, release_stream)  # in a task, which begins with this context
        finally:
            _incoming.reset(token)


class _Events(EventsProcessor):
    def process(self, event: Any) -> None:
        # What nobody knows is passed over: RFC 9113, 5.5. grpclib would end the connection.
        with contextlib.suppress(NotImplementedError):
            super().process(event)


class _Connection(H2Protocol):
    """Lets its caller wait for more than the 100 things at a time that are h2's default, and ends alone.

    Args:
        calls: what handles its calls.
        all: where it is while it is there.
    """

    def __init__(self, calls: CallHandler, all: set[_Connection]) -> None:
        config = Configuration().__for_server__()
        # As grpclib's own server has it.
        rules = H2Configuration(
            client_side=False,
            header_encoding="ascii",
            validate_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_inbound_headers=False,
            normalize_outbound_headers=False,
        )
        super().__init__(calls, config, rules)
        self.calls: CallHandler = calls
        self._all = all

    def connection_made(self, transport: Any) -> None:
        """In grpclib's place, which keeps to itself what could be told of more calls."""
        self._all.add(self)
        sides = H2Connection(config=self.h2_config)
        sides.initiate_connection()
        window = sides.local_settings.initial_window_size
        if more := self.config.http2_connection_window_size - window:
            sides.increment_flow_control_window(more)
        sides.update_settings(
            {
                SettingCodes.INITIAL_WINDOW_SIZE: self.config.http2_stream_window_size,
                SettingCodes.MAX_CONCURRENT_STREAMS: _MOST_CALLS,
            }
        )
        self.connection = Connection(sides, transport, config=self.config)
        self.connection.flush()
        self.connection.initialize()
        self.processor = _Events(self.handler, self.connection)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception as error:  # what grpclib has not thought of: asyncio would tell it with a traceback
            _logger.warning("a connection breaks the rules of HTTP/2: %r", error)
            self.end()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._all.discard(self)

    def end(self) -> None:
        self.processor.close("the server ends")


class Bytes(CodecBase):
    """Hands on what is already bytes."""

    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: type[bytes]) -> bytes:
        """The same."""
        return message

    def decode(self, data: bytes, message_type: type[bytes]) -> bytes:
        """The same."""
        return data


class _Table(dict[str, Handler]):
    """Has a handler for methods that do not exist too.

    grpclib's own answer lacks the content type, and so gRPC's client in Go tells UNKNOWN instead of UNIMPLEMENTED.
    """

    def get(self, key: str, default: object = None) -> Handler:
        return super().get(key) or Handler(_unimplemented, Cardinality.UNARY_UNARY, bytes, bytes)


async def _unimplemented(stream: GrpcStream[bytes, bytes]) -> None:
    raise GRPCError(GrpcLibStatus.UNIMPLEMENTED, "no such method")


def _handler(services: Services, method: Method[Any, Any]) -> Handler:
    async def handle(stream: GrpcStream[bytes, bytes]) -> None:
        try:
            await _serve(services, method, stream)
        except (GRPCError, StreamTerminatedError):  # the second one: the caller is gone
            raise
        except Exception as error:
            status = status_of(error, str(method))
            message = status.message.encode(errors="replace")[:_MAX_STATUS].decode(errors="ignore")
            raise GRPCError(_code(status.code), message) from None

    return Handler(handle, _cardinality(method), bytes, bytes)


async def _serve(services: Services, method: Method[Any, Any], stream: GrpcStream[bytes, bytes]) -> None:
    request = Request(method.service, method.name, metadata=_metadata(stream))
    messages = _Messages(stream, _incoming.get())
    if method.streams:
        await services.converse(request, messages)
        return
    payload = await messages.receive()
    if payload is None:
        raise InvalidArgumentError("the request has no message")
    await messages.send(await services.answer(attrs.evolve(request, payload=payload)))


class _Messages:
    """The messages of one call.

    Args:
        stream: to answer by.
        incoming: to read from.
    """

    def __init__(self, stream: GrpcStream[bytes, bytes], incoming: H2Stream) -> None:
        self._stream = stream
        self._incoming = incoming

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
        try:
            return await self._incoming.recv_data(size)
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
