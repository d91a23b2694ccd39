"""What ttrpc wraps messages in: Request and Response, with their bytes. Source: request.proto, google/rpc/status.proto.

By hand, since every call pays for it: a tenth of what the generated code takes, and `ttrpc/` needs no protobuf package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import attrs

from unisandbox.wire.protobuf import LENGTH, VARINT, MalformedError, fields, put_bytes, put_number, signed
from unisandbox.wire.status import Status

Metadata = Mapping[str, tuple[str, ...]]
"""Keys are lower case; one key may have several values."""

NO_METADATA: Final[Metadata] = MappingProxyType({})


@attrs.frozen
class Request:
    """The beginning of a call.

    Attributes:
        service: the full name of the service.
        method: the method's own name.
        payload: the message; empty also when none comes with it.
        timeout_nano: after how many nanoseconds the caller waits no more; 0 when he waits for ever. Negative: he has
            stopped waiting already.
        metadata: what else the caller says.
    """

    service: str
    method: str
    payload: bytes = b""
    timeout_nano: int = 0
    metadata: Metadata = NO_METADATA

    def encode(self) -> bytes:
        """Its bytes."""
        out = bytearray()
        put_bytes(out, 1, self.service.encode())
        put_bytes(out, 2, self.method.encode())
        if self.payload:
            put_bytes(out, 3, self.payload)
        if self.timeout_nano:
            put_number(out, 4, self.timeout_nano)
        for key, values in self.metadata.items():
            for value in values:
                pair = bytearray()
                put_bytes(pair, 1, key.encode())
                put_bytes(pair, 2, value.encode())
                put_bytes(out, 5, pair)
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """From its bytes; raises MalformedError."""
        service = method = ""
        payload = b""
        timeout_nano = 0
        lists: dict[str, list[str]] = {}
        for number, kind, begin, end in fields(data, 0, len(data)):
            if number == 1:
                service = _text(data, kind, begin, end, "service")
            elif number == 2:
                method = _text(data, kind, begin, end, "method")
            elif number == 3:
                _check(kind, LENGTH, "payload")
                payload = data[begin:end]
            elif number == 4:
                _check(kind, VARINT, "timeout_nano")
                timeout_nano = signed(begin)
            elif number == 5:
                _check(kind, LENGTH, "metadata")
                key, value = _pair(data, begin, end)
                lists.setdefault(key, []).append(value)
        metadata = MappingProxyType({key: tuple(values) for key, values in lists.items()}) if lists else NO_METADATA
        return cls(service, method, payload, timeout_nano, metadata)


@attrs.frozen
class Response:
    """The end of a call.

    Attributes:
        payload: the message, when `status` is None.
        status: why it failed.
    """

    payload: bytes = b""
    status: Status | None = None

    def encode(self) -> bytes:
        """Its bytes."""
        out = bytearray()
        if self.status is not None:
            status = bytearray()
            put_number(status, 1, self.status.code)
            put_bytes(status, 2, self.status.message.encode(errors="replace"))
            put_bytes(out, 1, status)
        if self.payload:
            put_bytes(out, 2, self.payload)
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes) -> Response:
        """From its bytes; raises MalformedError. The details of a status are not kept."""
        payload = b""
        status: Status | None = None
        for number, kind, begin, end in fields(data, 0, len(data)):
            if number == 1:
                _check(kind, LENGTH, "status")
                status = _status(data, begin, end)
            elif number == 2:
                _check(kind, LENGTH, "payload")
                payload = data[begin:end]
        return cls(payload, status)


def _status(data: bytes, at: int, end: int) -> Status | None:
    code, message = 0, ""
    for number, kind, begin, stop in fields(data, at, end):
        if number == 1:
            _check(kind, VARINT, "status.code")
            code = signed(begin)
        elif number == 2:
            message = _text(data, kind, begin, stop, "status.message")
    return Status(code, message) if code else None  # a status of 0 says OK


def _pair(data: bytes, at: int, end: int) -> tuple[str, str]:
    key = value = ""
    for number, kind, begin, stop in fields(data, at, end):
        if number == 1:
            key = _text(data, kind, begin, stop, "metadata.key")
        elif number == 2:
            value = _text(data, kind, begin, stop, "metadata.value")
    return key.lower(), value


def _text(data: bytes, kind: int, begin: int, end: int, what: str) -> str:
    _check(kind, LENGTH, what)
    try:
        return data[begin:end].decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"{what} is no UTF-8: {error}") from error


def _check(kind: int, wanted: int, what: str) -> None:
    if kind != wanted:
        raise MalformedError(f"{what} has wire type {kind}, not {wanted}")
