"""Operation ids: what was asked for is done once, whoever asks again and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from unisandbox.engine import operations
from unisandbox.engine.operations import OperationLog, digest_of


def log_in(place: Path, *, kept: int = 1024) -> OperationLog:
    return OperationLog(str(place / "operations"), durable=False, kept=kept)


@pytest.fixture
def log(tmp_path: Path) -> OperationLog:
    return log_in(tmp_path)


@pytest.mark.parametrize("durable", [True, False])
def test_asking_again_tells_what_it_came_to(tmp_path: Path, durable: bool) -> None:
    log = OperationLog(str(tmp_path / "operations"), durable=durable)
    assert log.begin("op-1", "create", "web", "d") is None
    known = log.begin("op-1", "create", "web", "d")
    assert known is not None
    assert (known.state, known.result, known.in_progress) == ("begun", "", True)
    log.finish("op-1", "s1")
    log.finish("op-1", "s1")
    # Another engine, later:
    again = OperationLog(str(tmp_path / "operations"), durable=durable).begin("op-1", "create", "web", "d")
    assert again == known._replace(state="finished", result="s1")
    assert not again.in_progress
    assert log.unfinished() == []
    assert os.listdir(tmp_path / "operations") == ["op-1.json"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("exec", "web", "d"), r"for 'create' of 'web', not for 'exec' of 'web'"),
        (("create", "db", "d"), r"for 'create' of 'web', not for 'create' of 'db'"),
        (("create", "web", "e"), r"for 'create' of 'web', with other arguments"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_id_that_was_used_for_something_else_says_for_what(
    log: OperationLog, asked: tuple[operations.Kind, str, str], words: str, finished: bool
) -> None:
    log.begin("op-1", "create", "web", "d")
    if finished:
        log.finish("op-1", "s1")
    with pytest.raises(FailedPreconditionError, match=words):
        log.begin("op-1", *asked)


def test_what_failed_may_be_tried_again(log: OperationLog) -> None:
    assert log.begin("op-1", "create", "web", "d") is None
    log.forget("op-1")
    log.forget("op-1")
    assert log.find("op-1") is None
    assert log.begin("op-1", "exec", "db", "e") is None


def test_only_what_was_begun_is_finished_and_only_once(log: OperationLog) -> None:
    with pytest.raises(NotFoundError, match="'op-1' has not been begun"):
        log.finish("op-1", "s1")
    log.begin("op-1", "create", "web", "d")
    log.finish("op-1", "s1")
    with pytest.raises(FailedPreconditionError, match="'s1' and not 's2'"):
        log.finish("op-1", "s2")


@pytest.mark.parametrize(
    "ask",
    [
        lambda log: log.begin("../op", "create", "web", "d"),
        lambda log: log.begin("", "create", "web", "d"),
        lambda log: log.begin("op", "reboot", "web", "d"),
        lambda log: log.begin("op", "create", "w" * 1025, "d"),
        lambda log: log.find("a/b"),
        lambda log: log.finish("op", "x" * (operations.RESULT_LIMIT + 1)),
        lambda log: OperationLog("/nowhere", durable=False, kept=0),
    ],
)
def test_what_no_operation_can_be_is_refused(
    log: OperationLog, tmp_path: Path, ask: Callable[[object], object]
) -> None:
    with pytest.raises(InvalidArgumentError):
        ask(log)
    assert os.listdir(tmp_path) == []


def test_the_longest_result_is_read_again(log: OperationLog) -> None:
    result = "\udcff" * (operations.RESULT_LIMIT // 3)
    log.begin("op", "create", "\x00" * 1024, "d")
    log.finish("op", result)
    known = log.find("op")
    assert known is not None
    assert known.result == result


def test_the_oldest_are_forgotten_and_none_that_is_in_progress(tmp_path: Path) -> None:
    log = log_in(tmp_path, kept=4)
    log.begin("running", "exec", "web", "d")
    for number in range(8):
        log.begin(f"op-{number}", "create", "web", "d")
        log.finish(f"op-{number}", "")
        assert len(os.listdir(tmp_path / "operations")) <= 4
    names = sorted(os.listdir(tmp_path / "operations"))
    assert names == ["op-5.json", "op-6.json", "op-7.json", "running.json"]
    assert [operation.operation_id for operation in log.unfinished()] == ["running"]


def test_the_latest_are_remembered_also_when_the_clock_was_set_back(tmp_path: Path) -> None:
    log = log_in(tmp_path, kept=16)
    for number in range(16):
        log.begin(f"before-{number}", "create", "", "")
        log.finish(f"before-{number}", "done")
    for path in (tmp_path / "operations").iterdir():  # as if they had been done in a day's time
        later = path.stat().st_mtime_ns + 86_400 * 10**9
        os.utime(path, ns=(later, later))
    log = log_in(tmp_path, kept=16)
    for number in range(8):
        log.begin(f"after-{number}", "create", "", "")
        log.finish(f"after-{number}", "done")
    assert sorted(name for name in os.listdir(tmp_path / "operations") if name.startswith("after")) == [
        f"after-{number}.json" for number in range(8)
    ]


def test_what_a_former_version_has_noted_of_the_same_is_the_same(log: OperationLog) -> None:
    assert log.begin("op-1", "exec", "web", "former") is None
    assert log.begin("op-1", "exec", "web", "now", former_digests=["older", "former"]) is not None
    with pytest.raises(FailedPreconditionError, match="with other arguments"):
        log.begin("op-1", "exec", "web", "now", former_digests=["another"])


def test_many_are_kept_near_the_number_asked_for(tmp_path: Path) -> None:
    for _ in range(3):
        log = log_in(tmp_path, kept=64)
        for number in range(100):
            log.begin(f"op-{number}", "create", "web", "d")
            log.finish(f"op-{number}", "")
            log.forget(f"op-{number - 90}") if number > 90 else None
        assert len(os.listdir(tmp_path / "operations")) <= 64 + 64 // 16


BEGIN = """
import os, signal, sys
from unisandbox.engine.operations import OperationLog
log = OperationLog(sys.argv[1], durable=True)
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    known = log.begin(f"op-{number}", "create", "web", "d")
    print("mine" if known is None else known.state, flush=True)
if sys.argv[3] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_many_at_once_one_begins_and_the_others_see_it(tmp_path: Path, count: Callable[[int], int]) -> None:
    turns = count(1000)
    command = [sys.executable, "-c", BEGIN, str(tmp_path / "operations"), str(turns), "live"]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.communicate(timeout=60)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert [len(words) for words in said] == [turns] * 4
    for answers in zip(*said, strict=True):
        assert sorted(answers) == ["begun", "begun", "begun", "mine"]


def test_what_a_crash_has_cut_is_found_by_the_next(tmp_path: Path, log: OperationLog) -> None:
    command = [sys.executable, "-c", BEGIN, str(tmp_path / "operations"), "2", "die"]
    done = subprocess.run(command, input="go\n", stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["ready", "mine", "mine"])
    cut = log.unfinished()
    assert [(operation.operation_id, operation.in_progress) for operation in cut] == [("op-0", False), ("op-1", False)]
    assert log.begin("op-0", "create", "web", "d") == cut[0]
    log.finish("op-0", "s1")
    log.forget("op-1")
    assert log.unfinished() == []


def test_after_a_restart_of_the_machine_nothing_is_in_progress(log: OperationLog) -> None:
    log.begin("op-1", "create", "web", "d")
    (operation,) = log.unfinished()
    assert operation.in_progress
    assert not operation._replace(boot_id="another").in_progress
    assert not operation._replace(owner=(operation.owner[0], operation.owner[1] + 1)).in_progress


def test_what_is_damaged_is_never_taken_for_undone(tmp_path: Path, log: OperationLog) -> None:
    log.begin("op-1", "create", "web", "d")
    path = tmp_path / "operations" / "op-1.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(BackendError, match=r"'op-1' .* is damaged"):
                log.begin("op-1", "create", "web", "d")
    assert log.unfinished() == []
    path.rename(tmp_path / "operations" / "op-2.json")
    with pytest.raises(BackendError, match=r"'op-2' .* is damaged"):
        log.find("op-2")
    path.symlink_to("/dev/zero")
    with pytest.raises(BackendError, match=r"'op-1' .* is damaged"):
        log.find("op-1")


def test_what_killed_writers_have_left_is_cleared_away_in_time(tmp_path: Path) -> None:
    place = tmp_path / "operations"
    place.mkdir()
    for name, age in (("old.json.01234567.tmp", 7200), ("new.json.01234567.tmp", 0)):
        (place / name).write_text("half")
        changed = (place / name).stat().st_mtime - age
        os.utime(place / name, (changed, changed))
    log_in(tmp_path).begin("op-1", "create", "web", "d")
    assert sorted(os.listdir(place)) == ["new.json.01234567.tmp", "op-1.json"]


def test_what_is_not_of_the_log_stays_and_does_no_harm(tmp_path: Path) -> None:
    place = tmp_path / "operations"
    (place / "directory.json").mkdir(parents=True)
    (place / "no name.json").write_text("")
    log = log_in(tmp_path, kept=1)
    for number in range(3):
        log.begin(f"op-{number}", "create", "web", "d")
        log.finish(f"op-{number}", "")
    assert log.unfinished() == []
    assert sorted(os.listdir(place)) == ["directory.json", "no name.json", "op-2.json"]


def test_a_digest_does_not_depend_on_the_order_of_fields() -> None:
    assert digest_of({"a": 1, "b": {"c": 2, "d": 3}}) == digest_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
