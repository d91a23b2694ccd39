"""The client's side of a connection, without input or output: calls in and bytes out, bytes in and the calls' ends out.

What a peer sends for a call that is not waited for any more is thrown away: it comes late, and that is all.
"""

from __future__ import annotations

from typing import Final

from unisandbox.api.errors import GrpcStatus
from unisandbox.wire.protobuf import MalformedError
from unisandbox.wire.status import Status, StatusError
from unisandbox.wire.ttrpc import frames
from unisandbox.wire.ttrpc.envelope import Request, Response
from unisandbox.wire.ttrpc.frames import MAX_DATA, Frame, FrameReader, too_long
from unisandbox.wire.ttrpc.shapes import LIMITS, Budget, Inbox, Limits, Shape

_MAX_STREAM: Final = (1 << 32) - 1


class Call:
    """One call of ours.

    Attributes:
        inbox: the messages of the peer, or the one; closed when the call is over.
        status: why it failed; None while it goes on, and when it ended well.
        closed: our side sends no more.
    """

    __slots__ = ("closed", "inbox", "shape", "status", "stream")

    def __init__(self, stream: int, shape: Shape, inbox: Inbox) -> None:
        self.stream: int = stream
        self.shape: Shape = shape
        self.inbox: Inbox = inbox
        self.status: Status | None = None
        self.closed: bool = not shape.client_streams

    @property
    def over(self) -> bool:
        """Whether the peer has ended it. What it sent before may still be in the inbox."""
        return self.inbox.closed


class ClientProtocol:
    """One connection.

    Args:
        limits: what the peer may make us hold.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._budget = Budget(limits.connection)
        self._reader = FrameReader()
        self._calls: dict[int, Call] = {}
        self._next = 1
        self._out = bytearray()
        self._end: Status | None = None

    def call(self, request: Request, shape: Shape) -> Call:
        """Begin a call.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, the request is too long; UNAVAILABLE, no call can be made on this
                connection any more. Nothing was sent.
        """
        if self._end is not None:
            raise StatusError(self._end)
        if self._next > _MAX_STREAM:
            text = "all stream numbers of this connection have been used; open a new one"
            raise StatusError(Status(GrpcStatus.UNAVAILABLE, text))
        data = _fitting(request.encode())
        call = Call(self._next, shape, Inbox(self._budget, self._limits.stream))
        self._next += 2
        self._calls[call.stream] = call
        self._out += frames.encode(call.stream, frames.REQUEST, _flags(shape, request), data)
        return call

    def send(self, call: Call, message: bytes) -> None:
        """Send one of the messages of a client that streams. Nothing happens when the call is over.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, the message is too long; nothing was sent, and the call goes on.
        """
        data = _fitting(message)
        if not (call.over or call.closed):
            self._out += frames.encode(call.stream, frames.DATA, 0, data)

    def half_close(self, call: Call) -> None:
        """Say that our side sends no more; repeating is harmless."""
        if not (call.over or call.closed):
            self._out += frames.encode(call.stream, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b"")
        call.closed = True

    def forget(self, call: Call) -> None:
        """Wait for this call no more. ttrpc has no way to cancel one: the peer is told only that we send no more."""
        self.half_close(call)
        self._calls.pop(call.stream, None)
        call.inbox.clear()
        call.inbox.closed = True

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer."""
        for frame in self._reader.feed(data):
            call = self._calls.get(frame.stream)
            if call is None:
                continue
            if frame.data is None:
                self._over(call, too_long(frame.length))
            elif frame.kind == frames.RESPONSE:
                self._response(call, frame.data)
            elif frame.kind == frames.DATA:
                self._data(call, frame, frame.data)
            # Other kinds are for a future version: to be ignored.

    def close(self, reason: Status) -> None:
        """The connection is gone: this is how every call ends that is not over."""
        self._end = self._end or reason
        for call in list(self._calls.values()):
            self._over(call, reason)

    def outgoing(self) -> bytes:
        """The bytes to send that have come together since the last call."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def _response(self, call: Call, data: bytes) -> None:
        try:
            response = Response.decode(data)
        except MalformedError as error:
            self._over(call, Status(GrpcStatus.INTERNAL, f"the peer's response is malformed: {error}"))
            return
        # A server that streams may end so too, mostly without a message.
        if response.status is None and (response.payload or not call.shape.server_streams):
            self._put(call, response.payload)
        self._over(call, response.status)

    def _data(self, call: Call, frame: Frame, data: bytes) -> None:
        if not call.shape.server_streams:
            self._over(call, Status(GrpcStatus.INTERNAL, "the peer sent data for a call with one reply message"))
            return
        if not frame.flags & frames.NO_DATA:
            self._put(call, data)
        if frame.flags & frames.REMOTE_CLOSED:
            self._over(call, None)

    def _put(self, call: Call, message: bytes) -> None:
        if not call.inbox.put(message):
            text = "the peer sends faster than its messages are taken"
            self._over(call, Status(GrpcStatus.RESOURCE_EXHAUSTED, text))

    def _over(self, call: Call, status: Status | None) -> None:
        if self._calls.pop(call.stream, None) is not None:
            call.status = status
            call.inbox.closed = True


def _flags(shape: Shape, request: Request) -> int:
    if shape.unary:
        return 0  # as from clients of the time before streams
    if not shape.client_streams:
        return frames.REMOTE_CLOSED
    # An empty payload is no message for the Go implementation; for Rust's only when this flag says so.
    return frames.REMOTE_OPEN | (0 if request.payload else frames.NO_DATA)


def _fitting(data: bytes) -> bytes:
    if len(data) > MAX_DATA:
        raise StatusError(too_long(len(data)))
    return data
