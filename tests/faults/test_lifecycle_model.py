"""Any sequence of what two clients can do to sandboxes, with crashes in between, is as a small model says it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from tests.crash.points import kill_keeper
from tests.programs import Program, program

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(3600)]

# A client: the owner of an engine, or one that has attached to it. Does what it is told, one line after the other.
HOST: Final = """
COMMANDS, STATE = int(sys.argv[1]), sys.argv[2]
SMALL = Resources(memory="64M")

async def lines():
    rest = b""
    os.set_blocking(COMMANDS, False)
    while True:
        await anyio.wait_readable(COMMANDS)
        rest += os.read(COMMANDS, 65536)
        *whole, rest = rest.split(b"\\n")
        for line in whole:
            yield json.loads(line)

async def seen(engine):
    return {status.name: status.state for status in await engine.list()}

async def do(engine, what, name, number):
    if what == "create":
        return (await engine.create(name=name, resources=SMALL, ttl=1000)).name
    if what == "remove":
        return await engine.remove(name)
    sandbox = await engine.get(name)
    if what == "start":
        return await sandbox.start()
    if what == "stop":
        return await sandbox.stop(grace=0)
    if what == "pause":
        return await sandbox.pause()
    if what == "resume":
        return await sandbox.resume()
    if what == "update":
        return await sandbox.update(Resources(memory=f"{64 + number}M"))
    if what == "expire":
        await sandbox._entry.sharing.set_expiry(0.001)  # its time is over now
        while name in await seen(engine):
            await anyio.sleep(0.005)
        return None
    if what == "run":
        return (await sandbox.run(["sh", "-c", f"exit {number}"])).exit_code
    if what == "write":
        return await sandbox.files.write("/tmp/kept", bytes([number]))
    if what == "read":
        return list(await sandbox.files.read("/tmp/kept"))
    if what == "exec":
        # It ends when its input does, with this code.
        return (await sandbox.exec(["sh", "-c", f"cat; exit {number}"], stdin="pipe")).id
    if what == "end":
        ends = {}
        for process in await sandbox.processes():
            await process.stdin.aclose()
            ends[process.id] = (await process.wait()).code
            await process.aclose()
        return ends
    raise AssertionError(what)

async def main():
    commands = lines()
    what, _, _ = await anext(commands)
    engine = await (Engine.open(STATE, policy="keep") if what == "open" else Engine.attach(STATE))
    tell(answer={found.name: found.action for found in engine.recovery.sandboxes}, now=await seen(engine))
    async for what, name, number in commands:
        if what == "close":
            await engine.close()
            tell(answer=None, now={})
            return
        answer = None
        try:
            with anyio.fail_after(20):
                if what != "look":
                    answer = await do(engine, what, name, number)
        except SandboxError as error:
            answer = type(error).__name__
        tell(answer=answer, now=await seen(engine))

anyio.run(main, backend=sys.argv[3])
"""


Who = Literal["owner", "other"]
CLIENTS: Final[tuple[Who, Who]] = ("owner", "other")
KILLED: Final = 128 + signal.SIGKILL


@attrs.define
class Running:
    """A process.

    Attributes:
        code: with which it will end.
        reader: the client that reads what it writes, whoever owns the engine; None: that one is gone.
    """

    code: int
    reader: Who | None


@attrs.define
class Box:
    """What the model knows of one sandbox: processes by id, and those that a stop has killed.

    Attributes:
        has_run: something has, since it was started: its container is there to be paused.
    """

    state: str = "ready"
    has_run: bool = False
    is_paused: bool = False
    content: int | None = None
    processes: dict[str, Running] = attrs.field(factory=dict)
    killed: dict[str, int] = attrs.field(factory=dict)


@attrs.define
class Model:
    """The rules."""

    boxes: dict[str, Box] = attrs.field(factory=dict)

    @property
    def seen(self) -> dict[str, str]:
        """What every client sees."""
        return {name: box.state for name, box in self.boxes.items()}

    def expects(self, who: Who, what: str, name: str, number: int) -> object:
        """What a call answers, whoever makes it; and that is done to the model. ... is any answer."""
        box = self.boxes.get(name)
        if what == "create":
            if box is not None:
                return "AlreadyExistsError"
            self.boxes[name] = Box()
            return name
        if box is None:
            return "NotFoundError"
        can_run = box.state == "ready" and not box.is_paused
        match what:
            case "remove" | "expire":
                del self.boxes[name]
            case "pause" if box.state != "ready" or not box.has_run:
                return "FailedPreconditionError"
            case "resume" if box.state != "ready":
                return "FailedPreconditionError"
            case "pause" | "resume":
                box.is_paused = what == "pause"
            case "stop":
                box.state, box.has_run, box.is_paused = "stopped", False, False
                box.killed |= dict.fromkeys(box.processes, KILLED)
                box.processes.clear()
            case "start":
                box.state = "ready"
            case "write":
                box.content = number
            case "read":
                return "NotFoundError" if box.content is None else [box.content]
            case "run":
                box.has_run |= can_run
                return number if can_run else "FailedPreconditionError"
            case "exec":
                box.has_run |= can_run
                return ... if can_run else "FailedPreconditionError"
            case "end":
                # What another living client reads is not listed.
                mine = {key: running for key, running in box.processes.items() if running.reader in {who, None}}
                box.processes = {key: running for key, running in box.processes.items() if key not in mine}
                return {key: running.code for key, running in mine.items()}
        return None

    def gone(self, who: Who) -> None:
        """A client has left or died: its processes are for whoever comes."""
        for box in self.boxes.values():
            for running in box.processes.values():
                if running.reader == who:
                    running.reader = None


NAMES: Final = st.sampled_from(["a", "b"])
CALLS: Final = st.tuples(
    st.sampled_from(CLIENTS),
    st.sampled_from(
        [
            *["create", "run", "exec"] * 3,
            *["write", "stop", "start", "end", "end", "end", "read", "remove"],
            *["pause", "pause", "resume", "update", "expire"],
        ]
    ),
    NAMES,
    st.integers(0, 120),
)
CRASHES: Final = st.tuples(
    st.sampled_from(["owner", "owner", "owner", "other", "keeper"]),
    st.sampled_from(["close", "kill", "kill"]),
    st.just(""),
    st.just(0),
)
SEQUENCES: Final = st.lists(
    st.lists(CALLS, min_size=3, max_size=9).flatmap(lambda calls: CRASHES.map(lambda crash: [*calls, crash])),
    min_size=1,
    max_size=3,
).map(lambda parts: [("owner", "create", "a", 0), *(call for part in parts for call in part)])


@attrs.define
class Client:
    """A process at work, replaced by the next one when it dies."""

    state: str
    how: Literal["open", "attach"]
    stack: ExitStack
    program: Program | None = None
    commands: int = -1
    count: int = 0

    def begin(self) -> None:
        """Start a process; it waits for its first command."""
        reading, self.commands = os.pipe2(os.O_CLOEXEC)
        self.stack.callback(os.close, self.commands)
        self.count += 1
        backend = ("asyncio", "trio")[self.count % 2]
        self.program = self.stack.enter_context(
            program(HOST, str(reading), self.state, backend, pass_fds=(reading,)),
        )
        os.close(reading)

    def open(self) -> dict[str, Any]:
        """Open the engine, or attach to it; what it has found."""
        return self.call(self.how)

    def call(self, what: str, name: str = "", number: int = 0) -> dict[str, Any]:
        """Let it do something."""
        assert self.program is not None
        os.write(self.commands, json.dumps([what, name, number]).encode() + b"\n")
        return self.program.heard()

    def close(self) -> None:
        """Its end, in order."""
        assert self.program is not None
        self.call("close")
        assert self.program.finish() == (0, "", "")

    def kill(self) -> None:
        """Its end by SIGKILL."""
        assert self.program is not None
        self.program.kill()


def test_any_sequence_of_two_clients_calls_and_crashes_is_as_the_model_says(
    tmp_path: Path, count: Callable[[int], int]
) -> None:
    @settings(
        max_examples=count(90),
        deadline=None,
        database=None,  # whoever sees a failure is told by what it comes again
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(SEQUENCES)
    def follows(sequence: list[tuple[str, str, str, int]]) -> None:
        with ExitStack() as stack:
            shutil.rmtree(tmp_path / "state", ignore_errors=True)
            state = str(tmp_path / "state")
            play(sequence, Client(state, "open", stack), Client(state, "attach", stack))

    follows()


def test_what_a_client_has_started_is_its_own_after_a_take_over_too_until_it_is_gone(tmp_path: Path) -> None:
    sequence = [
        ("owner", "create", "a", 0),
        ("other", "exec", "a", 4),
        ("other", "exec", "a", 7),
        ("owner", "kill", "", 0),
        ("owner", "end", "a", 0),
        ("other", "end", "a", 0),
        ("other", "exec", "a", 8),
        ("owner", "kill", "", 0),
        ("other", "kill", "", 0),
        ("owner", "end", "a", 0),
        ("owner", "exec", "a", 5),
        ("owner", "close", "", 0),
        ("other", "end", "a", 0),
    ]
    with ExitStack() as stack:
        state = str(tmp_path / "state")
        play(sequence, Client(state, "open", stack), Client(state, "attach", stack))


def test_a_client_goes_on_starting_processes_after_a_take_over_beside_those_it_had_started(tmp_path: Path) -> None:
    sequence = [
        ("owner", "create", "a", 0),
        ("other", "exec", "a", 4),
        ("owner", "kill", "", 0),
        ("other", "run", "a", 75),
        ("other", "exec", "a", 5),
        ("other", "end", "a", 0),
        ("owner", "exec", "a", 6),
        ("owner", "close", "", 0),
        ("owner", "run", "a", 76),
    ]
    with ExitStack() as stack:
        state = str(tmp_path / "state")
        play(sequence, Client(state, "open", stack), Client(state, "attach", stack))


def play(sequence: Sequence[tuple[str, str, str, int]], owner: Client, other: Client) -> None:
    """Compare, call by call."""
    model = Model()
    clients: dict[str, Client] = {"owner": owner, "other": other}
    owner.begin()
    other.begin()
    assert owner.open() == {"answer": {}, "now": {}}
    assert other.open() == {"answer": {}, "now": {}}
    try:
        for step in sequence:
            who, what, name, number = step
            if what in {"close", "kill"}:
                crash(who, what, model, clients)
            else:
                call("owner" if who == "owner" else "other", what, name, number, model, clients)
            for client in clients.values():
                assert client.call("look")["now"] == model.seen, step
    finally:
        for name in ("a", "b"):
            owner.call("remove", name)
        other.close()
        owner.close()


def call(who: Who, what: str, name: str, number: int, model: Model, clients: Mapping[str, Client]) -> None:
    """One of the two does something."""
    if what == "end" and name in model.boxes and model.boxes[name].is_paused:
        call(who, "resume", name, number, model, clients)  # what is paused does not end
    said = clients[who].call(what, name, number)
    if currently_in_test_context():
        note(f"{who} {what} {name} {number}: {said}")
    expected, box = model.expects(who, what, name, number), model.boxes.get(name)
    if expected is ...:
        assert box is not None
        box.processes[said["answer"]] = Running(number, who)
    elif what == "end" and isinstance(expected, dict) and box is not None:
        # Those that a stop has killed are listed, too, until somebody has asked for them.
        ended = {key: code for key, code in said["answer"].items() if key not in box.killed}
        assert ended == expected
        assert {key: box.killed[key] for key in said["answer"] if key in box.killed}.items() <= said["answer"].items()
    else:
        assert said["answer"] == expected


def crash(who: str, how: str, model: Model, clients: Mapping[str, Client]) -> None:
    """One of them ends, or all with their keeper; and what comes after them finds."""
    ended: dict[Who, Client] = {name: clients[name] for name in CLIENTS if who in {name, "keeper"}}
    if who == "keeper":
        kill_keeper(clients["owner"].state)
    for name, client in ended.items():
        client.close() if how == "close" else client.kill()
        client.begin()
        model.gone(name)
    # Only the owner takes over, and only the death of the keeper has ended anything.
    found = {} if who == "other" else dict.fromkeys(model.boxes, "removed" if who == "keeper" else "adopted")
    if who == "keeper":
        model.boxes.clear()
    for client in ended.values():
        said = client.open()
        assert said == {"answer": found if client.how == "open" else {}, "now": model.seen}, f"after {who} {how}"
