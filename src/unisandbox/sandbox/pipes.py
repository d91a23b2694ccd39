"""The standard streams of a process: pipes, whose inner ends it gets and whose others are ours; or a terminal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Self

import attrs

from unisandbox.api import Stdio, UnavailableError
from unisandbox.engine.held import StreamName
from unisandbox.host.readiness import Descriptor


@attrs.define(eq=False, repr=False)
class Pipes:
    """Both ends of a process's standard streams: `inside` goes to the process, the others are ours."""

    inside: Stdio = attrs.field(factory=Stdio)
    stdin: Descriptor | None = None
    stdout: Descriptor | None = None
    stderr: Descriptor | None = None
    terminal: Descriptor | None = None
    #: Hears when one of our ends is closed.
    closed: Callable[[StreamName], None] | None = None

    def own(self, stream: StreamName, fd: int) -> Descriptor:
        """Have `fd` as our end of a stream."""

        def close(fd: int) -> None:
            os.close(fd)
            if self.closed is not None:
                self.closed(stream)

        end = Descriptor(fd, close)
        setattr(self, stream, end)
        return end

    def ends(self) -> dict[StreamName, Descriptor]:
        """Our ends, by stream."""
        ends: tuple[tuple[StreamName, Descriptor | None], ...] = (
            ("stdin", self.stdin),
            ("stdout", self.stdout),
            ("stderr", self.stderr),
            ("terminal", self.terminal),
        )
        return {stream: end for stream, end in ends if end is not None}

    def fds(self) -> dict[StreamName, int]:
        """The numbers of our ends, by stream."""
        return {stream: end.fileno() for stream, end in self.ends().items()}

    def renew(self) -> Pipes:
        """The same ends in another object; these are closed, and nobody hears of that.

        Raises:
            UnavailableError: this process has too many open files; nothing has changed.
        """
        renewed = Pipes()
        try:
            for stream, end in self.ends().items():
                if not end.closed:
                    renewed.own(stream, fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))
        except OSError as error:
            renewed.close()
            raise _no_pipe(error) from error
        self.closed = None
        self.close()
        return renewed

    @classmethod
    def open(cls, *, stdin: bool, output: bool = True) -> Self:
        """Make the pipes; without `stdin` the process reads /dev/null."""
        made: list[int] = []
        try:
            ends: list[tuple[int, int] | None] = []
            for wanted in (stdin, output, output):
                pair = os.pipe2(os.O_CLOEXEC) if wanted else None
                made.extend(pair or ())
                ends.append(pair)
            into, out, err = ends
            pipes = cls(inside=Stdio(stdin=into and into[0], stdout=out and out[1], stderr=err and err[1]))
            if into:
                pipes.own("stdin", into[1])
            if out:
                pipes.own("stdout", out[0])
            if err:
                pipes.own("stderr", err[0])
            return pipes
        except BaseException as error:
            for fd in made:
                os.close(fd)
            if isinstance(error, OSError):
                raise _no_pipe(error) from error
            raise

    def close_inside(self) -> None:
        """The process has them now."""
        for fd in (self.inside.stdin, self.inside.stdout, self.inside.stderr):
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Close our ends."""
        for end in self.ends().values():
            end.close()


def _no_pipe(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"no pipe can be made for a process: {error.strerror}",
        hint="This process has too many open files: close some, or raise its limit (ulimit -n).",
    )
