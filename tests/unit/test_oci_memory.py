"""Waiting for kills for memory does not cost more than there is to see, however many processes a container has."""

from __future__ import annotations

import os
import time
from typing import Any, cast

import anyio
import attrs
import pytest

from unisandbox.host.cgroups import Cgroup
from unisandbox.oci import memory
from unisandbox.oci.memory import more_oom_kills
from unisandbox.oci.plan import Plan
from unisandbox.oci.processes import Container, Process

pytestmark = pytest.mark.anyio

DEADLINE = 10.0


@attrs.define(eq=False)
class Counters:
    """The memory counters of a container's cgroup as the kernel keeps them, and how often they were read."""

    version: str
    notice: int = attrs.field(factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    kills: int = 0
    looks: int = 0
    reads: int = 0

    def watch_oom(self) -> tuple[int, float]:
        return os.dup(self.notice), 0.2 if self.version == "v1" else 0.0

    def oom_kills_below(self) -> int | None:
        self.looks += 1
        return self.kills if self.version == "v2" else None

    def container(self, processes: int) -> Container:
        made = Container("c", cast("Plan", _Planned(self)), with_init=False)
        for number in range(processes):
            cgroup = cast("Cgroup", _OfProcess(self, is_victim=number == 0))
            made.processes[str(number)] = Process(str(number), None, [], cgroup=cgroup)
        return made

    async def give_notice(self) -> None:
        """As for a limit that is hit and for a kill; until it was read."""
        os.eventfd_write(self.notice, 1)
        with anyio.fail_after(DEADLINE):
            while True:
                await anyio.sleep(0.001)
                try:
                    value = os.eventfd_read(self.notice)
                except BlockingIOError:
                    return
                os.eventfd_write(self.notice, value)


@attrs.frozen
class _Planned:
    cgroup: Any


@attrs.frozen
class _OfProcess:
    counters: Counters
    is_victim: bool
    oom_counter: tuple[str, str] = ("", "")

    def oom_kills(self) -> int:
        self.counters.reads += 1
        return self.counters.kills if self.is_victim else 0


async def test_a_notice_without_a_kill_costs_one_look_whatever_runs_in_the_container() -> None:
    counters = Counters("v2")
    async with anyio.create_task_group() as group:
        group.start_soon(more_oom_kills, counters.container(1000), 0)
        for _ in range(20):
            await counters.give_notice()
        group.cancel_scope.cancel()
    os.close(counters.notice)
    assert counters.reads == 1000, "they are counted once, at the beginning"
    assert counters.looks <= 22


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_kill_is_found_at_its_notice_or_soon_after_it(version: str) -> None:
    counters = Counters(version)
    found: list[int] = []

    async def find() -> None:
        found.append(await more_oom_kills(counters.container(10), 0))

    with anyio.fail_after(DEADLINE):
        async with anyio.create_task_group() as group:
            group.start_soon(find)
            await counters.give_notice()
            counters.kills = 1
            if version == "v2":
                await counters.give_notice()
    os.close(counters.notice)
    assert found == [1]


async def test_who_has_counted_for_long_rests_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters("v1")
    clock = 0.0
    rests: list[float] = []

    def counted(container: Container) -> int:
        nonlocal clock
        clock += 0.05
        return int(len(rests) > 2)

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(time, "thread_time", lambda: clock)
    monkeypatch.setattr(memory, "all_oom_kills_of", counted)
    monkeypatch.setattr(anyio, "sleep", rest)
    os.eventfd_write(counters.notice, 1)
    assert await more_oom_kills(counters.container(0), 0) == 1
    os.close(counters.notice)
    assert rests == [pytest.approx(1.0)] * 3
