"""A process that was started by `exec`: its streams, its end, its terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

import anyio
import anyio.abc
import anyio.lowlevel
import attrs

from unisandbox.api import (
    ExecTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    StartedTask,
    Stdio,
    TaskService,
    Terminal,
    UnavailableError,
    check_name,
    short_name,
)
from unisandbox.api.plain import plain
from unisandbox.engine.entry import Entry
from unisandbox.engine.held import HeldProcess, StreamName
from unisandbox.engine.operations import digest_of
from unisandbox.host.readiness import Descriptor
from unisandbox.sandbox.streams import (
    MissingReceiveStream,
    MissingSendStream,
    ReceiveStream,
    SendStream,
)

# What cleaning after a cancellation may take before it is left to the engine.
CLEANING_SECONDS: Final = 5.0
NOTHING_KEPT: Final[Mapping[StreamName, bytes]] = MappingProxyType({})
# The handles that this process has given out, so that one process is not read by two.
_handles: Final[weakref.WeakKeyDictionary[Entry, weakref.WeakValueDictionary[str, Process]]] = (
    weakref.WeakKeyDictionary()
)
_END_OF_INPUT: Final = b"\x04"  # what a terminal's line discipline takes for the end of input; source: termios(3) VEOF


@attrs.frozen
class Output:
    """A piece of what a process wrote.

    Attributes:
        stream: "stdout" or "stderr"; a terminal has only the first.
        data: at least one byte.
    """

    stream: Literal["stdout", "stderr"]
    data: bytes

    @property
    def text(self) -> str:
        """As UTF-8; bytes that are not become U+FFFD."""
        return self.data.decode("utf-8", "replace")


@attrs.define(eq=False)
class Pipes:
    """Both ends of a process's standard streams: `inside` goes to the process, the others are ours."""

    inside: Stdio = attrs.field(factory=Stdio)
    stdin: Descriptor | None = None
    stdout: Descriptor | None = None
    stderr: Descriptor | None = None
    #: Hears when one of our ends is closed.
    closed: Callable[[StreamName], None] | None = None

    def own(self, stream: StreamName, fd: int) -> Descriptor:
        """Our end of a stream."""

        def close(fd: int) -> None:
            os.close(fd)
            if self.closed is not None:
                self.closed(stream)

        return Descriptor(fd, close)

    def fds(self) -> dict[StreamName, int]:
        """Our ends, by stream."""
        ends: tuple[tuple[StreamName, Descriptor | None], ...] = (
            ("stdin", self.stdin),
            ("stdout", self.stdout),
            ("stderr", self.stderr),
        )
        return {stream: end.fileno() for stream, end in ends if end is not None}

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
            pipes.stdin = pipes.own("stdin", into[1]) if into else None
            pipes.stdout = pipes.own("stdout", out[0]) if out else None
            pipes.stderr = pipes.own("stderr", err[0]) if err else None
            return pipes
        except BaseException as error:
            for fd in made:
                os.close(fd)
            if isinstance(error, OSError):
                raise UnavailableError(
                    f"no pipe can be made for a process: {error.strerror}",
                    hint="This process has too many open files: close some, or raise its limit (ulimit -n).",
                ) from error
            raise

    def close_inside(self) -> None:
        """The process has them now."""
        for fd in (self.inside.stdin, self.inside.stdout, self.inside.stderr):
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Close our ends."""
        for end in (self.stdin, self.stdout, self.stderr):
            if end is not None:
                end.close()


async def start(
    entry: Entry, spec: ProcessSpec, pipes: Pipes, *, exec_id: str = "", operation_id: str = ""
) -> tuple[str, int, int | None]:
    """Start a process in the sandbox's main container: (exec id, pid on the host, master of its terminal).

    On any failure or cancellation nothing is left of it. The inner ends of `pipes` are closed in every case.
    """
    exec_id = exec_id or entry.next_exec_id()
    try:
        try:
            started = await _start(entry, exec_id, spec, pipes, operation_id)
        except UnavailableError:
            # The main container ended between the look at it and the start; once more, in a new one.
            started = await _start(entry, exec_id, spec, pipes, operation_id)
        if started.terminal is not None:
            await entry.held.hold_streams(exec_id, {"terminal": started.terminal})
    except BaseException:
        pipes.close()
        raise
    finally:
        pipes.close_inside()
    entry.emit("process.started", exec_id=exec_id)
    return exec_id, started.pid, started.terminal


async def _start(entry: Entry, exec_id: str, spec: ProcessSpec, pipes: Pipes, operation_id: str) -> StartedTask:
    task = await entry.ready()
    try:
        await entry.held.hold(exec_id, spec, pipes.fds(), operation_id)
        pipes.closed = lambda stream: entry.held.drop_stream(exec_id, stream)
        await task.exec(ExecTask(entry.main, exec_id, spec, pipes.inside))
        return await task.start(entry.main, exec_id)
    except BaseException:
        task.kill_now(entry.main, exec_id)
        await entry.cleaning.run(lambda: task.delete(entry.main, exec_id), seconds=CLEANING_SECONDS)
        entry.held.forget(exec_id)
        raise


class Process:
    """A running process and its streams. Made by `Sandbox.exec`, or found by `Sandbox.processes`.

    Attributes:
        id: unique in its sandbox.
        argv: what was run.
        pid: its id on the host; 0 when it had ended before it was found.
        lost: bytes of its output that were dropped while nobody read it; those that were kept come first.
        stdin: what it reads; with a terminal, what is typed.
        stdout: what it writes; with a terminal, all of it.
        stderr: its errors; with a terminal there is none.
    """

    def __init__(
        self,
        entry: Entry,
        exec_id: str,
        argv: Sequence[str],
        pid: int,
        pipes: Pipes,
        terminal: int | None,
        *,
        operation_id: str = "",
        kept: Mapping[StreamName, bytes] = NOTHING_KEPT,
    ) -> None:
        self.id: str = exec_id
        self.argv: tuple[str, ...] = tuple(argv)
        self.pid = pid
        self.lost: int = 0
        self.stdin: anyio.abc.ByteSendStream
        self.stdout: anyio.abc.ByteReceiveStream
        self.stderr: anyio.abc.ByteReceiveStream
        self._entry = entry
        self._exec_id = exec_id
        self._exit: Exit | None = None
        self._operation_id = operation_id
        self._terminal = terminal is not None
        if terminal is not None:
            master = pipes.own("terminal", terminal)
            self._ends = [master]
            self.stdin = SendStream(master, close=lambda: _type_end(master))
            self.stdout = ReceiveStream(master, kept.get("terminal", b""))
            self.stderr = MissingReceiveStream("a process with a terminal has no stderr of its own; read stdout")
        else:
            self._ends = [end for end in (pipes.stdin, pipes.stdout, pipes.stderr) if end is not None]
            self.stdin = SendStream(pipes.stdin) if pipes.stdin else MissingSendStream("stdin of the process is null")
            missing = MissingReceiveStream
            out, err = pipes.stdout, pipes.stderr
            self.stdout = ReceiveStream(out, kept.get("stdout", b"")) if out else missing("stdout is null")
            self.stderr = ReceiveStream(err, kept.get("stderr", b"")) if err else missing("stderr is null")
        entry.closing.add(self._close_ends)
        _handles.setdefault(entry, weakref.WeakValueDictionary())[exec_id] = self

    @classmethod
    async def open(
        cls,
        entry: Entry,
        argv: Sequence[str],
        *,
        stdin: Literal["pipe", "null"],
        tty: bool | Terminal,
        cwd: str | None,
        env: Mapping[str, str],
        user: str | int | None,
        operation_id: str | None,
    ) -> Process:
        """Start it. See `Sandbox.exec`."""
        if stdin not in {"pipe", "null"}:
            raise InvalidArgumentError(f"stdin must be 'pipe' or 'null', got {stdin!r}")
        if not isinstance(tty, bool | Terminal):
            raise InvalidArgumentError(f"tty must be True, False or a Terminal, got {tty!r}")
        size = tty if isinstance(tty, Terminal) else (Terminal() if tty else None)
        spec = ProcessSpec(argv=argv, env=env, cwd=cwd, user=user, terminal=size)
        exec_id = ""
        if operation_id is not None:
            exec_id = f"op-{short_name(entry.sandbox_id, check_name(operation_id, 'operation id'))}"
            known = await cls._known(entry, exec_id, spec, operation_id)
            if known is not None:
                return known
        operation_id = operation_id or ""
        try:
            pipes = Pipes.open(stdin=stdin == "pipe" and size is None, output=size is None)
            exec_id, pid, terminal = await start(entry, spec, pipes, exec_id=exec_id, operation_id=operation_id)
        except BaseException:
            if operation_id:
                entry.operations.forget(operation_id)
            raise
        return cls(entry, exec_id, spec.argv, pid, pipes, terminal, operation_id=operation_id)

    @classmethod
    async def _known(cls, entry: Entry, exec_id: str, spec: ProcessSpec, operation_id: str) -> Process | None:
        """What this operation has started; None: it is ours to start."""
        known = entry.operations.begin(operation_id, "exec", entry.sandbox_id, digest_of(plain(spec)))
        if known is None:
            return None
        for process in await cls.all_of(entry):
            if process.id == exec_id:
                return process
        if known.state == "finished":
            ended = cls(entry, exec_id, spec.argv, 0, Pipes(), None)
            ended._exit = Exit(**json.loads(known.result))
            return ended
        if any(held.exec_id == exec_id for held in await entry.held.read()):
            raise FailedPreconditionError(
                f"operation {operation_id!r} has started a process whose streams another living process has",
                hint=f"That is process {known.owner[0]}; when it ends, ask again.",
            )
        return None  # it was cut before anything ran

    @classmethod
    async def all_of(cls, entry: Entry) -> list[Process]:
        """See `Sandbox.processes`."""
        task = await entry.known_task()
        mine = [process for process in _handles.get(entry, {}).values() if process.exit is None]
        for held in await entry.held.orphans():
            if all(process.id != held.exec_id for process in mine):
                process = await cls._adopted(entry, task, held)
                if process is not None:
                    mine.append(process)
        return sorted(mine, key=lambda process: process.id)

    @classmethod
    async def _adopted(cls, entry: Entry, task: TaskService, held: HeldProcess) -> Process | None:
        try:
            state = await task.state(entry.main, held.exec_id)
        except NotFoundError:
            entry.held.forget(held.exec_id)  # it never ran, or went with its container
            return None
        taken = await entry.held.take_over(held)
        pipes, terminal = Pipes(closed=lambda stream: entry.held.drop_stream(held.exec_id, stream)), None
        for stream, got in taken.items():
            fd = got[0] if got[0] >= 0 else _ended_pipe()
            if stream == "terminal":
                terminal = fd
            else:
                setattr(pipes, stream, pipes.own(stream, fd))
        process = cls(
            entry,
            held.exec_id,
            held.spec.argv,
            state.pid or 0,
            pipes,
            terminal,
            operation_id=held.operation_id,
            kept={stream: got[1] for stream, got in taken.items()},
        )
        process.lost = sum(got[2] for got in taken.values())
        return process

    def __repr__(self) -> str:
        end = f"code={self._exit.code}" if self._exit else "running"
        return f"<Process pid={self.pid} {end} in sandbox {self._entry.sandbox_id}>"

    @property
    def exit(self) -> Exit | None:
        """How it ended, once somebody has waited for it; None before."""
        return self._exit

    async def wait(self) -> Exit:
        """Wait until the process has ended.

        Safe to call many times and from several tasks; after the first return the answer never changes. What it left
        running in the background goes on. Unread output stays readable.

        Raises:
            UnavailableError: the sandbox is gone and the exit could not be learned; never guessed.
        """
        if self._exit is None:
            task = self._entry.last_task
            exit = await task.wait(self._entry.main, self._exec_id)
            if self._exit is None:
                self._exit = exit
                await task.delete(self._entry.main, self._exec_id)
                self._entry.process_exited(self._exec_id, exit)
                if self._operation_id:
                    self._entry.operations.finish(self._operation_id, json.dumps(attrs.asdict(exit)))
        else:
            await anyio.lowlevel.checkpoint()
        return self._exit

    async def signal(self, number: int) -> None:
        """Send a signal to the process; one that has ended takes it without a word."""
        if self._exit is None:
            await self._entry.task.kill(self._entry.main, self._exec_id, signal=number)
        else:
            await anyio.lowlevel.checkpoint()

    async def kill(self) -> Exit:
        """End the process and everything that it has started, and wait for its end."""
        if self._exit is None:
            self._entry.last_task.kill_now(self._entry.main, self._exec_id)
        return await self.wait()

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal; the foreground processes get SIGWINCH.

        Raises:
            FailedPreconditionError: it has no terminal.
        """
        if not self._terminal:
            raise FailedPreconditionError("the process has no terminal", hint="Start it with tty=True.")
        await self._entry.task.resize_pty(self._entry.main, self._exec_id, Terminal(rows, columns))

    async def aclose(self) -> None:
        """End it and all that it has started if it still runs, and close its streams. Repeating is harmless."""
        try:
            if self._exit is None:
                self._entry.last_task.kill_now(self._entry.main, self._exec_id)
                await self._entry.cleaning.run(self.wait, seconds=CLEANING_SECONDS)
        finally:
            self._close_ends()
        await anyio.lowlevel.checkpoint()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        """The next piece of output, of either stream; ends when nobody can write any more."""
        streams: list[tuple[Literal["stdout", "stderr"], ReceiveStream]] = []
        if isinstance(self.stdout, ReceiveStream):
            streams.append(("stdout", self.stdout))
        if isinstance(self.stderr, ReceiveStream):
            streams.append(("stderr", self.stderr))
        await anyio.lowlevel.checkpoint()
        while True:
            waiting: list[int] = []
            for name, stream in streams:
                data = stream.receive_nowait()
                if data:
                    return Output(name, data)
                if data is None:
                    waiting.append(stream.fileno())
            if not waiting:
                raise StopAsyncIteration
            await _any_readable(waiting)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _leave(self) -> None:
        await self.aclose()

    def _close_ends(self) -> None:
        for end in self._ends:
            end.close()
        self._entry.closing.discard(self._close_ends)


async def _any_readable(fds: Sequence[int]) -> None:
    # One epoll set is one thing to wait for, whatever the event loop. Of copies: one that its owner closes would leave
    # the set without a word.
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll(flags=select.EPOLL_CLOEXEC))
        for fd in fds:
            copy = os.dup(fd)
            stack.callback(os.close, copy)
            poll.register(copy, select.EPOLLIN)
        await anyio.wait_readable(poll.fileno())


def _ended_pipe() -> int:
    """The reading end of a pipe that nobody writes to: a stream that has ended."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    return reader


def _type_end(master: Descriptor) -> None:
    try:
        os.write(master.fileno(), _END_OF_INPUT)
    except (OSError, anyio.ClosedResourceError):
        return  # the terminal is gone, and with it whoever could read
