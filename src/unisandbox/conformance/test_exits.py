"""Exact exits: every code, every signal, memory, and nothing guessed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from unisandbox import InvalidArgumentError, ProcessFailedError, Resources, Sandbox
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.waiting import until

pytestmark: pytest.MarkDecorator = pytest.mark.anyio
of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")

# What a process cannot be ended by: its default is to be ignored or to stop. Source: signal(7).
_HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
_STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
DEADLY: Sequence[int] = sorted({int(n) for n in signal.valid_signals()} - _HARMLESS - _STOPPING - {32, 33})

_KILL_ITSELF = "import os, sys; os.kill(os.getpid(), int(sys.argv[1]))"
_EAT = "data = bytearray()\nwhile True: data += bytes(1 << 20)"


async def test_every_exit_code_is_exact(sandbox: Sandbox, programs: Programs, count: Callable[[int], int]) -> None:
    # All of them; with a backend that starts slowly some, unless with --long.
    codes = sorted({*range(0, 256, max(1, 256 // count(2560))), 1, 255})
    got = [(await sandbox.run(programs.exits(code))).exit for code in codes]

    assert [end.code for end in got] == codes
    assert {(end.reason, end.signal) for end in got} == {("exited", None)}


@of_processes
async def test_every_deadly_signal_is_exact(sandbox: Sandbox) -> None:
    # The children of one Python are faster than a Python each; each execs into a shell that the signal ends.
    for number in DEADLY:
        # CPython ignores SIGPIPE and SIGXFSZ; the shell resets nothing, so the disposition is set here.
        program = f"import signal; signal.signal({number}, signal.SIG_DFL)\n" if number not in {9, 19} else ""
        end = (await sandbox.run(["python3", "-S", "-c", program + _KILL_ITSELF, str(number)])).exit
        assert (end.signal, end.code, end.reason) == (number, 128 + number, "signaled"), f"signal {number}"


async def test_a_signal_from_outside_is_exact(sandbox: Sandbox, programs: Programs) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGRTMIN + 2):
        async with sandbox.exec(programs.sleeps(60)) as process:
            await process.signal(number)
            end = await process.wait()
        assert (end.signal, end.code, end.reason) == (int(number), 128 + number, "signaled")


async def test_a_signal_to_what_has_ended_with_its_sandbox_is_taken_without_a_word(
    create: Create, programs: Programs
) -> None:
    sandbox = await create()
    process = await sandbox.exec(programs.sleeps(60))
    await sandbox.stop(grace=0)
    await process.signal(signal.SIGTERM)
    await sandbox.remove()
    await process.signal(signal.SIGTERM)
    assert (await process.wait()).signal == signal.SIGKILL


@pytest.mark.parametrize("number", [0, -1, signal.NSIG, True, "TERM"])
async def test_what_is_no_signal_is_refused(sandbox: Sandbox, programs: Programs, number: Any) -> None:
    async with sandbox.exec(programs.sleeps(60)) as process:
        with pytest.raises(InvalidArgumentError, match="signal"):
            await process.signal(number)
        await process.signal(signal.SIGKILL)
        await process.wait()
        with pytest.raises(InvalidArgumentError, match="signal"):
            await process.signal(number)


async def test_an_abort_is_no_code(sandbox: Sandbox, programs: Programs, capabilities: Capabilities) -> None:
    end = (await sandbox.run(programs.aborts())).exit

    # A process ends by the signal; a guest, which has none, by a trap.
    how = (signal.SIGABRT, "signaled") if capabilities.processes else (None, "trap")
    assert (end.signal, end.reason, end.code) == (*how, 134)


async def test_a_code_above_128_is_no_signal(sandbox: Sandbox, programs: Programs) -> None:
    end = (await sandbox.run(programs.exits(137))).exit

    assert (end.signal, end.code, end.reason) == (None, 137, "exited")


async def test_the_time_of_an_end_does_not_depend_on_who_asks_when(sandbox: Sandbox, programs: Programs) -> None:
    begun = time.time()
    process = await sandbox.exec(programs.exits(3))
    async for _ in process:
        pass  # until nobody can write any more
    over = time.time()
    await sandbox.run(programs.sleeps(1.0))
    end = await process.wait()

    assert end.code == 3
    assert begun <= end.exited_at < over + 0.9


@of_processes
async def test_a_process_that_kills_itself_was_not_killed_for_memory(sandbox: Sandbox) -> None:
    end = (await sandbox.run(["sh", "-c", "kill -9 $$"])).exit

    assert (end.signal, end.reason, end.oom_kills) == (9, "signaled", 0)


@pytest.mark.needs("limits:memory")
async def test_memory_is_the_reason_of_an_end_for_it_and_of_no_other(create: Create, programs: Programs) -> None:
    async with create(resources=Resources(memory="64M")) as sandbox:
        end = (await sandbox.run(programs.eats(), timeout=60)).exit

        assert (end.code, end.reason) == (137, "oom")
        # It is not blamed on whoever comes next.
        assert (await sandbox.run(programs.nothing())).exit.oom_kills == 0
        later = (await sandbox.run(programs.exits(137))).exit
        assert (later.reason, later.oom_kills) == ("exited", 0)
        aborted = (await sandbox.run(programs.aborts())).exit
        assert (aborted.reason, aborted.oom_kills) != ("oom", 0)


@of_processes
@pytest.mark.needs("limits:memory")
async def test_memory_is_the_reason_when_the_kernel_killed_for_it(create: Create) -> None:
    async with create(resources=Resources(memory="64M")) as sandbox:
        end = (await sandbox.run(["python3", "-c", _EAT], timeout=60)).exit

        assert (end.signal, end.code, end.reason) == (9, 137, "oom")
        assert end.oom_kills >= 1
        assert ((await sandbox.metrics()).oom_kills or 0) >= 1
        # It is not blamed on whoever comes next.
        assert (await sandbox.run(["true"])).exit.oom_kills == 0
        later = (await sandbox.run(["sh", "-c", "kill -9 $$"])).exit
        assert (later.reason, later.oom_kills) == ("signaled", 0)


@of_processes
@pytest.mark.needs("limits:memory")
async def test_a_child_killed_for_memory_is_counted_but_is_no_reason(create: Create) -> None:
    script = 'import subprocess, sys\nsubprocess.run([sys.executable, "-c", sys.argv[1]])\nsys.exit(3)'
    async with create(resources=Resources(memory="64M")) as sandbox:
        end = (await sandbox.run(["python3", "-c", script, _EAT], timeout=60)).exit

        assert (end.code, end.reason) == (3, "exited")
        assert end.oom_kills >= 1


@of_processes
@pytest.mark.needs("limits:memory")
async def test_what_we_killed_was_not_killed_for_memory(create: Create) -> None:
    # A child of it was killed for memory before we killed the process itself: the counter alone would mislead.
    script = (
        'import subprocess, sys, time\nsubprocess.run([sys.executable, "-c", sys.argv[1]])\n'
        'print("eaten", flush=True)\ntime.sleep(60)'
    )
    async with create(resources=Resources(memory="64M")) as sandbox:
        async with sandbox.exec(["python3", "-c", script, _EAT]) as process:
            assert await process.stdout.receive() == b"eaten\n"
            end = await process.kill()

        assert (end.signal, end.reason) == (9, "signaled")
        assert end.oom_kills >= 1


@of_processes
async def test_what_a_run_leaves_in_the_background_goes_on(sandbox: Sandbox) -> None:
    script = "(while [ ! -e /tmp/go ]; do sleep 0.01; done; echo done > /tmp/done) & echo started"

    done = await sandbox.sh(script, timeout=30)
    await sandbox.files.write("/tmp/go", b"")

    assert done.stdout == b"started\n"
    await until(lambda: sandbox.files.exists("/tmp/done"), "the background process has done its work")


async def test_a_timeout_ends_the_run_and_only_that(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.copies(), stdin="pipe") as other:
        limit = await _seconds_to_say_something(sandbox, programs.announces("so far"))
        with pytest.raises(Exception, match="did not end within") as caught:
            await sandbox.run(programs.announces("so far"), timeout=limit)

        assert caught.value.completed.stdout == b"so far\n"  # type: ignore[attr-defined]
        assert caught.value.completed.exit.signal == 9  # type: ignore[attr-defined]
        await other.stdin.send(b"alive")
        assert await other.stdout.receive() == b"alive"


async def _seconds_to_say_something(sandbox: Sandbox, argv: list[str]) -> float:
    """A time within which this program does so here, also when the machine has other things to do."""
    begun = time.monotonic()
    async with sandbox.exec(argv) as process:
        await process.stdout.receive()
        return max(0.5, 5 * (time.monotonic() - begun))


@of_processes
@pytest.mark.needs("process_trees")
async def test_a_timeout_ends_all_that_the_run_started_and_only_that(sandbox: Sandbox) -> None:
    async with sandbox.exec(["sleep", "60"]) as other:
        script = "(setsid sleep 61 &) ; echo so far; sleep 62"
        limit = await _seconds_to_say_something(sandbox, ["sh", "-c", script])
        with pytest.raises(Exception, match="did not end within") as caught:
            await sandbox.sh(script, timeout=limit)

        assert caught.value.completed.stdout == b"so far\n"  # type: ignore[attr-defined]
        assert caught.value.completed.exit.signal == 9  # type: ignore[attr-defined]
        listing = await sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert "sleep 61" not in listing.text
        assert "sleep 62" not in listing.text
        assert "sleep 60" in listing.text
        assert other.exit is None


async def test_check_raises_with_all_that_there_was(sandbox: Sandbox, programs: Programs) -> None:
    with pytest.raises(ProcessFailedError) as caught:
        await sandbox.run(programs.says(("stdout", "out\n"), ("stderr", "err\n"), code=7), check=True)

    assert caught.value.completed.exit_code == 7
    assert caught.value.completed.stdout == b"out\n"
    assert "err" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "cwd", "code"),
    [
        (["/no/such/program"], None, 127),
        (["no-such-program"], None, 127),
        (["/usr"], None, 126),
        (["/etc/passwd"], None, 126),
        ([], "/no/such/directory", 126),
    ],
)
async def test_a_program_that_cannot_be_started_says_why(
    sandbox: Sandbox, programs: Programs, argv: list[str], cwd: str | None, code: int
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await sandbox.run(argv or programs.nothing(), cwd=cwd)

    assert caught.value.exit_code == code
    assert (cwd or argv[0]) in str(caught.value)
    assert (await sandbox.run(programs.nothing())).exit_code == 0


async def test_arguments_and_directory_arrive_as_they_are(sandbox: Sandbox, programs: Programs) -> None:
    words = ["", "a b", "-n", "grüße", "line\n", "$HOME", "*", "'\"\\", "x" * 4000]

    assert (await sandbox.run(programs.arguments(*words))).text.split("\0") == [*words, ""]
    assert (await sandbox.run(programs.directory(), cwd="/tmp")).text == "/tmp\n"


async def test_the_end_can_be_asked_for_again_and_by_many(sandbox: Sandbox, programs: Programs) -> None:
    import anyio

    ends = []
    async with sandbox.exec(programs.asks(42), stdin="pipe") as process:

        async def wait() -> None:
            ends.append(await process.wait())

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await process.stdin.send(b"\n")
        ends.append(await process.wait())

    assert len(ends) == 6
    assert {end.code for end in ends} == {42}
    assert len(set(ends)) == 1
