"""Host programs for tests: a Python process of its own that embeds unisandbox, and that may die or behave oddly."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

from typing_extensions import Unpack

DEADLINE = 60.0

PRELUDE = """\
import json, os, select, signal, sys, threading, time
import anyio
import unisandbox
from unisandbox import Engine, Mount, Resources, Sandbox, SandboxError

def tell(**words):
    os.write(REPORT, json.dumps(words).encode() + b"\\n")
"""


class Options(TypedDict, total=False):
    """How a host program is started.

    Attributes:
        wrapper: a command that starts it, such as unshare.
        env: added to this process's environment.
        cwd: its working directory.
        before_exec: called in the child.
        pass_fds: inherited by it under the same numbers.
    """

    wrapper: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    before_exec: Callable[[], object]
    pass_fds: Sequence[int]


class Program:
    """A running host program. What it says with `tell(...)` arrives here, one line a call."""

    def __init__(self, process: subprocess.Popen[bytes], report: int) -> None:
        self.process = process
        self.pid = process.pid
        self._report = report
        self._rest = b""

    def heard(self, deadline: float = DEADLINE) -> dict[str, Any]:
        """The next thing that it tells.

        Raises:
            AssertionError: it ended, or was silent until the deadline.
        """
        end = time.monotonic() + deadline
        while b"\n" not in self._rest:
            ready = select.select([self._report], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"the program said nothing within {deadline:g} s"
            piece = os.read(self._report, 65536)
            assert piece, f"the program ended without a word: {self.finish()}"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    def finish(self, deadline: float = DEADLINE) -> tuple[int, str, str]:
        """Wait for its end: exit code, what it wrote to stdout and to stderr."""
        out, err = self.process.communicate(timeout=deadline)
        return self.process.returncode, (out or b"").decode(), (err or b"").decode()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


@contextmanager
def program(code: str, *arguments: str, **options: Unpack[Options]) -> Iterator[Program]:
    """Start `code` after PRELUDE in a Python of its own; killed at the end if it still runs.

    Args:
        code: has `tell(**words)`, and sys.argv[1:] are the arguments.
        arguments: its arguments.
        options: how it is started.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    text = f"REPORT = {writing}\n{PRELUDE}os.set_inheritable(REPORT, False)\n{code}"
    process = subprocess.Popen(
        [*options.get("wrapper", ()), sys.executable, "-c", text, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **options.get("env", {})},
        cwd=options.get("cwd"),
        pass_fds=(writing, *options.get("pass_fds", ())),
        preexec_fn=options.get("before_exec"),  # noqa: PLW1509 - this process has no other thread that could hold a lock
    )
    os.close(writing)
    try:
        yield Program(process, reading)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)
        os.close(reading)
