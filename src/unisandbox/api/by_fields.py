"""Equality, hash and repr of the contracts' classes: by their fields, the same code for all of them.

attrs would generate and compile these three for each class, which is half of what importing the contracts costs. It
leaves alone what a class has already.
"""

from __future__ import annotations

import reprlib
from typing import TypeVar

import attrs

_T = TypeVar("_T", bound=type)


def by_fields(kind: _T) -> _T:
    """Give a class these three; to be written below `attrs.frozen`."""
    for method in (__eq__, __hash__, __repr__):
        setattr(kind, method.__name__, method)
    return kind


def __eq__(self: attrs.AttrsInstance, other: object) -> bool:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return all(getattr(self, field.name) == getattr(other, field.name) for field in attrs.fields(type(self)))


def __hash__(self: attrs.AttrsInstance) -> int:
    return hash((type(self), *(getattr(self, field.name) for field in attrs.fields(type(self)))))


@reprlib.recursive_repr()
def __repr__(self: attrs.AttrsInstance) -> str:
    shown = []
    for field in attrs.fields(type(self)):
        show = field.repr if callable(field.repr) else repr
        shown.append(f"{field.name}={show(getattr(self, field.name))}")
    return f"{type(self).__qualname__.rpartition('>.')[2]}({', '.join(shown)})"
