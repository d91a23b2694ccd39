"""What ends by itself at its time, whoever is there then: everything that has a name with a prefix.

Standard library only. The clock is CLOCK_BOOTTIME, which goes on while the machine sleeps and does not jump when
somebody sets the time; one timer of the kernel waits for the next of all times. Source: timerfd_create(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from unisandbox.host import syscalls
from unisandbox.host.boundary import reached
from unisandbox.host.keeper import names, protocol
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.guards import Guards, Run
    from unisandbox.host.keeper.loop import Loop
    from unisandbox.host.keeper.protocol import Packet
    from unisandbox.host.keeper.undo import Guard

_LIMIT = 65536
# So many are ended at a time: one that takes long delays few others, and many at once do not starve the machine.
_AT_ONCE = 8
# A guard that fails is tried again: a process may have come while the others were ended.
_ROUNDS = 3
_PAUSE = 1.0


class Expiry:
    """The times, and what happens at them.

    Args:
        drop_held: forgets the fds of a prefix, so that what they keep busy can be removed.
        drop_rest: forgets notes of a prefix, and, if all its guards have done their work, leases too.
        tell: tells all clients of a prefix.
        publish: tells readers of events: the event without its time, and its key.
    """

    def __init__(
        self,
        loop: Loop,
        guards: Guards,
        *,
        drop_held: Callable[[str], None],
        drop_rest: Callable[[str, bool], None],
        tell: Callable[[str], None],
        publish: Callable[[str, str], None],
    ) -> None:
        self._loop = loop
        self._guards = guards
        self._drop_held = drop_held
        self._drop_rest = drop_rest
        self._tell = tell
        self._publish = publish
        self._times: dict[str, float] = {}
        #: What to unlink of those that will expire, by prefix.
        self._files: dict[str, list[str]] = {}
        #: What readers of events are told of those that will expire.
        self._events: dict[str, tuple[str, str]] = {}
        #: Files of those that have, as far as all of theirs was undone.
        self._left_files: list[str] = []
        self._due: list[str] = []
        self._at_work: set[str] = set()
        self._is_starting = False
        self._stopped = False
        self._timer = syscalls.timerfd(time.CLOCK_BOOTTIME)
        loop.watch(self._timer, lambda _events: self._look())

    def expire(self, packet: Packet, reply: Reply) -> None:
        """Set the time of a prefix, change it, or (null) forget it."""
        message = packet.message
        prefix = names.given(message, "prefix")
        if message.get("seconds") is None:
            self._times.pop(prefix, None)
            self._files.pop(prefix, None)
            self._events.pop(prefix, None)
        else:
            seconds = protocol.seconds(message, "seconds", protocol.EXPIRE_LIMIT)
            event = (protocol.event(message), protocol.text(message, "key")) if "event" in message else None
            if len(self._times) >= _LIMIT and prefix not in self._times:
                raise OSError(errno.ENOSPC, f"more than {_LIMIT} prefixes are to expire")
            files = [protocol.path(path, "file") for path in protocol.texts(message, "files")]
            self._times[prefix] = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
            self._files[prefix] = files
            if event is not None:
                self._events[prefix] = event
        self._arm()
        reply({})

    @property
    def is_idle(self) -> bool:
        """Whether nothing expires now, or is to expire."""
        return not (self._times or self._due or self._at_work)

    def unlink(self) -> None:
        """Remove the files of what has expired: nobody has come who would do it, and tell of it."""
        for path in self._left_files:
            reached("before expiry.unlink", path)
            with contextlib.suppress(OSError):  # somebody has come; or the next one tells of it
                os.unlink(path)
            reached("after expiry.unlink", path)

    def stop(self) -> None:
        """The keeper ends, and with it everything."""
        self._stopped = True

    def _arm(self) -> None:
        syscalls.timerfd_settime(self._timer, min(self._times.values(), default=0.0))

    def _look(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set anew since it fired
            os.read(self._timer, 8)
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        for prefix in [prefix for prefix, at in self._times.items() if at <= now]:
            del self._times[prefix]
            self._due.append(prefix)
        self._arm()
        self._next()

    def _next(self) -> None:
        if self._is_starting:
            return  # what has nothing to undo is over at once, and comes here again
        self._is_starting = True
        try:
            while self._due and len(self._at_work) < _AT_ONCE and not self._stopped:
                prefix = self._due.pop(0)
                if prefix not in self._at_work:  # else told to expire again while it does
                    self._at_work.add(prefix)
                    self._kill(prefix)
        finally:
            self._is_starting = False

    def _kill(self, prefix: str) -> None:
        """First what runs: it may hold what is to be undone, and it may be the reason why somebody wants an end."""
        reached("before expiry.kill", prefix)
        kills = [guard for guard in self._guards.under(prefix) if guard[1] in protocol.KILLS]
        self._run(kills, lambda _run: self._undo(prefix, 1), lambda: self._kill(prefix))

    def _undo(self, prefix: str, number: int) -> None:
        """Then all guards, the kills again: a program may have been started meanwhile."""
        reached("before expiry.undo", prefix)
        self._drop_held(prefix)
        guards = self._guards.under(prefix)
        self._run(guards, lambda run: self._undone(prefix, number, run), lambda: self._undo(prefix, number))

    def _undone(self, prefix: str, number: int, run: Run | None) -> None:
        if run is not None:
            self._guards.forget(run)
            if run.failed and number < _ROUNDS:
                self._loop.later(_PAUSE, lambda: self._unless_stopped(lambda: self._undo(prefix, number + 1)))
                return
        is_clean = run is None or not run.failed
        if not is_clean:
            note(f"what begins with {prefix!r} has expired, but not all of it could be undone")
        files = self._files.pop(prefix, [])
        self._left_files += files if is_clean else []
        self._at_work.discard(prefix)
        reached("before expiry.tell", prefix)
        self._drop_rest(prefix, is_clean)
        if event := self._events.pop(prefix, None):
            self._publish(*event)
        self._tell(prefix)
        reached("after expiry.tell", prefix)
        self._next()

    def _run(self, guards: list[Guard], then: Callable[[Run | None], None], again: Callable[[], None]) -> None:
        if not guards:
            then(None)
            return
        try:
            self._guards.start(guards, lambda run: self._unless_stopped(lambda: then(run)))
        except OSError as error:
            note(f"cannot start a process for the guards, trying again: {error}")
            self._loop.later(_PAUSE, lambda: self._unless_stopped(again))

    def _unless_stopped(self, action: Callable[[], None]) -> None:
        if not self._stopped:
            action()
