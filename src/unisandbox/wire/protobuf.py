"""The grammar of protobuf's wire format, read strictly: what is cut short or malformed is an error.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
FIXED32: Final = 5

_MAX_FIELD: Final = (1 << 29) - 1


class MalformedError(ValueError):
    """The bytes are no message; says what is wrong and at which byte."""


def fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message in `data[at:end]`, in order.

    Yields:
        Number, wire type, and where its value begins and ends; a varint's value stands in place of its beginning.

    Raises:
        MalformedError: at the first field that is cut short or malformed.
    """
    while at < end:
        start = at
        key, at = varint(data, at, end)
        number, kind = key >> 3, key & 7
        if not 0 < number <= _MAX_FIELD:
            raise MalformedError(f"field number {number} at byte {start}")
        if kind == VARINT:
            value, at = varint(data, at, end)
            yield number, kind, value, at
            continue
        if kind == LENGTH:
            length, at = varint(data, at, end)
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:  # groups, which proto3 does not have, and what nobody has
            raise MalformedError(f"wire type {kind} at byte {start}")
        if length > end - at:
            raise MalformedError(f"field {number} at byte {start} is cut short: {end - at} of {length} bytes")
        yield number, kind, at, at + length
        at += length


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins at `at`, as 64 bits without sign, and where it ends.

    Raises:
        MalformedError: it is cut short, or has more than 64 bits.
    """
    if at < end and (value := data[at]) < 0x80:
        return value, at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise MalformedError("a number is cut short at the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise MalformedError(f"a number before byte {at} has more than 64 bits")


def signed(value: int) -> int:
    """A varint's 64 bits, read as an int64."""
    return value - (1 << 64) if value >> 63 else value


def put_varint(out: bytearray, value: int) -> None:
    """Append a number of up to 64 bits; negative ones as int64."""
    value &= (1 << 64) - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def put_bytes(out: bytearray, number: int, value: bytes | bytearray) -> None:
    """Append a field of bytes, text or a message."""
    put_varint(out, number << 3 | LENGTH)
    put_varint(out, len(value))
    out += value


def put_number(out: bytearray, number: int, value: int) -> None:
    """Append a field of type int32, int64 or uint64."""
    put_varint(out, number << 3 | VARINT)
    put_varint(out, value)
