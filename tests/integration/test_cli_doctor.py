"""`unisandbox doctor` lists what crashes and other versions have left, and removes what may be removed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.command_line import SECONDS, output_of, read_until, run, started
from tests.detached import keeper_of, launched, listed, ok
from tests.keepers import wait_ended

from unisandbox.cli.app import run_app
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine import leftovers

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.usefixtures("state")]


@pytest.fixture
def only_ours(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is left over on this host only that of the test's engine counts: others may have crashed too."""
    find = leftovers.find
    monkeypatch.setattr(leftovers, "find", lambda: [left for left in find() if left.state_dir == str(state)])


@pytest.mark.usefixtures("only_ours")
def test_doctor_lists_what_crashes_have_left_and_fix_removes_it(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = Inventory.take()
    launched("--name", "a", "sleep", "1000")
    assert run_app(["doctor", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["leftovers"] == []
    keeper = keeper_of(state)
    os.kill(keeper, signal.SIGKILL)
    wait_ended(keeper)
    assert run_app(["doctor"]) == 0
    out = capfd.readouterr().out
    assert f"  state {state}: " in out
    assert "unisandbox doctor --fix" in out
    assert run_app(["doctor", "--fix", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert "state" in {leftover["kind"] for leftover in answer["removed"]}
    assert answer["failures"] == {}
    assert settle(before) == []
    assert run_app(["doctor", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["leftovers"] == []
    assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}


@pytest.mark.usefixtures("only_ours")
def test_doctor_ends_a_keeper_that_nobody_needs(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = launched("sleep", "1000")
    keeper = keeper_of(state)
    with started("events") as process:
        read_until(output_of(process), b"container.started")
        ok("rm", "-f", name)
        process.kill()
        process.wait(SECONDS)
    assert run_app(["doctor", "--fix"]) == 0
    assert f"keeper {keeper}: removed" in capfd.readouterr().out
    wait_ended(keeper)


@pytest.mark.usefixtures("only_ours")
def test_a_record_that_cannot_be_used_is_told_by_every_command_and_freed_by_doctor(
    state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = Inventory.take()
    launched("--name", "bad", "sleep", "1000")
    keeper = keeper_of(state)
    [record] = (state / "sandboxes").iterdir()
    record.write_bytes(record.read_bytes() + b"x")
    done = run("ps", "-a")
    assert done.stdout.splitlines()[1:] == []
    assert f"the record {record} cannot be used" in done.stderr.decode()
    assert "unisandbox doctor --fix" in done.stderr.decode()
    assert run_app(["doctor", "--fix"]) == 0
    assert f"record {record}: removed" in capfd.readouterr().out
    wait_ended(keeper)
    assert settle(before) == []
    assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}


@pytest.mark.usefixtures("only_ours")
def test_doctor_leaves_to_a_later_version_what_that_has_written(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = Inventory.take()
    launched("--name", "theirs", "sleep", "1000")
    keeper = keeper_of(state)
    [record] = (state / "sandboxes").iterdir()
    good = record.read_bytes()
    record.write_bytes(good.replace(b'"version": 3', b'"version": 4'))
    done = run("ps", "-a")
    assert done.stdout.splitlines()[1:] == []
    assert "written by a later unisandbox" in done.stderr.decode()
    assert "use that version" in done.stderr.decode()
    assert run_app(["doctor", "--fix", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert [(left["kind"], left["what"]) for left in answer["leftovers"]] == [("later", str(record))]
    assert (answer["removed"], answer["failures"]) == ([], {})
    os.kill(keeper, 0)
    record.write_bytes(good)  # here this version is that version
    ok("rm", "-f", "theirs")
    wait_ended(keeper)
    assert settle(before) == []
