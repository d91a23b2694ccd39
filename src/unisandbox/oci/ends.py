"""How processes end: who tells, and what is known when nobody does."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Final

import anyio

from unisandbox.api import Exit, UnavailableError
from unisandbox.host import syscalls
from unisandbox.host.init import Ended, ended, ended_now
from unisandbox.host.keeper import Keeper
from unisandbox.host.pidfd import has_ended, zombie_status
from unisandbox.oci.made import Created
from unisandbox.oci.processes import Container, Process, copied, oom_kills_of

_REAPED_SECONDS: Final = 1.0
# An init tells of an end at once. What keeps it from that is looked for after so many seconds.
_TOLD_SECONDS: Final = 0.05


async def wait_end(keeper: Keeper, container: Container, process: Process) -> tuple[int | None, float]:
    """Wait for the end of a process: the raw wait status, and when the end came."""
    if process.life is None:
        pid, start_time = process.pid, process.start_time
        if pid is None:
            assert container.created is not None  # noqa: S101 (looked at by `OciTaskService.wait`)
            pid, start_time = container.created.pid, container.created.start_time
        record = await keeper.wait_exit(pid, start_time)
        return record.status, record.at
    # Copies: whoever asked first may have deleted the process before the others wake up.
    with process.life.dup() as life, copied(process.pidfd) as pidfd:
        end = await _told(container, life, pidfd)
        if end is not None:
            return end.status, end.at
        is_late = has_ended(pidfd)
        status = await _status_without_init(pidfd)
    at = time.time()
    if is_late and container.created is not None and has_ended(container.created.pidfd):
        # What an init has started ends with it, and the keeper, its parent, has seen that.
        with contextlib.suppress(UnavailableError, ProcessLookupError):
            at = (await keeper.wait_exit(container.created.pid, container.created.start_time)).at
    return status, at


async def _told(container: Container, life: socket.socket, pidfd: int) -> Ended | None:
    """What init says of the end; None when init is gone.

    A pause holds init, too, and then what was killed waits for it: the kernel knows how that has ended.
    """
    if ended_now(life) is None:
        await anyio.wait_readable(pidfd)
    while True:
        with anyio.move_on_after(_TOLD_SECONDS):
            return await ended(life)
        status = zombie_status(pidfd) if container.plan.cgroup.is_frozen else None
        if status is not None:
            return Ended(status, time.time())


async def _status_without_init(pidfd: int) -> int | None:
    """Init is gone without telling how a process ended; Linux 6.15 can still tell."""
    await anyio.wait_readable(pidfd)
    status = None
    with anyio.move_on_after(_REAPED_SECONDS):
        while (status := syscalls.pidfd_exit_status(pidfd)) is None:
            # It has ended but is not reaped yet, and no event tells of the reaping.
            await anyio.sleep(0.002)
    return status


async def wait_end_of_init(keeper: Keeper, created: Created) -> None:
    """Wait until a killed container is gone and reaped: a runtime refuses to delete what still lives."""
    await keeper.wait_exit(created.pid, created.start_time)


def end_now(process: Process) -> Exit | None:
    """How it ended, if that can be told without waiting."""
    end = None if process.life is None else ended_now(process.life)
    return None if end is None else exit_of(process, end.status, end.at)


def exit_of(process: Process, status: int | None, at: float) -> Exit:
    """A raw wait status as users get it; its cgroup is still there. None: nobody knows it."""
    if status is None:
        return Exit.lost(exited_at=at)
    kills = oom_kills_of(process.cgroup) if process.cgroup is not None else 0
    return Exit.from_wait_status(status, exited_at=at, oom_kills=kills, killed_by_us=process.killed_by_us)
