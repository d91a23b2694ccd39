"""Engines end with what they were opened in: an event loop, a notebook's cell, the interpreter."""

from __future__ import annotations

import os
import signal

import pytest
from tests.keepers import wait_ended
from tests.programs import program

pytestmark = pytest.mark.root


LOOPS = """
def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return False

async def leave(tag):
    sandbox = await Sandbox.create(resources=Resources(memory="64M"))
    done = await sandbox.run(["echo", tag])
    assert done.text == tag + "\\n"
    await sandbox.exec(["sleep", "1000"])
    return sandbox

def gone(sandbox):
    # After the end of its loop nothing of the engine is left: neither keeper nor cgroups nor directories.
    host = sandbox._entry._core.host
    # It is not our child: whoever is PID 1 here reaps it in his time.
    assert not alive(host.keeper.pid), "the keeper lives"
    assert not [place for place in host.cgroups.places if os.path.exists(f"{place.parent}/{host.cgroups.name}")]
    assert not os.path.exists(host.work_dir) and not os.path.exists(host.state_dir)
"""


def test_each_loop_has_its_own_default_engine_that_ends_with_it() -> None:
    code = """
import asyncio
first = asyncio.run(leave("one"))
gone(first)
second = asyncio.run(leave("two"))
gone(second)
import trio
third = trio.run(leave, "three")
gone(third)
fourth = asyncio.run(leave("four"))
gone(fourth)
assert len({sandbox._entry._core.host.engine_id for sandbox in (first, second, third, fourth)}) == 4
tell(ok=True)
"""
    with program(LOOPS + code) as host:
        assert host.heard() == {"ok": True}
        assert host.finish() == (0, "", "")


def test_a_sandbox_of_an_ended_loop_says_so() -> None:
    code = """
import asyncio
sandbox = asyncio.run(leave("one"))
async def use():
    for name, call in (
        ("run", lambda: sandbox.run(["true"])), ("status", sandbox.status), ("start", sandbox.start),
        ("read", lambda: sandbox.files.read("/tmp/x")), ("metrics", sandbox.metrics),
    ):
        try:
            await call()
        except SandboxError as error:
            tell(call=name, kind=type(error).__name__, text=str(error))
        else:
            tell(call=name, kind="none", text="")
    await sandbox.stop()
    await sandbox.kill()
    await sandbox.remove()
    tell(removed=True)
asyncio.run(use())
"""
    with program(LOOPS + code) as host:
        for _ in range(5):
            told = host.heard()
            assert told["kind"] == "FailedPreconditionError", told
            assert "closed" in told["text"]
        assert host.heard() == {"removed": True}
        assert host.finish() == (0, "", "")


def test_a_running_loop_as_in_a_notebook() -> None:
    """Cells are tasks of a loop that goes on; the last of them ends without any clean-up of the loop's."""
    code = """
import asyncio
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
async def cell(code):
    return await code
async def nested():
    # A cell's task makes the sandbox, another task of the same running loop uses it, a third removes another one.
    sandbox = await asyncio.create_task(leave("cell"))
    done = await asyncio.create_task(sandbox.run(["echo", "other task"]))
    return sandbox, done.text
sandbox, text = loop.run_until_complete(nested())
assert text == "other task\\n"
assert loop.run_until_complete(cell(sandbox.run(["echo", "again"]))).text == "again\\n"
other = loop.run_until_complete(leave("two"))
loop.run_until_complete(cell(other.remove()))
tell(keeper=sandbox._entry._core.host.keeper.pid)
"""
    with program(LOOPS + code) as host:
        keeper = host.heard()["keeper"]
        code_, out, err = host.finish()
        assert (code_, out) == (0, "")
        assert "Traceback" not in err, err
        wait_ended(keeper)


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("sys.exit(5)", 5),
        ("raise SystemExit(6)", 6),
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.abort()", -signal.SIGABRT),
        ("", 0),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["after-the-loop", "in-the-loop"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_interpreter_may_end_with_a_live_sandbox(end: str, wanted: int, inside: bool, backend: str) -> None:
    code = f"""
async def main():
    sandbox = await leave("x")
    tell(keeper=sandbox._entry._core.host.keeper.pid)
    if {inside}:
        {end or "pass"}
    return sandbox
kept = anyio.run(main, backend={backend!r})
{end}
"""
    with program(LOOPS + code) as host:
        keeper = host.heard()["keeper"]
        code_, out, err = host.finish()
        assert (code_, out) == (wanted, ""), err
        assert err == "", err
        wait_ended(keeper)


def test_an_engine_that_nobody_closes_ends_with_the_process() -> None:
    code = """
async def main():
    engine = await Engine.open()
    sandbox = await engine.create(resources=Resources(memory="64M"))
    await sandbox.exec(["sleep", "1000"])
    tell(keeper=engine._core.host.keeper.pid)
anyio.run(main)
"""
    with program(code) as host:
        keeper = host.heard()["keeper"]
        code_, out, err = host.finish()
        assert (code_, out) == (0, ""), err
        assert "Traceback" not in err, err
        wait_ended(keeper)


def test_a_keyboard_interrupt_removes_everything() -> None:
    code = """
async def main():
    async with Sandbox.create(resources=Resources(memory="64M")) as sandbox:
        tell(keeper=sandbox._entry._core.host.keeper.pid)
        await sandbox.run(["sleep", "1000"])
try:
    anyio.run(main, backend=sys.argv[1])
except KeyboardInterrupt:
    sys.exit(130)
"""
    for backend in ("asyncio", "trio"):
        with program(code, backend) as host:
            keeper = host.heard()["keeper"]
            os.kill(host.pid, signal.SIGINT)
            assert host.finish() == (130, "", "")
            wait_ended(keeper)


def test_the_cli_like_one_liner_leaves_nothing() -> None:
    """What people write first: no engine, no context manager, one asyncio.run."""
    code = """
import asyncio
async def main():
    sandbox = await Sandbox.create(resources=Resources(memory="64M"))
    print((await sandbox.sh("echo $((6*7))")).text, end="")
asyncio.run(main())
tell(ok=True)
"""
    with program(code) as host:
        assert host.heard() == {"ok": True}
        assert host.finish() == (0, "42\n", "")
