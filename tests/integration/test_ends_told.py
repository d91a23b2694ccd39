"""Events of ends: told when they happen, once and exactly, whether or not anybody waits."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from tests.keepers import wait_ended
from tests.programs import program

from unisandbox import Engine, Event, Exit, Resources, SandboxError
from unisandbox.api import ProcessSpec
from unisandbox.engine.entry import Entry

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")
ENDS = {"process.exited", "container.exited", "process.oom"}
EATS = ["python3", "-c", "x = bytearray(200 << 20)"]

# Starts what ends by itself, tells so, and waits for nothing.
STARTER = """
async def main():
    async with Engine.attach(sys.argv[1]) as engine:
        sandbox = await engine.get("w")
        process = await sandbox.exec(["sh", "-c", "sleep 0.5; exit 3"])
        container = await sandbox.containers.add(argv=["sh", "-c", "sleep 0.7; exit 4"], name="c")
        tell(id=process.id)
        await anyio.sleep(1000)
anyio.run(main)
"""


async def ends(engine: Engine, enough: Callable[[list[Event]], bool], seconds: float = 10.0) -> list[Event]:
    """The ends that are told, until there are enough."""
    found: list[Event] = []
    with anyio.fail_after(seconds):
        async for event in engine.events():
            found += [event] if event.kind in ENDS else []
            if enough(found):
                break
    return found


def how(event: Event) -> tuple[str, str, int, int | None, str]:
    assert event.exit is not None
    return event.kind, event.exec_id, event.exit.code, event.exit.signal, event.exit.reason


async def settled(engine: Engine, count: int) -> list[Event]:
    """The ends that are told by now: `count`, and a while later no more."""
    await ends(engine, lambda found: len(found) >= count)
    await anyio.sleep(0.5)  # twice the keeper's own patience; that nothing comes cannot be waited for
    last = await engine.create(name="last", resources=SMALL)
    found = []
    async for event in engine.events():
        found += [event] if event.kind in ENDS else []
        if event.sandbox_id == last.id:
            break
    await last.remove()
    return found


async def test_ends_that_nobody_waits_for_are_told_to_all(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine, Engine.attach(tmp_path / "state") as other:
        async with engine.create(resources=SMALL) as sandbox:
            first = await sandbox.exec(["sh", "-c", "exit 3"])
            begun = time.time()
            await ends(other, lambda found: len(found) == 1, 1.0)
            second = await sandbox.exec(["sh", "-c", "kill -9 $$"])
            await ends(other, lambda found: len(found) == 2, 1.0)
            third = await sandbox.exec(EATS)
            await ends(other, lambda found: len(found) == 4)
            fourth = await sandbox.exec(["sleep", "1000"])
            await fourth.signal(9)
            await ends(other, lambda found: len(found) == 5, 1.0)

            exits = [await process.wait() for process in (first, second, third, third, fourth)]
            for reader in (engine, other):
                found = await settled(reader, 5)
                assert [how(event) for event in found] == [
                    ("process.exited", first.id, 3, None, "exited"),
                    ("process.exited", second.id, 137, 9, "signaled"),
                    ("process.oom", third.id, 137, 9, "oom"),
                    ("process.exited", third.id, 137, 9, "oom"),
                    ("process.exited", fourth.id, 137, 9, "signaled"),
                ]
                assert [event.exit for event in found] == exits, "and to the very moment"
                for event in found:
                    assert event.exit is not None
                    assert event.at == event.exit.exited_at
                    assert begun - 1 < event.at < time.time()
                    assert event.container_id == "main"
                assert found[2].exit is not None
                assert found[2].exit.oom_kills == 1


async def test_the_start_is_told_before_the_end(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine, engine.create(resources=SMALL) as sandbox:
        started = [await sandbox.exec(["true"]) for _ in range(10)]
        told: list[tuple[str, str]] = []
        with anyio.fail_after(10):
            async for event in engine.events():
                told += [(event.kind, event.exec_id)] if event.exec_id else []
                if len(told) == 20:
                    break
        for process in started:
            assert [kind for kind, exec_id in told if exec_id == process.id] == ["process.started", "process.exited"]


async def test_ends_are_told_when_the_starter_was_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with Engine.open(state) as engine:
        await engine.create(name="w", resources=SMALL)
        with program(STARTER, str(state)) as starter:
            told = starter.heard()
            starter.kill()
        killed = time.time()
        found = await settled(engine, 2)
        assert [how(event) for event in found] == [
            ("process.exited", told["id"], 3, None, "exited"),
            ("container.exited", "", 4, None, "exited"),
        ]
        assert killed - 1 < found[0].at < found[1].at < killed + 2
        # Whoever waits later learns the same, and tells nothing twice.
        [process] = await (await engine.get("w")).processes()
        assert (await process.wait()).code == 3
        container = await (await engine.get("w")).containers.get("c")
        assert (await container.wait()).code == 4
        await container.remove()
        assert await settled(engine, 2) == found
        await engine.remove("w")


# Is killed when a program runs, and before anybody is told so.
CUT = """
from unisandbox.engine.telling import Telling
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
async def main():
    engine = await Engine.open(sys.argv[1], policy="keep")
    sandbox = await engine.create(name="w", resources=Resources(memory="64M"))
    if sys.argv[2] == "process":
        await sandbox.run(["true"])
        Telling.process_started = die
        await sandbox.exec(["sh", "-c", "exit 3"])
    Telling.container_started = die
    await sandbox.containers.add(argv=["sh", "-c", "exit 3"], name="c")
anyio.run(main)
"""


@pytest.mark.parametrize("what", ["process", "container"])
async def test_a_start_that_nobody_could_tell_is_told_once_by_whoever_comes_next(tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    with program(CUT, str(state), what) as host:
        assert host.finish()[0] == -9
    async with Engine.open(state) as engine, Engine.attach(state) as other:
        for reader in (other, engine, other):
            await (await reader.get("w")).status()
        await ends(engine, lambda found: bool(found and found[-1].kind == f"{what}.exited"))
        async with Engine.attach(state) as third:
            sandbox = await third.get("w")
            assert (await sandbox.run(["true"])).exit_code == 0
            await sandbox.remove()
        told: list[Event] = []
        with anyio.fail_after(10):
            async for event in engine.events():
                told += [event]
                if event.kind == "sandbox.removed":
                    break
    stories: dict[str, list[str]] = {}
    for event in told:
        kind, _, done = event.kind.partition(".")
        if kind == what:
            stories.setdefault(event.exec_id or event.container_id, []).append(done)
    whole = ["started", "exited"] if what == "process" else ["created", "started", "exited"]
    assert [story for story in stories.values() if story != whole] == []
    assert [event.exit.code for event in told if event.exit is not None and event.kind == f"{what}.exited"].count(
        3
    ) == 1


async def test_two_who_wait_tell_an_end_once_and_a_namesake_has_its_own(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with Engine.open(state) as engine, Engine.attach(state) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        for code in (5, 6):
            container = await sandbox.containers.add(argv=["sh", "-c", f"sleep 0.3; exit {code}"], name="c")
            same = await (await other.get("w")).containers.get("c")
            codes: list[Exit] = []

            async def wait(who: object, codes: list[Exit] = codes) -> None:
                codes.append(await who.wait())  # type: ignore[attr-defined]

            async with anyio.create_task_group() as group:
                group.start_soon(wait, container)
                group.start_soon(wait, same)
            assert [exit.code for exit in codes] == [code, code]
            await same.remove()
            await container.remove()
        found = await settled(engine, 2)
        assert [how(event) for event in found] == [
            ("container.exited", "", 5, None, "exited"),
            ("container.exited", "", 6, None, "exited"),
        ]
        await sandbox.remove()


async def test_the_end_of_init_is_no_guess(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine, engine.create(resources=SMALL) as sandbox:
        process = await sandbox.exec(["sleep", "1000"])
        [container] = sandbox._entry.task._containers.values()  # type: ignore[attr-defined]
        container.plan.cgroup.kill()
        found = await ends(engine, lambda found: len(found) == 2, 2.0)
        [event] = [event for event in found if event.exec_id == process.id]
        assert event.exit is not None
        assert event.exit.reason in {"lost", "signaled"}


# Ends a sandbox, and is killed when what ran in it has ended and nothing of it is gone yet.
CUT_END = """
from unisandbox.host import boundary

def die(name, of):
    if (name, of) == ("before keeper.*", "drop"):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = await Engine.attach(sys.argv[1])
    sandbox = await engine.get("w")
    await sandbox.status()
    boundary.watch(die)
    await getattr(sandbox, sys.argv[2])()

anyio.run(main)
"""


@pytest.mark.parametrize("how", ["stop", "remove", "kill"])
async def test_the_end_of_the_main_container_is_told_also_when_whoever_brings_it_about_is_killed(
    tmp_path: Path, how: str
) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        await sandbox.run(["true"])
        with program(CUT_END, str(tmp_path), how) as ender:
            assert ender.finish()[0] == -9
        found = await ends(engine, lambda found: any(event.kind == "container.exited" for event in found))
        assert [(event.kind, event.container_id, event.exit) for event in found[1:]] == [
            ("container.exited", "main", None)
        ]
        await sandbox.remove()
        assert await settled(engine, 2) == found, "and once"


async def test_a_main_container_that_is_made_anew_has_ended_before(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        await sandbox.run(["true"])
        [container] = sandbox._entry.task._containers.values()  # type: ignore[attr-defined]
        os.kill(container.created.pid, signal.SIGKILL)
        wait_ended(container.created.pid)
        await sandbox.run(["true"])
        told: list[str] = []
        with anyio.fail_after(10):
            async for event in engine.events():
                told += [event.kind] if event.kind.startswith("container.") else []
                if len(told) == 5:
                    break
        assert told == [f"container.{done}" for done in ("created", "started", "exited", "created", "started")]


async def test_what_a_removal_ends_is_told_before_it(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine:
        for _ in range(5):
            sandbox = await engine.create(resources=SMALL)
            process = await sandbox.exec(["sleep", "1000"])
            await sandbox.containers.add(argv=["sleep", "1000"], name="c")
            await sandbox.remove()
            told: list[Event] = []
            with anyio.fail_after(10):
                async for event in engine.events():
                    told += [event] if event.sandbox_id == sandbox.id else []
                    if event.kind == "sandbox.removed" and event.sandbox_id == sandbox.id:
                        break
            found = [event for event in told if event.exit is not None]
            assert sorted(how(event) for event in found) == [
                ("container.exited", "", 137, 9, "signaled"),
                ("process.exited", process.id, 137, 9, "signaled"),
            ]


async def test_a_sandbox_is_not_told_as_started_after_the_end_of_its_ttl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Entry.begin
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:

        async def overtaken(entry: Entry, program: ProcessSpec | None) -> None:
            await begin(entry, program)
            async for event in other.events():
                if event.kind == "sandbox.removed":
                    break

        monkeypatch.setattr(Entry, "begin", overtaken)
        with contextlib.suppress(SandboxError):  # its ttl is over
            await engine.create(ttl=1, resources=SMALL)
        monkeypatch.undo()
        last = await engine.create(resources=SMALL)
        told: list[str] = []
        async for event in other.events():
            if event.sandbox_id != last.id:
                told.append(event.kind)
            elif event.kind == "sandbox.started":
                break
        assert told == ["sandbox.created", "sandbox.removed"]


async def test_the_end_of_a_ttl_is_told_when_it_comes_also_when_nobody_looks(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as reader:
        sandbox = await engine.create(resources=SMALL, ttl=600)
        process = await sandbox.exec(["sleep", "1000"])
        before = time.time()
        await sandbox._entry.sharing.set_expiry(0)  # its time is over now
        told: list[Event] = []
        with anyio.fail_after(20):
            async for event in reader.events():
                told.append(event)
                if event.kind == "sandbox.removed":
                    break
        assert told[-1].sandbox_id == sandbox.id
        assert told[-1].detail == {"reason": "ttl"}
        assert before <= told[-1].at <= time.time()
        assert {("process.exited", process.id), ("container.exited", "")} <= {(e.kind, e.exec_id) for e in told}
        # Nor again by who comes to it afterwards.
        assert await engine.list() == await reader.list() == []
        last = await engine.create(resources=SMALL)
        kinds = []
        async for event in reader.events(after=told[-1].seq):
            kinds.append((event.sandbox_id, event.kind))
            if event.kind == "sandbox.started":
                break
        assert kinds == [(last.id, "sandbox.created"), (last.id, "sandbox.started")]
