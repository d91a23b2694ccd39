"""What `run` and `exec` have in common: the options of a process, and what is printed at its end."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from unisandbox.api import InvalidArgumentError
from unisandbox.cli.answering import answer
from unisandbox.cli.errors import say

if TYPE_CHECKING:
    from unisandbox.cli.run import Ended, Request

LARGEST_OUTPUT: Final = 16 << 20
"""Bytes of each stream that --json keeps; as of `Sandbox.run`."""

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS: Final = (
    click.option("-i", "--interactive", is_flag=True, help="Pass standard input on; otherwise the program has none."),
    click.option("-t", "--tty", is_flag=True, help="Give the program a terminal."),
    click.option(
        "-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="A variable; NAME alone takes your own value."
    ),
    click.option("-w", "--workdir", metavar="DIR", help="Working directory inside."),
    click.option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers inside.  [default: root inside]"),
)


def process_options(command: _F) -> _F:
    """The options of a process."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def pairs(values: Sequence[str]) -> dict[str, str]:
    """Of -e: NAME=VALUE, or NAME for the caller's value; one that the caller does not have is left out."""
    env: dict[str, str] = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not name:
            raise InvalidArgumentError(
                f"-e {value!r} has no name", hint="Write NAME=VALUE, or NAME for your own value."
            )
        if sign:
            env[name] = text
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def own_terminal(env: Mapping[str, str], *, tty: bool, as_json: bool) -> dict[str, str]:
    """The environment of a program that may get the caller's terminal."""
    if tty and as_json:
        raise InvalidArgumentError("-t and --json cannot be used together", hint="Leave out one of them.")
    return ({"TERM": os.environ.get("TERM", "xterm")} if tty else {}) | dict(env)


def attend(request: Request) -> int:
    """Run it, and say what there is to say at its end; the exit code."""
    import anyio

    from unisandbox.cli.run import run

    ended = anyio.run(run, request)
    program = request.argv[0]
    if request.collect is not None:
        answer(json.dumps(_as_json(request.argv, ended)))
    elif ended.timed_out:
        say(f"{program!r} did not end within {request.timeout:g} s; it was killed")
    elif ended.exit is not None and ended.exit.reason == "oom":
        say(f"{program!r} was killed: it reached the memory limit")
        click.echo("hint: give it more with --memory", err=True)
    elif ended.exit is not None and ended.exit.reason == "trap":
        say(f"{program!r} trapped: {ended.exit.detail}")
    elif ended.exit is not None and ended.exit.reason in {"cpu", "fuel"}:
        used_up = {"cpu": "processor time", "fuel": "fuel"}[ended.exit.reason]
        say(f"{program!r} was ended: its {used_up} is used up")
    elif ended.exit is not None and ended.exit.reason == "lost":
        say(f"{program!r} is gone, and how it ended could not be learned")
    return ended.code


def _as_json(argv: Sequence[str], ended: Ended) -> dict[str, object]:
    end = ended.exit
    return {
        "argv": list(argv),
        "exit_code": ended.code,
        "code": end.code if end else None,
        "signal": end.signal if end else ended.signal,
        "reason": end.reason if end else "interrupted",
        "oom_kills": end.oom_kills if end else 0,
        "detail": end.detail if end else "",
        "timed_out": ended.timed_out,
        "duration": round(ended.duration, 6),
        "truncated": ended.truncated,
        **text("stdout", ended.stdout),
        **text("stderr", ended.stderr),
    }


def text(name: str, data: bytes) -> dict[str, str]:
    """As text where it is UTF-8, else as base64; `*_encoding` says which."""
    try:
        return {name: data.decode(), f"{name}_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {name: base64.b64encode(data).decode(), f"{name}_encoding": "base64"}
