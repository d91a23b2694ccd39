"""A keeper that kills itself in the middle of a request: the product's, with each of its requests wrapped here.

It runs as any keeper does, with the standard library alone. Whoever wants it dead writes into a file at which request,
and at which moment: "begun" is when the request was taken up and will be answered later, "done" when all was done and
the answer is about to be sent.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from unisandbox.host.keeper import server

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
main({wish!r}, sys.argv[2])
"""


def program(wish: str) -> str:
    """What to start in place of the product's program. `wish` is the path of that file."""
    return _PROGRAM.format(root=str(Path(__file__).parents[2]), wish=wish)


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


def main(wish: str, argument: str) -> None:
    """Run the keeper."""

    def strike(moment: str) -> None:
        try:
            with open(wish, encoding="ascii") as file:
                wanted = file.read()
        except FileNotFoundError:
            return
        if wanted == moment:
            os.unlink(wish)
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
    server.main(argument)
