"""The host process stays itself: nothing of it is changed, and nothing is left in it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import anyio
import pytest

from unisandbox import Engine, Sandbox
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.hosts import Watched
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.conformance.notebook import notebook
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.selection import Candidate, options, options_in_source
from unisandbox.conformance.waiting import line

# Kinds of what may differ while an engine is open: its keeper, its socket, its directories.
_OPEN = (
    "left behind: process",
    "left behind: cgroup",
    "left behind: fd",
    "left behind: file",
    "left behind: unix socket",
)


@pytest.mark.anyio
async def test_an_open_engine_changes_nothing_of_the_process(
    anyio_backend: str, backend: Candidate, rootfs: str, programs: Programs, capabilities: Capabilities
) -> None:
    before = Inventory.take()
    async with Engine.open() as engine, engine.create(**options(backend, rootfs)) as sandbox:
        await sandbox.run(programs.nothing())
        async with sandbox.exec(programs.copies(), stdin="pipe"):
            changes = before.diff(Inventory.take())

    # What runs, and is no process, is a thread.
    running = _OPEN if capabilities.processes else (*_OPEN, "left behind: thread")
    assert [change for change in changes if not change.startswith(running)] == []
    assert settle(before) == []


@pytest.mark.anyio
async def test_children_of_the_host_process_stay_its_own(sandbox: Sandbox, programs: Programs) -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])  # noqa: ASYNC220
    done = await sandbox.run(programs.exits(3))

    assert done.exit_code == 3
    # Nobody else has reaped it.
    assert child.wait() == 7
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@pytest.mark.anyio
async def test_a_child_of_the_host_process_inherits_nothing(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.copies(), stdin="pipe"):
        listing = subprocess.run(  # noqa: ASYNC221
            ["ls", "/proc/self/fd"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            close_fds=False,
            text=True,
            check=True,
        )

    # What this process itself was given (by a runner of tests, say) is its own affair.
    mine = {name for name in os.listdir("/proc/self/fd") if _inheritable(int(name))}
    assert set(listing.stdout.split()) <= mine | {"0", "1", "2", "3"}


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


@pytest.mark.anyio
async def test_create_in_one_task_and_remove_in_another(create: Create, programs: Programs) -> None:
    made: list[Sandbox] = []

    async def first() -> None:
        made.append(await create())

    async def second() -> None:
        assert (await made[0].run(programs.nothing())).exit_code == 0
        await made[0].remove()

    for step in (first, second):
        async with anyio.create_task_group() as group:
            group.start_soon(step)


def test_two_event_loops_in_a_row_each_have_their_own_engine(
    backend: Candidate, rootfs: str, programs: Programs
) -> None:
    async def one() -> str:
        async with Sandbox.create(**options(backend, rootfs)) as sandbox:
            return (await sandbox.run(programs.echo("x"))).text

    before = Inventory.take()
    assert [asyncio.run(one()) for _ in range(2)] == ["x\n", "x\n"]
    assert settle(before) == []


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_loop_that_ends_takes_what_was_not_removed(
    backend: Candidate, rootfs: str, programs: Programs, loop: str
) -> None:
    async def forget() -> None:
        sandbox = await Sandbox.create(**options(backend, rootfs))
        process = await sandbox.exec(programs.sleeps(600))
        assert process.exit is None

    before = Inventory.take()
    anyio.run(forget, backend=loop)
    assert settle(before) == []


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_loop_that_ends_by_an_error_takes_what_was_not_removed(
    backend: Candidate, rootfs: str, programs: Programs, loop: str
) -> None:
    async def fail() -> None:
        sandbox = await Sandbox.create(**options(backend, rootfs))
        await sandbox.exec(programs.sleeps(600))
        raise ZeroDivisionError

    before = Inventory.take()
    with pytest.raises(ZeroDivisionError):
        anyio.run(fail, backend=loop)
    assert settle(before) == []


def test_a_notebooks_loop_goes_on_between_cells_and_has_nothing_to_do_there(
    backend: Candidate, rootfs: str, programs: Programs, capabilities: Capabilities
) -> None:
    before = Inventory.take()
    with notebook() as book:
        sandbox = book.cell(lambda: Sandbox.create(**options(backend, rootfs)))
        book.check_rest()
        assert book.cell(lambda: sandbox.run(programs.echo("x"))).text == "x\n"
        process = book.cell(lambda: sandbox.exec(programs.asks(5, before="ready"), stdin="pipe"))
        assert book.cell(lambda: line(process)) == b"ready\n"
        with Watched(process.pid) if capabilities.processes else nullcontext() as watched:
            book.cell(lambda: process.stdin.send(b"end\n"))
            assert watched is None or watched.ended()
        # It ends while nobody waits for it.
        book.check_rest()
        begun = time.time()
        exit = book.cell(process.wait)
        assert (exit.code, exit.exited_at <= begun or watched is None) == (5, True)
        book.cell(process.aclose)
        book.cell(sandbox.remove)
        book.check_rest()
    assert settle(before) == []


_PROGRAM = """
    import os, signal, subprocess, sys
    import anyio
    from unisandbox import Engine, Resources, Sandbox, Security

    async def main():
        async with Sandbox.create({options}) as sb:
            assert (await sb.run({exits})).exit_code == 7
            if {processes}:
                assert (await sb.run(["sh", "-c", "kill -9 $$"])).exit.signal == 9
            process = await sb.exec({sleeps})
            assert (await process.kill()).signal == 9
            await sb.exec({sleeps})
        print("pid", os.getpid())

    anyio.run(main, backend={loop!r})
    print("end")
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a pid namespace is made")
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_the_host_process_may_be_pid_1(
    backend: Candidate,
    rootfs: str,
    programs: Programs,
    capabilities: Capabilities,
    loop: str,
    tmp_path: Path,
) -> None:
    source = _PROGRAM.format(
        options=options_in_source(backend, rootfs),
        loop=loop,
        exits=programs.exits(7),
        sleeps=programs.sleeps(600),
        processes=capabilities.processes,
    )
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(source))

    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (done.returncode, done.stdout.split()) == (0, ["pid", "1", "end"]), done.stderr


@pytest.mark.parametrize("end", ["exit", "kill", "exception", "exit in a fork"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_however_the_host_process_ends_nothing_is_left(
    backend: Candidate, rootfs: str, programs: Programs, loop: str, end: str, tmp_path: Path
) -> None:
    ends = {
        "exit": "os._exit(5)",
        "kill": "os.kill(os.getpid(), 9)",
        "exception": "raise SystemExit(5)",
        # The child keeps every descriptor open, the engine's too, when its parent is killed.
        "exit in a fork": "os.fork() or os.execlp('sleep', 'sleep', '1')\n            os.kill(os.getpid(), 9)",
    }
    source = f"""
        import os, sys
        import anyio
        from unisandbox import Engine, Resources, Security

        async def main():
            engine = await Engine.open()
            sb = await engine.create({options_in_source(backend, rootfs)})
            await sb.exec({programs.stubborn()})
            print("ready", flush=True)
            {ends[end]}

        anyio.run(main, backend={loop!r})
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(source))
    before = Inventory.take()

    done = subprocess.run([sys.executable, str(program)], stdout=subprocess.PIPE, timeout=60, check=False)

    assert done.stdout == b"ready\n"
    assert done.returncode == (-9 if "kill" in ends[end] else 5)
    assert settle(before, timeout=15.0) == []
