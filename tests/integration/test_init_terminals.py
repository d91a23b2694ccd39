"""Terminals that init gives to processes."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios

import anyio
import anyio.lowlevel
import pytest
from tests.init_container import (
    Container,
    closing,
    read_until,
    status_of,
)
from tests.keepers import files_of

pytestmark = [pytest.mark.anyio, pytest.mark.root]


def _resize(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


async def test_a_terminal_has_its_size_and_follows_resizes(on_machine: Container) -> None:
    script = (
        "import os, signal, sys\n"
        "def now(*_):\n"
        "    os.write(1, b'now %d %d\\n' % os.get_terminal_size())\n"
        "    os._exit(4)\n"
        "signal.signal(signal.SIGWINCH, now)\n"
        "print('first', *os.get_terminal_size(), os.ttyname(0), os.isatty(1), os.isatty(2), flush=True)\n"
        "while True: signal.pause()\n"
    )
    process = await on_machine.start("python3", "-c", script, tty=(24, 80))
    async with closing(process):
        assert process.master is not None
        assert not os.get_inheritable(process.master)
        assert b"first 80 24 /dev/pts/0 True True\r\n" in await read_until(process.master, b"\n")
        _resize(process.master, 50, 132)
        assert b"now 132 50\r\n" in await read_until(process.master, b"\n")
        assert await status_of(process.life) == 4 << 8


async def test_a_terminal_controls_its_jobs(on_machine: Container) -> None:
    # Not through a shell: dash loses a SIGINT that comes while it forks.
    async with closing(await on_machine.start("cat", tty=(24, 80))) as process:
        assert process.master is not None
        os.write(process.master, b"word\n")
        await read_until(process.master, b"word\r\nword\r\n")
        os.write(process.master, b"\x03")
        with anyio.fail_after(10):
            assert await status_of(process.life) == signal.SIGINT


async def test_a_job_can_be_stopped_and_continued_on_a_terminal(container: Container) -> None:
    shell = ["bash", "--norc", "--noediting", "-i"]
    async with closing(await container.start(*shell, tty=(24, 80), env={"PATH": "/bin", "PS1": "$ "})) as process:
        assert process.master is not None
        await read_until(process.master, b"$ ")
        os.write(process.master, b"cat\n")
        await read_until(process.master, b"cat\r\n")
        os.write(process.master, b"word\n")
        await read_until(process.master, b"word\r\nword\r\n")
        os.write(process.master, b"\x1a")
        await read_until(process.master, b"Stopped")
        os.write(process.master, b"fg\n")
        await read_until(process.master, b"cat\r\n")
        os.write(process.master, b"\x04")
        await read_until(process.master, b"$ ")
        os.write(process.master, b"exit 6\n")
        with anyio.fail_after(10):
            assert await status_of(process.life) == 6 << 8


async def test_a_terminal_belongs_to_its_user_and_its_end_is_seen(container: Container) -> None:
    script = (
        "import os\n"
        "os.close(os.open('/dev/tty', os.O_RDWR))\n"
        "print('owner', os.stat('/dev/pts/0').st_uid, flush=True)\n"
        "input()\n"
    )
    async with closing(await container.start("python3", "-c", script, tty=(24, 80), uid=1000)) as process:
        assert process.master is not None
        assert b"owner 1000\r\n" in await read_until(process.master, b"\n")
        for pid in (container.pid, process.pid):
            links = files_of(pid)
            assert not [link for link in links if "ptmx" in link], "the master is the host's alone"
        signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        assert await status_of(process.life) == signal.SIGKILL
