"""What the programs in examples/ promise to show."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

# CPython is compiled at the first run on a machine: 25 s of processor time.
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(400)]

EXAMPLES: Final = Path(__file__).resolve().parent.parent.parent / "examples"
SECONDS: Final = 300.0


def run_example(name: str, directory: Path) -> str:
    """What it prints; it must end well, warn of nothing and leave its directory as it was."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert os.listdir(directory) == []
    return done.stdout


def test_first(tmp_path: Path) -> None:
    assert run_example("first.py", tmp_path).startswith("42, in ")


def test_agent_tools_bounds_every_snippet(tmp_path: Path) -> None:
    lines = run_example("agent_tools.py", tmp_path).splitlines()
    told = dict(line.split(" -> ") for line in lines[:-1])
    assert {what.strip(): answer for what, answer in told.items()} == {
        "makes a file": "ok, no output",
        "reads it back": "204",
        "has a mistake": "failed: NameError: name 'undefined' is not defined",
        "never ends": "stopped: it took longer than a second",
        "wants all memory": "stopped: it needed more memory than it may have",
        "looks for secrets": "[] []",
        "calls home": "failed: urllib.error.URLError: <urlopen error [Errno 101] Network is unreachable>",
    }
    assert lines[-1] == "it leaves ['squares.csv']: 41 bytes, read from outside"


def test_terminal_follows_its_size(tmp_path: Path) -> None:
    assert run_example("terminal.py", tmp_path).splitlines() == [
        "window: 25 80",
        "resized: 50 132",
        "the shell ended with code 4",
    ]


def test_tour_shows_real_programs_and_leaves_nothing(tmp_path: Path) -> None:
    begun = time.monotonic()
    report = run_example("tour.py", tmp_path)
    assert time.monotonic() - begun < 30  # about 2 s on an idle machine
    assert "failed\n" not in report.replace(" 0 failed\n", "\n")
    for promise in (
        "examples, 0 failed",
        "out: ann,10000,149985000",
        "5 pieces over",
        "reason 'oom', signal 9",
        "killed with all it had started; it had said 'begun\\n'",
        "answer 200; the server logged: GET / HTTP/1.1",
    ):
        assert promise in report
    if importlib.util.find_spec("wasmtime") is None:
        assert "pip install 'unisandbox[wasm]'" in report
    else:
        for promise in (
            "beside it: guests (wasm), tour (runc)",
            "168 primes below 1000",
            "reason 'trap': memory_out_of_bounds",
            "reason 'cpu'",
            "made, used and removed",
        ):
            assert promise in report
    assert ("10 commits" in report) == (shutil.which("git") == "/usr/bin/git")
    assert report.endswith("Left behind: nothing.\n")


def test_wasm_code_runner_runs_both_languages_and_bounds_them(tmp_path: Path) -> None:
    pytest.importorskip("wasmtime")
    answers = [line.partition(" -> ")[2] for line in run_example("wasm_code_runner.py", tmp_path).splitlines()]
    assert answers[:3] == ["285", "1 4 9", "mine"]
    assert "FileNotFoundError" in answers[3]
    assert answers[4].strip() == "failed with 7"
    assert "NameError" in answers[5]
    assert answers[6].startswith("stopped: it took longer")
    assert answers[7].startswith("stopped: it took longer")
    assert answers[8] == "failed with 1 MemoryError"


def test_every_example_is_tested_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "agent_tools.py",
        "first.py",
        "terminal.py",
        "tour.py",
        "wasm_code_runner.py",
    ]
