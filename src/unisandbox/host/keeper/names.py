"""Names, which clients give to what the keeper keeps for them: checked, selected, listed. Standard library only."""

from __future__ import annotations

import errno
import json

from unisandbox.host.keeper import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisandbox.host.keeper.protocol import Message

# A page ends before it has more bytes than this. One note alone may have more: it came in one message and goes in one.
_PAGE_BYTES = 128 * 1024


def page(message: Message, field: str, everything: Mapping[str, object]) -> Message:
    """The part of `everything` that a message asks for: names with `prefix`, in order, from behind `after` on.

    `more` says that it did not go into one answer.
    """
    prefix = protocol.text(message, "prefix")
    after = protocol.text(message, "after")
    found: dict[str, object] = {}
    size = 0
    for name in sorted(name for name in everything if name.startswith(prefix) and name > after):
        size += len(json.dumps(name)) + len(json.dumps(everything[name])) + 2
        if found and size > _PAGE_BYTES:
            return {field: found, "more": True}
        found[name] = everything[name]
    return {field: found, "more": False}


def selected(names: Mapping[str, object], wanted: list[str], prefix: str) -> list[str]:
    """Of `names` those that are wanted by name, and those that begin with `prefix` unless it is empty."""
    found = [name for name in wanted if name in names]
    if prefix:
        found += [name for name in names if name.startswith(prefix)]
    return found


def given(message: Message, field: str = "name") -> str:
    """A name for something new."""
    value = protocol.text(message, field)
    check(value)
    return value


def check(value: str) -> None:
    """Raise OSError EINVAL unless this may be a name."""
    if not 0 < len(value) <= protocol.NAME_LIMIT:
        raise OSError(errno.EINVAL, f"a name has 1 to {protocol.NAME_LIMIT} characters, got {value[:200]!r}")
