"""How errors are shown: one readable line, and a hint."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from unisandbox.api import FailedPreconditionError, InvalidArgumentError, SandboxError
from unisandbox.cli.answering import answer, forget_output

OWN_ERROR: Final = 125
"""The exit code for our own errors, as docker run's; 126 and 127 are for programs that cannot be started."""

STDOUT_GONE: Final = 141
"""128 + SIGPIPE: what a shell says of a program whose reader has left."""


def with_json_errors(work: Callable[[], int], *, as_json: bool, debug: bool) -> int:
    """Do the work; what goes wrong is shown, with `as_json` also as one JSON object. Returns the exit code."""
    try:
        return _with_errors(work, as_json=as_json, debug=debug)
    except BrokenPipeError:  # not for click, which makes it 1
        forget_output()
        return STDOUT_GONE


def _with_errors(work: Callable[[], int], *, as_json: bool, debug: bool) -> int:
    try:
        return work()
    except Exception as raised:
        error = the_one(raised)
        if isinstance(error, BrokenPipeError):
            raise error from raised
        code = explain(error, debug=debug)
        if as_json:
            with suppress(FailedPreconditionError):  # of which this is the error, perhaps
                answer(json.dumps({"exit_code": code, "error": as_dict(error)}))
        return code


def as_dict(error: Exception) -> dict[str, str]:
    """For `--json`."""
    message = error.message if isinstance(error, SandboxError) else str(error)
    hint = error.hint if isinstance(error, SandboxError) else ""
    return {"type": type(error).__name__, "message": message, "hint": hint}


def explain(error: Exception, *, debug: bool) -> int:
    """Say it on standard error; the exit code."""
    if isinstance(error, SandboxError):
        code = OWN_ERROR
        if isinstance(error, InvalidArgumentError) and error.exit_code is not None:
            code = error.exit_code
        hint = error.hint
        if getattr(error, "log", "") and not debug:
            hint = f"{hint} --debug shows the backend's log.".strip()
        complain(error, error.message, hint, debug=debug)
        return code
    text = f"unexpected {type(error).__name__}: {error}"
    return complain(error, text, "This is a bug in unisandbox; --debug shows where it happened.", debug=debug)


def complain(error: Exception, message: str, hint: str, *, debug: bool) -> int:
    """Say this on standard error; the exit code."""
    if debug:
        traceback.print_exception(error)
    say(message)
    if hint:
        print(f"hint: {_one_line(hint)}", file=sys.stderr)
    return OWN_ERROR


def say(message: str) -> None:
    """One line on standard error."""
    print(f"unisandbox: {_one_line(message)}", file=sys.stderr)


def the_one(error: Exception) -> Exception:
    """What is in a group, as task groups wrap it: of what went wrong at the same time, the first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _one_line(text: str) -> str:
    return " ".join(text.split())
