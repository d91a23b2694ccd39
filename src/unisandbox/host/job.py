"""A job while it runs: the fields of its steps, and what it has made so far. Standard library only; see `jobs`.

A source is an absolute path without symbolic links (a string), `{"fd": n}` (the n-th fd of the request), `{"name": s}`
(what a former step has named), `{"name": s, "path": path}` (below that, without symbolic links), or
`{"below": directory, "path": path}` (a path as seen by a process with that root).
"""

from __future__ import annotations

import os

from unisandbox.host import mounts
from unisandbox.host.tree import Tree


class Fields:
    """The fields of one step or operation, each taken once and of the right type; `end` refuses what nobody took."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"an object is wanted, got {values!r}")
        self._values: dict[str, object] = dict(values)

    def _take(self, name: str, kind: type, default: object, *, required: bool) -> object:
        if name not in self._values:
            if required:
                raise ValueError(f"field {name!r} is missing")
            return default
        value = self._values.pop(name)
        if value is None and default is None and not required:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"field {name!r} must be of type {kind.__name__}, got {value!r}")
        return value

    def text(self, name: str) -> str:
        """A required string."""
        value = self._take(name, str, None, required=True)
        assert isinstance(value, str)  # noqa: S101 (for the type checker; _take has raised otherwise)
        if "\0" in value:
            raise ValueError(f"field {name!r} contains a NUL")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A string that may be absent or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.text(name)

    def number(self, name: str, default: int | None = None) -> int:
        """An integer that is not negative; required without a default."""
        value = self._take(name, int, default, required=default is None)
        assert isinstance(value, int)  # noqa: S101
        if value < 0:
            raise ValueError(f"field {name!r} must not be negative, got {value}")
        return value

    def number_or_none(self, name: str) -> int | None:
        """The same, absent or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._take(name, bool, default, required=False)
        return value is True

    def items(self, name: str, *, required: bool = True) -> list[object]:
        """A list."""
        if not required and self._values.get(name) is None:
            self._values.pop(name, None)
            return []
        value = self._take(name, list, None, required=True)
        assert isinstance(value, list)  # noqa: S101
        return value

    def any(self, name: str) -> object:
        """Whatever is there; None when absent."""
        return self._values.pop(name, None)

    def end(self) -> None:
        """Refuse fields that nobody asked for."""
        if self._values:
            raise ValueError(f"unknown field {', '.join(map(repr, self._values))}")


class Job:
    """What one job has made so far."""

    def __init__(self, fds: list[int], leave_children: bool) -> None:
        self.fds = fds
        self.leave_children = leave_children
        self.named: dict[str, int] = {}
        self.trees: list[Tree] = []

    def name(self, name: str, fd: int) -> None:
        if name in self.named:
            os.close(fd)
            raise ValueError(f"two steps name a descriptor {name!r}")
        self.named[name] = fd

    def given(self, number: int) -> int:
        """The n-th descriptor that came with the request."""
        if number >= len(self.fds):
            raise ValueError(f"there is no descriptor {number}: {len(self.fds)} came with the request")
        return self.fds[number]

    def close(self) -> None:
        for tree in self.trees:
            tree.close()

    def undo(self) -> None:
        for tree in reversed(self.trees):
            tree.undo()
        for fd in self.named.values():
            os.close(fd)
        self.named = {}

    def source(self, value: object) -> tuple[int, bool]:
        """A descriptor of a source, and whether it is to be closed after use."""
        if isinstance(value, str):
            return mounts.open_source(value), True
        fields = Fields(value)
        name = fields.text_or_none("name")
        number = fields.number_or_none("fd")
        below = fields.text_or_none("below")
        if [name, number, below].count(None) != 2:
            raise ValueError("a source is a path, or has one of 'fd', 'name', 'below'")
        if below is not None:
            path = fields.text("path")
            fields.end()
            root = mounts.open_source(below)
            try:
                return mounts.open_below(root, path, os.O_PATH, follow=True), True
            finally:
                os.close(root)
        inside = fields.text_or_none("path") if name is not None else None
        fields.end()
        if name is not None:
            if name not in self.named:
                raise ValueError(f"no step before this one has named a descriptor {name!r}")
            if inside is not None:
                return mounts.open_below(self.named[name], inside, os.O_PATH), True
            return self.named[name], False
        assert number is not None  # noqa: S101
        if number >= len(self.fds):
            raise ValueError(f"there is no descriptor {number}: {len(self.fds)} came with the request")
        return self.fds[number], False

    def userns(self, fields: Fields) -> tuple[int | None, bool]:
        """The user namespace to map ids by, and whether they must be mapped."""
        wanted = fields.any("idmap")
        if wanted is None or wanted is False:
            return None, False
        if wanted is not True and wanted != "try":
            raise ValueError(f"field 'idmap' must be true, false or 'try', got {wanted!r}")
        if "user" not in self.named:
            raise ValueError("ids can only be mapped after a step that names a user namespace 'user'")
        return self.named["user"], wanted is True


def strings(name: str, values: list[object]) -> list[str]:
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) != len(values):
        raise ValueError(f"field {name!r} must be a list of strings, got {values!r}")
    return strings
