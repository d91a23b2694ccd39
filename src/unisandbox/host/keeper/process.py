"""The keeper's process as a client reaches it: whether it lives, and by its id what it holds and where it mounts."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from unisandbox.api.errors import UnavailableError
from unisandbox.host import pidfd as pidfds
from unisandbox.host.subordinate import Rows

# A keeper that could not begin has said so and ends: milliseconds.
_LAST_BREATH: Final = 1.0


def reap(pidfd: int) -> None:
    """Wait for the end of a keeper that has said that it ends, and close its pidfd.

    Nobody else reaps it if it became our child (we are PID 1, or a subreaper).
    """
    try:
        if pidfds.has_ended(pidfd, _LAST_BREATH):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    finally:
        os.close(pidfd)


class Process:
    """The process at the other end of a connection. What is reached by its id is never another one's."""

    def __init__(self, state_dir: str) -> None:
        self.pid: int = 0
        #: Readable when it has ended; -1 before the greeting and after the end of the connection.
        self.pidfd: int = -1
        self._has_ended = False
        self._state_dir = state_dir
        #: Descriptors of the keeper's own file system and of its root ("").
        self._views: dict[str, int] = {}

    def meet(self, pid: int, pidfd: int) -> None:
        """From now on it is known, and the pidfd is ours."""
        self.pid, self.pidfd = pid, pidfd

    @property
    def alive(self) -> bool:
        """A look, without waiting."""
        return self.pidfd >= 0 and not pidfds.has_ended(self.pidfd)

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, or does so while this call blocks."""
        return self.pidfd < 0 or pidfds.has_ended(self.pidfd, seconds)

    def check(self) -> None:
        """Raise UnavailableError when it has ended."""
        if not self.alive:
            raise UnavailableError(f"the keeper of {self._state_dir} (process {self.pid}) has ended")

    def opened(self, what: str, flags: int) -> int:
        """A descriptor of our own of `what` in its directory of /proc."""
        try:
            fd = os.open(f"/proc/{self.pid}/{what}", flags | os.O_CLOEXEC)
        except OSError:
            self.check()  # that is why
            raise
        try:
            self.check()  # after it was opened: the number was still the keeper's then
        except UnavailableError:
            os.close(fd)
            raise
        return fd

    def is_in_another_user_namespace(self) -> bool:
        """Whether it is in another one than this process."""
        fd = self.opened("ns/user", os.O_RDONLY)
        try:
            return not os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/user"))
        finally:
            os.close(fd)

    def ids(self) -> tuple[Rows, Rows]:
        """The rows of its user map and its group map, as this process sees them. Source: user_namespaces(7)."""
        return self._rows("uid_map"), self._rows("gid_map")

    def _rows(self, name: str) -> Rows:
        with open(self.opened(name, os.O_RDONLY), encoding="ascii") as file:
            return [[int(word) for word in line.split()] for line in file]

    def outside(self, path: str, workdir: str) -> str:
        """See `Keeper.outside`; its own file system is at `workdir`."""
        # With the keeper its mounts go, and a path through the root would lead to what they covered: to the directories
        # of the host. The descriptor of its own file system leads nowhere else, dead or alive.
        top = workdir if path == workdir or path.startswith(f"{workdir}/") else ""
        if top not in self._views:
            self._views[top] = self.opened(f"root{top}", os.O_PATH | os.O_DIRECTORY)
        self.check()
        return f"/proc/self/fd/{self._views[top]}{path[len(top) :]}"

    def leave(self, wait: float) -> bool:
        """Let go of it, after up to `wait` seconds for its end: whether it is known to have ended."""
        if self.pidfd >= 0:
            self._has_ended = pidfds.has_ended(self.pidfd, wait)
            if self._has_ended:
                # If it became our child (we are PID 1, or a subreaper), nobody else reaps it.
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            os.close(self.pidfd)
            self.pidfd = -1
        for fd in self._views.values():
            os.close(fd)
        self._views.clear()
        return self._has_ended
