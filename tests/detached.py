"""Commands of the command line on one state directory, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import keepers
from tests.command_line import run


def ok(*args: str) -> str:
    """What a command prints that succeeds without a word on standard error."""
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout.decode()


def refused(*args: str) -> list[str]:
    """The lines on standard error of a command that fails with our own exit code."""
    done = run(*args)
    assert done.returncode == 125, done
    lines = done.stderr.decode().splitlines()
    assert [line.partition(": ")[0] for line in lines] in (["unisandbox"], ["unisandbox", "hint"])
    return lines


def launched(*args: str) -> str:
    return ok("run", "-d", "--memory", "64M", *args).strip()


def listed() -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(ok("ps", "-a", "--json"))
    return answer


def ids() -> list[str]:
    found = json.loads(run("ps", "-a", "--json").stdout)
    return [sandbox["id"] for sandbox in found["sandboxes"]]


def word_of(name: str) -> str:
    [word] = [sandbox["status"] for sandbox in listed()["sandboxes"] if sandbox["name"] == name]
    assert isinstance(word, str)
    return word


def keeper_of(state: Path) -> int:
    pid = json.loads((state / "lock").read_bytes())["keeper"]
    assert isinstance(pid, int)
    return pid


def until(condition: Callable[[], bool]) -> None:
    """Wait for what a program inside is about to do."""
    keepers.until(condition, "what the program inside does")
