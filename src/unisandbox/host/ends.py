"""Ends of processes that are told when they come, whether or not anybody waits: by the keeper, which holds their sign.

The keeper tells raw facts (see `host.keeper.ends`); what they mean is said here, for whoever reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from unisandbox.api import BackendError, Exit
from unisandbox.host.init import KILLED, status_of

KILLED_PACKETS: Final = tuple(packet.hex() for packet in KILLED)
"""The only ones with which a process can have been killed for memory."""


class HeldEnd(NamedTuple):
    """Where the keeper sees the end of one process.

    Attributes:
        name: what it holds and stamps; init's packet about the end waits there.
        noted: the note that is there once SIGKILL was sent by us.
        counter: the file with the number of its kills for memory, and the word before that number; None: not counted.
        late: whoever started it may have told of that already, and how it ended, too.
        is_init: it is the init of a container that has no main process: how that ended says nothing.
    """

    name: str
    noted: str
    counter: tuple[str, str] | None
    late: bool = False
    is_init: bool = False


@runtime_checkable
class TellsEnds(Protocol):
    """A task service whose processes' ends the keeper sees."""

    def identity_of(self, container_id: str) -> str:
        """What tells this container from a later one of the same name, also when it is gone; empty: it is not known."""
        ...

    def end_of(self, container_id: str, exec_id: str = "") -> HeldEnd | None:
        """Of a process that was started, or of a container; None when the keeper does not see its end."""
        ...

    def taken_over(self) -> Sequence[tuple[str, str]]:
        """Container and exec id of what others have started, as far as it was learnt since this was asked last.

        The exec id is empty for a container.
        """
        ...


def exit_of(seen: Mapping[str, object]) -> Exit:
    """How a process ended, from what the keeper has seen.

    Raises:
        TypeError, ValueError, KeyError: no keeper of ours has said this.
    """
    at, packet, count = seen["at"], seen["packet"], seen["count"]
    if not isinstance(at, float) or not isinstance(packet, str) or not isinstance(count, int):
        raise TypeError(f"the end of a process: {dict(seen)!r}")
    try:
        status = status_of(bytes.fromhex(packet)) if packet else None
    except BackendError:
        status = None  # init was taken over
    if status is None:
        return Exit.lost(exited_at=at)
    return Exit.from_wait_status(status, exited_at=at, oom_kills=count, killed_by_us=seen["noted"] is True)
