"""What a worker tells of its guest's end beside its exit status, read as a stranger's words."""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any, Final

import attrs

from unisandbox.api import Exit
from unisandbox.api.exits import ExitReason
from unisandbox.backends.wasm.process.worker import REPORT_BYTES

# The codes with which a worker ends for them; see `worker`.
_CODES: Final[dict[ExitReason, int]] = {"trap": 134, "oom": 137, "cpu": 137, "fuel": 137}
_DETAIL_CHARACTERS: Final = 8192


def new_report() -> int:
    """A descriptor of an empty one, which can be written, and never grow or shrink."""
    fd = os.memfd_create("report", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, REPORT_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def told(exit: Exit, report: int) -> Exit:
    """How the guest ended, from how its worker did.

    What the kernel says counts: the report can only say more of an end with the very code that goes with it, and a
    guest that has broken out can say no more than it could by its exit code: how it ended itself.

    Args:
        exit: of the worker.
        report: its descriptor, or -1.
    """
    if report < 0 or exit.reason != "exited" or exit.code not in _CODES.values():
        return exit
    words = os.pread(report, REPORT_BYTES, 0).rstrip(b"\0")
    try:
        said: Any = json.loads(words)
        reason, detail = said["reason"], said["detail"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return exit
    if not isinstance(reason, str) or not isinstance(detail, str):
        return exit
    for known, code in _CODES.items():
        if reason == known and code == exit.code:
            detail = detail.encode("utf-8", "replace").decode()[:_DETAIL_CHARACTERS]
            return attrs.evolve(exit, reason=known, detail=detail, oom_kills=exit.oom_kills + (known == "oom"))
    return exit
