"""`unisandbox run -d` that is cut, or looked at, between the creation of its sandbox and the launch in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import SECONDS, run, started
from tests.detached import launched, ok

from unisandbox.conformance.inventory import Inventory, settle

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.usefixtures("state")]

# `unisandbox`, which gets this signal in the place of the launch: its sandbox is there, and nothing runs in it.
_CUT = """
import os, sys
from unisandbox.cli import main
from unisandbox.engine.programs import Programs

number = int(sys.argv.pop(1))

async def cut(*_):
    os.kill(os.getpid(), number)

Programs._add = cut
main()
"""


def test_a_launch_that_is_killed_after_the_creation_is_freed_and_told_by_the_next_command(state: Path) -> None:
    before = Inventory.take()
    command = [sys.executable, "-c", _CUT, str(int(signal.SIGKILL)), "run", "-d", "--name", "job", "sleep", "1000"]
    done = subprocess.run(command, check=False, timeout=SECONDS)
    assert done.returncode == -signal.SIGKILL
    answer = json.loads(run("ps", "-a", "--json").stdout)
    assert answer["sandboxes"] == []
    [found] = answer["recovered"]
    assert (found["name"], found["action"]) == ("job", "removed")
    assert "creation was cut" in found["reason"]
    assert launched("--name", "job", "sleep", "1000") == "job"
    ok("rm", "-f", "job")
    assert settle(before) == []


def test_a_launch_that_goes_on_is_left_alone_by_all_who_look_at_it_meanwhile(state: Path) -> None:
    before = Inventory.take()
    command = [sys.executable, "-c", _CUT, str(int(signal.SIGSTOP)), "run", "-d", "--name", "job", "sleep", "1000"]
    with subprocess.Popen(command) as process:
        try:
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            with started("ps", "-a", "--json") as first, started("ps", "-a", "--json") as second:
                answers = [json.loads(looker.communicate(timeout=SECONDS)[0]) for looker in (first, second)]
        finally:
            process.kill()
    for answer in answers:
        assert [(sandbox["name"], sandbox["status"]) for sandbox in answer["sandboxes"]] == [("job", "creating")]
        assert answer["recovered"] == []
    assert [found["name"] for found in json.loads(run("ps", "-a", "--json").stdout)["recovered"]] == ["job"]
    assert settle(before) == []
