"""How a call ended, as both protocols say it: from our errors to a status, and from a peer's status to our errors."""

from __future__ import annotations

import logging
from typing import Final

import attrs

from unisandbox.api.errors import (
    GRPC_STATUS,
    GrpcStatus,
    ProcessFailedError,
    SandboxError,
    UnsupportedError,
    grpc_status,
)

_logger: Final = logging.getLogger("unisandbox.wire")

_ERRORS: Final[dict[int, type[SandboxError]]] = {
    status: kind
    for kind, status in GRPC_STATUS.items()
    # The first says nothing; the others are made of more than a message.
    if kind not in {SandboxError, UnsupportedError, ProcessFailedError}
}


_MAX_MESSAGE: Final = 16 << 10
"""The most characters of a message that are told: an error must fit into a frame."""


def _cut(message: str) -> str:
    return message[:_MAX_MESSAGE]


@attrs.frozen
class Status:
    """Why a call failed.

    Attributes:
        code: a gRPC status code other than 0; `GrpcStatus` has the names of those that mean something here.
        message: for the person who must act; what is too long is cut.
    """

    code: int
    message: str = attrs.field(converter=_cut)


class StatusError(SandboxError):
    """A call ended with a status that says more, or other things, than a class of the error tree could."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message or f"the call failed with status {status.code}")
        self.status = status


def status_of(error: Exception, what: str) -> Status:
    """The status that a caller is told when his call ended with `error`.

    What was not raised on purpose is INTERNAL, and one line in the log.

    Args:
        error: what the call's handler raised.
        what: the call, as "containerd.task.v3.Task/Create".
    """
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]  # how a task group hands on the error of one of its tasks
    if isinstance(error, StatusError):
        return error.status
    if isinstance(error, SandboxError):
        return Status(grpc_status(error), str(error))
    text = f"{type(error).__name__}: {error}"
    _logger.error("%s failed, which is a bug: %s (%s)", what, text.replace("\n", " "), _place(error))
    return Status(GrpcStatus.INTERNAL, f"internal error: {text}")


def error_of(status: Status) -> SandboxError:
    """The error that a status from a peer stands for: a class of the tree where one has exactly this meaning."""
    kind = _ERRORS.get(status.code)
    return kind(status.message) if kind else StatusError(status)


def _place(error: Exception) -> str:
    """Where it was raised: a whole traceback would be more than one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "no traceback"
