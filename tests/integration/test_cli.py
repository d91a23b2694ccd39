"""The command line as a user meets it: a process with streams, options, an exit code and answers for programs."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
from tests.command_line import CLI, SECONDS, output_of, read_until, run, started

import unisandbox
from unisandbox.cli.app import run_app

pytestmark = pytest.mark.root

# Output, input, exit codes


def test_output_streams_and_exit_code_pass_through() -> None:
    done = run("run", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_output_comes_while_the_program_runs() -> None:
    with started("run", "sh", "-c", "echo first; read never; sleep 1000") as process:
        assert read_until(output_of(process), b"first\n") == b"first\n"
        process.terminate()
        assert process.wait(SECONDS) == 128 + signal.SIGTERM


def test_words_after_the_program_are_its_own() -> None:
    done = run("run", "echo", "--memory", "-e", "--", "--json")
    assert (done.returncode, done.stdout) == (0, b"--memory -e -- --json\n")


def test_rm_is_what_happens_anyway() -> None:
    done = run("run", "--rm", "echo", "--rm")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"--rm\n", b"")


def test_stdin_is_read_only_with_i() -> None:
    assert run("run", "cat", stdin=b"typed").stdout == b""
    assert run("run", "-i", "cat", stdin=b"typed").stdout == b"typed"


def test_stdin_may_be_a_file_or_not_be_there(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    with source.open("rb") as file:
        done = subprocess.run([*CLI, "run", "-i", "cat"], stdin=file, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (0, source.read_bytes())
    shell = f"exec {' '.join(CLI)} run -- echo fine <&-"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, check=False, timeout=SECONDS).stdout == b"fine\n"


def test_large_input_and_output_are_whole() -> None:
    data = os.urandom(5_000_000)
    done = run("run", "-i", "cat", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_input_that_the_program_does_not_read_is_no_error() -> None:
    done = run("run", "-i", "true", stdin=bytes(5_000_000))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_program_learns_that_its_reader_has_left() -> None:
    with started("run", "yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE


def test_full_disk_under_our_output_is_said() -> None:
    with Path("/dev/full").open("wb") as full, started("run", "echo", "lost", stdout=full.fileno()) as process:
        assert process.stderr is not None
        assert process.stderr.read() == b"unisandbox: cannot write the program's output: No space left on device\n"
        assert process.wait(SECONDS) == 125


@pytest.mark.parametrize(
    "args", [["run", "--json", "true"], ["run", "--json", "nope"], ["--help"], ["doctor", "--json"]]
)
def test_an_answer_that_cannot_be_written_is_said(args: list[str]) -> None:
    with Path("/dev/full").open("wb") as full, started(*args, stdout=full.fileno()) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        code = process.wait(SECONDS)
    assert b"Traceback" not in said
    assert b"bug" not in said
    if "nope" in args:
        assert (said.startswith(b"unisandbox: cannot start 'nope'"), code) == (True, 127)
    else:
        assert (said, code) == (b"unisandbox: standard output cannot be written: No space left on device\n", 125)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["run", "echo", "lost"], b"cannot write the program's output"),
        (["run", "--json", "true"], b"standard output cannot be written"),
        (["ps"], b"standard output cannot be written"),
    ],
)
def test_a_closed_output_is_said(args: list[str], what: bytes, tmp_path: Path) -> None:
    if args == ["ps"]:
        args = ["ps", "--state", str(tmp_path / "state")]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *CLI, *args], capture_output=True, check=False, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (125, b"unisandbox: " + what + b": Bad file descriptor\n")


def test_a_closed_input_is_an_empty_one_and_a_closed_stderr_is_not_wanted() -> None:
    script = 'exec "$@" <&- 2>&-'
    program = ["run", "-i", "sh", "-c", "cat; echo lost >&2; echo there"]
    done = subprocess.run(["sh", "-c", script, "sh", *CLI, *program], capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"there\n", b"")


def test_background_process_does_not_keep_the_sandbox() -> None:
    done = run("run", "sh", "-c", "sleep 1000 & echo over")
    assert (done.returncode, done.stdout) == (0, b"over\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGUSR1])
def test_program_ended_by_a_signal_gives_128_and_its_number(number: signal.Signals) -> None:
    assert run("run", "sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number


# Errors


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["run", "no-such-program"], 127, "cannot start 'no-such-program'"),
        (["run", "/etc/passwd"], 126, "cannot start '/etc/passwd'"),
        (["run", "--no-such-option", "true"], 125, "No such option '--no-such-option'"),
        (["run"], 125, "Missing argument"),
        (["no-such-command"], 125, "No such command 'no-such-command'"),
        (["run", "--memory", "lots", "true"], 125, "--memory must be bytes or a string like '512M'"),
        (["run", "--memory", "0", "true"], 125, "--memory must be > 0"),
        (["run", "--cpus", "-1", "true"], 125, "cpu must be a number > 0"),
        (["run", "--timeout", "0", "true"], 125, "--timeout must be > 0 seconds"),
        (["run", "--isolation", "no-such", "true"], 125, "isolation 'no-such' is not known"),
        (["run", "--rootfs", "/no/such", "true"], 125, "/no/such"),
        (["run", "--rootfs", "image", "true"], 125, "not supported by backend"),
        (["run", "--network", "bridge", "true"], 125, "network 'bridge' is not known"),
        (["run", "-v", "/no/such:/x", "true"], 125, "'/no/such' does not exist on this host"),
        (["run", "-v", "/usr", "true"], 125, "-v '/usr' is not valid"),
        (["run", "-e", "=x", "true"], 125, "has no name"),
        (["run", "-u", "no-such-user", "true"], 125, "no-such-user"),
        (["run", "-t", "--json", "true"], 125, "cannot be used together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_is_one_line_and_a_hint(args: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(args) == code
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" or "--json" in args
    assert lines[0].startswith("unisandbox: ")
    assert says in lines[0]
    assert [line[:6] for line in lines[1:]] in ([], ["hint: "])


def test_terminal_without_a_terminal_is_an_error() -> None:
    done = run("run", "-it", "true")
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.decode().splitlines() == [
        "unisandbox: -t with -i needs a terminal, and standard input is none",
        "hint: Leave out -t, or run it in a terminal.",
    ]


def test_debug_shows_where_an_error_was_raised() -> None:
    done = run("run", "--debug", "--isolation", "no-such", "true")
    assert b"Traceback" in done.stderr
    assert done.stderr.splitlines()[-2].startswith(b"unisandbox: isolation 'no-such'")


def test_missing_extra_is_one_readable_line() -> None:
    code = "import sys; sys.modules['click'] = None; import unisandbox.cli; unisandbox.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "unisandbox: the command line needs click, which is missing: pip install 'unisandbox[cli]'"
    ]


# What the options do


def test_options_of_the_sandbox_and_the_process() -> None:
    done = run(
        *("run", "-e", "GIVEN=1", "-e", "TAKEN", "-e", "ABSENT", "-w", "/usr/lib", "-u", "1000:65534"),
        *("--hostname", "box", "--pids", "50", "--cpus", "0.5", "--disk", "8M", "--memory", "64M", "--name", "n"),
        *("sh", "-c", "echo $GIVEN $TAKEN ${ABSENT-unset} ${OTHER-unset} $PWD $(id -u):$(id -g) $(uname -n)"),
        env={"TAKEN": "2", "OTHER": "3"},
    )
    assert done.stdout.decode() == "1 2 unset unset /usr/lib 1000:65534 box\n", done.stderr


def test_disk_is_limited() -> None:
    done = run("run", "--disk", "4M", "sh", "-c", "head -c 8M /dev/zero > /tmp/full")
    assert done.returncode != 0
    assert b"No space left" in done.stderr


def test_processes_are_limited() -> None:
    assert run("run", "--pids", "10", "sh", "-c", "for i in $(seq 30); do sleep 1000 & done").returncode != 0
    assert run("run", "--unlimited", "sh", "-c", "for i in $(seq 300); do sleep 1000 & done").returncode == 0


def test_volume_is_writable_unless_ro(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("read\n")
    script = "cat /mnt/x/there; echo written > /mnt/x/new"
    readonly = run("run", "-v", f"{tmp_path}:/mnt/x:ro", "sh", "-c", script)
    assert readonly.stdout == b"read\n"
    assert readonly.returncode != 0
    assert not (tmp_path / "new").exists()
    assert run("run", "-v", f"{tmp_path}:/mnt/x", "sh", "-c", script).returncode == 0
    assert (tmp_path / "new").read_text() == "written\n"


def test_network_is_none_unless_host() -> None:
    interfaces = ["run", "python3", "-c", "import socket; print(*[name for _, name in socket.if_nameindex()])"]
    assert run(*interfaces).stdout == b"lo\n"
    host = run("run", "--network", "host", *interfaces[1:])
    assert set(host.stdout.decode().split()) == set(os.listdir("/sys/class/net")) - {"bonding_masters"}, host.stderr


def test_userns_host_is_root_of_the_host() -> None:
    assert run("run", "--userns", "host", "cat", "/proc/self/uid_map").stdout.split() == [b"0", b"0", b"4294967295"]
    assert run("run", "cat", "/proc/self/uid_map").stdout.split()[2] == b"65536"


def test_timeout_kills_all_that_runs() -> None:
    done = run("run", "--timeout", "0.2", "sh", "-c", "sleep 1000 & echo begun; sleep 1000")
    assert (done.returncode, done.stdout) == (124, b"begun\n")
    assert done.stderr == b"unisandbox: 'sh' did not end within 0.2 s; it was killed\n"


# --json

FIELDS: Final = {
    "argv": list,
    "exit_code": int,
    "code": int,
    "signal": int | None,
    "reason": str,
    "oom_kills": int,
    "detail": str,
    "timed_out": bool,
    "duration": float,
    "truncated": bool,
    "stdout": str,
    "stdout_encoding": str,
    "stderr": str,
    "stderr_encoding": str,
}


def run_json(*args: str) -> tuple[int, dict[str, Any]]:
    done = run("run", "--json", *args)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.stdout.count(b"\n") == 1
    return done.returncode, answer


@pytest.mark.parametrize("args", [("--bogus", "true"), ("--cpus", "many", "true"), ()])
def test_json_says_what_is_wrong_with_the_arguments(args: tuple[str, ...]) -> None:
    code, answer = run_json(*args)
    assert code == answer["exit_code"] == 125
    assert answer["error"]["type"] == "InvalidArgumentError"
    assert "--help" in answer["error"]["hint"]


def test_json_of_the_program_is_not_ours() -> None:
    done = run("run", "--bogus", "--", "echo", "--json")
    assert (done.returncode, done.stdout) == (125, b"")


def test_input_that_cannot_be_read_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    writing = (tmp_path / "file").open("wb")
    with writing, started("run", "-i", "sh", "-c", "echo ran", stdin=writing.fileno()) as process:
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (125, b"")
    assert b"standard input cannot be read" in err
    assert b"bug" not in err


def test_json_is_one_object_with_every_field() -> None:
    code, answer = run_json("sh", "-c", "echo out; echo err >&2; exit 3")
    assert {name: type(value) for name, value in answer.items()} == {
        name: type(None) if name == "signal" else kind for name, kind in FIELDS.items()
    }
    assert code == answer["exit_code"] == answer["code"] == 3
    assert (answer["stdout"], answer["stderr"], answer["reason"]) == ("out\n", "err\n", "exited")
    assert 0 < answer["duration"] < SECONDS


def test_json_says_signal_oom_and_timeout() -> None:
    assert run_json("sh", "-c", "kill -9 $$")[1].items() >= {"signal": 9, "reason": "signaled", "code": 137}.items()
    code, answer = run_json("--memory", "32M", "python3", "-c", "bytearray(200 << 20)")
    assert code == 137
    assert answer["reason"] == "oom"
    assert answer["oom_kills"] >= 1
    code, answer = run_json("--timeout", "0.2", "sleep", "1000")
    assert code == answer["exit_code"] == 124
    assert answer.items() >= {"timed_out": True, "code": 137, "reason": "signaled"}.items()


def test_json_gives_bytes_that_are_no_text_as_base64() -> None:
    _, answer = run_json("printf", r"\377\000")
    assert answer["stdout_encoding"] == "base64"
    assert base64.b64decode(answer["stdout"]) == b"\xff\x00"


def test_json_bounds_the_output() -> None:
    _, answer = run_json("head", "-c", str(17 << 20), "/dev/zero")
    assert answer["truncated"] is True
    assert len(answer["stdout"]) == 16 << 20


def test_json_of_an_error_is_one_object_too() -> None:
    code, answer = run_json("no-such-program")
    assert code == answer["exit_code"] == 127
    assert answer["error"]["type"] == "InvalidArgumentError"
    assert "no-such-program" in answer["error"]["message"]


# Signals to the command line


def test_version() -> None:
    assert run("--version").stdout.decode() == f"unisandbox {unisandbox.__version__}\n"


def test_doctor_finds_a_backend() -> None:
    done = run("doctor", "--deep")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"runc: can run here (tried)" in done.stdout


def test_doctor_as_json() -> None:
    answer = json.loads(run("doctor", "--json").stdout)
    assert answer["host"]["kernel"].startswith(os.uname().release)
    assert {"unisandbox", "python", "cgroups", "user namespaces"} <= set(answer["host"])
    backends = {probe["backend"]: probe for probe in answer["backends"]}
    assert backends["runc"]["available"] is True
    assert backends["runc"]["facts"]["runtime"]


def test_doctor_says_what_is_missing_and_how_to_get_it() -> None:
    hide = 'for p in crun runc youki; do p=$(command -v $p) && mount --bind /dev/null "$p"; done; exec "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", hide, "sh", *CLI]
    done = subprocess.run([*hidden, "doctor"], capture_output=True, check=False, timeout=SECONDS)
    assert done.returncode == (0 if find_spec("wasmtime") else 1)  # Wasm needs no runtime: something runs then
    assert b"runc: cannot run here\n  cause: " in done.stdout
    assert b"  remedy: " in done.stdout
    done = subprocess.run([*hidden, "run", "true"], capture_output=True, check=False, timeout=SECONDS)
    assert done.returncode == 125
    assert [line.split(b":")[0] for line in done.stderr.splitlines()] == [b"unisandbox", b"hint"]


def test_bench_measures_against_a_plain_process() -> None:
    done = run("bench", "--rounds", "2", "--json")
    answer = json.loads(done.stdout)
    measured = {m["name"]: m for m in answer["measurements"]}
    assert answer["rounds"] == 2
    assert measured["plain process"]["ratio"] == 1
    assert all(0 < m["least"] <= m["median"] <= m["most"] for m in measured.values())
    assert {"sandbox, create to first output", "sandbox, a further run in it", "sandbox, remove"} <= set(measured)
    assert b"2 rounds of each" in run("bench", "--rounds", "2").stdout


def test_without_a_command_there_is_the_help() -> None:
    asked, alone = run("--help"), run()
    assert (alone.returncode, alone.stderr) == (0, b"")
    assert alone.stdout == asked.stdout
    assert len(alone.stdout.splitlines()) > 10


def test_help_does_not_load_the_engine() -> None:
    code = (
        "import sys; sys.argv = ['unisandbox', 'run', '--help']\n"
        "import unisandbox.cli\n"
        "try: unisandbox.cli.main()\n"
        "except SystemExit: pass\n"
        "print('engine:', any(m.startswith(('unisandbox.engine', 'unisandbox.sandbox', 'anyio')) for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.stdout.splitlines()[-1] == "engine: False"
