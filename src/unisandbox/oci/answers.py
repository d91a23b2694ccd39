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
_NO_ERROR: Final = re.compile("(?:trace|debug|info|warn|warning): ")

# What runtimes say, and no exit code tells. Source: crun 1.8.1, runc 1.1.5 and youki 0.7.0, by trying. Compiled when
# one fails.
_MISSING: Final = r"does not exist|no such container"
_NOT_RUNNING: Final = r"not running|already stopped|no such process|process already finished"
_NOT_STOPPED: Final = (
    r"not stopped|is not in `created` or `stopped` state|is still running|is running|incompatible container status"
)
# youki says "exec process failed" of whatever its child failed at.
_EXECUTABLE: Final = r"(?:exec(?! process failed)|executable|open executable)\b"
_PROGRAM_MISSING: Final = rf"executable .*not found in \$PATH|{_EXECUTABLE}.*no such file or directory"
_PROGRAM_REFUSED: Final = (
    rf"{_EXECUTABLE}.*(?:permission denied|operation not permitted|exec format error|is a directory|not a directory"
    r"|does not have correct permissions)"
    r"|the path `[^`]*` is not a regular file"  # crun 1.28
    r"|(?:chdir|cwd|getcwd)\b.*(?:no such file or directory|permission denied|not a directory|ENOENT|EACCES|ENOTDIR)"
)
_NO_ROOM: Final = r"\b(?:clone3?|v?fork(?:/exec)?)\b.*(?:resource temporarily unavailable|EAGAIN)"
NO_ROOM_HINT: Final = (
    "Its limit of processes (Resources.pids) or one of the host's is reached: wait until others have ended, or raise it"
    " with update()."
)
# What is no part of the reason in a line of youki's log.
_YOUKI_FRAME: Final = frozenset({"timestamp", "level", "message", "target"})


def failure(label: str, code: int, log: str, *, starts_program: bool = False) -> SandboxError:
    """The error for a call that failed.

    Args:
        label: which call.
        code: its exit code, or minus the number of a signal.
        log: what `read_log` gave.
        starts_program: the call starts a user's program, which may be missing.
    """
    reason = why(log)
    message = f"{label} failed: {reason or describe(code)}"

    def says(pattern: str) -> bool:
        return re.search(pattern, reason, re.IGNORECASE) is not None

    if starts_program and says(_PROGRAM_REFUSED):
        return InvalidArgumentError(message, exit_code=126)
    if starts_program and says(_PROGRAM_MISSING):
        return InvalidArgumentError(message, exit_code=127)
    if says(_NO_ROOM):
        return FailedPreconditionError(message, hint=NO_ROOM_HINT)
    if says(_NOT_STOPPED) or says(_NOT_RUNNING):
        return FailedPreconditionError(message)
    if says(r"\bcontainer\b") and says(_MISSING):
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
    return "\n".join(filter(None, (_line(line) for line in _whole(lines))))


def _whole(lines: list[str]) -> list[str]:
    """With each object on one line: crun with json-c (1.28 of Debian) writes it on several."""
    text = re.sub(r"^\{\n((?: .*\n)*)\}$", lambda found: found.group().replace("\n", " "), "\n".join(lines), flags=re.M)
    return text.split("\n")


def _line(line: str) -> str:
    try:
        entry = json.loads(line)
        if "msg" in entry:
            text = str(entry["msg"])
        else:
            # youki's: the cause is in fields beside the message.
            fields = [str(value) for key, value in entry.items() if key not in _YOUKI_FRAME]
            text = ": ".join(filter(None, (str(entry["message"]), ", ".join(fields))))
        level = str(entry.get("level", "")).lower()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text, level = line, ""
    text = "".join(character if character.isprintable() else " " for character in text).strip()
    return f"{level}: {text}" if text and level and level not in {"error", "fatal"} else text


def why(log: str) -> str:
    """What a log (as `read_log` gives it) tells of a failure, cut to a readable length: its last line.

    And before it the first error, if there are several: a runtime that logs one at each level (youki) has the cause
    there, and in its last perhaps no more than "failed to unix syscall".
    """
    lines = log.splitlines()
    errors = [line for line in lines if not _NO_ERROR.match(line)] or lines[-1:]
    said = dict.fromkeys((errors[0], errors[-1])) if errors else ()
    return "; ".join(text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + " ..." for text in said)


def describe(code: int) -> str:
    """An exit code or signal of a runtime in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
