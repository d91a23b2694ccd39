"""Processes that are put into cgroups before they do what a test wants to see."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from unisandbox.host.cgroups import Cgroups, DeviceRule

PATIENCE = 60.0  # what a slow machine may take
# Each worker of a run that is shared out has its own: whose ends removes it with all that is below.
PARENT = f"/unisandbox-test-{os.getpid()}.slice/unisandbox-below.service"


class Actor:
    """A process that waits for a line before it runs `code`, so that it can be put into a cgroup first."""

    def __init__(self, code: str) -> None:
        script = "import os, sys, time\nsys.stdin.readline()\n" + code
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()


Spawn = Callable[[str], Actor]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def variants() -> list[str]:
    hybrid = Cgroups.detect("unisandbox-x").version == "hybrid"
    return ["by default", "below a parent", *(["without unified tree"] if hybrid else [])]


ANYTHING = (DeviceRule("c"), DeviceRule("b"))
