"""Which guest runs in which thread of this process. A guest has a thread of its own from its start to its end."""

from __future__ import annotations

import _thread
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisandbox.backends.wasm.guest import Guest
    from unisandbox.backends.wasm.memory import MemoryOwner

_by_thread: dict[int, Guest] = {}
_alive: set[Guest] = set()
_changed = threading.Condition()


def enter(guest: Guest) -> None:
    """The current thread is this guest's from now on."""
    _by_thread[_thread.get_ident()] = guest


def leave() -> None:
    """And no longer."""
    del _by_thread[_thread.get_ident()]


def guest_of_thread() -> Guest:
    """Whose thread this is; KeyError outside of guests."""
    return _by_thread[_thread.get_ident()]


def memories_of_thread() -> MemoryOwner | None:
    """Whose memories are made here."""
    guest = _by_thread.get(_thread.get_ident())
    return None if guest is None else guest.memories


def begun(guest: Guest) -> None:
    """It is about to get its thread."""
    with _changed:
        _alive.add(guest)


def over(guest: Guest) -> None:
    """Its store is closed."""
    with _changed:
        _alive.discard(guest)
        if not _alive:
            _changed.notify_all()


def all_guests() -> list[Guest]:
    """Those that have not ended."""
    with _changed:
        return list(_alive)


def wait_for_none() -> None:
    """Until all have ended."""
    with _changed:
        while _alive:
            _changed.wait()
