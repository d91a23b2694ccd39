"""What the command line itself writes on standard output: all of it, or an error that says why not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from unisandbox.api import FailedPreconditionError


def answer(text: str, *, end: str = "\n") -> None:
    """Write an answer, at once.

    Raises:
        BrokenPipeError: nobody reads it any more.
        FailedPreconditionError: it cannot be written.
    """
    with answering():
        print(text, end=end, flush=True)


@contextmanager
def answering() -> Iterator[None]:
    """What is written in here to standard output is an answer: errors as of `answer`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise FailedPreconditionError(f"standard output cannot be written: {error.strerror}") from error


def forget_output() -> None:
    """What is buffered cannot be written at the end of the process either, and the interpreter would say so."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


def fill_streams() -> None:
    """Have three standard streams, also where the caller has closed some.

    The numbers would be given to what is opened next, and that would get the program's output. There is nothing to read
    then, a standard output cannot be written (EBADF), and a standard error is not wanted.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest that is free, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (it is the process's)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
