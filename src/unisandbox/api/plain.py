"""Specs as plain data and back: what JSON can hold, for records and for what travels between processes.

The way back reads a stranger's words: an unknown field is an error and never dropped, every value is checked as when a
spec is made by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import attrs

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.filesystem import Mount, Rootfs
from unisandbox.api.network import Dns, Network
from unisandbox.api.resources import Resources
from unisandbox.api.spec import ContainerSpec, ProcessSpec, SandboxSpec, Security, Terminal

Spec = SandboxSpec | ContainerSpec | ProcessSpec

_T = TypeVar("_T", bound=attrs.AttrsInstance)

# The fields that hold specs of their own; all others are what JSON has already.
_PARTS: Final[Mapping[type, Mapping[str, type[attrs.AttrsInstance]]]] = {
    SandboxSpec: {
        "rootfs": Rootfs,
        "resources": Resources,
        "network": Network,
        "mounts": Mount,
        "dns": Dns,
        "security": Security,
    },
    ContainerSpec: {"process": ProcessSpec, "rootfs": Rootfs, "resources": Resources, "mounts": Mount},
    ProcessSpec: {"terminal": Terminal},
}
_LISTS: Final = frozenset({"mounts"})
# Most values by far: to ask each whether it is a Mapping would cost more than all the rest.
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})


def plain(spec: Spec) -> dict[str, object]:
    """The spec as dictionaries, lists, text, numbers, booleans and None; equal specs give equal data.

    Text may hold lone surrogates (bytes of file names that are no UTF-8): JSON carries them when it is written as
    ASCII, which is Python's default.
    """
    return {field.name: _plain(getattr(spec, field.name)) for field in attrs.fields(type(spec))}


def plain_given(spec: Spec) -> dict[str, object]:
    """The same of what is not as by default: with a version that has more fields it is still the same."""
    return _given(spec)


def sandbox_spec_of(data: Mapping[str, object]) -> SandboxSpec:
    """The inverse of `plain`. A field that is missing has its default.

    Raises:
        InvalidArgumentError: a field is unknown (it is named) or has a value that a spec refuses.
    """
    return _made(SandboxSpec, data, "sandbox spec")


def container_spec_of(data: Mapping[str, object]) -> ContainerSpec:
    """See `sandbox_spec_of`."""
    return _made(ContainerSpec, data, "container spec")


def process_spec_of(data: Mapping[str, object]) -> ProcessSpec:
    """See `sandbox_spec_of`."""
    return _made(ProcessSpec, data, "process spec")


def _plain(value: object) -> object:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if attrs.has(kind):
        return {field.name: _plain(getattr(value, field.name)) for field in attrs.fields(kind)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _given(value: attrs.AttrsInstance) -> dict[str, object]:
    fields = attrs.fields(type(value))
    found = {field.name: getattr(value, field.name) for field in fields}
    return {
        field.name: _given_part(found[field.name])
        for field in fields
        if field.default is attrs.NOTHING or found[field.name] != _default_of(field)
    }


def _given_part(value: object) -> object:
    if attrs.has(type(value)):
        return _given(cast("attrs.AttrsInstance", value))
    if isinstance(value, tuple | list):
        return [_given_part(item) for item in value]
    return _plain(value)


def _default_of(field: attrs.Attribute[Any]) -> object:
    factory = getattr(field.default, "factory", None)  # of an `attrs.Factory`
    value = field.default if factory is None else factory()
    return field.converter(value) if callable(field.converter) else value


def _made(kind: type[_T], data: object, what: str) -> _T:
    if not isinstance(data, Mapping):
        raise InvalidArgumentError(f"{what}: must be a mapping of fields, got {data!r:.80}")
    fields = {field.name: field for field in attrs.fields(kind)}
    parts = _PARTS.get(kind, {})
    given: dict[str, object] = {}
    for name, value in data.items():
        if name not in fields:
            raise InvalidArgumentError(
                f"{what}: the field {name!r:.80} is not known",
                hint="It may have been written by a later version of unisandbox: use that one.",
            )
        given[name] = _part(parts[name], value, name, what) if name in parts else value
    for name, field in fields.items():
        if field.default is attrs.NOTHING and name not in given:
            raise InvalidArgumentError(f"{what}: the field {name!r} is missing")
    try:
        return kind(**given)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{what}: {error.message}", hint=error.hint) from error


def _part(kind: type[attrs.AttrsInstance], value: object, name: str, what: str) -> object:
    if value is None:
        return None  # a spec that does not take it says so itself
    if name not in _LISTS:
        return _made(kind, value, f"{what}: {name}")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidArgumentError(f"{what}: {name} must be a list, got {value!r:.80}")
    return tuple(_made(kind, item, f"{what}: {name}") for item in value)
