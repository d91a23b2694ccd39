"""The command line in tests: a process with streams, or with a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# What started the tests may ignore signals, and so would all that they start.
_SIGNALS: Final = ["env", "--default-signal=HUP,INT,QUIT"]
CLI: Final = [*_SIGNALS, sys.executable, "-W", "error", "-m", "unisandbox.cli"]
SECONDS: Final = 30.0


def run(*args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CLI, *args], input=stdin, capture_output=True, check=False, timeout=SECONDS, env={**os.environ, **(env or {})}
    )


@contextmanager
def started(
    *args: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """The command line in the background; killed at the end if it still runs."""
    with subprocess.Popen([*CLI, *args], stdout=stdout, stderr=subprocess.PIPE, stdin=stdin) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(fd: int, wanted: bytes) -> bytes:
    """What comes, up to `wanted`."""
    deadline = time.monotonic() + SECONDS
    seen = b""
    while wanted not in seen:
        assert select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0], f"no {wanted!r} in {seen!r}"
        piece = os.read(fd, 65536)
        assert piece, f"it ended without {wanted!r} after {seen!r}"
        seen += piece
    return seen


def output_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return process.stdout.fileno()


@contextmanager
def in_terminal(*args: str, rows: int = 31, columns: int = 97) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The command line with a terminal of its own: (what its user types into and looks at, the process)."""
    master, slave = os.openpty()
    try:
        resize(master, rows, columns)
        with subprocess.Popen(["setsid", "--ctty", *CLI, *args], stdin=slave, stdout=slave, stderr=slave) as process:
            try:
                yield master, process
            finally:
                process.kill()
    finally:
        os.close(master)
        os.close(slave)


def resize(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
