"""A record as bytes: one line of JSON, a header with version and checksum, and the body.

It is read as a stranger's words: one that is not to the byte what we would have written, or says something that we
never say, is none. Records of former versions are read, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

from unisandbox.api import check_id, check_name
from unisandbox.api.names import check_isolation
from unisandbox.engine import durable
from unisandbox.engine.record import Phase, Record

RECORD_VERSION: Final = 3
_PHASES: Final[tuple[str, ...]] = get_args(Phase)
_LARGEST: Final = 1 << 62


class LaterError(ValueError):
    """It is whole, and this version is too old for it."""


def line_of(version: int, body: Mapping[str, object]) -> bytes:
    """The bytes of a record. Version 1 had a checksum of the body alone."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if version > 1:
        return durable.sealed(version, "record", text)
    return f'{{"version": {version}, "sha256": "{durable.checksum(text)}", "record": {text}}}\n'.encode()


def parse(raw: bytes) -> Record:
    """The record of these bytes.

    Raises:
        ValueError, InvalidArgumentError: they are none; says why.
    """
    try:
        outer = json.loads(raw.decode("ascii"))
    except RecursionError:
        raise ValueError("it is nested without end") from None
    except ValueError:
        raise ValueError("it is not whole, or is no record") from None
    if type(outer) is not dict or type(outer.get("version")) is not int:
        raise ValueError("it is no record")
    version = outer["version"]
    if version > RECORD_VERSION:
        raise LaterError(f"it has version {version}, written by a later unisandbox; this one knows {RECORD_VERSION}")
    if version < 1 or type(body := outer.get("record")) is not dict:
        raise ValueError("it is no record")
    if line_of(version, body) != raw:
        raise ValueError("the checksum does not match")
    if version == 1:
        body = _second(body)
    return _record(body if version > 2 else {**body, "client": 0})


def _second(body: Mapping[str, object]) -> dict[str, object]:
    """A body of version 1 as version 2 has it: the owner's start time was not noted, nor when it was started."""
    return {
        **{name: value for name, value in body.items() if name != "owner_pid"},
        "owner": [body.get("owner_pid"), 0],
        "started_at": None,
        "stopped_at": None,
        "expires_at": None,
        "operation_id": "",
    }


def _record(body: Mapping[str, object]) -> Record:
    names = set(Record._fields)
    unknown, missing = sorted(set(body) - names), sorted(names - set(body))
    if unknown:
        raise LaterError(f"the field {unknown[0]!r:.80} is not known; a later unisandbox may have written it")
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing")
    for name, (check, wanted) in _CHECKS.items():
        if not check(body[name]):
            raise ValueError(f"{name} must be {wanted}, got {body[name]!r:.80}")
    checked: dict[str, Any] = {**body}
    checked["owner"] = tuple(checked["owner"])
    check_id(checked["sandbox_id"])
    check_isolation(checked["backend"])
    if checked["name"] is not None:
        check_name(checked["name"])
    if checked["operation_id"]:
        check_name(checked["operation_id"], "operation id")
    return Record(**checked)


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_time(value: object) -> bool:
    return (type(value) is int and abs(value) < _LARGEST) or (type(value) is float and math.isfinite(value))


def _is_time_or_none(value: object) -> bool:
    return value is None or _is_time(value)


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_owner(value: object) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_is_whole, value))


_TIME: Final = "seconds since the epoch"
_CHECKS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "sandbox_id": (_is_text, "text"),
    "name": (lambda value: value is None or type(value) is str, "text or null"),
    "backend": (_is_text, "text"),
    "phase": (lambda value: value in _PHASES, f"one of {', '.join(_PHASES)}"),
    "created_at": (_is_time, _TIME),
    "generation": (lambda value: _is_whole(value) and value != 0, "a whole number > 0"),
    "boot_id": (lambda value: type(value) is str and len(value) <= 64, "a boot id"),
    "owner": (_is_owner, "a pid and a start time"),
    "client": (_is_whole, "a whole number"),
    "spec": (lambda value: type(value) is dict, "an object"),
    "started_at": (_is_time_or_none, f"{_TIME}, or null"),
    "stopped_at": (_is_time_or_none, f"{_TIME}, or null"),
    "expires_at": (_is_time_or_none, f"{_TIME}, or null"),
    "operation_id": (_is_text, "text"),
}
