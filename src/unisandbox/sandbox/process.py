"""A process that was started by `exec`: its streams, its end, its terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

import anyio
import anyio.abc
import anyio.lowlevel
import attrs

from unisandbox.api import (
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    TaskService,
    Terminal,
    UnavailableError,
    UnsupportedError,
    check_name,
    short_name,
)
from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import check_signal
from unisandbox.api.plain import plain, plain_given
from unisandbox.engine.entry import Entry
from unisandbox.engine.held import HeldProcess, OpenStreams, StreamName
from unisandbox.engine.operations import digest_of, in_progress_error
from unisandbox.sandbox.pipes import Pipes, ended_pipe
from unisandbox.sandbox.starting import CLEANING_SECONDS, start
from unisandbox.sandbox.streams import (
    Kept,
    MissingReceiveStream,
    MissingSendStream,
    ReceiveStream,
    SendStream,
    TypingStream,
)

NOTHING_KEPT: Final[Mapping[StreamName, Kept]] = MappingProxyType({})
# The handles that this process has given out, so that one process is not read by two.
_handles: Final[weakref.WeakKeyDictionary[OpenStreams, weakref.WeakValueDictionary[str, Process]]] = (
    weakref.WeakKeyDictionary()
)


@attrs.frozen
@by_fields
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


def pid_of(pid: int | None, entry: Entry) -> int:
    """The process id, where there is one.

    Raises:
        UnsupportedError: what runs is no process of its own.
    """
    if pid is None:
        raise UnsupportedError(
            "pid", entry.backend, reason="what runs in its sandboxes is no process of its own", hint="Use its id."
        )
    return pid


class _End:
    """The one end of a process, which all its handles tell."""

    def __init__(self, exit: Exit | None = None) -> None:
        self.exit = exit


class Process:
    """A running process and its streams. Made by `Sandbox.exec`, or found by `Sandbox.processes`.

    Attributes:
        id: unique in its sandbox.
        argv: what was run.
        lost: bytes of its output that were dropped while nobody read it, since it was started; those that were kept
            come first, and go to whoever takes over next as far as nobody has received them.
        stdin: what it reads; with a terminal, what is typed. Closing that types the end of the input, which ends what
            reads lines; in raw mode it is the key Ctrl-D.
        stdout: what it writes; with a terminal, all of it.
        stderr: its errors; with a terminal there is none.
    """

    def __init__(
        self,
        entry: Entry,
        exec_id: str,
        argv: Sequence[str],
        pid: int | None,
        pipes: Pipes,
        *,
        operation_id: str = "",
        kept: Mapping[StreamName, Kept] = NOTHING_KEPT,
        lost: int = 0,
        end: _End | None = None,
    ) -> None:
        self.id: str = exec_id
        self.argv: tuple[str, ...] = tuple(argv)
        self._pid = pid
        self.lost: int = lost
        self.stdin: anyio.abc.ByteSendStream
        self.stdout: anyio.abc.ByteReceiveStream
        self.stderr: anyio.abc.ByteReceiveStream
        self._entry = entry
        self._exec_id = exec_id
        self._end = end or _End()
        self._last: Literal["stdout", "stderr"] = "stderr"
        self._operation_id = operation_id
        self._pipes = pipes
        if pipes.terminal is not None:
            self.stdin = TypingStream(pipes.terminal)
            self.stdout = ReceiveStream(pipes.terminal, kept.get("terminal"), reopens=True)
            self.stderr = MissingReceiveStream("a process with a terminal has no stderr of its own; read stdout")
        else:
            self.stdin = SendStream(pipes.stdin) if pipes.stdin else MissingSendStream("stdin of the process is null")
            missing = MissingReceiveStream
            out, err = pipes.stdout, pipes.stderr
            self.stdout = ReceiveStream(out, kept.get("stdout")) if out else missing("stdout is null")
            self.stderr = ReceiveStream(err, kept.get("stderr")) if err else missing("stderr is null")
        if self._end.exit is None:
            entry.streams.add(exec_id, self, pipes.ends().values())
        _handles.setdefault(entry.streams, weakref.WeakValueDictionary())[exec_id] = self

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
        if stdin not in ("pipe", "null"):
            raise InvalidArgumentError(f"stdin must be 'pipe' or 'null', got {stdin!r}")
        if not isinstance(tty, bool | Terminal):
            raise InvalidArgumentError(f"tty must be True, False or a Terminal, got {tty!r}")
        size = tty if isinstance(tty, Terminal) else (Terminal() if tty else None)
        spec = ProcessSpec(argv=argv, env=env, cwd=cwd, user=user, terminal=size)
        exec_id = ""
        if operation_id is not None:
            exec_id = f"op-{short_name(entry.sandbox_id, check_name(operation_id, 'operation id'))}"
            known = await cls._known(entry, exec_id, spec, stdin, operation_id)
            if known is not None:
                return known
        operation_id = operation_id or ""
        try:
            pipes = Pipes.open(stdin=stdin == "pipe" and size is None, output=size is None)
            exec_id, pid = await start(entry, spec, pipes, exec_id=exec_id, operation_id=operation_id)
        except BaseException:
            if operation_id:
                entry.operations.forget(operation_id)
            raise
        return cls(entry, exec_id, spec.argv, pid, pipes, operation_id=operation_id)

    @classmethod
    async def _known(
        cls, entry: Entry, exec_id: str, spec: ProcessSpec, stdin: str, operation_id: str
    ) -> Process | None:
        """What this operation has started; None: it is ours to start."""
        former = plain(spec)
        known = entry.operations.begin(
            operation_id,
            "exec",
            entry.sandbox_id,
            digest_of({**plain_given(spec), "stdin": stdin}),
            # Former versions noted what is as by default, too, and the first one not what was on stdin.
            former_digests=[digest_of({**former, "stdin": stdin}), digest_of(former)],
        )
        if known is None:
            return None
        in_progress = known.in_progress  # before the look: whoever is dead now has started all that he ever will
        for process in await cls.all_of(entry):
            if process.id == exec_id:
                return process
        if known.state == "finished":
            ended = cls(entry, exec_id, spec.argv, 0, Pipes(), end=_End(Exit(**json.loads(known.result))))
            ended._close_ends()
            return ended
        if any(held.exec_id == exec_id for held in await entry.held.read()):
            raise FailedPreconditionError(
                f"operation {operation_id!r} has started a process whose streams somebody else has",
                hint="Ask again when it has ended, or whoever has them.",
            )
        # If it was cut before anything ran, it is started by one of those who ask again.
        if in_progress or not entry.operations.take_over(known):
            raise in_progress_error(known)
        return None

    @classmethod
    async def all_of(cls, entry: Entry) -> list[Process]:
        """See `Sandbox.processes`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        task = await entry.known_task()
        handles = tuple(_handles.get(entry.streams, {}).values())
        mine = [process._under(entry) for process in handles if process.exit is None]
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
        if taken is None:
            return None
        pipes = Pipes()
        pipes.tell(lambda stream: entry.held.drop_stream(held.exec_id, stream))
        for stream, got in taken.items():
            pipes.own(stream, got.fd if got.fd >= 0 else ended_pipe())
        return cls(
            entry,
            held.exec_id,
            held.spec.argv,
            0 if state.state == "stopped" else state.pid,
            pipes,
            operation_id=held.operation_id,
            kept={
                stream: Kept(got.data, partial(entry.held.taken, held.exec_id, stream, got))
                for stream, got in taken.items()
            },
            lost=sum(got.lost for got in taken.values()),
        )

    def _under(self, entry: Entry) -> Process:
        """This process as one of `entry`; of a former generation's handle only `wait` is of use then."""
        if self._entry.record.generation >= entry.record.generation:
            return self
        kept: dict[StreamName, Kept] = {}
        if isinstance(self.stdout, ReceiveStream):
            kept["stdout" if self._pipes.terminal is None else "terminal"] = self.stdout.kept
        if isinstance(self.stderr, ReceiveStream):
            kept["stderr"] = self.stderr.kept
        pipes = self._pipes.renew()
        pipes.tell(lambda stream: entry.held.drop_stream(self.id, stream))
        return Process(
            entry,
            self.id,
            self.argv,
            self._pid,
            pipes,
            operation_id=self._operation_id,
            kept=kept,
            lost=self.lost,
            end=self._end,
        )

    def __repr__(self) -> str:
        end = f"code={self.exit.code}" if self.exit else "running"
        name = self.id if self._pid is None else f"pid={self._pid}"
        return f"<Process {name} {end} in sandbox {self._entry.sandbox_id}>"

    @property
    def pid(self) -> int:
        """Its id on the host; 0 when it had ended before it was found.

        Raises:
            UnsupportedError: it is no process of its own, but runs in this one (a Wasm guest).
        """
        return pid_of(self._pid, self._entry)

    @property
    def exit(self) -> Exit | None:
        """How it ended, once somebody has waited for it; None before."""
        return self._end.exit

    async def wait(self) -> Exit:
        """Wait until the process has ended.

        Safe to call many times and from several tasks; after the first return the answer never changes. What it left
        running in the background goes on. Unread output stays readable.

        Raises:
            UnavailableError: the sandbox is gone and the exit could not be learned; never guessed.
        """
        if self._end.exit is None:
            with self._entry.in_our_words():
                exit = await self._entry.last_task.wait(self._entry.main, self._exec_id)
            if self._end.exit is None:
                # What was asked for is done, before anything is forgotten: asked for again, it is not done again.
                self._end.exit = self._noted(exit) if self._operation_id else exit
                self._entry.streams.waited_for(self._exec_id)
                self._entry.programs.ended(self._exec_id)
                await self._entry.cleaning.run(self._delete, seconds=CLEANING_SECONDS)
        else:
            await anyio.lowlevel.checkpoint()
        return self._end.exit

    def _noted(self, exit: Exit) -> Exit:
        """The exit that this operation has come to, now or when somebody noted it who was cut right after that."""
        operations = self._entry.operations
        try:
            operations.finish(self._operation_id, json.dumps(attrs.asdict(exit)))
        except NotFoundError:
            return exit  # forgotten: many others have been asked for since
        except FailedPreconditionError:
            known = operations.find(self._operation_id)
            return exit if known is None else Exit(**json.loads(known.result))
        return exit

    async def _delete(self) -> None:
        await self._entry.last_task.delete(self._entry.main, self._exec_id)
        self._entry.programs.exited(self._exec_id, self.exit)

    async def signal(self, number: int) -> None:
        """Send a signal to the process; one that has ended takes it without a word.

        Raises:
            InvalidArgumentError: it is no signal's number.
            FailedPreconditionError: another engine has taken the sandbox over.
            UnavailableError: the keeper has ended, and with it what ran.
        """
        check_signal(number)
        if self.exit is None:
            self._entry.sharing.check_ours()
            with contextlib.suppress(NotFoundError), self._entry.in_our_words():
                task = self._entry.task
                try:
                    await task.kill(self._entry.main, self._exec_id, signal=number)
                except NotFoundError:  # it ended with its container
                    self._entry.check_there()
        else:
            await anyio.lowlevel.checkpoint()

    async def kill(self) -> Exit:
        """End the process and everything that it has started, and wait for its end.

        Raises:
            FailedPreconditionError: another engine has taken the sandbox over; the process goes on.
        """
        if self.exit is None:
            self._entry.sharing.check_ours()
            with self._entry.in_our_words():
                self._entry.last_task.kill_now(self._entry.main, self._exec_id)
        return await self.wait()

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal; the foreground processes get SIGWINCH.

        Raises:
            FailedPreconditionError: it has no terminal, or another engine has taken the sandbox over.
        """
        if self._pipes.terminal is None:
            raise FailedPreconditionError("the process has no terminal", hint="Start it with tty=True.")
        self._entry.sharing.check_ours()
        await self._entry.task.resize_pty(self._entry.main, self._exec_id, Terminal(rows, columns))

    async def aclose(self) -> None:
        """End it and all that it has started if it still runs, and close its streams. Repeating is harmless.

        If it had ended, what it has left in the background goes on, and gets SIGPIPE when it writes to one of them.

        Raises:
            FailedPreconditionError: another engine has taken the sandbox over; the process goes on.
        """
        try:
            if self.exit is None and not self._entry.in_fork:
                self._entry.sharing.check_ours()
                with self._entry.in_our_words():
                    self._entry.last_task.kill_now(self._entry.main, self._exec_id)
                await self._entry.cleaning.run(self.wait, seconds=CLEANING_SECONDS)
        finally:
            self._close_ends()
        await anyio.lowlevel.checkpoint()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        """The next piece of output, of either stream that is open here; ends when nobody can write any more.

        Raises:
            anyio.ClosedResourceError: both were closed here.
            UnavailableError: this process has too many open files to wait for some.
        """
        streams: list[tuple[Literal["stdout", "stderr"], ReceiveStream]] = []
        if isinstance(self.stdout, ReceiveStream):
            streams.append(("stdout", self.stdout))
        if isinstance(self.stderr, ReceiveStream):
            streams.append(("stderr", self.stderr))
        if self._last == "stdout":
            streams.reverse()  # each in its turn: one that always has more would keep the other away
        await anyio.lowlevel.checkpoint()
        while True:
            waiting: list[int] = []
            # Closed ones are left out, unless there is no other: then it is an error to read on.
            for name, stream in [each for each in streams if not each[1].closed] or streams:
                data = stream.receive_nowait()
                if data:
                    self._last = name
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
        self._pipes.close()
        self._entry.streams.drop(self._exec_id, self)

    def is_written_to(self) -> bool:
        """Whether somebody in the sandbox has the other end of an output."""
        pipes = self._pipes
        return any(end is not None and end.is_written_to() for end in (pipes.stdout, pipes.stderr, pipes.terminal))


async def _any_readable(fds: Sequence[int]) -> None:
    # One epoll set is one thing to wait for, whatever the event loop. Of copies: one that its owner closes would leave
    # the set without a word.
    with contextlib.ExitStack() as stack:
        try:
            poll = stack.enter_context(select.epoll(flags=select.EPOLL_CLOEXEC))
            for fd in fds:
                copy = os.dup(fd)
                stack.callback(os.close, copy)
                poll.register(copy, select.EPOLLIN)
        except OSError as error:
            raise UnavailableError(
                f"the output of a process cannot be waited for: {error.strerror}",
                hint="This process has too many open files: close some, or raise the limit (ulimit -n).",
            ) from error
        await anyio.wait_readable(poll.fileno())
