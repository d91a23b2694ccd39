"""Sandboxes that live on beside the commands: launched, found, listed, stopped, removed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import anyio
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    ContainerStatus,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    SandboxStatus,
)
from unisandbox.sandbox import Container, Engine, Sandbox
from unisandbox.sandbox.launching import create_launched
from unisandbox.sandbox.sandbox import SandboxOptions

PROGRAM_LABEL: Final = "unisandbox.program"
"""The label that says what was launched, as JSON, so that it can be shown, and launched again."""
SHORT_ID: Final = 12

_MAIN: Final = "main"
_LEAST_PREFIX: Final = 3
_SIGNALS: Final = {number.name.removeprefix("SIG"): int(number) for number in signal.Signals}

Word = Literal["creating", "idle", "running", "paused", "exited", "stopped", "unusable"]


class Program(NamedTuple):
    """What is launched in a sandbox; as of `Sandbox.launch`."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    cwd: str | None = None
    user: str | None = None

    def as_spec(self) -> ProcessSpec:
        """As the request to start it."""
        return ProcessSpec(argv=self.argv, env=self.env, cwd=self.cwd, user=self.user)

    def as_label(self) -> str:
        """As text that a label can hold."""
        return json.dumps(self._asdict())

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Program | None:
        """What the labels say; None when these commands have not launched anything there."""
        try:
            said = json.loads(labels[PROGRAM_LABEL])
            return cls(**(said | {"argv": tuple(said["argv"])}))
        except (KeyError, TypeError, ValueError):  # somebody else's sandbox, or somebody else's label
            return None


class Row(NamedTuple):
    """One sandbox, as `ps` shows it.

    Attributes:
        status: of the sandbox.
        word: what is going on in it.
        program: what was launched in it.
        exit: how that has ended.
    """

    status: SandboxStatus
    word: Word
    program: Program | None
    exit: Exit | None = None

    @classmethod
    def of(cls, status: SandboxStatus) -> Row:
        """What the status comes to."""
        program, main = Program.of(status.labels), main_of(status)
        if status.unusable:
            return cls(status, "unusable", program)
        if status.state != "ready":
            return cls(status, "creating" if status.state == "created" else "stopped", program)
        if main is None:
            return cls(status, "idle", program)
        if main.state == "stopped":
            return cls(status, "exited", program, main.exit)
        return cls(status, "paused" if main.state == "paused" else "running", program)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs in it any more; `ps` shows those with -a."""
        return self.word in {"exited", "stopped"}

    def as_json(self) -> dict[str, object]:
        """For `--json`; times in seconds since the epoch, `unusable` as in `SandboxStatus`."""
        return {
            "id": self.status.id,
            "name": self.status.name,
            "backend": self.status.backend,
            "status": self.word,
            "unusable": self.status.unusable,
            "command": list(self.program.argv) if self.program else [],
            "exit": attrs.asdict(self.exit) if self.exit else None,
            "created_at": self.status.created_at,
            "expires_at": self.status.expires_at,
        }

    def cells(self, now: float) -> tuple[str, ...]:
        """For people: id, name, command, status, created, what is left of its ttl."""
        status, word = self.status, str(self.word)
        command = " ".join(self.program.argv) if self.program else ""
        if self.exit is not None:
            words = {"oom": "out of memory", "trap": "trap", "cpu": "out of processor time", "fuel": "out of fuel"}
            how = "unknown" if self.exit.reason == "lost" else str(self.exit.code)
            how += f", {words[self.exit.reason]}" if self.exit.reason in words else ""
            word = f"exited ({how}) {_span(now - self.exit.exited_at)} ago"
        elif self.word == "stopped" and status.stopped_at is not None:
            word = f"stopped {_span(now - status.stopped_at)} ago"
        elif self.word == "unusable":
            word = f"{status.state}, unusable here"
        left = "" if status.expires_at is None else _span(status.expires_at - now)
        shown = command if len(command) <= 40 else command[:37] + "..."
        return (
            status.id[:SHORT_ID],
            status.name or "",
            shown.encode("unicode_escape", "replace").decode(),  # a command may hold anything
            word,
            f"{_span(now - status.created_at)} ago",
            left,
        )


def main_of(status: SandboxStatus) -> ContainerStatus | None:
    """The container in which `run` and `exec` work."""
    return next((container for container in status.containers if container.name == _MAIN), None)


def table(rows: Sequence[Row], now: float) -> list[str]:
    """Lines for people."""
    cells = [("ID", "NAME", "COMMAND", "STATUS", "CREATED", "TTL"), *(row.cells(now) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{int(seconds)} second{'' if int(seconds) == 1 else 's'}"


async def launch(engine: Engine, options: SandboxOptions, program: Program) -> Sandbox:
    """Create a sandbox and start a program in it that nobody has to wait for; on any failure nothing is left."""
    labelled: SandboxOptions = {**options, "labels": {PROGRAM_LABEL: program.as_label()}}
    try:
        return await create_launched(engine, labelled, program.as_spec())
    except AlreadyExistsError as error:
        raise AlreadyExistsError(
            error.message, hint=f"Take another --name, or: unisandbox rm -f {options.get('name')}"
        ) from error


async def find(engine: Engine | None, ref: str) -> Sandbox:
    """The sandbox with that name or id, or the only one whose id begins so.

    Raises:
        NotFoundError: there is none.
        InvalidArgumentError: there are several.
    """
    missing = NotFoundError(f"no sandbox has the name or id {ref!r}", hint="unisandbox ps -a lists all there are.")
    if engine is None:
        raise missing
    try:
        return await engine.get(ref)
    except NotFoundError:
        found = [status.id for status in await engine.list() if status.id.startswith(ref)]
    if not found or len(ref) < _LEAST_PREFIX:
        raise missing
    if len(found) > 1:
        raise InvalidArgumentError(f"the ids of {len(found)} sandboxes begin with {ref!r}", hint="Give more of it.")
    return await engine.get(found[0])


async def running(sandbox: Sandbox, ref: str, *, or_idle: bool = False) -> Row:
    """See that something runs in it, or, with `or_idle`, can be run.

    Raises:
        FailedPreconditionError: it does not.
    """
    row = Row.of(await sandbox.status())
    if row.word == "running" or (or_idle and row.word == "idle"):
        return row
    hints = {"paused": "unisandbox unpause", "exited": "unisandbox start", "stopped": "unisandbox start"}
    hint = f"{hints[row.word]} {ref} first." if row.word in hints and (row.program or row.word == "paused") else ""
    raise FailedPreconditionError(f"nothing can be done in sandbox {ref!r}: it is {row.word}", hint=hint)


async def start(sandbox: Sandbox, ref: str) -> None:
    """Launch its program again, with its files as they are; one that runs goes on."""
    row = Row.of(await sandbox.status())
    if row.word in {"running", "paused"}:
        return
    if row.program is None:
        raise FailedPreconditionError(
            f"sandbox {ref!r} was not made by `unisandbox run -d`: what to start in it is not known",
            hint=f"unisandbox exec {ref} PROGRAM",
        )
    await sandbox.start()
    program = row.program
    await sandbox.launch(program.argv, env=program.env, cwd=program.cwd, user=program.user)


async def stop(sandbox: Sandbox, grace: float) -> None:
    """End what runs in it: SIGTERM, and SIGKILL after `grace` seconds. Its files and its output stay."""
    row = Row.of(await sandbox.status())
    if row.is_over or row.word == "idle":
        return
    if row.word == "paused":
        await sandbox.resume()
    if row.program is None or len(row.status.containers) > 1:
        await sandbox.stop(grace)
        return
    # Not the sandbox: with that its output would go.
    container = await sandbox.containers.get(_MAIN)
    if grace > 0:
        await container.signal(signal.SIGTERM)
        with anyio.move_on_after(grace):
            await container.wait()
            return
    await container.kill()


async def kill(sandbox: Sandbox, ref: str, number: int) -> None:
    """Send a signal to its program."""
    await running(sandbox, ref)
    await (await sandbox.containers.get(_MAIN)).signal(number)


async def wait(sandbox: Sandbox, ref: str) -> Exit:
    """Wait until its program has ended; one that has ended is fine."""
    row = Row.of(await sandbox.status())
    if row.exit is not None:
        return row.exit
    if row.word != "paused":
        await running(sandbox, ref)
    return await (await sandbox.containers.get(_MAIN)).wait()


async def pause(sandbox: Sandbox, ref: str) -> None:
    """Hold everything in it."""
    await running(sandbox, ref)
    await sandbox.pause()


async def unpause(sandbox: Sandbox, ref: str) -> None:
    """Let it go on."""
    row = Row.of(await sandbox.status())
    if row.word != "paused":
        raise FailedPreconditionError(f"sandbox {ref!r} is not paused: it is {row.word}")
    await sandbox.resume()


async def remove(sandbox: Sandbox, ref: str, *, force: bool) -> None:
    """Free everything of it.

    Raises:
        FailedPreconditionError: something runs in it, and `force` was not given.
    """
    if not force:
        row = Row.of(await sandbox.status())
        if row.word in {"running", "paused", "creating"}:
            raise FailedPreconditionError(
                f"sandbox {ref!r} is {row.word}", hint=f"unisandbox stop {ref} first, or unisandbox rm -f {ref}"
            )
    await sandbox.remove()


async def main_container(sandbox: Sandbox, ref: str) -> Container:
    """The container of its program.

    Raises:
        NotFoundError: nothing was run in it.
    """
    try:
        return await sandbox.containers.get(_MAIN)
    except NotFoundError as error:
        raise NotFoundError(f"nothing has run in sandbox {ref!r} yet") from error


def now() -> float:
    """Seconds since the epoch."""
    return time.time()


def signal_number(text: str) -> int:
    """Of 9, KILL or SIGKILL.

    Raises:
        InvalidArgumentError: there is no such signal.
    """
    name = text.upper()
    number = int(name) if name.isdecimal() else _SIGNALS.get(name.removeprefix("SIG"), 0)
    if not 0 < number < signal.NSIG:
        raise InvalidArgumentError(f"there is no signal {text!r}", hint="Write a number or a name, as in TERM or 15.")
    return number
