"""What a process was asked for with, in either mode, and what it begins with.

A process has what it was given until its guest has it: our copies of its streams are closed by whoever comes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal as signals
from collections.abc import AsyncIterator, Mapping
from typing import Final

import attrs

from unisandbox.api import (
    ContainerSpec,
    CreateTask,
    FailedPreconditionError,
    InvalidArgumentError,
    ProcessSpec,
    SandboxSpec,
    Stdio,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.backends.wasm.artefacts import Root
from unisandbox.backends.wasm.checks import NOT_EXECUTABLE, check_directory, environment
from unisandbox.backends.wasm.programs import Originals, Program, Programs

Streams = tuple[int | None, int | None, int | None]
"""Descriptors of standard input, output and error."""

_NONE: Final[Streams] = (None, None, None)
_IGNORED: Final = frozenset({signals.SIGCHLD, signals.SIGURG, signals.SIGWINCH, signals.SIGCONT})
"""Signals whose default action is to do nothing. Source: signal(7)."""

STOPPING: Final = frozenset({signals.SIGSTOP, signals.SIGTSTP, signals.SIGTTIN, signals.SIGTTOU})
"""Signals that stop a process for a while."""


@attrs.define(eq=False)
class Given:
    """What a process was asked for with.

    Attributes:
        spec: what to run.
        streams: our copies.
    """

    spec: ProcessSpec
    streams: Streams = _NONE

    @classmethod
    def of(cls, spec: ProcessSpec, stdio: Stdio) -> Given:
        """Raises UnavailableError: no descriptor is left."""
        with contextlib.ExitStack() as opened:

            def copy(fd: int | None) -> int | None:
                made = None if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                if made is not None:
                    opened.callback(os.close, made)
                return made

            try:
                given = cls(spec, (copy(stdio.stdin), copy(stdio.stdout), copy(stdio.stderr)))
            except OSError as error:
                raise UnavailableError(
                    f"no file descriptor is left for a guest's streams: {error.strerror}",
                    hint="This process has too many open files: close some, or raise its limit (ulimit -n).",
                ) from error
            opened.pop_all()
            return given

    def take(self) -> Streams:
        """The copies, which are the caller's from now on."""
        streams, self.streams = self.streams, _NONE
        return streams

    def close(self) -> None:
        """Close the copies. Repeating is harmless."""
        for fd in self.take():
            if fd is not None:
                os.close(fd)


@attrs.frozen
class Surroundings:
    """Environment and working directory of a process."""

    env: Mapping[str, str]
    cwd: str

    @classmethod
    def of(cls, spec: SandboxSpec, root: Root) -> Surroundings:
        """What every process of a sandbox has that does not say otherwise."""
        return cls(environment(spec, root.env), root.cwd if spec.cwd == "/" else spec.cwd)

    def within(self, container: ContainerSpec, process: ProcessSpec) -> Surroundings:
        """What this one has."""
        cwd = process.cwd or container.cwd or self.cwd
        return Surroundings({**self.env, **container.env, **process.env}, cwd)


@contextlib.asynccontextmanager
async def found(
    programs: Programs, argv0: str, around: Surroundings, root: int, lower: Originals, label: str
) -> AsyncIterator[Program]:
    """The module that a command means, open while this is.

    Args:
        programs: the engine's.
        argv0: the command's first word.
        around: of the process.
        root, lower: see `Programs.find`.
        label: of the sandbox.

    Raises:
        InvalidArgumentError: there is none (exit code 127), or it cannot be begun with or there (126).
    """
    check_directory(root, around.cwd, argv0, label)
    program = await programs.find(argv0, around.env, root, lower, cwd=around.cwd)
    try:
        yield program
    finally:
        program.close()


def not_started(argv0: str, label: str, error: InvalidArgumentError) -> InvalidArgumentError:
    """Why a guest was not started, in the words of whoever asked for it."""
    return InvalidArgumentError(
        f"cannot start {argv0!r} in sandbox {label!r}: {error.message}",
        hint=error.hint,
        exit_code=error.exit_code or NOT_EXECUTABLE,
    )


def check_room(most: int | None, running: int, what: str) -> None:
    """Raises FailedPreconditionError: as many guests run in `what` as `pids` allows."""
    if most is not None and running >= most:
        raise FailedPreconditionError(
            f"{most} guests run in {what}, as many as its limit of processes allows",
            hint="Create it with a larger Resources(pids=), or end some.",
        )


def is_deadly(signal: int) -> bool:
    """Whether it ends a guest, which has no handlers."""
    return signal not in _IGNORED and signal not in STOPPING


def ended_before_start(container: str, exec_id: str) -> FailedPreconditionError:
    """A process, or its container, was ended before it could be started."""
    return FailedPreconditionError(f"process {exec_id or 'main'} of {container!r} was ended before its start")


def container_of(request: CreateTask, backend: str) -> ContainerSpec:
    """Raises UnsupportedError: it asks for a bundle."""
    if request.container is None:
        raise UnsupportedError("bundle", backend, hint="Give a ContainerSpec.")
    return request.container
