"""The server's side of a connection, without input or output: bytes in and events out, answers in and bytes out.

It never fails: whatever a peer sends ends that peer's call at worst, with a status that says what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from unisandbox.api.errors import GrpcStatus
from unisandbox.wire.protobuf import MalformedError
from unisandbox.wire.status import Status, StatusError
from unisandbox.wire.ttrpc import frames
from unisandbox.wire.ttrpc.envelope import Request, Response
from unisandbox.wire.ttrpc.frames import MAX_DATA, Frame, FrameReader, too_long
from unisandbox.wire.ttrpc.shapes import LIMITS, OVERHEAD, Budget, Inbox, Limits, Shape


@attrs.frozen
class Called:
    """A call has begun: answer it with `reply`, `finish` or `fail`.

    Attributes:
        inbox: the caller's messages, when the shape is not unary.
    """

    stream: int
    request: Request
    shape: Shape
    inbox: Inbox


@attrs.frozen
class Arrived:
    """The call's inbox has more, or is closed now."""

    stream: int


@attrs.frozen
class Broken:
    """The call was ended here, and the peer told why: its handler has nobody to answer to."""

    stream: int


Event = Called | Arrived | Broken


@attrs.define
class _Call:
    shape: Shape
    inbox: Inbox
    cost: int


class ServerProtocol:
    """One connection.

    Args:
        shape_of: the shape of a method, by service and method; None when there is none of that name.
        limits: what the peer may make us hold.
    """

    def __init__(self, shape_of: Callable[[str, str], Shape | None], limits: Limits = LIMITS) -> None:
        self._shape_of = shape_of
        self._limits = limits
        self._budget = Budget(limits.connection)
        self._reader = FrameReader()
        self._calls: dict[int, _Call] = {}
        self._last = 0
        self._out = bytearray()

    def receive(self, data: bytes) -> list[Event]:
        """What these bytes of the peer mean."""
        events: list[Event] = []
        for frame in self._reader.feed(data):
            if frame.kind == frames.REQUEST:
                self._request(frame, events)
            elif frame.kind == frames.DATA:
                self._data(frame, events)
            # Other kinds are for a future version: to be ignored.
        return events

    def outgoing(self) -> bytes:
        """The bytes to send that have come together since the last call."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def reply(self, stream: int, payload: bytes) -> None:
        """End a call with its one message. Nothing happens when the call has ended already."""
        data = Response(payload).encode()
        if len(data) > MAX_DATA:
            self.fail(stream, too_long(len(data)))
        elif self._end(stream):
            self._out += frames.encode(stream, frames.RESPONSE, 0, data)

    def send(self, stream: int, message: bytes) -> None:
        """Send one of the messages of a server that streams. Nothing happens when the call has ended already.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, the message is too long; nothing was sent, and the call goes on.
        """
        if len(message) > MAX_DATA:
            raise StatusError(too_long(len(message)))
        if stream in self._calls:
            self._out += frames.encode(stream, frames.DATA, 0, message)

    def finish(self, stream: int) -> None:
        """End the call of a server that streams. Nothing happens when it has ended already."""
        if self._end(stream):
            self._out += frames.encode(stream, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")

    def fail(self, stream: int, status: Status) -> None:
        """End a call with an error. Nothing happens when it has ended already."""
        if self._end(stream):
            self._refuse(stream, status)

    def _request(self, frame: Frame, events: list[Event]) -> None:
        stream = frame.stream
        if stream % 2 == 0:
            self._refuse(stream, _invalid("StreamID must be odd for client initiated streams"))
            return
        if stream <= self._last:
            self._refuse(stream, _invalid("StreamID cannot be re-used and must increment"))
            return
        self._last = stream
        if frame.data is None:
            self._refuse(stream, too_long(frame.length))
            return
        try:
            request = Request.decode(frame.data)
        except MalformedError as error:
            self._refuse(stream, _invalid(f"unmarshal request error: {error}"))
            return
        shape = self._shape_of(request.service, request.method)
        if shape is None:
            self._refuse(stream, Status(GrpcStatus.UNIMPLEMENTED, f"no method {request.service}/{request.method}"))
            return
        call = self._begin(frame, request, shape)
        if call is None:
            self._refuse(stream, Status(GrpcStatus.RESOURCE_EXHAUSTED, "too much at the same time on this connection"))
            return
        self._calls[stream] = call
        events.append(Called(stream, request, shape, call.inbox))

    def _begin(self, frame: Frame, request: Request, shape: Shape) -> _Call | None:
        """Hold what a call has brought; None, and nothing is held, when that is beyond a limit."""
        cost = frame.length + OVERHEAD
        if len(self._calls) >= self._limits.calls or not self._budget.take(cost):
            return None
        inbox = Inbox(self._budget, self._limits.stream)
        # The first message of a stream is held twice: in the request, and in the inbox until it is taken.
        first = not shape.unary and (not shape.client_streams or _brings_message(frame, request))
        if first and not inbox.put(request.payload):
            self._budget.give(cost)
            return None
        inbox.closed = not shape.client_streams or bool(frame.flags & frames.REMOTE_CLOSED)
        return _Call(shape, inbox, cost)

    def _data(self, frame: Frame, events: list[Event]) -> None:
        stream = frame.stream
        call = self._calls.get(stream)
        if call is None:
            # What was under way when the call ended is no fault of the peer's.
            if stream > self._last or stream % 2 == 0:
                self._refuse(stream, _invalid("StreamID is not active"))
            return
        message = None if frame.flags & frames.NO_DATA else frame.data
        if frame.data is None:
            fault = too_long(frame.length)
        elif not call.shape.client_streams:
            fault = _invalid("data for a call with one request message")
        elif call.inbox.closed:
            fault = _invalid("data after the last message")
        elif message is not None and not call.inbox.put(message):
            fault = Status(GrpcStatus.RESOURCE_EXHAUSTED, "too many messages that nobody has taken yet")
        else:
            call.inbox.closed = bool(frame.flags & frames.REMOTE_CLOSED)
            events.append(Arrived(stream))
            return
        self.fail(stream, fault)
        events.append(Broken(stream))

    def _end(self, stream: int) -> bool:
        call = self._calls.pop(stream, None)
        if call is None:
            return False
        call.inbox.clear()
        call.inbox.closed = True
        self._budget.give(call.cost)
        return True

    def _refuse(self, stream: int, status: Status) -> None:
        self._out += frames.encode(stream, frames.RESPONSE, 0, Response(status=status).encode())


def _brings_message(frame: Frame, request: Request) -> bool:
    return bool(request.payload) and not frame.flags & frames.NO_DATA


def _invalid(message: str) -> Status:
    return Status(GrpcStatus.INVALID_ARGUMENT, message)
