"""Asking the keeper to start programs and to run jobs. Client side."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import cast

import anyio

from unisandbox.api.errors import DeadlineExceededError
from unisandbox.host.keeper.heard import HeardExits
from unisandbox.host.keeper.link import Link, error_of
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import JobFailed, JobResult, Spawned, SpawnFailed, SpawnStage


async def spawn(link: Link, exits: HeardExits, request: Message, fds: Sequence[int]) -> Spawned:
    """See `Keeper.spawn`; `request` has its arguments by the names that they have there."""
    key, program = request["key"], cast("list[str]", request["argv"])[0]
    try:
        packet = await link.request("spawn", fds, request)
    except (anyio.get_cancelled_exc_class(), DeadlineExceededError):
        link.say({"op": "cancel_spawn", "key": key})
        raise
    error = error_of(packet)
    if error is not None:
        stage = cast("SpawnStage", packet.message.get("stage", "fork"))
        raise SpawnFailed(error.errno or errno.EIO, f"cannot start a program: {error.strerror}", stage)
    if packet.lost:
        link.say({"op": "cancel_spawn", "key": key})
        raise SpawnFailed(errno.EMFILE, f"cannot start {program}: no file descriptor left here for it", "pidfd")
    pid, start_time = cast("int", packet.message["pid"]), cast("int", packet.message["start_time"])
    exits.expect(pid, start_time)
    return Spawned(pid, start_time, packet.claim() if packet.fds else -1)


async def job(
    link: Link, steps: Sequence[Mapping[str, object]], hold: Mapping[str, str], timeout: float, fds: Sequence[int]
) -> JobResult:
    """See `Keeper.job`."""
    number = link.number()
    request: Message = {"steps": [dict(step) for step in steps], "hold": dict(hold), "timeout": timeout}
    try:
        packet = await link.request("job", fds, request, number)
    except (anyio.get_cancelled_exc_class(), DeadlineExceededError):
        link.say({"op": "cancel_job", "job": number, "names": list(hold.values())})
        raise
    error = error_of(packet)
    if error is not None:
        index, do = cast("int | None", packet.message.get("index")), cast("str | None", packet.message.get("do"))
        raise JobFailed(error.errno or errno.EIO, str(error.strerror), index, do)
    return JobResult(
        cast("Mapping[str, object]", packet.message["result"]), cast("Mapping[str, int]", packet.message["held"])
    )
