"""The standard streams of a process: pipes, whose inner ends it gets and whose others are ours; or a terminal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from functools import partial
from typing import Self

import attrs

from unisandbox.api import Stdio, UnavailableError
from unisandbox.engine.held import StreamName
from unisandbox.host.pipes import open_pipe
from unisandbox.host.readiness import Descriptor


class End(Descriptor):
    """Our end of a stream of a process. One that is read to its end, or dropped, has nothing open any more.

    Attributes:
        told: hears that it was closed; not that it was dropped.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.told: Callable[[], None] | None = None
        self._ended = False

    @property
    def closed(self) -> bool:
        return super().closed and not self._ended

    @property
    def ended(self) -> bool:
        """Whether it was read to its end, and nobody has closed it since."""
        return self._ended

    def finish(self) -> None:
        """Nothing can come any more: it stays at its end, without a descriptor."""
        self._ended = not self.closed
        super().close()

    def close(self) -> None:
        if not self.closed:
            self._ended = False
            super().close()
            if self.told is not None:
                self.told()

    def read(self, limit: int) -> bytes | None:
        return b"" if self._ended else super().read(limit)

    def is_written_to(self) -> bool:
        """Whether somebody has the other end of it."""
        return not super().closed and not self.hung_up()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            super().close()


@attrs.define(eq=False, repr=False)
class Pipes:
    """Both ends of a process's standard streams: `inside` goes to the process, the others are ours."""

    inside: Stdio = attrs.field(factory=Stdio)
    stdin: End | None = None
    stdout: End | None = None
    stderr: End | None = None
    terminal: End | None = None
    _told: Callable[[StreamName], None] | None = None

    def own(self, stream: StreamName, fd: int) -> End:
        """Have `fd` as our end of a stream."""
        end = End(fd)
        setattr(self, stream, end)
        self.tell(self._told)
        return end

    def tell(self, told: Callable[[StreamName], None] | None) -> None:
        """Let `told` hear when one of our ends is closed, also of those that are still to come; None: nobody."""
        self._told = told
        for stream, end in self.ends().items():
            end.told = told and partial(told, stream)

    def ends(self) -> dict[StreamName, End]:
        """Our ends, by stream."""
        ends: tuple[tuple[StreamName, End | None], ...] = (
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
                if end.ended:
                    renewed.own(stream, ended_pipe())
                elif not end.closed:
                    renewed.own(stream, fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))
        except OSError as error:
            renewed.close()
            raise _no_pipe(error) from error
        self.tell(None)
        self.close()
        return renewed

    @classmethod
    def open(cls, *, stdin: bool, output: bool = True) -> Self:
        """Make the pipes; without `stdin` the process reads /dev/null."""
        made: list[int] = []
        try:
            ends: list[tuple[int, int] | None] = []
            for wanted in (stdin, output, output):
                pair = open_pipe() if wanted else None
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


def ended_pipe() -> int:
    """The reading end of a pipe that nobody writes to: a stream that has ended."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    return reader


def _no_pipe(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"no pipe can be made for a process: {error.strerror}",
        hint="This process has too many open files: close some, wait for what exec() has started (each keeps its pipes"
        " until then), or raise the limit (ulimit -n).",
    )
