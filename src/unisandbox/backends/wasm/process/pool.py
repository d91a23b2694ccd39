"""Workers: processes in a sandbox that wait for a guest, and the handing over of one."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal

import anyio
import attrs

from unisandbox.api import BackendError, ExecTask, InvalidArgumentError, ProcessSpec, SandboxError, Stdio, TaskService
from unisandbox.backends.wasm.places import Turns, in_place
from unisandbox.backends.wasm.process.worker import MOST_ANSWER
from unisandbox.host.memory import in_memory
from unisandbox.host.readiness import readable

START_SECONDS: Final = 30.0
TURN_SECONDS: Final = 1.0
_PROCESSORS: Final = os.cpu_count() or 1
_CLEANING_SECONDS: Final = 10.0
_LOG_BYTES: Final = 4096
_NOT_EXECUTABLE: Final = 126

Answer = Literal["started", "gone"]


@attrs.define(eq=False)
class Worker:
    """A process that waits for a guest, or is about to.

    Attributes:
        exec_id: in the inner sandbox.
        channel: our end; closed, it ends a worker that has no guest.
        log: what it says on its standard error until it has one.
    """

    exec_id: str
    channel: socket.socket
    log: int

    @property
    def is_gone(self) -> bool:
        """It has ended, or has said something although it was not asked: neither is of use."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close what is ours of it."""
        self.channel.close()
        if self.log >= 0:
            os.close(self.log)
            self.log = -1

    async def hand_over(
        self, request: Mapping[str, object], image: int, report: int, streams: Sequence[int | None]
    ) -> Answer:
        """Give it a guest. "gone": it has ended without an answer; how, its exit tells.

        Raises:
            InvalidArgumentError: the guest cannot be started; the reason, and the shell's code.
            BackendError: no answer came in time.
        """
        given = [fd for fd in streams if fd is not None]
        mask = sum(1 << number for number, fd in enumerate(streams) if fd is not None)
        words = in_memory(json.dumps(request).encode("ascii"), "request")
        try:
            fds = array.array("i", [words, image, report, *given])
            self.channel.sendmsg([bytes([mask])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except (BrokenPipeError, ConnectionResetError):
            return "gone"
        finally:
            os.close(words)
        with anyio.move_on_after(START_SECONDS):
            await readable(self.channel.fileno())
            return self._answer()
        raise BackendError(
            f"a worker did not start its guest within {START_SECONDS:g} s", log=self.last_words(), hint="Try again."
        )

    def _answer(self) -> Answer:
        try:
            # Twice: see `stamps.peek`.
            words = self.channel.recv(MOST_ANSWER, socket.MSG_DONTWAIT) or self.channel.recv(
                MOST_ANSWER, socket.MSG_DONTWAIT
            )
        except (BlockingIOError, ConnectionResetError):
            words = b""
        if not words:
            return "gone"
        # A stranger's words from here on: its guest may be running already.
        try:
            answer: Any = json.loads(words)
            error, code = str(answer.get("error", "")), answer.get("code")
        except (ValueError, AttributeError, RecursionError):
            return "started"
        if error:
            code = code if code in {126, 127} else _NOT_EXECUTABLE
            raise InvalidArgumentError(error, exit_code=code)
        return "started"

    def last_words(self) -> str:
        """The end of what it said before it had a guest."""
        if self.log < 0:
            return ""
        size = os.fstat(self.log).st_size
        return os.pread(self.log, _LOG_BYTES, max(size - _LOG_BYTES, 0)).decode("utf-8", "replace").strip()


def channel() -> tuple[socket.socket, socket.socket]:
    """Our end, and the one that becomes a worker's standard input."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def log_file() -> int:
    """What becomes a worker's standard error."""
    return os.memfd_create("worker", os.MFD_CLOEXEC)


async def start_worker(
    inner: TaskService, container_id: str, exec_id: str, argv: Sequence[str], env: Mapping[str, str]
) -> Worker:
    """Start one in a running container; it gets itself ready meanwhile.

    Raises:
        SandboxError: it cannot be started.
    """
    ours, theirs = channel()
    worker = Worker(exec_id, ours, -1)
    try:
        worker.log = log_file()
        process = ProcessSpec(argv, env=env, cwd="/")
        await inner.exec(ExecTask(container_id, exec_id, process, Stdio(theirs.fileno(), None, worker.log)))
        await inner.start(container_id, exec_id)
        return worker
    except BaseException:
        worker.close()
        await end_worker(inner, container_id, exec_id)
        raise
    finally:
        theirs.close()


async def end_worker(inner: TaskService, container_id: str, exec_id: str) -> None:
    """End one, and free what it was."""
    inner.kill_now(container_id, exec_id)
    with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS), contextlib.suppress(SandboxError):
        await inner.delete(container_id, exec_id)


class IdleWorkers:
    """Those of one engine that wait: at most one for each container, and so many in all; the oldest goes first.

    Args:
        most: in all.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._places = anyio.Semaphore(2 * _PROCESSORS)
        self._of_sandbox = Turns(_PROCESSORS)
        self._idle: OrderedDict[tuple[str, str], tuple[Worker, Callable[[str], None]]] = OrderedDict()

    async def in_turn(self, sandbox_id: str, start: Callable[[], Awaitable[None]]) -> None:
        """Start a guest when its turn has come: more of them at once would only take memory and each other's time.

        A sandbox has at most half of the places. A start that takes longer than a second (in a sandbox with little
        processor time, say) lets the next one begin.
        """
        async with self._of_sandbox.of(sandbox_id):
            await in_place(self._places, TURN_SECONDS, start)

    @property
    def wanted(self) -> bool:
        """Whether there are to be any."""
        return self._most > 0

    def take(self, sandbox_id: str, container_id: str) -> Worker | None:
        """The one that waits in this container, now the caller's."""
        found = self._idle.pop((sandbox_id, container_id), None)
        return None if found is None else found[0]

    def has(self, sandbox_id: str, container_id: str) -> bool:
        """Whether one waits there."""
        return (sandbox_id, container_id) in self._idle

    def put(self, sandbox_id: str, container_id: str, worker: Worker, left: Callable[[str], None]) -> None:
        """Let one wait.

        Args:
            sandbox_id, container_id: where it is.
            worker: the one.
            left: told its exec id when it has to go: its end has to be waited for.
        """
        self._idle[sandbox_id, container_id] = worker, left
        while len(self._idle) > self._most:
            (_, _), (oldest, told) = self._idle.popitem(last=False)
            oldest.close()
            told(oldest.exec_id)

    def close(self) -> None:
        """End them all: each reads the end of its channel."""
        while self._idle:
            self._idle.popitem()[1][0].close()
