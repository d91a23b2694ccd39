"""Host processes that die: programs of their own, which embed unisandbox and are killed for real."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from unisandbox.conformance.selection import Candidate, options_in_source
from unisandbox.host.keeper import Keeper

DEADLINE = 60.0
"""Seconds. What is waited for comes at once on an idle machine."""

_PROGRAM = """\
import json, os
import anyio
from unisandbox import Engine, Resources, Sandbox, SandboxError, Security, Terminal, UnsupportedError

def tell(**words):
    print(json.dumps(words), flush=True)

def pid(process):
    try:
        return process.pid
    except UnsupportedError:
        return None

async def main():
    engine = await Engine.{how}
    async def create(**options):
        return await engine.create(**(dict({options}) | options))
{body}
    tell(ready=True)
    await anyio.sleep_forever()

anyio.run(main, backend={loop!r})
"""


class Victim:
    """A running host process; what it tells arrives here, one line a call."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid: int = process.pid
        self._process = process

    def heard(self) -> dict[str, Any]:
        """The next thing that it tells."""
        said = self._process.stdout
        assert said is not None
        line = said.readline() if select.select([said], [], [], DEADLINE)[0] else b""
        assert line, f"the host process ended or was silent for {DEADLINE:g} s; its errors are above"
        told: dict[str, Any] = json.loads(line)
        return told

    def kill(self) -> float:
        """SIGKILL, and the moment after its end (Unix time)."""
        self._process.kill()
        self._process.wait(DEADLINE)
        return time.time()


class Hosts:
    """Starts host processes for one backend, all with one root file system and event loop."""

    def __init__(self, candidate: Candidate, rootfs: str, loop: str) -> None:
        self._options = options_in_source(candidate, rootfs)
        self._loop = loop

    @contextmanager
    def start(
        self, directory: Path, body: str = "", *, policy: Literal["stop", "keep"] = "keep", attach: bool = False
    ) -> Iterator[Victim]:
        """One that opens an engine, or attaches to one, does `body` and waits; killed at the end if it still runs.

        Args:
            directory: the engine's state directory.
            body: statements of an async function; `engine`, `create(**options)`, `tell(**words)` and `pid(process)`
                are there. After them it tells `ready`.
            policy: of the engine that it opens.
            attach: it attaches.
        """
        how = f"attach({str(directory)!r})" if attach else f"open({str(directory)!r}, policy={policy!r})"
        text = textwrap.indent(textwrap.dedent(body), " " * 4)
        program = _PROGRAM.format(how=how, options=self._options, body=text, loop=self._loop)
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        ) as process:
            try:
                yield Victim(process)
            finally:
                process.kill()

    def leave(self, directory: Path, body: str) -> tuple[list[dict[str, Any]], float]:
        """One with policy "keep" that does `body` and is killed: what it told, and when it was dead (Unix time)."""
        with self.start(directory, body) as host:
            told = []
            while "ready" not in (words := host.heard()):
                told.append(words)
            return told, host.kill()


class Watched:
    """A process that is nobody's child here."""

    def __init__(self, pid: int) -> None:
        self.pid: int = pid
        self._pidfd = os.pidfd_open(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        signal.pidfd_send_signal(self._pidfd, number)

    def ended(self, timeout: float = DEADLINE) -> bool:
        """Whether it ends within so many seconds."""
        return bool(select.select([self._pidfd], [], [], timeout)[0])


def pids(told: Iterable[Mapping[str, Any]]) -> list[int]:
    """The `pid` of what was told, of those that have one: a guest that is a thread of its host process has none."""
    return [words["pid"] for words in told if words["pid"] is not None]


async def keeper_pid(directory: Path) -> int:
    """The keeper's process of the engine that has this state directory."""
    keeper = await Keeper.attach(str(directory))
    try:
        return keeper.pid
    finally:
        keeper.abandon()
