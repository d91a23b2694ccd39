"""The streams of a process at their edges: an end that nobody reads any more, an input that is closed, odd sizes."""

from __future__ import annotations

import os
import signal
import sys

import anyio
import pytest
import trio

from unisandbox import Engine, NotFoundError, Sandbox
from unisandbox.conformance.waiting import line, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

SECONDS = 20.0


@pytest.mark.anyio
async def test_sending_to_a_terminal_ends_with_its_process() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        # It reads one line, so that it ends when the terminal has more than it takes.
        async with sandbox.exec(["sh", "-c", "read line"], tty=True) as process:
            with anyio.fail_after(SECONDS), pytest.raises(anyio.BrokenResourceError):
                await process.stdin.send(b"x\n" * 100_000)
            assert (await process.wait()).code == 0


@pytest.mark.anyio
async def test_sending_to_the_terminal_of_a_process_that_has_ended_is_refused() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["true"], tty=True) as process:
            await process.wait()
            with pytest.raises(anyio.BrokenResourceError):
                await process.stdin.send(b"x")
            await process.stdin.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("typed", [b"", b"abc\n", b"abc\r", b"abc"])
async def test_closing_a_terminals_input_is_its_end_also_within_a_line(typed: bytes) -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        # What is left for the next reader is what was typed too much.
        script = "stty -echo; echo ready; cat; echo =; stty -icanon min 0 time 0; od -c"
        async with sandbox.exec(["sh", "-c", script], tty=True) as process:
            assert await line(process) == b"ready\r\n"
            await process.stdin.send(typed)
            await process.stdin.aclose()
            with anyio.fail_after(SECONDS):
                got = b"".join([output.data async for output in process])
            assert got == typed.replace(b"\r", b"\n").replace(b"\n", b"\r\n") + b"=\r\n0000000\r\n"


@pytest.mark.anyio
async def test_a_terminals_input_that_is_closed_stays_so() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["sh", "-c", "cat; exec sleep 1000"], tty=True) as process:
            await process.stdin.aclose()
            await process.stdin.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await process.stdin.send(b"x")


@pytest.mark.anyio
async def test_a_terminals_input_is_closed_by_a_cancellation_too() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["cat"], tty=True) as process:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await process.stdin.aclose()
            with anyio.fail_after(SECONDS):
                assert (await process.wait()).code == 0


@pytest.mark.anyio
async def test_the_end_of_a_terminals_input_waits_for_room() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        script = "stty raw -echo; echo ready; read line <&3; stty cooked -echo; exec cat >/dev/null"
        script = f"mkfifo /tmp/go; exec 3<>/tmp/go; {script}"
        async with sandbox.exec(["sh", "-c", script], tty=True) as process:
            assert await line(process) == b"ready\n"
            with anyio.move_on_after(0.5):  # raw: the terminal takes what it has room for
                await process.stdin.send(b"\n" * 100_000)
            with anyio.fail_after(SECONDS):
                async with anyio.create_task_group() as group:
                    group.start_soon(process.stdin.aclose)
                    await sandbox.run(["sh", "-c", "echo >/tmp/go"])
                assert (await process.wait()).code == 0


@pytest.mark.anyio
@pytest.mark.parametrize("most", [1 << 40, sys.maxsize, 1 << 70])
async def test_a_receiver_may_ask_for_more_than_there_is_memory(most: int) -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["echo", "here"]) as process:
            assert await process.stdout.receive(most) == b"here\n"


@pytest.mark.anyio
async def test_the_output_goes_on_when_one_of_its_streams_was_closed() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["sh", "-c", "echo err >&2"]) as process:
            await process.stdout.aclose()
            assert [(output.stream, output.data) async for output in process] == [("stderr", b"err\n")]
            await process.stderr.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await anext(process)


def test_an_interrupt_of_trio_is_a_keyboard_interrupt() -> None:
    async def main() -> None:
        async with Engine.open() as engine, engine.create() as sandbox:
            # A system task takes no interrupt: the main task does.
            trio.lowlevel.spawn_system_task(_interrupt_when_it_runs, sandbox)
            with pytest.raises(KeyboardInterrupt):
                await sandbox.run(["sh", "-c", "touch /tmp/runs; exec sleep 1000"])

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may ignore it
    try:
        trio.run(main)
    finally:
        signal.signal(signal.SIGINT, former)


async def _interrupt_when_it_runs(sandbox: Sandbox) -> None:
    async def runs() -> bool:
        try:
            await sandbox.files.read("/tmp/runs")
        except NotFoundError:
            return False
        return True

    await until(runs, "the program runs")
    os.kill(os.getpid(), signal.SIGINT)
