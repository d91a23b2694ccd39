"""The state directory that the commands share, and the engine on it: the one that runs is used, or one is opened.

No daemon: the first command that needs an engine starts its keeper, which lives as long as there are sandboxes. Every
command is a client beside others, and its end ends nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

from unisandbox.api import BackendError, FailedPreconditionError, RecoveryReport, UnavailableError
from unisandbox.cli.errors import say
from unisandbox.engine.runtime_directory import POINTER, runtime_directory
from unisandbox.engine.state_files import has_records, known_id
from unisandbox.host.keeper import KeeperElsewhereError, KeeperVersionError
from unisandbox.sandbox import Engine

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.01
# How often to come again to a directory that a program outside of these commands opens and closes all the time.
_TRIES: Final = 5


def default_directory() -> str:
    """Where state is kept when nothing else is said."""
    if os.geteuid() == 0:
        return "/var/lib/unisandbox/cli"
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "unisandbox", "cli")


@asynccontextmanager
async def opened(directory: str | None, *, create: bool) -> AsyncIterator[Engine | None]:
    """The engine on the state directory; it is left, not ended, when the context is.

    Args:
        directory: None: the default.
        create: make one if there is none. Otherwise one is opened only to recover what a former one has left, and
            where nothing is, None is the answer and nothing is made.

    Raises:
        SandboxError: the directory cannot be used, or this host cannot carry an engine.
    """
    engine = await _engine(default_directory() if directory is None else directory, create=create)
    if engine is None:
        yield None
        return
    async with engine:
        for line in recovered(engine.recovery):
            say(line)
        yield engine


async def _engine(path: str, *, create: bool) -> Engine | None:
    for left in reversed(range(_TRIES)):
        engine = await _attached(path)
        if engine is not None or not (create or _is_in_use(path)):
            return engine
        async with _starting(path):
            engine = await _attached(path)  # another command was faster
            if engine is not None or not (create or _is_in_use(path)):
                return engine
            try:
                return await Engine.open(path, policy="keep")
            except FailedPreconditionError:
                # A program that is none of these commands was faster.
                if not left:
                    raise
    raise AssertionError("the loop returns or raises")


async def _attached(path: str) -> Engine | None:
    try:
        return await Engine.attach(path)
    except (KeeperElsewhereError, KeeperVersionError):
        raise
    except UnavailableError:
        return None  # no keeper runs, or it is about to end


def _is_in_use(path: str) -> bool:
    """Whether an engine had it and was not left in order: it has records, or has got no further than to its pointer."""
    try:
        engine_id = known_id(path)
        pointer = os.path.join(runtime_directory(), engine_id + POINTER)
        return has_records(path) or (engine_id != "" and os.path.lexists(pointer))
    except OSError as error:
        raise BackendError(
            f"cannot read the state directory {path!r}: {error.strerror}",
            hint="Use one of your own: --state DIR, or UNISANDBOX_STATE.",
        ) from error


@asynccontextmanager
async def _starting(path: str) -> AsyncIterator[None]:
    """No other command starts a keeper meanwhile: one that is started is attached to, never taken over."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(
            f"cannot use the state directory {path!r}: {error.strerror}",
            hint="It must be a directory that this user can write: --state DIR, or UNISANDBOX_STATE.",
        ) from error
    try:
        with anyio.move_on_after(_START_SECONDS) as scope:
            while not _try_lock(fd):
                await anyio.sleep(_POLL_SECONDS)  # a lock has no event with a deadline
        if scope.cancelled_caught:
            raise UnavailableError(
                f"another command has been starting an engine on {path!r} for {_START_SECONDS:g} s",
                hint="See which process has the directory open: fuser -v.",
            )
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def recovered(report: RecoveryReport) -> list[str]:
    """What became of what was left by former commands, one line each; what simply lives on is not told."""
    lines = []
    for found in report.sandboxes:
        label = found.name or found.sandbox_id[:12] or "without a record"
        if found.action == "removed":
            lines.append(f"sandbox {label!r} is gone and was cleaned up: {found.reason}")
        elif found.action != "adopted":
            lines.append(f"sandbox {label!r} was left behind and could not be cleaned up: {found.reason}")
    for bad in report.damaged:
        kept = f"; it is kept as {bad.kept_as}" if bad.kept_as else ""
        if report.keeper == "attached":
            remedy = "use that version" if bad.later else "unisandbox doctor --fix frees it"
            kept = f". What it describes may run on: {remedy}"
        lines.append(f"the record {bad.path} cannot be used: {bad.reason}{kept}")
    return lines
