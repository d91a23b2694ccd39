"""Small texts that the keeper keeps for its clients by name. Standard library only."""

from __future__ import annotations

import errno

from unisandbox.host.keeper import names, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.protocol import Packet

# Of all notes together, with what a name and an entry cost besides their text.
TOTAL_LIMIT = 64 << 20
_ENTRY = 256


class Notes:
    """Texts by name."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._size = 0

    def note(self, packet: Packet, reply: Reply) -> None:
        """Keep a text in place of the one that has this name."""
        name = names.given(packet.message)
        value = protocol.text(packet.message, "value")
        if len(value.encode("utf-8", "surrogatepass")) > protocol.NOTE_LIMIT:
            raise OSError(errno.EINVAL, f"note {name!r} has more than {protocol.NOTE_LIMIT} bytes")
        size = self._size + _cost(name, value) - self._cost_now(name)
        if size > TOTAL_LIMIT:
            raise OSError(
                errno.ENOSPC, f"no room for note {name!r}: all notes together have at most {TOTAL_LIMIT} bytes"
            )
        self._texts[name] = value
        self._size = size
        reply({})

    def notes(self, packet: Packet, reply: Reply) -> None:
        """A page of them."""
        reply(names.page(packet.message, "notes", self._texts))

    def has(self, name: str) -> bool:
        """Whether there is such a note."""
        return name in self._texts

    def drop(self, wanted: list[str], prefix: str) -> None:
        """Forget those of these names, and of this prefix."""
        for name in names.selected(self._texts, wanted, prefix):
            self._size -= self._cost_now(name)
            self._texts.pop(name, None)

    def _cost_now(self, name: str) -> int:
        value = self._texts.get(name)
        return 0 if value is None else _cost(name, value)


def _cost(name: str, value: str) -> int:
    # What Python takes for it: one, two or four bytes for each character, by the widest.
    widest = max(value, default="")
    width = 1 if widest < "\u0100" else 2 if widest < "\U00010000" else 4
    return _ENTRY + len(name) + width * len(value)
