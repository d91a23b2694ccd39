"""Signals and terminals pass through the command line to the program that it runs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest
from tests.command_line import SECONDS, in_terminal, output_of, read_until, resize, started
from tests.keepers import until

from unisandbox import Engine, Terminal
from unisandbox.cli import run as foreground
from unisandbox.cli.run import KnownSandbox

pytestmark = pytest.mark.root

# Output, input, exit codes


# sigwait() takes also what came before it was called; a handler and pause() would not.
TELL_SIGNALS: Final = """
import os, signal, sys
numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
os.write(1, b"ready\\n")
while True:
    number = signal.sigwait(numbers)
    os.write(1, b"got %d\\n" % number)
    if number != signal.SIGINT:
        sys.exit(7)
"""

TELL_SIZES: Final = """
import os, signal, sys
numbers = {signal.SIGINT, signal.SIGWINCH}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
while True:
    os.write(1, b"size %d %d\\n" % os.get_terminal_size())
    if signal.sigwait(numbers) == signal.SIGINT:
        sys.exit(5)
"""


@pytest.mark.parametrize(
    "number",
    [
        *(
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGALRM,
        ),
        *(signal.SIGCONT, signal.SIGIO, signal.SIGPWR, signal.SIGRTMIN, signal.SIGRTMIN + 1, signal.SIGRTMAX),
    ],
)
def test_signal_is_forwarded_and_the_program_decides(number: int) -> None:
    with started("run", "python3", "-c", TELL_SIGNALS) as process:
        read_until(output_of(process), b"ready\n")
        process.send_signal(number)
        assert read_until(output_of(process), b"\n") == f"got {int(number)}\n".encode()
        assert process.wait(SECONDS) == 7


def test_second_sigint_is_the_programs_too() -> None:
    with started("run", "python3", "-c", TELL_SIGNALS) as process:
        read_until(output_of(process), b"ready\n")
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            read_until(output_of(process), b"got %d\n" % number)
        assert process.wait(SECONDS) == 7


def test_sigints_in_quick_succession_kill() -> None:
    with started("run", "python3", "-c", TELL_SIGNALS) as process:
        read_until(output_of(process), b"ready\n")
        told = -1
        # On a machine that is busy three may not be quick enough.
        while process.poll() is None and told < 100:
            told += 1
            process.send_signal(signal.SIGINT)
            if not os.read(output_of(process), 65536):
                break
        assert process.wait(SECONDS) == 128 + signal.SIGKILL
        assert told >= 2


@pytest.mark.anyio
async def test_sigints_that_are_far_apart_do_not_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    session = foreground._Session(foreground.Request(("true",), KnownSandbox(None, "any"), {}))
    moments = (0.0, 0.1, 2.1, 2.2, 4.2, 4.3, 4.4)
    clock = iter(moments)
    monkeypatch.setattr(foreground, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert [session._is_impatient(signal.SIGINT) for _ in moments] == [*[False] * 6, True]


def test_window_that_changes_is_no_signal_for_a_program_without_a_terminal() -> None:
    with started("run", "python3", "-c", TELL_SIGNALS) as process:
        read_until(output_of(process), b"ready\n")
        process.send_signal(signal.SIGWINCH)
        process.send_signal(signal.SIGUSR1)
        assert read_until(output_of(process), b"\n") == b"got %d\n" % signal.SIGUSR1
        assert process.wait(SECONDS) == 7


def test_signal_at_any_moment_of_the_start_leaves_nothing(count: Callable[[int], int]) -> None:
    times = count(100)
    for number in range(times):
        with started("run", "sleep", "1000") as process:
            select.select([output_of(process)], [], [], 0.6 * number / times)  # nothing is written: a delay
            process.terminate()
            # -15: it had not begun to take signals yet
            assert process.wait(SECONDS) in {128 + signal.SIGTERM, -signal.SIGTERM}
            assert process.stderr is not None
            assert process.stderr.read() == b""


def test_killed_command_line_leaves_nothing() -> None:
    with started("run", "sh", "-c", "echo ready; sleep 1000") as process:
        read_until(output_of(process), b"ready\n")
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL


def test_signal_ends_waiting_for_a_reader_that_does_not_read() -> None:
    sleep = f"sleep {os.getpid()}.5"  # can be told from others'
    script = f"{sleep} & read line; head -c 120k /dev/zero"
    with started("run", "-i", "sh", "-c", script, stdin=subprocess.PIPE) as process:
        until(lambda: _runs(sleep), "it has begun", SECONDS)
        assert process.stdin is not None
        process.stdin.write(b"go on\n")
        process.stdin.flush()
        # 64 KiB are in the pipe to us, the rest on its way: the program ends, and its output cannot be written. What
        # it has left in the background is ended then.
        until(lambda: not _runs(sleep), "it has ended", SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0


def _runs(command: str) -> bool:
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0") == [
                *command.encode().split(),
                b"",
            ]:
                return True
        except OSError:  # ended meanwhile
            continue
    return False


# A terminal


def test_terminal_has_the_callers_size_and_follows_it() -> None:
    with in_terminal("run", "-it", "python3", "-c", TELL_SIZES) as (master, process):
        read_until(master, b"size 97 31\r\n")
        resize(master, 40, 120)
        read_until(master, b"size 120 40\r\n")
        os.write(master, b"\x03")  # goes through: it is the program's terminal that makes a SIGINT of it
        assert process.wait(SECONDS) == 5


@pytest.mark.anyio
async def test_resizing_the_terminal_of_what_is_being_removed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "terminal_size", Terminal)
    async with Engine.open() as engine, engine.create() as sandbox:
        process = await sandbox.exec(["sleep", "1000"], tty=True)
        session = foreground._Session(foreground.Request(("sleep",), KnownSandbox(None, sandbox.id), {}, tty=True))
        session._process = process
        await session._resize()
        await sandbox.remove()
        await session._resize()


def test_terminal_echoes_once_and_ends_with_control_d() -> None:
    with in_terminal("run", "-it", "sh", "-c", "echo ready; cat") as (master, process):
        read_until(master, b"ready\r\n")
        os.write(master, b"typed\r")
        assert read_until(master, b"typed\r\ntyped\r\n") == b"typed\r\ntyped\r\n"
        os.write(master, b"\x04")
        assert process.wait(SECONDS) == 0


def test_shell_in_a_terminal_has_job_control_and_its_own_exit_code() -> None:
    with in_terminal("run", "-it", "-e", "PS1=? ", "sh") as (master, process):
        read_until(master, b"? ")
        os.write(master, b"sh -c \"stty size; tty; echo asl''eep; exec sleep 1000\"\r")
        assert b"31 97\r\n/dev/pts/0\r\nasleep\r\n" in read_until(master, b"asleep\r\n")
        os.write(master, b"\x03")
        read_until(master, b"? ")
        os.write(master, b"exit 9\r")
        assert process.wait(SECONDS) == 9


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored(number: signal.Signals | None) -> None:
    with in_terminal("run", "-it", "sh", "-c", "echo ready; read line; exit 0") as (master, process):
        before = termios.tcgetattr(master)
        read_until(master, b"ready\r\n")
        assert termios.tcgetattr(master) != before
        if number is None:
            os.write(master, b"\r")
        else:
            process.send_signal(number)
        assert process.wait(SECONDS) == (128 + number if number else 0)
        assert termios.tcgetattr(master) == before


def test_terminal_for_output_only() -> None:
    with started("run", "-t", "sh", "-c", "test -t 1 && stty size && echo $TERM") as process:
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, err) == (0, b"")
        assert out.startswith(b"24 80\r\n")


# doctor, bench, version
