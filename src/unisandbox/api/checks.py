"""Checks of single fields, which the classes of this room are made with: each says which field is wrong, and how."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs

from unisandbox.api.errors import InvalidArgumentError

Validator: TypeAlias = "Callable[[object, attrs.Attribute[Any], Any], None]"


def is_of(kind: type, *, optional: bool = False) -> Validator:
    """An instance of this class, or None if that is allowed."""

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not (isinstance(value, kind) or (optional and value is None)):
            raise InvalidArgumentError(f"{attribute.name} must be of type {kind.__name__}, got {value!r}")

    return check


def is_one_of(*words: str) -> Validator:
    """One of these words."""

    # A typo must never open what is closed.
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, str) or value not in words:
            known = " or ".join(map(repr, words))
            raise InvalidArgumentError(f"{attribute.name} must be {known}, got {value!r}")

    return check


def several(values: object, what: str) -> tuple[Any, ...]:
    """All of an iterable, which is neither text nor a mapping."""
    if not isinstance(values, Iterable) or isinstance(values, Mapping | str | bytes):
        raise InvalidArgumentError(f"{what} must be a list, got {values!r}")
    return tuple(values)


def kernel_text(value: object, what: str) -> str:
    """Text that the kernel takes: without NUL, and encodable."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be text, got {value!r}")
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what} {value!r} cannot be encoded: {error.reason}") from error
    if b"\0" in encoded:
        raise InvalidArgumentError(f"{what} {value!r} holds a NUL byte")
    return value


def check_signal(number: object) -> None:
    """Raises InvalidArgumentError: it is not the number of a signal. Source: signal(7)."""
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < signal.NSIG:
        raise InvalidArgumentError(
            f"a signal is given by its number, 1 to {signal.NSIG - 1}, got {number!r}",
            hint="For example signal.SIGTERM.",
        )


def matches(pattern: str, value: object) -> bool:
    """Whether it is text, and all of it is as the pattern says."""
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address; one of a single link may have that behind a "%"."""
    import ipaddress  # most specs have no addresses

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_number(value: object) -> bool:
    """Whether it is a number, no boolean, that a float can hold; also infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def is_positive(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """None, or a finite number above 0."""
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise InvalidArgumentError(f"{attribute.name} must be a number > 0, got {value!r}")


def is_whole(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """None, or a whole number that the kernel can hold."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62):
        raise InvalidArgumentError(f"{attribute.name} must be a whole number >= 0, got {value!r}")


def is_at_most(most: int) -> Validator:
    """None, or not above this."""

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and value > most:
            raise InvalidArgumentError(f"{attribute.name} must be at most {most}, got {value}")

    return check


def is_at_least(least: int) -> Validator:
    """None, 0, or not below this."""

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and 0 != value < least:
            raise InvalidArgumentError(f"{attribute.name} must be at least {least} bytes, got {value}")

    return check
