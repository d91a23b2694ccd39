"""`unisandbox run` and `exec`: one program in a new or a known sandbox, with the caller's streams and signals."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, nullcontext, suppress
from typing import Final, NamedTuple

import anyio
import anyio.abc

from unisandbox.api import Exit, FailedPreconditionError, NotFoundError, Terminal
from unisandbox.cli.local import (
    STDERR,
    STDIN,
    STDOUT,
    LocalInput,
    LocalOutput,
    check_input,
    raw_terminal,
    terminal_size,
)
from unisandbox.cli.sandboxes import find, running
from unisandbox.cli.state import opened
from unisandbox.sandbox import Engine, Process, Sandbox
from unisandbox.sandbox.sandbox import SandboxOptions
from unisandbox.sandbox.streams import ReceiveStream

TIMEOUT_CODE: Final = 124
"""What `unisandbox run --timeout` ends with when the time was over; as timeout(1) does."""

# Signals that are about this process and not for the program:
_OWN: Final = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # cannot be caught
        *(signal.SIGCHLD, signal.SIGPIPE, signal.SIGURG),  # what its children, streams and sockets do
        *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),  # what its shell does with it
        signal.SIGWINCH,  # the size of its window, which a program with a terminal is told in another way
        signal.SIGXCPU,  # its own limit
        # Its own faults: Python would return from its handler into the same one for ever, and faulthandler has them.
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGABRT),
    }
)
_STOPPING: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
# So many Ctrl-C in such a time say that the program is to end, whatever it does with them. Docker's client gives up at
# the third, too; it leaves the container behind.
_IMPATIENT: Final = 3
_IMPATIENT_SECONDS: Final = 2.0
# Output of a process that has ended is in its pipes already; whoever still holds them is a background process, and
# that ends with the sandbox, or is not waited for.
_LAST_OUTPUT_SECONDS: Final = 0.05
# Of what is in a pipe then; more than a pipe holds was written later. Source: pipe(7), /proc/sys/fs/pipe-max-size.
_LAST_OUTPUT_BYTES: Final = 1 << 20


class NewSandbox(NamedTuple):
    """A sandbox of an engine of our own: both are gone when the program has ended.

    Attributes:
        options: of the sandbox.
    """

    options: SandboxOptions

    async def enter(self, stack: AsyncExitStack) -> Sandbox:
        """Create it."""
        engine = await stack.enter_async_context(Engine.open())
        return await stack.enter_async_context(engine.create(**self.options))

    async def end_background(self, sandbox: Sandbox) -> None:
        """The program has ended: nothing else has a reason to be."""
        await sandbox.kill()


class KnownSandbox(NamedTuple):
    """A sandbox that lives on.

    Attributes:
        state: the state directory; None: the default.
        ref: its name or id, or the beginning of it.
    """

    state: str | None
    ref: str

    async def enter(self, stack: AsyncExitStack) -> Sandbox:
        """Find it, and see that something can be run in it."""
        engine = await stack.enter_async_context(opened(self.state, create=False))
        sandbox = await find(engine, self.ref)
        await running(sandbox, self.ref, or_idle=True)
        return sandbox

    async def end_background(self, sandbox: Sandbox) -> None:
        """What the program has left in the background goes on."""


class Request(NamedTuple):
    """What to run, and with which of the caller's streams.

    Attributes:
        argv, env, cwd, user: as of `Sandbox.exec`.
        place: the sandbox.
        interactive: the caller's standard input goes to the program; otherwise it has none.
        tty: the program gets a terminal.
        timeout: seconds from the program's start, then it is killed.
        collect: keep up to so many bytes of each stream instead of passing the output on; None: pass it on.
    """

    argv: tuple[str, ...]
    place: NewSandbox | KnownSandbox
    env: Mapping[str, str]
    cwd: str | None = None
    user: str | None = None
    interactive: bool = False
    tty: bool = False
    timeout: float | None = None
    collect: int | None = None


class Ended(NamedTuple):
    """How it went.

    Attributes:
        exit: how the program ended; None when a signal came before it ran.
        signal: the signal that came before it ran.
        timed_out: we killed it because its time was over.
        duration: seconds from its start to its end.
        stdout, stderr: what was collected.
        truncated: more was written than was kept.
    """

    exit: Exit | None
    signal: int | None = None
    timed_out: bool = False
    duration: float = 0.0
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False

    @property
    def code(self) -> int:
        """The exit code for the caller."""
        if self.timed_out:
            return TIMEOUT_CODE
        if self.exit is None:
            return 128 + (self.signal or 0)
        return self.exit.code


class _Collected:
    """Output that is kept up to a limit; more is read and thrown away."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._limit = limit

    async def write(self, data: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += data[:room]
        self.truncated |= len(data) > room


async def run(request: Request) -> Ended:
    """Run it; a sandbox of its own is gone when this returns or raises.

    Signals go to the program, but for those that are about this process; SIGINT three times within 2 seconds kills it.
    Before it runs SIGINT, SIGTERM, SIGHUP and SIGQUIT end everything, and the others wait for it.

    Raises:
        InvalidArgumentError: a wrong option; or the program cannot be started, with its `exit_code`.
        FailedPreconditionError: there is no terminal, or the caller's input cannot be read, his output not written.
        SandboxError: the sandbox cannot be created, or there is none.
    """
    if request.tty and request.interactive and not os.isatty(STDIN):
        raise FailedPreconditionError(
            "-t with -i needs a terminal, and standard input is none", hint="Leave out -t, or run it in a terminal."
        )
    if request.interactive:
        check_input()
    session = _Session(request)
    wanted = signal.valid_signals() - _OWN | ({signal.SIGWINCH} if request.tty else set())
    # What is ignored stays so: a shell starts background jobs without SIGINT, and nohup takes SIGHUP away.
    numbers = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    with anyio.open_signal_receiver(*numbers) as signals:
        return await session.run(signals)


class _Session:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._sandbox: Sandbox | None = None
        self._process: Process | None = None
        self._starting = anyio.CancelScope()
        self._showing = anyio.CancelScope()
        self._ended = False
        self._early: int | None = None
        self._waiting: list[int] = []
        self._interrupts: deque[float] = deque(maxlen=_IMPATIENT)

    async def run(self, signals: AsyncIterator[signal.Signals]) -> Ended:
        outcome: Ended | Exception = Ended(None)
        async with anyio.create_task_group() as group:
            group.start_soon(self._forward, signals)
            try:
                outcome = await self._run()
            except Exception as error:  # raised below: a task group would wrap it
                outcome = error
            group.cancel_scope.cancel()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _forward(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for number in signals:
            if number == signal.SIGWINCH:
                await self._resize()
            elif self._ended:
                # Only its last output is still being written: to a reader that does not read, perhaps.
                if number in _STOPPING:
                    self._showing.cancel()
            elif self._process is None:
                if number in _STOPPING:
                    self._early = number
                    self._starting.cancel()
                else:
                    self._waiting.append(number)
            else:
                with suppress(NotFoundError):  # its sandbox is being removed, which ends it too
                    await self._process.signal(signal.SIGKILL if self._is_impatient(number) else number)

    def _is_impatient(self, number: int) -> bool:
        """Whether this signal is the last straw."""
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        self._interrupts.append(now)
        return len(self._interrupts) == _IMPATIENT and now - self._interrupts[0] <= _IMPATIENT_SECONDS

    async def _resize(self) -> None:
        size = terminal_size()
        if self._request.tty and self._process is not None and not self._ended and size is not None:
            with suppress(NotFoundError):  # as in `_forward`
                await self._process.resize(size.rows, size.columns)

    async def _run(self) -> Ended:
        request = self._request
        async with AsyncExitStack() as stack:
            with self._starting:  # a signal interrupts what is in here, but not the leaving of what was entered
                self._sandbox, self._process = await self._start(stack)
            if self._sandbox is None or self._process is None:
                return Ended(None, signal=self._early)
            if self._early is not None:  # it came in the moment in which the program was started
                self._waiting.append(self._early)
            for number in self._waiting:
                await self._process.signal(number)
            with raw_terminal() if request.tty and request.interactive else nullcontext():
                return await self._attend(self._sandbox, self._process)
        raise AssertionError("unreachable: no context here swallows errors")

    async def _start(self, stack: AsyncExitStack) -> tuple[Sandbox, Process]:
        request = self._request
        sandbox = await request.place.enter(stack)
        process = await stack.enter_async_context(
            sandbox.exec(
                request.argv,
                stdin="pipe" if request.interactive else "null",
                tty=(terminal_size() or Terminal()) if request.tty else False,
                cwd=request.cwd,
                env=request.env,
                user=request.user,
            )
        )
        return sandbox, process

    async def _attend(self, sandbox: Sandbox, process: Process) -> Ended:
        """Move bytes between the caller and the program until it has ended and its output is written."""
        request = self._request
        begun = time.monotonic()
        limit = request.collect
        sinks: list[_Collected | LocalOutput] = (
            [LocalOutput(STDOUT), LocalOutput(STDERR)] if limit is None else [_Collected(limit), _Collected(limit)]
        )
        sources = [_Source(process.stdout)] + ([] if request.tty else [_Source(process.stderr)])
        shown = [anyio.Event() for _ in sources]
        problems: list[OSError] = []
        exit: Exit | None = None
        timed_out, duration = False, 0.0
        with self._showing:  # nobody cancels it before these are known
            async with anyio.create_task_group() as group:
                for source, sink, done in zip(sources, sinks, shown, strict=False):
                    group.start_soon(_show, source, sink.write, done, problems)
                typing = anyio.CancelScope()
                if request.interactive:
                    group.start_soon(_type, process.stdin, typing)
                exit, timed_out = await self._end_of(process)
                duration = time.monotonic() - begun
                self._ended = True
                typing.cancel()
                with anyio.move_on_after(_LAST_OUTPUT_SECONDS):
                    for done in shown:
                        await done.wait()
                if not all(done.is_set() for done in shown):
                    await request.place.end_background(sandbox)
                    for source in sources:
                        source.finish()
        if problems:
            raise FailedPreconditionError(f"cannot write the program's output: {problems[0].strerror}") from problems[0]
        collected = [sink for sink in sinks if isinstance(sink, _Collected)] or [_Collected(0), _Collected(0)]
        return Ended(
            exit,
            timed_out=timed_out,
            duration=duration,
            stdout=bytes(collected[0].data),
            stderr=bytes(collected[1].data),
            truncated=any(sink.truncated for sink in collected),
        )

    async def _end_of(self, process: Process) -> tuple[Exit, bool]:
        with anyio.move_on_after(self._request.timeout):
            return await process.wait(), False
        return await process.kill(), True


class _Source:
    """A stream of the program, up to its end or to what is in it when the program has ended."""

    def __init__(self, stream: anyio.abc.ByteReceiveStream) -> None:
        self._stream = stream
        self._waiting = anyio.CancelScope()
        self._left: int | None = None

    async def read(self) -> bytes:
        """The next bytes; b"" at the end."""
        if self._left is None:
            with anyio.CancelScope() as self._waiting:
                try:
                    return await self._stream.receive()
                except anyio.EndOfStream:
                    return b""
        assert isinstance(self._stream, ReceiveStream) and self._left is not None  # noqa: S101, PT018 (it was read)
        data = self._stream.receive_nowait() if self._left > 0 else b""
        self._left -= len(data or b"")
        return data or b""

    def finish(self) -> None:
        """Do not wait any more for what others may write."""
        self._left = _LAST_OUTPUT_BYTES
        self._waiting.cancel()

    async def aclose(self) -> None:
        """Nobody reads it any more."""
        await self._stream.aclose()


async def _show(
    source: _Source,
    write: Callable[[bytes], Awaitable[None]],
    done: anyio.Event,
    problems: list[OSError],
) -> None:
    """Pass on a stream to its end. When nobody reads ours any more, the program learns it by SIGPIPE, as in a shell."""
    try:
        while data := await source.read():
            await write(data)
    except BrokenPipeError:
        await source.aclose()
    except OSError as error:
        problems.append(error)
        await source.aclose()
    finally:
        done.set()


async def _type(stdin: anyio.abc.ByteSendStream, scope: anyio.CancelScope) -> None:
    local = LocalInput()
    with scope:
        try:
            while data := await local.read():
                await stdin.send(data)
        except anyio.BrokenResourceError:
            return  # the program does not read any more, which is its good right
        await stdin.aclose()
