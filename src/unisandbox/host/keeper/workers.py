"""The keeper's workers: forks of it that run jobs, each one job at a time. Standard library only.

To fork a process with Python in it, and to end it, costs more than what most jobs do (measured: 2 to 3 ms of CPU time
for every job). So a worker whose job went well stays for a while for the next one. The first is forked for the first
job, and after a time without jobs none is left.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time

from unisandbox.host.keeper import children, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Message, Packet

# So many are enough for jobs as they should be: more would wait for the keeper. Each has about 2 MB of its own.
_ENOUGH = 2
# A job takes a few milliseconds. One that takes longer (a disk, a network) does not keep another from its beginning.
PATIENCE = 0.05
# One without a job ends after so long.
_IDLE_SECONDS = 10.0
_DIED = "the job died without an answer; see keeper.log"


class Worker:
    """One of them, from its fork until it is reaped."""

    __slots__ = ("answered", "began", "killed", "pid", "sock", "timer")

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid: int = pid
        self.sock: socket.socket = sock
        #: Who is told what its job gave; None when it has no job.
        self.answered: Callable[[Packet], None] | None = None
        #: When it was given its job.
        self.began: float = 0.0
        #: Runs while it waits for a job.
        self.timer: Timer | None = None
        self.killed: bool = False


class Workers:
    """All of them.

    Args:
        loop: the keeper's.
        ready: called when one has room for a job.
    """

    def __init__(self, loop: Loop, ready: Callable[[], None]) -> None:
        self._loop = loop
        self._ready = ready
        self._living: dict[int, Worker] = {}
        #: Those that wait for a job; the last one is taken first, so that those that are not needed end.
        self._idle: list[Worker] = []
        self._buffer = protocol.new_buffer()

    @property
    def are_busy(self) -> bool:
        """Whether a job begins sooner if it waits a moment for one of those that are at work."""
        if self._idle:
            return False
        since = time.monotonic() - PATIENCE
        return sum(worker.began > since for worker in self._living.values()) >= _ENOUGH

    def begin(self, steps: Sequence[object], fds: Sequence[int], answered: Callable[[Packet], None]) -> int:
        """Let one run a job: its pid. `answered` is called once, with the answer or an `error`.

        Raises:
            OSError: no process could be started, or the job is too large.
        """
        try:
            data = protocol.encode({"steps": steps}, fds)
        except protocol.MessageTooLargeError as error:
            raise OSError(errno.EMSGSIZE, f"the job is {error}") from None
        while True:
            waited = bool(self._idle)
            worker = self._idle[-1] if waited else self._fork()
            self._rouse(worker)
            try:
                protocol.send(worker.sock, data, fds)
            except OSError as error:
                self._leave(worker)
                if waited and error.errno in {errno.EPIPE, errno.ECONNRESET}:
                    continue  # somebody killed it while it waited
                raise
            worker.answered = answered
            worker.began = time.monotonic()
            return worker.pid

    def kill(self, pid: int) -> None:
        """End this one and what its job has started, whatever it is doing; its answer, if it comes, counts."""
        worker = self._living.get(pid)
        if worker is not None:
            worker.killed = True
            os.kill(pid, signal.SIGKILL)  # our child and not reaped: the pid is its own

    def __contains__(self, pid: int) -> bool:
        return pid in self._living

    def reaped(self, pid: int) -> None:
        """It is dead, and its pid is free. What it had said before counts."""
        worker = self._living.pop(pid)
        while worker.sock.fileno() >= 0 and self._said(worker):
            pass
        self._leave(worker, _DIED)  # a copy of its end may live a moment longer, in a child that dies with it

    def _fork(self) -> Worker:
        pid, sock = children.start_worker()
        worker = Worker(pid, sock)
        self._living[pid] = worker
        self._loop.watch(sock.fileno(), lambda _events: self._hear(worker))
        return worker

    def _hear(self, worker: Worker) -> None:
        self._said(worker)

    def _said(self, worker: Worker) -> bool:
        """Take one packet; whether there was anything."""
        try:
            packet = protocol.receive(worker.sock, self._buffer)
        except BlockingIOError:
            return False
        except (protocol.ProtocolError, OSError) as error:
            self._leave(worker, f"the job's answer cannot be read: {error}")
            return True
        if packet is None:
            self._leave(worker, _DIED)
        elif packet.message.get("ready"):
            self._rest(worker)
        else:
            self._answer(worker, packet)
        return True

    def _answer(self, worker: Worker, packet: Packet) -> None:
        answered, worker.answered = worker.answered, None
        try:
            if answered is not None:
                answered(packet)
        finally:
            packet.close()

    def _rest(self, worker: Worker) -> None:
        if worker.killed or len(self._idle) >= _ENOUGH:
            self._leave(worker)
            return
        self._idle.append(worker)
        worker.timer = self._loop.later(_IDLE_SECONDS, lambda: self._leave(worker))
        self._ready()

    def _rouse(self, worker: Worker) -> None:
        if worker.timer is not None:
            self._idle.remove(worker)
            worker.timer.cancel()
            worker.timer = None

    def _leave(self, worker: Worker, why: str = "") -> None:
        """Close its socket: it ends, if it has not."""
        self._rouse(worker)
        if worker.sock.fileno() < 0:
            return
        self._loop.unwatch(worker.sock.fileno())
        worker.sock.close()
        message: Message = {"error": why, "errno": errno.EIO}
        self._answer(worker, protocol.Packet(message, [], 0))
