"""The keeper's register of guards, and their running in a child. Standard library only.

What they do is in `undo`; here is when: all of them at the keeper's end, those of a prefix when it expires.
"""

from __future__ import annotations

import errno
import json
import os
import signal

from unisandbox.host.keeper import children, names, protocol, undo
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisandbox.host.keeper.birth import View
    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Message, Packet
    from unisandbox.host.keeper.undo import Guard

# How long all guards of one run together may take (seconds).
TIME = 10.0
_LIMIT = 65536


class Run:
    """Guards that are run, and how each of them went."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self.guards: Sequence[Guard] = guards
        self.done: list[str] = []
        self.failed: dict[str, str] = {}
        self.buffer = b""
        self.timer: Timer | None = None

    def tell(self, name: str, error: object) -> None:
        """One guard has run; `error` is None when it has done its work."""
        if error is None:
            self.done.append(name)
        else:
            self.failed[name] = str(error)
            note(f"guard {name!r} failed: {error}")

    def close(self) -> None:
        """The child is gone: of what it did not tell it has done nothing."""
        told = set(self.done) | set(self.failed)
        for name, _, _ in self.guards:
            if name not in told:
                self.failed[name] = "not run"


class Guards:
    """What is registered.

    Args:
        view: of the mounts, with the way back to the host's.
        keep: fds that a child which runs guards keeps open: it goes on when the keeper is killed.
        adopt: hears the pid of each such child.
    """

    def __init__(self, loop: Loop, view: View, keep: Sequence[int], adopt: Callable[[int], None]) -> None:
        self._loop = loop
        self._view = view
        self._keep = [*keep, *view.fds]
        self._adopt = adopt
        self._guards: dict[str, Guard] = {}

    # --- requests ---

    def guard(self, packet: Packet, reply: Reply) -> None:
        """Register guards, in order; a name that is there already keeps its place and gets the new meaning."""
        entries = packet.message.get("guards")
        if type(entries) is not list:
            raise OSError(errno.EINVAL, "guards must be a list")
        guards = [_guard_of(entry) for entry in entries]
        if len(self._guards) + len(guards) > _LIMIT:
            raise OSError(errno.ENOSPC, f"more than {_LIMIT} guards")
        for guard in guards:
            self._guards[guard[0]] = guard
        reply({})

    def unguard(self, packet: Packet, reply: Reply) -> None:
        """Forget guards; a name that is not there is no error."""
        for name in protocol.texts(packet.message, "names"):
            self._guards.pop(name, None)
        reply({})

    def drop(self, wanted: list[str], prefix: str) -> None:
        """Forget those of these names, and those whose names begin with the prefix unless it is empty."""
        for name in names.selected(self._guards, wanted, prefix):
            self._guards.pop(name, None)

    # --- running ---

    def all(self) -> list[Guard]:
        """In the order of registration."""
        return list(self._guards.values())

    def under(self, prefix: str) -> list[Guard]:
        """Those whose names begin so."""
        return [guard for name, guard in self._guards.items() if name.startswith(prefix)]

    def forget(self, run: Run) -> None:
        """Those that were run with success have no meaning any more, unless they were registered anew meanwhile."""
        done = set(run.done)
        for guard in run.guards:
            if guard[0] in done and self._guards.get(guard[0]) is guard:
                del self._guards[guard[0]]

    def start(self, guards: Sequence[Guard], finished: Callable[[Run], None]) -> None:
        """Run guards (given in the order of their registration) in reverse, in a child; `finished` hears of the end.

        Raises:
            OSError: no child can be started.
        """
        run = Run(guards)
        pid, pipe = children.start_guards(lambda report: self._in_child(guards, report), self._keep)
        self._adopt(pid)

        def too_late() -> None:
            os.kill(pid, signal.SIGKILL)
            run.failed[""] = f"the guards took more than {TIME:g} s"

        run.timer = self._loop.later(TIME, too_late)
        self._loop.watch(pipe, lambda _events: self._said(run, pipe, finished))

    def run_here(self, guards: Sequence[Guard]) -> Run:
        """The same in this very process, which can do nothing else meanwhile, nor afterwards."""
        run = Run(guards)
        self._undo(guards, run.tell)
        return run

    @staticmethod
    def retry_rmdir(run: Run) -> None:
        """Try again the directories that were not empty. No path of these leads through what only the keeper sees."""
        left = [guard for guard in run.guards if guard[1] == "rmdir" and guard[0] in run.failed]
        for name, _, _ in left:
            del run.failed[name]
        undo.run(left, run.tell)

    def _in_child(self, guards: Sequence[Guard], report: int) -> None:
        os.set_blocking(report, True)

        def tell(name: str, error: OSError | None) -> None:
            os.write(report, (json.dumps([name, None if error is None else str(error)]) + "\n").encode())

        self._undo(guards, tell)

    def _undo(self, guards: Sequence[Guard], tell: Callable[[str, OSError | None], None]) -> None:
        self._view.leave()
        undo.run(guards, tell)

    def _said(self, run: Run, pipe: int, finished: Callable[[Run], None]) -> None:
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        run.buffer += data
        *lines, run.buffer = run.buffer.split(b"\n")
        for line in lines:
            run.tell(*json.loads(line))
        if not data:
            self._loop.unwatch(pipe)
            os.close(pipe)
            if run.timer is not None:
                run.timer.cancel()
            run.close()
            finished(run)


def _guard_of(entry: object) -> Guard:
    if type(entry) is not dict:
        raise OSError(errno.EINVAL, "a guard must be an object")
    message: Message = entry
    name = protocol.text(message, "name")
    kind = protocol.text(message, "kind")
    if kind not in protocol.GUARD_KINDS:
        raise OSError(
            errno.EINVAL, f"guard {name!r}: kind must be one of {', '.join(protocol.GUARD_KINDS)}, got {kind!r}"
        )
    paths = protocol.texts(message, "paths")
    return name, kind, [protocol.path(path, f"guard {name!r}: path") for path in paths]
