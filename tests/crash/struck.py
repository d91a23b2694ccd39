"""A keeper that kills itself, or its host, in the middle of something: the product's, with its requests wrapped here.

It runs as any keeper does, with the standard library alone. Whoever wants somebody dead writes into a file who that is,
and at which moment: "begun" is when a request was taken up and will be answered later, "done" when all was done and the
answer is about to be sent. The others are the points of the product itself (`host.boundary`), to which the keeper or a
process that it has forked comes.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from unisandbox.host import boundary
from unisandbox.host.keeper import birth, children, server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.protocol import Message, Packet

_PROGRAM = """\
import os, sys
os.setsid()
if os.fork(): os._exit(0)
sys.path += [sys.argv[1], {root!r}]
from tests.crash.struck import main
main({wish!r}, {record!r}, sys.argv[2])
"""


def program(wish: str, *, record: bool = False) -> str:
    """What to start in place of the product's program.

    Args:
        wish: the path of that file.
        record: kill nobody, and write down every point of the product in `passed(wish)`.
    """
    return _PROGRAM.format(root=str(Path(__file__).parents[2]), wish=wish, record=record)


def passed(wish: str) -> str:
    """The path of a file with a line for each point that was come by."""
    return f"{wish}.passed"


class _Watched:
    """A reply that calls `before` when it is about to be used for anything but an error."""

    def __init__(self, reply: Reply, before: Callable[[], None]) -> None:
        self._reply = reply
        self._before = before
        self.is_used = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._reply, name)

    def __call__(self, message: Message, fds: Sequence[int] = ()) -> None:
        self.is_used = True
        if "error" not in message:
            self._before()
        self._reply(message, fds)


def _kept(directory: str) -> int:
    """A descriptor of a directory that the keeper and its forks keep: a job may be where its path leads nowhere."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    leave_inheritance, close_all_but = birth.leave_inheritance, children._close_all_but
    birth.leave_inheritance = lambda keep: leave_inheritance([*keep, fd])
    children._close_all_but = lambda keep: close_all_but([*keep, fd])
    return fd


def main(wish: str, record: bool, argument: str) -> None:
    """Run the keeper."""
    keeper = os.getpid()
    name_of_wish = os.path.basename(wish)
    place = _kept(os.path.dirname(wish))

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600, dir_fd=place)

    def note(name: str, of: str) -> None:
        with open(passed(name_of_wish), "a", encoding="ascii", opener=opener) as file:
            file.write(name.replace("*", of) + "\n")

    def strike(moment: str) -> None:
        try:
            with open(name_of_wish, encoding="ascii", opener=opener) as file:
                wanted = json.load(file)
        except FileNotFoundError:
            return
        if wanted["moment"] != moment:
            return
        if wanted["nth"] > 1:
            wanted["nth"] -= 1
            with open(f"{name_of_wish}.next", "w", encoding="ascii", opener=opener) as file:
                json.dump(wanted, file)
            os.rename(f"{name_of_wish}.next", name_of_wish, src_dir_fd=place, dst_dir_fd=place)
            return
        os.unlink(name_of_wish, dir_fd=place)
        if wanted["victim"] == "both" and os.getpid() != keeper:
            os.kill(keeper, signal.SIGSTOP)  # it shall not end this worker as its host's end is seen
        if wanted["victim"] != "keeper":
            os.kill(wanted["host"], signal.SIGKILL)
        if wanted["victim"] != "host":
            os.kill(keeper, signal.SIGKILL)
            # A worker dies with its keeper: here, and not a moment later. What runs guards goes on without it.
            if wanted["victim"] == "both" or os.getpgrp() == os.getpid():
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(op: str, action: Callable[[Packet, Reply], None]) -> Callable[[Packet, Any], None]:
        def act(packet: Packet, reply: Reply) -> None:
            answer: Any = _Watched(reply, lambda: strike(f"done {op}"))
            action(packet, answer)
            if not answer.is_used:
                strike(f"begun {op}")

        return act

    class Struck(server.Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._requests = {op: watched(op, action) for op, action in self._requests.items()}

    server.Server = Struck  # type: ignore[assignment, misc]
    boundary.watch(note if record else lambda name, of: strike(name.replace("*", of)))
    server.main(argument)
