"""Streams: everything arrives, in bounds, and who does not read harms nobody but that process."""

from __future__ import annotations

import array
import gc
import hashlib
import os
import signal
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from unisandbox import FailedPreconditionError, Output, Sandbox, Terminal
from unisandbox.conformance.programs import BLOCK, Programs
from unisandbox.conformance.waiting import line, until

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

MIB = 1 << 20


async def test_both_streams_arrive_apart(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.says(("stdout", "to out\n"), ("stderr", "to err\n")))

    assert (done.stdout, done.stderr, done.truncated) == (b"to out\n", b"to err\n", False)


async def test_large_output_is_complete(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.writes(8 * MIB // len(BLOCK)))

    assert len(done.stdout) == 8 * MIB
    assert done.stdout == BLOCK * (8 * MIB // len(BLOCK))
    assert not done.truncated


async def test_output_at_the_very_end_is_not_lost(
    sandbox: Sandbox, programs: Programs, count: Callable[[int], int]
) -> None:
    for number in range(count(500)):
        done = await sandbox.run(programs.says(("stdout", str(number)), ("stderr", "err"), code=3))
        assert (done.stdout, done.stderr, done.exit_code) == (str(number).encode(), b"err", 3)


async def test_output_beyond_the_bound_is_thrown_away_and_blocks_nobody(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.writes(8 * MIB // len(BLOCK)), max_output=100_000, timeout=60)

    assert done.exit_code == 0
    assert done.truncated
    assert done.stdout == (BLOCK * 2)[:100_000]


async def test_a_bound_that_is_just_reached_is_not_exceeded(sandbox: Sandbox, programs: Programs) -> None:
    exact = await sandbox.run(programs.says(("stdout", "12345")), max_output=5)
    nothing = await sandbox.run(programs.says(("stdout", "12345")), max_output=0)

    assert (exact.stdout, exact.truncated) == (b"12345", False)
    assert (nothing.stdout, nothing.truncated) == (b"", True)


async def test_input_arrives_whole_and_ends(sandbox: Sandbox, programs: Programs) -> None:
    data = bytes(range(256)) * 16384
    done = await sandbox.run(programs.digest(), input=data)

    assert done.text.split()[0] == hashlib.sha256(data).hexdigest()


async def test_items_larger_than_a_byte_arrive_whole(sandbox: Sandbox, programs: Programs) -> None:
    data = memoryview(array.array("i", range(100_000)))
    given: Any
    for given in (data, data[::2]):
        done = await sandbox.run(programs.digest(), input=given)
        assert done.text.split()[0] == hashlib.sha256(given.tobytes()).hexdigest()
        await sandbox.files.write("/tmp/items", given)
        assert await sandbox.files.read("/tmp/items") == given.tobytes()
        async with sandbox.exec(programs.digest(), stdin="pipe") as process:
            await process.stdin.send(given)
            await process.stdin.aclose()
            assert (await line(process)).decode().split()[0] == hashlib.sha256(given.tobytes()).hexdigest()


async def test_a_second_sender_is_refused_before_its_first_byte(sandbox: Sandbox, programs: Programs) -> None:
    sent = [bytes([65 + number]) * MIB for number in range(3)]
    refused: list[bytes] = []

    async with sandbox.exec(programs.copies(), stdin="pipe") as process:

        async def send(data: bytes) -> None:
            try:
                await process.stdin.send(data)
            except anyio.BusyResourceError:
                refused.append(data)

        async with anyio.create_task_group() as group:
            for data in sent:
                group.start_soon(send, data)
            got = b""
            while len(got) < MIB:
                got += await process.stdout.receive()
        await process.stdin.aclose()
        got += b"".join([output.data async for output in process])

    assert len(refused) == 2
    assert [got] == [data for data in sent if data not in refused]


async def test_without_input_there_is_nothing_to_read(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.copies(), timeout=20)

    assert (done.exit_code, done.stdout) == (0, b"")


async def test_input_that_nobody_reads_does_not_hang(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.nothing(), input=bytes(4 * MIB), timeout=20)

    assert done.exit_code == 0


async def test_input_and_output_flow_at_the_same_time(sandbox: Sandbox, programs: Programs) -> None:
    data = bytes(range(256)) * 16384
    done = await sandbox.run(programs.copies(), input=data, timeout=60)

    assert done.stdout == data


async def test_text_replaces_what_is_not_utf8(sandbox: Sandbox, programs: Programs) -> None:
    done = await sandbox.run(programs.says(("stdout", b"a\xff\xc3\xa9")))

    assert done.stdout == b"a\xff\xc3\xa9"
    assert done.text == "a\ufffdé"


async def test_a_conversation(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.copies(), stdin="pipe") as process:
        for word in (b"one\n", b"two\n", bytes(range(256))):
            await process.stdin.send(word)
            got = b""
            while len(got) < len(word):
                got += await process.stdout.receive()
            assert got == word
        await process.stdin.aclose()
        with pytest.raises(anyio.EndOfStream):
            await process.stdout.receive()
        end = await process.wait()

    assert end.code == 0


async def test_iterating_gives_both_streams_to_their_ends(sandbox: Sandbox, programs: Programs) -> None:
    got = {"stdout": b"", "stderr": b""}
    argv = programs.says(("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c\n"), ("stderr", "d\n"))
    async with sandbox.exec(argv) as process:
        async for output in process:
            assert output.data
            got[output.stream] += output.data
        end = await process.wait()

    assert got == {"stdout": b"a\nc\n", "stderr": b"b\nd\n"}
    assert end.code == 0


@pytest.mark.needs("processes")
async def test_iterating_gives_each_stream_its_turn_also_while_the_other_has_more(sandbox: Sandbox) -> None:
    script = "echo 1; read x; echo 2; echo err >&2"
    async with sandbox.exec(["sh", "-c", script], stdin="pipe") as process:
        got = [await anext(process)]
        await process.stdin.send(b"go\n")
        await process.wait()
        got += [output async for output in process]

    assert got == [Output("stdout", b"1\n"), Output("stderr", b"err\n"), Output("stdout", b"2\n")]


async def test_unread_output_blocks_that_process_and_no_other(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.writes(16)) as silent:
        # It is in the middle of it: a pipe holds 64 KiB by default. Source: pipe(7).
        size = len(await silent.stdout.receive())
        with anyio.fail_after(20):
            assert (await sandbox.run(programs.echo("here"))).stdout == b"here\n"
        assert silent.exit is None
        async for output in silent:
            size += len(output.data)
        assert size == 16 * len(BLOCK)
        assert (await silent.wait()).code == 0


@pytest.mark.needs("processes")
async def test_unread_output_lets_its_process_sleep(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.writes(16)) as silent:
        # It has filled its pipe and sleeps in write(2).
        async def blocked() -> bool:
            done = await sandbox.sh("cat /proc/[0-9]*/wchan /proc/[0-9]*/stat 2>/dev/null | grep -c '(python3) S'")
            return done.text.strip() == "1"

        await until(blocked, "the writer sleeps")
        with anyio.fail_after(20):
            assert (await sandbox.run(["echo", "here"])).stdout == b"here\n"
        assert silent.exit is None
        size = 0
        async for output in silent:
            size += len(output.data)
        assert size == 16 * len(BLOCK)
        assert (await silent.wait()).code == 0


async def test_output_stays_readable_after_the_end(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.echo("late")) as process:
        await process.wait()
        assert await process.stdout.receive() == b"late\n"


def descriptors() -> int:
    """How many this process has open, but for those that only garbage has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def test_a_process_that_was_waited_for_and_dropped_has_nothing_open(sandbox: Sandbox, programs: Programs) -> None:
    async def use() -> None:
        process = await sandbox.exec(programs.echo("unread"), stdin="pipe")
        await process.wait()

    await use()
    before = descriptors()
    for _ in range(5):
        await use()

    assert descriptors() == before


async def test_a_stream_that_was_read_to_its_end_has_nothing_open_and_stays_ended(
    sandbox: Sandbox, programs: Programs
) -> None:
    await sandbox.run(programs.nothing())
    before = descriptors()
    process = await sandbox.exec(programs.says(("stdout", "a\n"), ("stderr", "b\n")))
    assert sorted([output.data async for output in process]) == [b"a\n", b"b\n"]
    end = await process.wait()

    assert descriptors() == before
    assert end.code == 0
    assert [output async for output in process] == []
    for stream in (process.stdout, process.stderr):
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        await stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()
    await process.aclose()


async def test_two_who_read_one_stream_are_both_told_of_its_end(sandbox: Sandbox, programs: Programs) -> None:
    process = await sandbox.exec(programs.copies(), stdin="pipe")
    told: list[str] = []

    async def read() -> None:
        with pytest.raises(anyio.EndOfStream):
            await process.stdout.receive()
        told.append("receive")

    async def iterate() -> None:
        assert [output async for output in process] == []
        told.append("iterate")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            group.start_soon(iterate)
            await anyio.wait_all_tasks_blocked()
            await process.stdin.aclose()
    await process.wait()

    assert sorted(told) == ["iterate", "receive"]


async def test_a_stream_outlives_the_handle_that_it_is_of(sandbox: Sandbox, programs: Programs) -> None:
    process = await sandbox.exec(programs.echo("late"))
    await process.wait()
    stdout = process.stdout
    del process
    gc.collect()

    assert await stdout.receive() == b"late\n"
    with pytest.raises(anyio.EndOfStream):
        await stdout.receive()


async def test_a_process_that_nobody_has_waited_for_is_found_again_with_its_streams(
    sandbox: Sandbox, programs: Programs
) -> None:
    process = await sandbox.exec(programs.asks(7, before="before", after="after"), stdin="pipe")
    assert await line(process) == b"before\n"
    del process
    gc.collect()

    (found,) = await sandbox.processes()
    await found.stdin.send(b"go\n")
    assert b"".join([output.data async for output in found]) == b"after go\n"
    (found,) = await sandbox.processes()
    assert (await found.wait()).code == 7
    assert await sandbox.processes() == []


@pytest.mark.needs("processes")
async def test_what_a_dropped_process_has_left_behind_may_go_on_writing(sandbox: Sandbox) -> None:
    script = "(while [ ! -e /tmp/go ]; do sleep 0.01; done; echo more; echo $? > /tmp/code) &"

    async def leave() -> None:
        process = await sandbox.exec(["sh", "-c", script])
        assert (await process.wait()).code == 0

    await sandbox.run(["true"])
    # What an engine opens once, at the first use of files, is there before the count.
    await sandbox.files.exists("/tmp/go")
    before = descriptors()
    await leave()
    gc.collect()
    await sandbox.files.write("/tmp/go", b"")

    await until(lambda: sandbox.files.exists("/tmp/code"), "the background writer ends")

    async def written() -> bool:
        return await sandbox.files.read("/tmp/code") == b"0\n"

    await until(written, "its code is 0")

    # And when it has ended the next start lets go of its streams, too.
    async def freed() -> bool:
        await (await sandbox.exec(["true"])).wait()
        return descriptors() == before

    await until(freed, "its streams are closed")


async def test_a_closed_output_ends_the_writer(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.repeats()) as process:
        await process.stdout.receive()
        await process.stdout.aclose()
        with anyio.fail_after(20):
            end = await process.wait()

    assert end.signal == signal.SIGPIPE


async def test_an_input_that_nobody_has_any_more_is_broken(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.nothing(), stdin="pipe") as process:
        await process.wait()
        with pytest.raises(anyio.BrokenResourceError):
            await process.stdin.send(b"x")


async def test_missing_streams_are_errors_and_never_none(sandbox: Sandbox, programs: Programs) -> None:
    async with sandbox.exec(programs.nothing()) as process:
        with pytest.raises(FailedPreconditionError):
            await process.stdin.send(b"x")
        with pytest.raises(FailedPreconditionError):
            await process.resize(10, 10)
        await process.stdin.aclose()


@pytest.mark.needs("processes")
async def test_streams_can_be_opened_by_their_names(sandbox: Sandbox) -> None:
    done = await sandbox.sh("cat /dev/stdin > /dev/stdout; echo error > /dev/stderr", input=b"in")

    assert (done.stdout, done.stderr) == (b"in", b"error\n")


@pytest.mark.needs("processes")
async def test_the_end_does_not_wait_for_streams_that_others_hold(sandbox: Sandbox) -> None:
    with anyio.fail_after(20):
        done = await sandbox.sh("sleep 60 & echo started; exit 5")

    assert (done.exit_code, done.stdout) == (5, b"started\n")


@pytest.mark.needs("processes")
async def test_a_background_writer_is_never_blocked_nor_ended(sandbox: Sandbox) -> None:
    # It writes 1 MiB, far more than a pipe holds, after the run is over.
    script = "(while [ ! -e /tmp/go ]; do sleep 0.01; done; head -c 1048576 /dev/zero; echo $? > /tmp/code) &"
    done = await sandbox.sh(script)
    await sandbox.files.write("/tmp/go", b"")

    assert done.exit_code == 0
    await until(lambda: sandbox.files.exists("/tmp/code"), "the background writer ends")

    async def written() -> bool:
        return await sandbox.files.read("/tmp/code") == b"0\n"

    await until(written, "its code is 0")


@pytest.mark.needs("tty")
async def test_a_terminal_is_one_with_the_size_asked_for(sandbox: Sandbox) -> None:
    async with sandbox.exec(
        ["sh", "-c", "test -t 0 && test -t 1 && test -t 2 && stty size"], tty=Terminal(30, 100)
    ) as p:
        got = b""
        async for output in p:
            assert output.stream == "stdout"
            got += output.data
        end = await p.wait()

    assert (end.code, got) == (0, b"30 100\r\n")


@pytest.mark.needs("tty")
async def test_a_terminal_can_be_resized(sandbox: Sandbox) -> None:
    # Blocked first: a signal that comes between "ready" and the wait is not lost.
    script = "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})\n"
    script += "print('ready')\nsignal.sigwait({signal.SIGWINCH})\nprint(*os.get_terminal_size())"
    async with sandbox.exec(["python3", "-u", "-c", script], tty=True) as process:
        assert await line(process) == b"ready\r\n"
        await process.resize(51, 132)
        got = b""
        async for output in process:
            got += output.data

        assert got == b"132 51\r\n"
        assert (await process.wait()).code == 0


@pytest.mark.needs("tty")
async def test_a_terminal_passes_keys_on(sandbox: Sandbox) -> None:
    async with sandbox.exec(["sh", "-c", "stty -echo; echo ready; cat"], tty=True) as process:
        assert await line(process) == b"ready\r\n"
        await process.stdin.send(b"typed\n")
        assert await line(process) == b"typed\r\n"
        await process.stdin.aclose()
        assert (await process.wait()).code == 0

    # No shell: it may take the key before it has started its child, and go on. Nor one sleep: Python only notes a
    # signal that comes right before it, and sleeps.
    naps = "import time; print('ready', flush=True)\nwhile True: time.sleep(0.01)"
    async with sandbox.exec(["python3", "-c", naps], tty=True) as process:
        assert await line(process) == b"ready\r\n"
        await process.stdin.send(b"\x03")
        with anyio.fail_after(20):
            assert (await process.wait()).code == 128 + signal.SIGINT


@pytest.mark.needs("tty")
async def test_a_terminal_has_no_stderr(sandbox: Sandbox) -> None:
    async with sandbox.exec(["true"], tty=True) as process:
        with pytest.raises(FailedPreconditionError):
            await process.stderr.receive()
