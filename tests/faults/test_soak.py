"""Many processes work on one state directory at random, and are killed at random: nothing is left, nothing grows.

Bounded by counts of operations, with fixed seeds that are printed. Every operation ends well, or with an error that
stands in a table below: what the work of others may mean for it, and what only the death of its keeper may.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import pytest
from tests.programs import Program, program

from unisandbox import Engine, Resources

pytestmark = [pytest.mark.root, pytest.mark.slow]

# What a client can do, and how it tells of it.
WORK: Final = """
import gc, random

SMALL = Resources(memory="64M", pids=32)
NAMES = [f"n{number}" for number in range(6)]

async def create(engine, name, dice):
    await engine.create(name=name, resources=SMALL)

async def run(engine, name, dice):
    sandbox = await engine.get(name)
    code = dice.randrange(256)
    done = await sandbox.run(["sh", "-c", f"echo out; exit {code}"])
    if done.exit.reason == "exited":
        assert (done.exit_code, done.stdout) == (code, b"out\\n"), f"{done!r} is not what was run (code {code})"
        return "ok"
    assert done.exit.signal in {None, 9, 15}, done  # the last: a patient stop of another one asks first
    return done.exit.reason

async def leave_running(engine, name, dice):
    await (await engine.get(name)).exec(["sh", "-c", "echo here; sleep 1000"])

async def look(engine, name, dice):
    for process in await (await engine.get(name)).processes():
        await process.kill()

async def add(engine, name, dice):
    sandbox = await engine.get(name)
    container = await sandbox.containers.add(argv=["sleep", "1000"], resources=Resources(memory="32M"))
    if dice.random() < 0.5:
        await container.remove()

async def write(engine, name, dice):
    sandbox = await engine.get(name)
    await sandbox.files.write("/tmp/a", b"x" * dice.randrange(5000))

async def stop(engine, name, dice):
    await (await engine.get(name)).stop(grace=0.1)

async def start(engine, name, dice):
    await (await engine.get(name)).start()

async def remove(engine, name, dice):
    await engine.remove(name)

async def listing(engine, name, dice):
    for status in await engine.list():
        assert status.id

KINDS = [create] * 4 + [run] * 8 + [leave_running] * 2 + [look, add, write, stop, start, start, listing] + [remove] * 2

async def work(engine, dice):
    kind, name = dice.choice(KINDS), dice.choice(NAMES)
    keeper, text = engine._core.host.keeper.pid, ""
    try:
        with anyio.fail_after(60):
            word = await kind(engine, name, dice) or "ok"
    except SandboxError as error:
        word, text = type(error).__name__, str(error)
    tell(op=kind.__name__, word=word, text=text, keeper=keeper)

def play(main, backend):
    try:
        anyio.run(main, backend=backend)
    except BaseException:
        import traceback
        tell(op="fault", text=traceback.format_exc())
        raise
"""

# One of many clients: so many operations with such a seed, on an engine that it opens again when its keeper has died.
CLIENT: Final = (
    WORK
    + """
from unisandbox import FailedPreconditionError, UnavailableError

STATE, SEED, COUNT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

async def opened():
    with anyio.fail_after(60):
        while True:
            try:
                return await Engine.attach(STATE)
            except UnavailableError:
                pass
            try:
                return await Engine.open(STATE, policy="keep")
            except (FailedPreconditionError, UnavailableError):
                await anyio.sleep(0.05)  # another one is opening it

async def main():
    dice = random.Random(SEED)
    engine = await opened()
    for number in range(COUNT):
        await work(engine, dice)
        if not engine._core.host.keeper.alive:
            await engine.close()
            engine = await opened()
    await engine.close()
    tell(op="end")

play(main, sys.argv[4])
"""
)

# The owner of a keeper, neither of which is killed: it does as many operations as it hears, then it removes everything
# and tells what it and its keeper have.
OWNER: Final = (
    WORK
    + """
STATE, SEED, COMMANDS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def size(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        private = sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
    return {"fds": len(os.listdir(f"/proc/{pid}/fd")), "private": private * 1024}

async def main():
    dice = random.Random(SEED)
    engine = await Engine.open(STATE, policy="keep")
    keeper = engine._core.host.keeper
    tell(op="opened")
    while count := int.from_bytes(os.read(COMMANDS, 2), "little"):
        for number in range(count):
            await work(engine, dice)
        tell(op="worked")
        os.read(COMMANDS, 2)
        while len(await keeper.clients()) > 1:
            await anyio.sleep(0.005)
        for status in await engine.list():
            await engine.remove(status.id)
        gc.collect()
        last = (await keeper.events.after(0)).last
        tell(op="swept", host=size(os.getpid()), keeper=size(keeper.pid), events=last)
    await engine.close()
    tell(op="end")

play(main, "asyncio")
"""
)

CLIENTS: Final = 3
DEADLINE: Final = 600.0

# What another one's work may mean for an operation: the class of the error, and its words.
GONE: Final = ("NotFoundError", r"^no sandbox (has the id or name )?'\w+'$|^sandbox '\w+' was removed$")
TAKEN: Final = ("AlreadyExistsError", r"^a sandbox with the name '\w+' exists already")
STOPPED: Final = ("FailedPreconditionError", r"^sandbox '\w+' is stopped")
BEING_REMOVED: Final = (
    "FailedPreconditionError",
    r"^sandbox '\w+' cannot be used: its creation or removal by process \d+",
)
KILLED: Final = (
    "BackendError",
    r"^'\w+' was killed before it was started|^crun create of .* failed: signal SIGKILL"
    r"|^crun create of container '\S+': process \d+ is not there, or not its process"
    r"|^container '\S+' (of sandbox '\w+' )?ended before it was started|^the container's init refused to start",
)
# A container that is added has an init of its own; with that killed nothing can be started in it.
INIT_KILLED: Final = ("UnavailableError", r"^the container's init has ended, so 'sleep' was not started")
USES: Final = (GONE, STOPPED, BEING_REMOVED, KILLED)
BY_OTHERS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "create": (TAKEN,),
    "run": USES,
    "leave_running": USES,
    "add": (*USES, INIT_KILLED),
    "look": (GONE, BEING_REMOVED),
    "write": (GONE, BEING_REMOVED),
    "stop": (GONE, BEING_REMOVED),
    "start": (GONE, BEING_REMOVED),
    "remove": (GONE,),
    "listing": (),
}
# And what it may meet beside that if its keeper was killed before it ended. Nothing else is forgiven.
KEEPER_DIED: Final = ("UnavailableError", r"has ended|cannot reach the keeper")

# The part of all `run` that others may end by force: each takes some milliseconds, so it is seldom met. Measured:
# below 1 %.
CUT_SHORT: Final = 0.05


@attrs.define
class Judge:
    """Hears how operations ended, and fails at an end that cannot be."""

    words: Counter[str] = attrs.field(factory=Counter)
    runs: int = 0
    killed_keepers: set[int] = attrs.field(factory=set)

    def hear(self, word: Mapping[str, Any]) -> None:
        """One operation has ended."""
        self.words[word["word"]] += 1
        self.runs += word["op"] == "run"
        # The last two of a `run` that a `stop`, `look` or `remove` of another one has killed, with its init or without.
        if word["word"] in {"ok", "signaled", "lost"}:
            return
        possible = BY_OTHERS[word["op"]]
        if word["keeper"] in self.killed_keepers:
            possible += (KEEPER_DIED,)
        assert any(word["word"] == name and re.search(text, word["text"]) for name, text in possible), word

    def sum_up(self) -> None:
        """All have ended: fail if more was cut short than others can have cut short."""
        cut = self.words["lost"] + self.words["signaled"]
        assert cut <= self.runs * CUT_SHORT, f"{cut} of {self.runs} runs were cut short: {self.words}"


class Crew:
    """The clients, what they have told, and their deaths."""

    def __init__(self, state: str, total: int, seed: int) -> None:
        self.state = state
        self.dice = random.Random(seed)
        self.total = total
        self.judge = Judge()
        self.kills: Counter[str] = Counter()
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self._clients: dict[int, Program] = {}
        self._left = dict.fromkeys(range(CLIENTS), total // CLIENTS)

    def run(self) -> None:
        """Until every client has done its part."""
        with self._stack:
            for place in range(CLIENTS):
                self._start(place)
            end = time.monotonic() + DEADLINE
            while self._clients:
                assert time.monotonic() < end, f"no end after {DEADLINE:g} s: {self.judge.words}, {self.kills}"
                for place in list(self._clients):
                    while place in self._clients and select.select([self._clients[place]._report], [], [], 0.002)[0]:
                        self._hear(place, self._clients[place].heard())
                self._perhaps_kill()

    def _start(self, place: int) -> None:
        self._seed += 1
        backend = ("asyncio", "trio")[place % 2]
        arguments = (self.state, str(self._seed), str(self._left[place]), backend)
        self._clients[place] = self._stack.enter_context(program(CLIENT, *arguments))

    def _hear(self, place: int, word: dict[str, Any]) -> None:
        assert word["op"] != "fault", word["text"]
        if word["op"] == "end":
            assert self._clients.pop(place).finish()[0] == 0
            return
        self.judge.hear(word)
        self._left[place] -= 1

    def _perhaps_kill(self) -> None:
        # One in about 40 operations, and every sixth time the keeper.
        if self.kills.total() >= self.judge.words.total() // 40:
            return
        if self.kills.total() % 6 == 5:
            self._kill_keeper()
            return
        place = self.dice.randrange(CLIENTS)
        if place in self._clients and self._left[place] > 0:
            client = self._clients[place]
            client.process.kill()
            client.process.wait()
            for word in _last_words(client):
                if word["op"] != "end":
                    self._hear(place, word)
            self.kills["client"] += 1
            self._start(place)

    def _kill_keeper(self) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError, KeyError):
            keeper = json.loads((Path(self.state) / "lock").read_text())["keeper"]
            if not keeper:
                return  # one is just being started
            pidfd = os.pidfd_open(keeper)
            try:
                if Path(f"/proc/{keeper}/comm").read_text().startswith("unisandbox-keep"):
                    self.judge.killed_keepers.add(keeper)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    self.kills["keeper"] += 1
            finally:
                os.close(pidfd)


def _last_words(client: Program) -> Iterator[dict[str, Any]]:
    """What it had told before its death counts."""
    while True:
        try:
            word = client.heard()
        except AssertionError:  # it ended without another word
            return
        yield word


async def _stop_all(state: str) -> None:
    async with Engine.open(state, on_recover="stop"):
        return


@contextlib.contextmanager
def _outlived_by_nothing(state: str) -> Iterator[None]:
    """What a test has made that fails anywhere, also at its last word, is not to outlive it."""
    try:
        yield
    except BaseException:
        anyio.run(_stop_all, state)  # those who have worked there are ended by now
        raise


@pytest.mark.timeout(900)
def test_random_work_and_random_deaths_leave_nothing(tmp_path: Path, count: Callable[[int], int]) -> None:
    total, seed = count(6_000), 20_240_611
    state = str(tmp_path / "state")
    crew = Crew(state, total, seed)
    with _outlived_by_nothing(state):
        crew.run()
        print(f"seed {seed}: {total} operations, killed {dict(crew.kills)}, words {dict(crew.judge.words)}")
        assert crew.kills["client"] > 0
        assert crew.kills["keeper"] > 0
        assert crew.judge.words["ok"] > total * 0.3, f"most work failed: {crew.judge.words}"
        crew.judge.sum_up()

        # What the clients left is adopted and removed; then nothing is.
        async def end() -> int:
            async with Engine.open(state) as engine:
                for status in await engine.list():
                    await engine.remove(status.id)
                return len(await engine.list())

        assert anyio.run(end) == 0
    assert not os.listdir(f"{state}/sandboxes")
    assert not os.path.exists(f"{state}/damaged")


def test_a_soak_that_fails_at_its_last_word_leaves_nothing(tmp_path: Path) -> None:
    async def leave() -> None:
        engine = await Engine.open(tmp_path, policy="keep")
        await (await engine.create(resources=Resources(memory="64M"))).exec(["sleep", "1000"])
        await engine.close()

    anyio.run(leave)
    with pytest.raises(ZeroDivisionError), _outlived_by_nothing(str(tmp_path)):
        _ = 1 // 0
    assert os.listdir(tmp_path / "sandboxes") == []


BATCH: Final = 60
# What comes and goes in a keeper: a worker that waits some seconds for another job is reached by one descriptor.
FDS: Final = 2
# What the keeper keeps of each of its last 4096 events, with its key and the spawn and the end behind it; measured.
EVENT_BYTES: Final = 1000
EVENTS_KEPT: Final = 4096
# What an allocator may not give back, of either process.
SLACK: Final = 1_000_000


@pytest.mark.timeout(900)
def test_neither_a_keeper_nor_its_owner_grows(
    tmp_path: Path, count: Callable[[int], int], record_property: Callable[[str, object], None]
) -> None:
    batches, seed = count(40), 20_240_611
    state, judge, sizes = str(tmp_path / "state"), Judge(), list[dict[str, Any]]()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        stack.enter_context(_outlived_by_nothing(state))
        with program(OWNER, state, str(seed), str(reading), pass_fds=(reading,)) as owner:
            assert owner.heard()["op"] == "opened"
            for number in range(batches):
                os.write(writing, BATCH.to_bytes(2, "little"))
                with program(CLIENT, state, str(seed + number), str(BATCH), ("asyncio", "trio")[number % 2]) as other:
                    _hear(other, judge)
                    _until(owner, "worked", judge)
                    other.kill()  # in the middle of something, if it is not the quicker one
                os.write(writing, b"go")
                sizes.append(_until(owner, "swept", judge))
            os.write(writing, (0).to_bytes(2, "little"))
            _until(owner, "end", judge)
            assert owner.finish()[0] == 0
    print(f"seed {seed}: {batches} batches of {BATCH}, {dict(judge.words)}\n" + "\n".join(map(str, sizes)))
    record_property("sizes", sizes)
    judge.sum_up()
    early, late = sizes[len(sizes) // 4], sizes[-1]
    events = min(late["events"], EVENTS_KEPT) - min(early["events"], EVENTS_KEPT)
    for who, kept in (("host", 0), ("keeper", events * EVENT_BYTES)):
        assert late[who]["fds"] <= early[who]["fds"] + FDS, f"descriptors of the {who} grew: {early}, {late}"
        grown = late[who]["private"] - early[who]["private"]
        assert grown <= kept + SLACK, f"memory of the {who} grew by {grown} bytes: {early}, {late}"


def _until(owner: Program, op: str, judge: Judge) -> dict[str, Any]:
    while (word := _hear(owner, judge))["op"] != op:
        pass
    return word


def _hear(client: Program, judge: Judge) -> dict[str, Any]:
    word = client.heard()
    assert word["op"] != "fault", word["text"]
    if word["op"] in BY_OTHERS:
        judge.hear(word)
    return word
