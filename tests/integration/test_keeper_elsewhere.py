"""A state directory that is used from another pid namespace than its keeper's: a container that shares it, say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import CLI, SECONDS
from tests.detached import launched, listed, ok

from unisandbox import Engine, UnavailableError

pytestmark = [pytest.mark.root, pytest.mark.slow]

ELSEWHERE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
SAYS = "runs in another pid namespace"

OPENED = """
import sys
import anyio
from unisandbox import Engine, UnavailableError

async def main():
    for way in (Engine.attach, Engine.open):
        try:
            await way(sys.argv[1])
        except UnavailableError as error:
            print(error.message)

anyio.run(main)
"""

HELD = """
import sys
import anyio
from unisandbox import Engine

async def main():
    async with Engine.open(sys.argv[1]):
        print("open", flush=True)
        sys.stdin.read()

anyio.run(main)
"""


@pytest.mark.parametrize("args", [["ps"], ["run", "-d", "true"]], ids=" ".join)
def test_a_command_says_at_once_that_the_keeper_is_in_another_pid_namespace(state: Path, args: list[str]) -> None:
    name = launched("sleep", "1000")
    done = subprocess.run([*ELSEWHERE, *CLI, *args], capture_output=True, check=False, timeout=SECONDS)
    assert done.returncode == 125
    said, hint = done.stderr.decode().splitlines()
    assert SAYS in said
    assert "share that pid namespace" in hint
    assert [sandbox["status"] for sandbox in listed()["sandboxes"]] == ["running"]
    ok("rm", "-f", name)


def test_opening_and_attaching_say_so_too(state: Path) -> None:
    name = launched("sleep", "1000")
    command = [*ELSEWHERE, sys.executable, "-c", OPENED, str(state)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2
    assert all(SAYS in line for line in lines)
    ok("rm", "-f", name)


@pytest.mark.anyio
async def test_a_keeper_below_our_pid_namespace_is_told_from_one_that_has_ended(tmp_path: Path) -> None:
    command = [*ELSEWHERE, sys.executable, "-c", HELD, str(tmp_path / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:  # noqa: ASYNC220
        assert host.stdout is not None
        assert host.stdout.readline() == b"open\n"
        with pytest.raises(UnavailableError, match=SAYS):
            await Engine.attach(tmp_path / "state")
    assert host.returncode == 0
