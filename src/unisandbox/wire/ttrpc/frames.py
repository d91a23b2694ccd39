"""ttrpc's frames: ten bytes of header and up to 4 MiB of data. Source: PROTOCOL.md of github.com/containerd/ttrpc."""

from __future__ import annotations

import struct
from typing import Final

import attrs

from unisandbox.api.errors import GrpcStatus
from unisandbox.wire.status import Status

REQUEST: Final = 1
RESPONSE: Final = 2
DATA: Final = 3

REMOTE_CLOSED: Final = 0x1
"""On a request or data: its sender sends no more on this stream."""
REMOTE_OPEN: Final = 0x2
"""On a request: its sender will send more on this stream."""
NO_DATA: Final = 0x4
"""On data, and on a request whose sender streams: this is no message. On data without it, no bytes are an empty one."""

MAX_DATA: Final = 4 << 20
"""The most that the data of one frame may have, in bytes. Source: messageLengthMax in the Go implementation."""

_HEADER: Final = struct.Struct(">IIBB")  # length of the data, stream, kind, flags


@attrs.frozen
class Frame:
    """One frame.

    Attributes:
        data: what it carries; None when that was more than `MAX_DATA` and has been thrown away.
        length: how many bytes were announced.
    """

    stream: int
    kind: int
    flags: int
    data: bytes | None
    length: int


def encode(stream: int, kind: int, flags: int, data: bytes) -> bytes:
    """The bytes of a frame; `data` must not be longer than `MAX_DATA`."""
    return _HEADER.pack(len(data), stream, kind, flags) + data


def too_long(length: int) -> Status:
    """What is said of data longer than `MAX_DATA`; in the words of the Go implementation."""
    text = f"message length {length} exceed maximum message size of {MAX_DATA}"
    return Status(GrpcStatus.RESOURCE_EXHAUSTED, text)


class FrameReader:
    """Cuts bytes into frames, however they come. Holds at most one unfinished frame."""

    __slots__ = ("_buffer", "_discard")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._discard = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete with these bytes; one that is too long is told at its header."""
        if self._discard:
            skipped = min(self._discard, len(data))
            self._discard -= skipped
            data = data[skipped:]
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            length, stream, kind, flags = _HEADER.unpack_from(self._buffer, at)
            begin = at + _HEADER.size
            there = len(self._buffer) - begin
            if length > MAX_DATA:
                frames.append(Frame(stream, kind, flags, None, length))
                self._discard = max(0, length - there)
                at = begin + min(length, there)
            elif length <= there:
                at = begin + length
                frames.append(Frame(stream, kind, flags, bytes(self._buffer[begin:at]), length))
            else:
                break
        del self._buffer[:at]
        return frames
