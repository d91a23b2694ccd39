"""Messages to bytes and back: nothing that is cut short or invalid becomes a message.

betterproto2 reads leniently: a message that ends in the middle of a field is a shorter one, a number where text belongs
becomes the text. So what comes in is walked through by its types first, and only then read.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Final, TypeVar

import attrs
import betterproto2
from betterproto2 import FieldMetadata, Message

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.wire.protobuf import FIXED32, FIXED64, LENGTH, VARINT, MalformedError, fields, varint

M = TypeVar("M", bound=Message)

_MAX_DEPTH: Final = 100
"""Messages inside of messages; the limit of the other implementations of protobuf."""

_MAX_VALUES: Final = 32768
"""Of all fields of one message, with what is inside of it. No request of an engine has a hundredth of them. Reading so
many takes a fraction of a second; 4 MiB of empty ones would hold up everybody else for many."""

_WIRE: Final = {
    **dict.fromkeys(betterproto2.WIRE_VARINT_TYPES, VARINT),
    **dict.fromkeys(betterproto2.WIRE_FIXED_32_TYPES, FIXED32),
    **dict.fromkeys(betterproto2.WIRE_FIXED_64_TYPES, FIXED64),
    **dict.fromkeys(betterproto2.WIRE_LEN_DELIM_TYPES, LENGTH),
}


@attrs.frozen
class _Field:
    """How a field has to look.

    Attributes:
        wire: the wire type of one value.
        packed: many values may stand in one, without their wire types.
        message: the type of what is inside, when that is a message.
        value: of a map whose values are messages, their type.
    """

    name: str
    wire: int
    packed: bool
    message: type[Message] | None
    value: type[Message] | None


def encode(message: Message) -> bytes:
    """The bytes of a message; raises what betterproto2 raises for values that do not have the types they should."""
    return bytes(message)


def decode(kind: type[M], data: bytes) -> M:
    """The message in `data`. Fields that `kind` does not know are kept, and written again by `encode`.

    Raises:
        InvalidArgumentError: the bytes are no such message: cut short, of other types, text that is no UTF-8, a time
            that is none.
    """
    try:
        whole = _Walk(data).check(kind, 0, len(data))
        message = kind.parse(data)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"this is no valid {kind.__name__}: {error}") from error
    if not whole:
        _complete(message)
    return message


class _Walk:
    """One way through the fields of a message.

    Args:
        data: the whole.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values = 0

    def check(self, kind: type[Message], at: int, end: int, depth: int = 0) -> bool:
        """Raise MalformedError unless `data[at:end]` is a `kind`.

        Returns:
            False when a map's value is left out, which is the default then.
        """
        if depth > _MAX_DEPTH:
            raise MalformedError(f"more than {_MAX_DEPTH} messages inside of each other")
        known = _fields(kind)
        whole = True
        for number, wire, begin, stop in fields(self._data, at, end):
            self._count()
            field = known.get(number)
            if field is None:
                continue
            if wire != field.wire:
                if not (field.packed and wire == LENGTH):
                    raise MalformedError(f"{field.name} has wire type {wire}, not {field.wire}")
                self._check_packed(field, begin, stop)
            elif field.message is not None:
                whole &= self.check(field.message, begin, stop, depth + 1)
                if field.value is not None:
                    whole &= any(number == 2 for number, *_ in fields(self._data, begin, stop))
        return whole

    def _check_packed(self, field: _Field, at: int, end: int) -> None:
        if field.wire == VARINT:
            while at < end:
                self._count()
                _, at = varint(self._data, at, end)
            return
        count, rest = divmod(end - at, 8 if field.wire == FIXED64 else 4)
        self._count(count)
        if rest:
            raise MalformedError(f"the last of {field.name} is cut short")

    def _count(self, more: int = 1) -> None:
        self._values += more
        if self._values > _MAX_VALUES:
            raise MalformedError(f"more than {_MAX_VALUES} values")


def _complete(message: Message) -> None:
    """Put default messages where a map left its values out: betterproto2 puts None there."""
    for field in _fields(type(message)).values():
        inside = getattr(message, field.name)
        if field.value is not None:
            for key in [key for key, value in inside.items() if value is None]:
                inside[key] = field.value()
            inside = list(inside.values())
        for each in inside if isinstance(inside, list) else [inside]:
            if isinstance(each, Message):
                _complete(each)


@cache
def _fields(kind: type[Message]) -> dict[int, _Field]:
    # betterproto2 says the types of fields only to itself; the extra `serve` names the versions that were tested.
    classes: dict[str, type[Message]] = kind._betterproto.cls_by_field  # type: ignore[arg-type]
    table: dict[int, _Field] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        meta = FieldMetadata.get(field)
        wire = _WIRE[meta.proto_type]
        inside = value = None
        if meta.proto_type in {betterproto2.TYPE_MESSAGE, betterproto2.TYPE_MAP}:
            inside = meta.unwrap() if meta.unwrap else classes[field.name]
        if meta.map_meta is not None and meta.map_meta[1].proto_type == betterproto2.TYPE_MESSAGE:
            value = classes[f"{field.name}.value"]
        table[meta.number] = _Field(field.name, wire, bool(meta.repeated) and wire != LENGTH, inside, value)
    return table
