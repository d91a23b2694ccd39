"""What runtimes say when they fail: their logs, and the typed error that belongs to each."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Final

from unisandbox.api.errors import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
)

_LOG_TAIL: Final = 16384
_MESSAGE_LIMIT: Final = 600

# What runtimes say, and no exit code tells. Source: crun 1.8.1 and runc 1.1.5, by trying.
_MISSING: Final = re.compile(r"does not exist|no such container", re.IGNORECASE)
_NOT_RUNNING: Final = re.compile(r"not running|already stopped|no such process|process already finished", re.IGNORECASE)
_NOT_STOPPED: Final = re.compile(
    r"not stopped|is not in `created` or `stopped` state|is still running|is running", re.IGNORECASE
)
_PROGRAM_MISSING: Final = re.compile(
    r"executable file .*not found in \$PATH|(?:exec|executable|open executable)\b.*no such file or directory",
    re.IGNORECASE,
)
_PROGRAM_REFUSED: Final = re.compile(
    r"(?:exec|executable|open executable)\b.*"
    r"(?:permission denied|operation not permitted|exec format error|is a directory|not a directory)"
    r"|(?:chdir|cwd|getcwd)\b.*(?:no such file or directory|permission denied|not a directory)",
    re.IGNORECASE,
)


def failure(label: str, code: int, log: str, *, starts_program: bool = False) -> SandboxError:
    """The error for a call that failed.

    Args:
        label: which call.
        code: its exit code, or minus the number of a signal.
        log: what `read_log` gave.
        starts_program: the call starts a user's program, which may be missing.
    """
    reason = last_message(log)
    message = f"{label} failed: {reason or describe(code)}"
    if starts_program and _PROGRAM_REFUSED.search(reason):
        return InvalidArgumentError(message, exit_code=126)
    if starts_program and _PROGRAM_MISSING.search(reason):
        return InvalidArgumentError(message, exit_code=127)
    if _NOT_STOPPED.search(reason) or _NOT_RUNNING.search(reason):
        return FailedPreconditionError(message)
    if re.search(r"\bcontainer\b", reason, re.IGNORECASE) and _MISSING.search(reason):
        return NotFoundError(message)
    hint = "" if reason else "It wrote no log; what it wrote to its standard error went to the container's."
    return BackendError(message, hint=hint, log=log)


def read_log(path: str) -> str:
    """The end of a runtime's log as text: one message a line, "" when there is none.

    A runtime writes JSON objects; lines that are none are kept as they are, without control characters.
    """
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL))
            raw = file.read(_LOG_TAIL)
    except OSError:
        # It never came to opening its log: there is nothing to tell, and this is asked for another error's message.
        return ""
    lines = raw.decode("utf-8", "replace").splitlines()
    if size > _LOG_TAIL:
        lines = lines[1:] or lines
    return "\n".join(filter(None, (_line(line) for line in lines)))


def _line(line: str) -> str:
    try:
        entry = json.loads(line)
        text = str(entry["msg"])
        level = str(entry.get("level", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text, level = line, ""
    text = "".join(character if character.isprintable() else " " for character in text).strip()
    return f"{level}: {text}" if text and level and level not in {"error", "fatal"} else text


def last_message(log: str) -> str:
    """The line of a log (as `read_log` gives it) that says why: its last, cut to a readable length."""
    lines = log.splitlines()
    text = lines[-1] if lines else ""
    return text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + " ..."


def describe(code: int) -> str:
    """An exit code or signal of a runtime in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
