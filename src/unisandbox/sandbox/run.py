"""`run`: start, feed, collect, wait; bounded, and cleaned up however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Final

import anyio

from unisandbox.api import (
    Completed,
    DeadlineExceededError,
    Exit,
    InvalidArgumentError,
    ProcessFailedError,
    ProcessSpec,
    SandboxError,
)
from unisandbox.api.checks import is_number
from unisandbox.engine.entry import Entry
from unisandbox.sandbox.pipes import End, Pipes
from unisandbox.sandbox.starting import CLEANING_SECONDS, start
from unisandbox.sandbox.streams import bytes_of

_CHUNK: Final = 1 << 16


class _Collector:
    """One output stream, kept up to a limit; what comes beyond it is read and thrown away."""

    def __init__(self, source: End, limit: int) -> None:
        self.source = source
        self.data = bytearray()
        self.truncated = False
        self.ended = False
        self._limit = limit

    def take(self, most: int = _CHUNK) -> int:
        """Read once without waiting; how many bytes came."""
        data = self.source.read(most)
        if data is None:
            return 0
        if not data:
            self.ended = True
            return 0
        room = self._limit - len(self.data)
        self.data += data[:room]
        self.truncated |= len(data) > room
        return len(data)

    def drain(self) -> None:
        """Read what is in the pipe at this moment, and no more: a background process may go on writing for ever."""
        size = bytearray(4)
        fcntl.ioctl(self.source.fileno(), termios.FIONREAD, size)
        left = struct.unpack("i", size)[0]
        while left > 0 and (got := self.take(min(left, _CHUNK))):
            left -= got


class _Exchange:
    """Feeds the input and collects the output of one process until it is cancelled."""

    def __init__(self, pipes: Pipes, data: memoryview, limit: int) -> None:
        assert pipes.stdout is not None and pipes.stderr is not None  # noqa: S101, PT018 (run always makes both)
        self.stdout = _Collector(pipes.stdout, limit)
        self.stderr = _Collector(pipes.stderr, limit)
        self._stdin = pipes.stdin
        self._rest = data

    async def pump(self) -> None:
        """Move bytes until every stream has ended."""
        poll = select.epoll(flags=select.EPOLL_CLOEXEC)
        try:
            readers = {collector.source.fileno(): collector for collector in (self.stdout, self.stderr)}
            for fd in readers:
                poll.register(fd, select.EPOLLIN)
            writer = self._stdin.fileno() if self._stdin is not None else None
            if writer is not None:
                poll.register(writer, select.EPOLLOUT)
            while readers or writer is not None:
                await anyio.wait_readable(poll.fileno())
                for fd, _ in poll.poll(0):
                    if fd == writer:
                        if self._feed():
                            poll.unregister(fd)
                            self._close_stdin()
                            writer = None
                        continue
                    collector = readers[fd]
                    collector.take()
                    if collector.ended:
                        poll.unregister(fd)
                        del readers[fd]
        finally:
            poll.close()

    def drain(self) -> None:
        """What is in the pipes now."""
        self.stdout.drain()
        self.stderr.drain()

    def _feed(self) -> bool:
        """Write some input; True when all is written or nobody reads it."""
        assert self._stdin is not None  # noqa: S101 (called only while it is open)
        try:
            if self._rest:
                self._rest = self._rest[os.write(self._stdin.fileno(), self._rest[:_CHUNK]) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            return True
        return not self._rest

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()


async def run(
    entry: Entry,
    argv: Sequence[str],
    *,
    input: bytes | str | None,
    cwd: str | None,
    env: Mapping[str, str],
    user: str | int | None,
    timeout: float | None,
    check: bool,
    max_output: int,
) -> Completed:
    """See `Sandbox.run`."""
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise InvalidArgumentError(f"timeout must be > 0 seconds, got {timeout!r}")
    if isinstance(max_output, bool) or not isinstance(max_output, int) or max_output < 0:
        raise InvalidArgumentError(f"max_output must be >= 0 bytes, got {max_output!r}")
    if not isinstance(check, bool):
        raise InvalidArgumentError(f"check must be True or False, got {check!r}")
    spec = ProcessSpec(argv=argv, env=env, cwd=cwd, user=user)
    try:
        data = bytes_of(input.encode() if isinstance(input, str) else b"" if input is None else input, "input")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"input cannot be written as UTF-8: {error.reason}", hint="Give bytes.") from error
    begun = time.monotonic()
    exit: Exit | None = None
    exchange: _Exchange | None = None
    with anyio.move_on_after(timeout) as scope:
        pipes = Pipes.open(stdin=input is not None)
        exec_id, _ = await start(entry, spec, pipes)
        exchange = _Exchange(pipes, data, max_output)
        try:
            exit = await _end_of(entry, exec_id, exchange)
            for collector in (exchange.stdout, exchange.stderr):
                if not collector.ended and collector.source.is_written_to():
                    # A background process goes on, and goes on writing: somebody has to take it.
                    await entry.programs.take_over_output(collector.source.fileno())
            await entry.last_task.delete(entry.main, exec_id)
        except BaseException:
            task = entry.last_task
            with contextlib.suppress(OSError):  # no file descriptor is left, say: `finish` does it
                task.kill_now(entry.main, exec_id)

            async def finish() -> None:
                nonlocal exit
                if exit is None:
                    task.kill_now(entry.main, exec_id)
                    exit = await task.wait(entry.main, exec_id)
                with contextlib.suppress(anyio.ClosedResourceError):  # it was cut, and nobody reads any more
                    exchange.drain()
                await task.delete(entry.main, exec_id)

            with entry.in_our_words():
                await entry.cleaning.run(finish, seconds=CLEANING_SECONDS)
            raise
        finally:
            pipes.close()
            entry.programs.exited(exec_id, exit)
    completed = None
    if exchange is not None:
        completed = Completed(
            argv=spec.argv,
            exit=exit or Exit.lost(exited_at=time.time()),
            stdout=bytes(exchange.stdout.data),
            stderr=bytes(exchange.stderr.data),
            truncated=exchange.stdout.truncated or exchange.stderr.truncated,
            duration=time.monotonic() - begun,
        )
    if scope.cancelled_caught or completed is None:
        raise DeadlineExceededError(
            f"{spec.argv[0]!r} in sandbox {entry.label!r} did not end within {timeout:g} s; it was killed with all"
            " that it had started",
            hint="Give a larger timeout=.",
            completed=completed or Completed(argv=spec.argv, exit=Exit.lost(exited_at=time.time())),
        )
    if check and completed.exit.code != 0:
        raise ProcessFailedError(_failure(completed, entry.label), completed=completed)
    return completed


async def _end_of(entry: Entry, exec_id: str, exchange: _Exchange) -> Exit:
    """Move bytes until the process has ended and what it wrote has been taken."""
    outcome: Exit | SandboxError
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(exchange.pump)
            try:
                with entry.in_our_words():
                    outcome = await entry.last_task.wait(entry.main, exec_id)
            except SandboxError as error:
                outcome = error  # raised below: a task group would wrap it
            group.cancel_scope.cancel()
    except BaseExceptionGroup as raised:
        # Nobody outside knows of this group: a KeyboardInterrupt, which trio raises in here, is one.
        if len(raised.exceptions) > 1:
            raise
        raise raised.exceptions[0] from None
    if isinstance(outcome, SandboxError):
        raise outcome
    exchange.drain()
    return outcome


def _failure(completed: Completed, label: str) -> str:
    end = completed.exit
    how = {
        "exited": f"ended with code {end.code}",
        "signaled": f"was ended by signal {end.signal}",
        "oom": "was killed because its memory limit was reached",
        "trap": f"trapped: {end.detail.partition(chr(10))[0]}",
        "cpu": "was ended because its processor time is used up",
        "fuel": "was ended because its fuel is used up",
        "lost": "is gone, and how it ended could not be learned",
    }[end.reason]
    tail = completed.stderr[-500:].decode("utf-8", "replace").strip()
    return f"{completed.argv[0]!r} in sandbox {label!r} {how}" + (f": {tail}" if tail else "")
