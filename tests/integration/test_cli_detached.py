"""Sandboxes that outlive the commands: separate processes on one state directory, and no daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.command_line import CLI, SECONDS, in_terminal, output_of, read_until, run, started
from tests.detached import keeper_of, launched, listed, ok, refused, until, word_of
from tests.keepers import wait_ended

from unisandbox.cli.app import run_app
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine.state import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.usefixtures("state")]

STATE_FILES = {"engine-id", "lock", "keeper.log", "events", "cgroups", "sandboxes"}


# One after the other


def test_a_sandbox_is_launched_listed_used_stopped_and_removed_by_separate_commands(state: Path) -> None:
    script = "echo out; echo err >&2; touch /tmp/there; sleep 1000"
    assert launched("--name", "web", "sh", "-c", script) == "web"
    table = ok("ps").splitlines()
    assert table[0].split() == ["ID", "NAME", "COMMAND", "STATUS", "CREATED", "TTL"]
    assert "  web  " in table[1]
    assert "  running  " in table[1]
    [sandbox] = listed()["sandboxes"]
    assert ok("ps", "-q").strip() == sandbox["id"][:12]
    assert sandbox["command"] == ["sh", "-c", script]
    until(lambda: run("exec", "web", "test", "-e", "/tmp/there").returncode == 0)
    assert (done := run("logs", "web")).stdout == b"out\n", done
    assert done.stderr == b"err\n"
    assert ok("exec", sandbox["id"][:6], "sh", "-c", "echo $(ls /tmp)") == "there\n"
    assert run("exec", "web", "--", "sh", "-c", "exit 7").returncode == 7
    assert refused("rm", "web")[1] == "hint: unisandbox stop web first, or unisandbox rm -f web"
    assert ok("stop", "web") == "web\n"
    assert ok("ps").splitlines()[1:] == []
    assert "  exited (143) " in ok("ps", "-a")
    assert run("logs", "--stdout", "web").stdout == b"out\n"
    assert ok("wait", "web") == "143\n"
    assert ok("rm", "web") == "web\n"
    assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}


def test_nothing_but_small_files_in_the_state_directory_is_left(state: Path) -> None:
    before = Inventory.take()
    name = launched("sleep", "1000")
    keeper = keeper_of(state)
    ok("exec", name, "true")
    ok("rm", "-f", name)
    wait_ended(keeper)
    assert settle(before) == []
    assert {path.name for path in state.iterdir()} <= STATE_FILES
    assert list((state / "sandboxes").iterdir()) == []
    assert sum(path.stat().st_size for path in state.iterdir() if path.is_file()) < 4096


@pytest.mark.parametrize("args", [["ps"], ["ps", "-a", "-q"], ["events"]], ids=" ".join)
def test_reading_where_nothing_is_leaves_nothing(state: Path, args: list[str]) -> None:
    ok(*args)
    assert not state.exists()


@pytest.mark.parametrize("command", ["logs", "exec", "stop", "start", "rm", "kill", "wait", "pause", "inspect"])
def test_a_name_that_is_not_there_is_one_line_and_a_hint(state: Path, command: str) -> None:
    lines = refused(command, "nobody", *(["true"] if command == "exec" else []))
    assert lines == [
        "unisandbox: no sandbox has the name or id 'nobody'",
        "hint: unisandbox ps -a lists all there are.",
    ]
    assert not state.exists()


def test_the_end_of_a_program_is_exact_and_its_output_stays_until_rm() -> None:
    name = launched("sh", "-c", "seq 3; exit 3")
    assert ok("wait", name) == "3\n"
    [sandbox] = listed()["sandboxes"]
    assert sandbox["status"] == "exited"
    assert (sandbox["exit"]["code"], sandbox["exit"]["reason"]) == (3, "exited")
    assert ok("logs", "--tail", "2", name) == "2\n3\n"
    assert json.loads(ok("logs", "--json", name)) == {
        "stdout": "1\n2\n3\n",
        "stdout_encoding": "utf-8",
        "stderr": "",
        "stderr_encoding": "utf-8",
    }
    assert refused("exec", name, "true")[1] == f"hint: unisandbox start {name} first."
    ok("rm", name)


def test_memory_that_was_not_enough_is_said() -> None:
    name = launched("python3", "-c", "bytearray(200 << 20)")
    assert ok("wait", name) == "137\n"
    assert "exited (137, out of memory)" in ok("ps", "-a")
    ok("rm", name)


def test_what_has_ended_can_be_started_again_with_its_files() -> None:
    name = launched("-e", "GIVEN=1", "-w", "/tmp", "sh", "-c", "echo $GIVEN $PWD >> /tmp/lines; exec sleep 1000")
    until(lambda: run("exec", name, "test", "-e", "/tmp/lines").returncode == 0)
    ok("kill", name)
    assert ok("wait", name) == "137\n"
    ok("start", name)
    until(lambda: ok("exec", name, "cat", "/tmp/lines") == "1 /tmp\n1 /tmp\n")
    ok("start", name)  # it runs already
    ok("rm", "-f", name)


def test_logs_follow_until_the_end() -> None:
    name = launched("sh", "-c", "echo first; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo last")
    with started("logs", "-f", name) as process:
        read_until(output_of(process), b"first\n")
        ok("exec", name, "touch", "/tmp/go")
        assert read_until(output_of(process), b"last\n") == b"last\n"
        assert process.wait(SECONDS) == 0
    ok("rm", name)


def test_logs_that_are_followed_end_with_the_sandbox() -> None:
    name = launched("sh", "-c", "echo first; sleep 1000")
    with started("logs", "-f", name) as process:
        read_until(output_of(process), b"first\n")
        ok("rm", "-f", name)
        assert process.wait(SECONDS) == 0


@pytest.mark.parametrize("args", [["logs"], ["logs", "-f"], ["logs", "--json"]], ids=" ".join)
def test_a_reader_that_leaves_ends_a_command_as_it_ends_others(args: list[str]) -> None:
    name = launched("sh", "-c", "head -c 512K /dev/zero; sleep 1000")
    until(lambda: len(run("logs", name).stdout) == 512 << 10)
    with started(*args, name) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE
    ok("rm", "-f", name)


def test_pause_holds_all_and_unpause_lets_it_go_on() -> None:
    name = launched("--name", "p", "sh", "-c", "while :; do echo tick; sleep 0.01; done")
    ok("pause", name)
    assert word_of("p") == "paused"
    held = ok("logs", name)
    assert refused("exec", name, "true")[1] == "hint: unisandbox unpause p first."
    assert ok("logs", name) == held
    ok("unpause", name)
    until(lambda: len(ok("logs", name)) > len(held))
    refused("unpause", name)
    ok("pause", name)
    ok("stop", "-t", "0", name)
    ok("start", name)
    ok("pause", name)
    ok("rm", "-f", name)


def test_signal_goes_to_the_program_and_stop_is_patient_as_long_as_told() -> None:
    script = "trap 'echo usr1' USR1; trap '' TERM; echo ready; while :; do sleep 0.01; done"
    name = launched("sh", "-c", script)
    until(lambda: ok("logs", name) == "ready\n")
    ok("kill", "-s", "usr1", name)
    until(lambda: ok("logs", name) == "ready\nusr1\n")
    assert "no signal 'no-such'" in refused("kill", "-s", "no-such", name)[0]
    begun = time.monotonic()
    ok("stop", "--time", "0.3", name)
    assert time.monotonic() - begun >= 0.3
    assert ok("wait", name) == "137\n"
    ok("rm", name)


def test_events_tell_what_happened_and_can_be_resumed() -> None:
    name = launched("sleep", "1000")
    with started("events", "--json") as process:
        kinds = []
        for line in process.stdout or ():
            event = json.loads(line)
            kinds.append(event["kind"])
            if event["kind"] == "container.started":
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 128 + signal.SIGINT
    assert kinds == ["sandbox.created", "sandbox.started", "container.created", "container.started"]
    with started("events", "--after", str(event["seq"] - 1)) as process:
        read_until(output_of(process), b"container.started")  # it is there, so the engine stays as long as it listens
        ok("rm", "-f", name)
        assert b" container.exited " in read_until(output_of(process), b"sandbox.removed")
        process.terminate()
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
    # It was the last that used the engine, and left it in order.


def test_events_tell_of_a_program_that_ends_alone() -> None:
    name = launched("sh", "-c", "sleep 0.5; exit 3")
    with started("events", "--json") as process:
        ends = []
        for line in process.stdout or ():
            event = json.loads(line)
            ends += [event["exit"]] if event["kind"] == "container.exited" else []
            if ends:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 128 + signal.SIGINT
    assert [(end["code"], end["reason"]) for end in ends] == [(3, "exited")]
    assert ok("wait", name) == "3\n"
    ok("rm", name)


def test_inspect_is_json() -> None:
    name = launched("--name", "i", "--ttl", "1000", "sleep", "1000")
    answer = json.loads(ok("inspect", name))
    assert (answer["name"], answer["word"], answer["program"]["argv"]) == ("i", "running", ["sleep", "1000"])
    assert 0 < answer["expires_at"] - time.time() <= 1000
    assert ok("inspect", "--json", name).count("\n") == 1
    ok("rm", "-f", name)


# exec, as run


def test_exec_passes_streams_on_and_leaves_the_background_alone() -> None:
    name = launched("sleep", "1000")
    data = os.urandom(300_000)
    done = run("exec", "-i", name, "sh", "-c", "cat; echo err >&2; exit 5", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (5, data, b"err\n")
    done = run("exec", name, "sh", "-c", "(while :; do echo more; sleep 0.01; done) & echo over")
    assert done.returncode == 0
    assert b"over\n" in done.stdout
    answer = json.loads(
        ok("exec", "--json", "-e", "A=1", "-w", "/tmp", "-u", "1", name, "sh", "-c", "echo $A $PWD; id -u")
    )
    assert (answer["exit_code"], answer["stdout"]) == (0, "1 /tmp\n1\n")
    assert run("exec", name, "no-such").returncode == 127
    ok("rm", "-f", name)


def test_exec_has_the_environment_directory_and_user_that_the_sandbox_was_launched_with() -> None:
    name = launched("-e", "A=1", "-e", "B=1", "-w", "/tmp", "-u", "user", "sleep", "1000")
    ask = ["sh", "-c", "echo $A $B; pwd; id -u"]
    assert ok("exec", name, *ask).splitlines() == ["1 1", "/tmp", "1000"]
    assert ok("exec", "-e", "B=2", "-w", "/", "-u", "root", name, *ask).splitlines() == ["1 2", "/", "0"]
    ok("rm", "-f", name)


def test_exec_forwards_signals_and_has_a_terminal() -> None:
    name = launched("sleep", "1000")
    with started("exec", name, "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done") as process:
        read_until(output_of(process), b"ready\n")
        process.terminate()
        assert process.wait(SECONDS) == 9
    with in_terminal("exec", "-it", name, "sh", "-c", "stty size; read line; exit 4") as (master, process):
        read_until(master, b"31 97\r\n")
        os.write(master, b"\r")
        assert process.wait(SECONDS) == 4
    ok("rm", "-f", name)


def test_what_ends_both_streams_that_are_followed_is_told_once(state: Path) -> None:
    name = launched("sh", "-c", "while :; do echo tick; echo tock >&2; sleep 0.01; done")
    with started("logs", "-f", name) as process:
        read_until(output_of(process), b"tick\n")
        os.kill(keeper_of(state), signal.SIGKILL)
        assert process.wait(SECONDS) == 125
        assert process.stderr is not None
        [said] = [line for line in process.stderr.read().decode().splitlines() if line.startswith("unisandbox: ")]
    assert said.endswith("has ended")


def test_exec_ends_with_its_sandbox() -> None:
    name = launched("sleep", "1000")
    with started("exec", name, "sh", "-c", "echo ready; sleep 1000") as process:
        read_until(output_of(process), b"ready\n")
        ok("rm", "-f", name)
        assert process.wait(SECONDS) == 128 + signal.SIGKILL
        assert process.stderr is not None
        assert process.stderr.read() == b""


# Errors


def test_a_name_that_is_taken_is_refused_with_a_hint() -> None:
    launched("--name", "web", "sleep", "1000")
    lines = refused("run", "-d", "--name", "web", "true")
    assert lines == [
        "unisandbox: a sandbox with the name 'web' exists already",
        "hint: Take another --name, or: unisandbox rm -f web",
    ]
    assert len(listed()["sandboxes"]) == 1
    ok("rm", "-f", "web")


def test_a_program_that_cannot_be_started_leaves_nothing(state: Path) -> None:
    done = run("run", "-d", "--name", "n", "no-such-program")
    assert done.returncode == 127
    assert b"cannot start 'no-such-program'" in done.stderr
    assert listed()["sandboxes"] == []
    assert {path.name for path in state.iterdir()} <= STATE_FILES


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "-d", "-i", "true"], "-i cannot be used with -d"),
        (["run", "-d", "-t", "true"], "-t cannot be used with -d"),
        (["run", "-d", "--timeout", "1", "true"], "--timeout cannot be used with -d"),
        (["run", "-d", "--rm", "true"], "--rm cannot be used with -d"),
        (["run", "-d", "--ttl", "0", "true"], "--ttl must be > 0 seconds"),
        (["run", "--ttl", "1", "true"], "--ttl cannot be used with run without -d"),
        (["run", "--state", "/tmp/x", "true"], "--state cannot be used with run without -d"),
        (["run", "-d", "--state", "", "true"], "the path of a directory, got ''"),
        (["ps", "--state", ""], "the path of a directory, got ''"),
        (["ps", "-q", "--json"], "cannot be used together"),
        (["logs", "-f", "--json", "x"], "cannot be used together"),
        (["stop", "-t", "-1", "x"], "-1.0 is not in the range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    state: Path, args: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_app(args) == 125
    assert says in capfd.readouterr().err.splitlines()[0]
    assert not state.exists()


@pytest.mark.parametrize(
    ("option", "remedy"),
    [(["-i"], "no standard input"), (["-t"], "and no terminal"), (["--timeout", "1"], "--ttl")],
    ids=["i", "t", "timeout"],
)
def test_the_remedy_for_what_a_detached_program_cannot_have_is_one(
    option: list[str], remedy: str, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["run", "-d", *option, "true"]) == 125
    hint = capfd.readouterr().err.splitlines()[1]
    assert remedy in hint
    assert ("--ttl" in hint) == ("--timeout" in option)
    assert not state.exists()


def test_state_directory_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    file, shared = tmp_path / "file", tmp_path / "shared"
    file.touch()
    shared.mkdir()
    shared.chmod(0o777)
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 1234, -1)
    for path, why in ((file, "Not a directory"), (file / "below", "Not a directory")):
        assert why in refused("ps", "--state", str(path))[0]
        assert why in refused("run", "-d", "--state", str(path), "true")[0]
    for path in (shared, foreign):
        assert "is not this user's alone" in refused("ps", "--state", str(path))[0]
        assert "is not this user's alone" in refused("run", "-d", "--state", str(path), "true")[0]
        assert list(path.iterdir()) == []
    os.chown(foreign, 0, -1)


# Time, many at once, crashes


def test_ttl_ends_a_sandbox_with_nobody_there(state: Path) -> None:
    before = Inventory.take()
    sleep = f"{os.getpid()}.25"  # can be told from others'
    launched("--name", "short", "--ttl", "9", "sleep", sleep)
    assert ok("ps").splitlines()[1].split()[-2] in {str(seconds) for seconds in range(9)}
    until(lambda: subprocess.run(["pgrep", "-f", f"^sleep {sleep}$"], capture_output=True, check=False).returncode == 1)
    wait_ended(keeper_of(state))
    assert settle(before) == []
    assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}


def test_many_commands_at_once_neither_corrupt_nor_wait_for_ever(state: Path, count: Callable[[int], int]) -> None:
    script = """
        name=$1; cli="$2"
        $cli run -d --memory 64M --name $name sh -c "echo $name; sleep 1000" || exit 2
        test "$($cli exec $name echo inside)" = inside || exit 3
        $cli ps -a >/dev/null || exit 4
        test "$($cli logs $name)" = $name || exit 5
        $cli rm -f $name || exit 6
    """
    before = Inventory.take()
    for _ in range(count(10)):
        many = [
            subprocess.Popen(
                ["sh", "-c", script, "sh", f"n{number}", " ".join(CLI)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for number in range(5)
        ]
        ends = [(process.communicate(timeout=100), process.returncode) for process in many]
        assert ends == [((f"n{n}\nn{n}\n".encode(), b""), 0) for n in range(5)]
        assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}
        assert settle(before) == []
    assert {path.name for path in state.iterdir()} <= STATE_FILES


def test_a_killed_exec_harms_nobody(count: Callable[[int], int]) -> None:
    name = launched("sleep", "1000")
    for number in range(count(30)):
        with started("exec", name, "sh", "-c", "echo ready; sleep 1000") as process:
            if number % 3 == 0:
                read_until(output_of(process), b"ready\n")
            else:
                _delay(process, number * 0.02)
            process.kill()
        assert ok("exec", name, "echo", "fine") == "fine\n"
    ok("rm", "-f", name)


@pytest.mark.timeout(600)
def test_a_launch_that_is_killed_at_any_moment_can_be_seen_and_removed(
    state: Path, count: Callable[[int], int]
) -> None:
    before = Inventory.take()
    ok("rm", "-f", launched("true"))  # from here on all is compiled and cached
    times = count(60)
    for number in range(times):
        with started("run", "-d", "--memory", "64M", "--name", "cut", "sleep", "1000") as process:
            _delay(process, 0.2 + 0.6 * number / times)
            process.kill()
            process.wait(SECONDS)
        done = run("ps", "-a", "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        names = [sandbox["name"] for sandbox in answer["sandboxes"]]
        assert names + [found["name"] for found in answer["recovered"]] in ([], ["cut"]), answer
        if names:
            ok("rm", "-f", "cut")
        assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}
        assert settle(before) == []


def test_a_start_that_came_no_further_than_to_its_directories_is_cleaned_by_the_next_command(state: Path) -> None:
    before = Inventory.take()
    StateDirectory.prepare(state)
    assert before.diff(Inventory.take())
    assert listed() == {"sandboxes": [], "recovered": [], "damaged": []}
    assert settle(before) == []


def _delay(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Some time, or until it has written something or has ended."""
    import select

    select.select([output_of(process)], [], [], seconds)


def test_after_a_killed_keeper_ps_tells_what_became_of_the_sandboxes_once(state: Path) -> None:
    before = Inventory.take()
    launched("--name", "a", "sleep", "1000")
    launched("--name", "b", "true")
    keeper = keeper_of(state)
    os.kill(keeper, signal.SIGKILL)
    wait_ended(keeper)
    done = run("ps", "-a", "--json")
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["sandboxes"] == []
    assert [(found["name"], found["action"]) for found in answer["recovered"]] == [("a", "removed"), ("b", "removed")]
    assert [line[:45] for line in done.stderr.decode().splitlines()] == [
        "unisandbox: sandbox 'a' is gone and was clean",
        "unisandbox: sandbox 'b' is gone and was clean",
    ]
    assert settle(before) == []
    assert ok("ps", "-a").splitlines()[1:] == []
    launched("--name", "a", "sleep", "1000")
    ok("rm", "-f", "a")
