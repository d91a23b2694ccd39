"""A program that works for one sandbox, beside what runs in it: a child of the keeper in a cgroup below the sandbox's.

It ends with the keeper: the launcher has asked the kernel for that (PR_SET_PDEATHSIG), and no helper changes its
privileges in a way that would undo it; see commit_creds() in kernel/cred.c.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import Cgroup, patience
from unisandbox.host.keeper import Guard, Keeper, Spawned
from unisandbox.host.services import Host

END_SECONDS: Final = 5.0
"""How long the end of a killed one may take: it may sit in the kernel."""


class Helper:
    """One that runs, or has ended by itself."""

    def __init__(self, keeper: Keeper, cgroup: Cgroup, pid: int, start_time: int, pidfd: int) -> None:
        """Use `settle` or `restore`; the pidfd is this object's from now on."""
        self._keeper = keeper
        self._cgroup = cgroup
        self.pid: int = pid
        self.start_time: int = start_time
        self._pidfd = pidfd

    @classmethod
    async def settle(cls, host: Host, name: str, cgroup: Cgroup, spawned: Spawned) -> Helper:
        """Take over what has just been started: let it end with the sandbox whatever happens, and be found again.

        On failure it is killed, and its cgroup is left.

        Args:
            host: of the engine.
            name: under which the keeper guards it, and where others may come also knows it.
            cgroup: its own.
            spawned: its pidfd is this object's from now on.
        """
        helper = cls(host.keeper, cgroup, spawned.pid, spawned.start_time, spawned.pidfd)
        try:
            if not cgroup.holds_processes:
                await host.keeper.guard([Guard(name, "kill_process", (f"/{helper.pid}/{helper.start_time}",))])
            if host.shared:
                await host.keeper.notes.write_process(name, helper.pid, helper.start_time, helper._pidfd)
        except BaseException:
            helper.kill()
            helper.close()
            raise
        return helper

    @classmethod
    async def restore(cls, host: Host, name: str, parent: Cgroup, child: str) -> Helper | None:
        """Take over one that another process has started; None when there is none.

        Args:
            host, name: as for `settle`.
            parent: the sandbox's cgroup.
            child: the name below that of the helper's.
        """
        noted = await host.keeper.notes.find_process(name)
        if noted is None:
            return None
        try:
            own = parent.find(child)
            return cls(host.keeper, own, *noted, await host.keeper.take(name))
        except FileNotFoundError:
            return None

    @staticmethod
    async def clear(keeper: Keeper, name: str) -> None:
        """End one of which only the name is known, where no cgroup does."""
        with contextlib.suppress(FileNotFoundError):
            fd = await keeper.take(name)
            try:
                pidfds.send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)

    @property
    def has_ended(self) -> bool:
        """Whether it has, although nobody here has ended it."""
        return self._pidfd >= 0 and pidfds.has_ended(self._pidfd)

    def wake(self) -> None:
        """Let it go on, if somebody has stopped it (SIGSTOP)."""
        if self._pidfd >= 0:
            pidfds.send_signal(self._pidfd, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, without waiting for its end."""
        self._cgroup.kill()
        if self._pidfd >= 0:
            pidfds.send_signal(self._pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """End it. May be repeated until it has returned.

        Raises:
            UnavailableError: the keeper has ended, and it with that.
        """
        self.kill()
        with contextlib.suppress(ProcessLookupError):  # so long ago that nobody knows of it
            await self._keeper.wait_exit(self.pid, self.start_time)
        await patience.remove(self._cgroup.dirs, END_SECONDS)
        self.close()

    def close(self) -> None:
        """Close what this process holds of it; ends nothing. Repeating is harmless."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
