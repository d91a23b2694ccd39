"""Plays stories and kills them: `python -m tests.crash points`, or `... cases < cases`; answers are lines of JSON.

Each case is played in a fork of this process, which has everything imported, and judged in another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import trio  # noqa: F401 (imported once, before the forks)
from tests.crash import struck
from tests.crash.judge import Judge, Promises
from tests.crash.points import Point, Stage, see_keeper_die
from tests.crash.stories import SMALL, STORIES

from unisandbox import Engine, SandboxError
from unisandbox.conformance.inventory import RUN_PREFIX, Inventory
from unisandbox.conformance.scope import run_cgroup
from unisandbox.host import boundary
from unisandbox.host.keeper import starting

DEADLINE = 60.0
# What a state directory keeps for good.
_STAYS = frozenset({"engine-id", "lock", "events", "keeper.log", "cgroups", "operations", "sandboxes", "damaged"})
# Of these kinds a listing also shows what other engines of this moment have.
_SHARED = (
    "left behind: file",
    "left behind: cgroup",
    "left behind: unix socket",
    "left behind: loop device",
    "left behind: hidden",
)


def main() -> None:
    """Do what is asked for."""
    parent = os.getppid()
    with run_cgroup():
        anyio.run(_warm_up)
        if sys.argv[1] == "points":
            for story in STORIES:
                for point in _points(story):
                    _answer(attrs.asdict(point))
        else:
            for line in sys.stdin.read().splitlines():  # all at once: nobody shall wait until we have worked
                if os.getppid() != parent:
                    return  # whoever asked is gone
                _answer(_case(json.loads(line)))


def _answer(words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


async def _warm_up() -> None:
    """What is compiled and probed once per process need not be so in each fork."""
    async with Engine.open() as engine, engine.create(resources=SMALL) as sandbox:
        await sandbox.run(["true"])


def _points(story: str) -> list[Point]:
    with tempfile.TemporaryDirectory(dir=_base()) as place:
        result = f"{place}/points"
        before = Inventory.take()

        def play() -> None:
            stage = Stage(place, "keep", story)
            starting._PROGRAM = struck.program(stage.wish, record=True)  # type: ignore[misc]
            anyio.run(_play, stage)
            with open(result, "w", encoding="utf-8") as file:
                json.dump([attrs.asdict(point) for point in stage.reached], file)

        status, trouble = _in_fork(place, play)
        if status != 0:
            _sweep(before, place)
            raise AssertionError(f"story {story!r} fails by itself:\n{trouble}")
        with open(result, encoding="utf-8") as file:
            return [Point(**point) for point in json.load(file)]


def _case(case: dict[str, Any]) -> dict[str, object]:
    point = Point(**case["point"])
    stage = Stage("", case["policy"], point.story, point, case["victim"])
    begun = time.monotonic()
    before = Inventory.take()
    answer: dict[str, object] = {**case, "complaints": [], "missed": False}
    with tempfile.TemporaryDirectory(dir=_base()) as place:
        stage.place = place
        status, trouble = _in_fork(place, lambda: _play_case(stage, case["backend"]))
        if case["victim"] == "both":
            see_keeper_die(f"{place}/state")
        complaints: list[str] = []
        expected = 0 if case["victim"] == "keeper" else -signal.SIGKILL
        if status != expected:
            complaints.append(f"the host process ended with {status} and not with {expected}: {trouble}")
        gone_after = time.monotonic()
        if case["policy"] == "stop" and case["victim"] == "host":
            if left := _left(before, place, 5.0, opening=point.step == "open"):
                complaints.append(f"after its owner was killed the keeper left: {left}")
            answer["gone_after"] = time.monotonic() - gone_after
        if point.story != "private":
            complaints += _judged(place, case)
            complaints += _files_left(f"{place}/state")
        complaints += _left(before, place, 5.0, opening=(point.story, point.step) == ("private", "open"))
        if point.story == "private" and point.step == "open":
            _discard(Promises.read(place).directory)
        promised = Promises.read(place)
        answer["killed"], answer["missed"] = promised.killed, promised.missed
        if complaints:
            log = f"{place}/state/keeper.log"
            if os.path.exists(log):
                with open(log, encoding="utf-8", errors="replace") as file:
                    answer["log"] = file.read()[-2000:]
            answer["promises"] = open(f"{place}/promises", encoding="utf-8").read()[-2000:]  # noqa: SIM115
            _sweep(before, place)
    answer["complaints"] = complaints
    answer["seconds"] = time.monotonic() - begun
    return answer


def _play_case(stage: Stage, backend: str) -> None:
    if stage.target is not None and (stage.target.is_inside or stage.target.is_within):
        starting._PROGRAM = struck.program(stage.wish)  # type: ignore[misc]
    anyio.run(_play, stage, backend=backend)


async def _play(stage: Stage) -> None:
    try:
        await STORIES[stage.story](stage)
    except SandboxError:
        if not stage.killed:
            raise
        # Its keeper was killed: whatever it does next may fail, in the words of our errors only.
        for engine in stage.engines:
            try:
                with anyio.fail_after(DEADLINE / 2):
                    await engine.close()
            except SandboxError:
                continue


def _judged(place: str, case: dict[str, Any]) -> list[str]:
    result = f"{place}/complaints"

    def judge() -> None:
        complaints = anyio.run(Judge(place, case["policy"], case["on_recover"]).judge, backend=case["backend"])
        with open(result, "w", encoding="utf-8") as file:
            json.dump(complaints, file)

    status, trouble = _in_fork(place, judge)
    if status != 0:
        return [f"the judge ended with {status}: {trouble}"]
    with open(result, encoding="utf-8") as file:
        found: list[str] = json.load(file)
    return found


def _in_fork(place: str, work: Callable[[], None]) -> tuple[int, str]:
    """Do it in a fork: its exit code (or minus the number of a signal), and what it wrote about its troubles."""
    path = f"{place}/trouble"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, 2)
            os.close(fd)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    pidfd = os.pidfd_open(pid)
    hangs = not select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    if hangs:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(path, encoding="utf-8", errors="replace") as file:
        trouble = file.read()[-3000:]
    return status, f"it hung for {DEADLINE:g} s; {trouble}" if hangs else trouble


def _left(before: Inventory, place: str, timeout: float, *, opening: bool) -> list[str]:
    """What is there and was not before, after it had time to go.

    An engine that is killed while it opens, before it has a keeper, leaves its directories and a link in /run, for the
    next one that opens its state directory or, if that was a temporary one, for the next that needs one (`test_crash`).
    """
    directory = Promises.read(place).directory or f"{place}/state"
    engine_id = _engine_id(directory)
    mine = (place, directory, *([engine_id] if engine_id else []))
    end = time.monotonic() + timeout
    while True:
        left = [line for line in before.diff(Inventory.take()) if _is_ours(line, mine)]
        if opening:
            left = [line for line in left if not line.startswith("left behind: file /run/unisandbox/")]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.005)


def _engine_id(directory: str) -> str:
    try:
        with open(f"{directory}/engine-id", encoding="ascii") as file:
            return file.read().split()[0]
    except (FileNotFoundError, IndexError):
        return ""


def _discard(directory: str) -> None:
    """Do as `unisandbox doctor` does in a minute, with what is left of a private engine."""
    engine_id = _engine_id(directory)
    shutil.rmtree(directory, ignore_errors=True)
    if engine_id:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/run/unisandbox/{engine_id}.state")
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f"/run/unisandbox/{engine_id}")


def _is_ours(line: str, mine: tuple[str, ...]) -> bool:
    """Whether a line of a listing is about this case: engines of other cases and of strangers come and go."""
    if line.startswith("left behind: process"):
        try:
            with open(f"/proc/{line.split()[3]}/cgroup", encoding="ascii") as file:
                return f"/{RUN_PREFIX}{os.getpid()}" in file.read()
        except (FileNotFoundError, ProcessLookupError):
            return False
    return not line.startswith(_SHARED) or any(word in line for word in mine)


def _files_left(state_dir: str) -> list[str]:
    left = [name for name in os.listdir(state_dir) if name not in _STAYS]
    for name in ("sandboxes",):
        if os.path.isdir(f"{state_dir}/{name}"):
            left += [f"{name}/{file}" for file in os.listdir(f"{state_dir}/{name}")]
    return [f"in the state directory is left: {name}" for name in left]


def _sweep(before: Inventory, place: str) -> None:
    """After a complaint the next case shall not meet the remains of this one: only what is surely ours is ended."""
    for line in before.diff(Inventory.take()):
        if line.startswith("left behind: process") and _is_ours(line, (place,)):
            pid = int(line.split()[3])
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                if _is_ours(line, (place,)):  # still, and while its number cannot pass to another one
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)


def _base() -> str | None:
    """Where places are made: in memory, since a test of what is durable is elsewhere."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


if __name__ == "__main__":
    boundary.watch(None)
    main()
