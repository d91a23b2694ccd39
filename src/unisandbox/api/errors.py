"""The error tree, and the one table from errors to gRPC status codes.

A message says what failed, for which thing and why; `hint` says what to do about it.
"""

from __future__ import annotations

import copyreg
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unisandbox.api.exits import Completed


class SandboxError(Exception):
    """The root of every error that unisandbox raises on purpose.

    Args:
        message: what failed, for which thing, and why; one sentence without a full stop.
        hint: what the reader can do about it; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # That of an exception calls the class with the message alone, and some of these want more.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class InvalidArgumentError(SandboxError):
    """An argument is wrong whatever the state of the system; also a program that cannot be started.

    `exit_code` is what a shell would answer for a program that could not be started (127 not found, 126 not
    executable), and None for every other argument.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class NotFoundError(SandboxError):
    """No sandbox, container, process or file of that name."""


class AlreadyExistsError(SandboxError):
    """The name or id is taken."""


class FailedPreconditionError(SandboxError):
    """The thing is not in a state in which this can be done."""


class UnavailableError(SandboxError):
    """It cannot run on this host now; the message says what is missing, the hint how to get it."""


class UnsupportedError(SandboxError):
    """A backend cannot do what was asked. Raised before any side effect.

    Args:
        capability: what was asked for, by its name in `Capabilities` or in the spec.
        backend: the backend that cannot do it.
        alternatives: backends that can, or other ways; may be empty.
    """

    def __init__(
        self, capability: str, backend: str, *, alternatives: Sequence[str] = (), reason: str = "", hint: str = ""
    ) -> None:
        message = f"{capability} is not supported by backend {backend!r}" + (f": {reason}" if reason else "")
        if alternatives and not hint:
            hint = f"Supported by: {', '.join(alternatives)}."
        super().__init__(message, hint=hint)
        self.capability = capability
        self.backend = backend
        self.alternatives: tuple[str, ...] = tuple(alternatives)


class BackendError(SandboxError):
    """A runtime, VMM, agent or helper failed.

    Args:
        message: what failed and for which thing.
        hint: what to do about it.
        log: the end of the backend's own log, as it is.
    """

    def __init__(self, message: str, *, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n{self.log.rstrip()}" if self.log.strip() else text


class DeadlineExceededError(SandboxError):
    """The time given was not enough; what had been started was ended.

    `completed` holds what a `run` had produced so far, and is None for every other operation.
    """

    def __init__(self, message: str, *, hint: str = "", completed: Completed | None = None) -> None:
        super().__init__(message, hint=hint)
        self.completed = completed


class ProcessFailedError(SandboxError):
    """A process ended with another code than 0 and `check=True` was given."""

    def __init__(self, message: str, *, completed: Completed, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.completed = completed


class GrpcStatus(enum.IntEnum):
    """The gRPC status codes that the error tree or a protocol maps to. Source: grpc/doc/statuscodes.md."""

    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


GRPC_STATUS: Final[dict[type[SandboxError], GrpcStatus]] = {
    SandboxError: GrpcStatus.UNKNOWN,
    InvalidArgumentError: GrpcStatus.INVALID_ARGUMENT,
    DeadlineExceededError: GrpcStatus.DEADLINE_EXCEEDED,
    NotFoundError: GrpcStatus.NOT_FOUND,
    AlreadyExistsError: GrpcStatus.ALREADY_EXISTS,
    FailedPreconditionError: GrpcStatus.FAILED_PRECONDITION,
    ProcessFailedError: GrpcStatus.ABORTED,
    UnsupportedError: GrpcStatus.UNIMPLEMENTED,
    BackendError: GrpcStatus.INTERNAL,
    UnavailableError: GrpcStatus.UNAVAILABLE,
}


def grpc_status(error: BaseException) -> GrpcStatus:
    """The gRPC status of an error: the nearest class of the tree; INTERNAL for what is not ours."""
    for kind in type(error).__mro__:
        if kind in GRPC_STATUS:
            return GRPC_STATUS[kind]
    return GrpcStatus.INTERNAL
