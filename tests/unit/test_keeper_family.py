"""The keeper's jobs, with a worker that takes its time to die."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from unisandbox.host.keeper import family, launches
from unisandbox.host.keeper.protocol import Message, Packet


class Loop:
    """Its timers go off when the test says so."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], None]] = []

    def later(self, _seconds: float, action: Callable[[], None]) -> Loop:
        self.actions.append(action)
        return self

    def cancel(self) -> None:
        """As of a timer."""


class Workers:
    """Real processes that do nothing, and end when the test says so."""

    are_busy = False

    def __init__(self, *_: object) -> None:
        self.pids: list[int] = []
        self.killed: list[int] = []

    def begin(self, *_: object) -> int:
        self.pids.append(os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ, setpgroup=0))
        return self.pids[-1]

    def kill(self, pid: int) -> None:
        self.killed.append(pid)

    def __contains__(self, pid: int) -> bool:
        return pid in self.pids

    def reaped(self, pid: int) -> None:
        self.pids.remove(pid)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    workers = Workers()
    monkeypatch.setattr(family, "Workers", lambda *_: workers)
    monkeypatch.setattr(launches, "Launcher", lambda: None)
    yield workers
    for pid in workers.pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_job_begins_when_the_one_before_it_that_took_too_long_is_dead(workers: Workers) -> None:
    loop = Loop()
    jobs = family.Family(cast("Any", loop), *cast("Any", (None, None, None)))
    answers: list[Message] = []
    jobs.job(Packet({"steps": [], "hold": {}, "timeout": 5.0}, [], 0), cast("Any", answers.append))
    (first,) = workers.pids
    loop.actions.pop()()
    assert [answer["errno"] for answer in answers] == [errno.ETIMEDOUT]
    assert workers.killed == [first]

    jobs.job(Packet({"steps": [], "hold": {}, "timeout": 5.0}, [], 0), cast("Any", answers.append))
    assert workers.pids == [first], "the one that cleans up waits"

    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    jobs.reap()
    assert len(workers.pids) == 1
    assert workers.pids != [first]
