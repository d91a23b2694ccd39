"""One guest in a process: what it was asked for with, the worker that it is handed to, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import anyio
import attrs

from unisandbox.api import BackendError, Exit, InvalidArgumentError
from unisandbox.backends.wasm.given import Given, ended_before_start, not_started
from unisandbox.backends.wasm.process.notes import GuestNote
from unisandbox.backends.wasm.process.pool import Worker, end_worker
from unisandbox.backends.wasm.process.report import new_report, told
from unisandbox.backends.wasm.process.workers import Workplace

_END_SECONDS: Final = 10.0


@attrs.define(eq=False)
class Guest:
    """One that was asked for.

    Attributes:
        place: of its sandbox.
        container: its container's name.
        exec_id: ours.
        given: what was asked for.
        worker: the inner exec id of its process, once there is one.
        pid: of its worker, asked for while that waits: a guest may have ended when its start is known.
        report: what its worker tells of its end.
        starting: set when a start that is under way is over.
        has_place: it counts as running, since it is about to.
        started: it runs or has run.
        killed: it was ended before it had a worker.
        exit: how it ended.
        settled: set when it has started, or never will.
    """

    place: Workplace
    container: str
    exec_id: str
    given: Given
    worker: str | None = None
    pid: int | None = None
    report: int = -1
    starting: anyio.Event | None = None
    has_place: bool = False
    started: bool = False
    killed: bool = False
    exit: Exit | None = None
    settled: anyio.Event = attrs.field(factory=anyio.Event)

    async def begin(self, worker: Worker, request: Mapping[str, object], image: int) -> None:
        """Have it run by a worker, which is closed.

        Args:
            worker: which waits.
            request: see `worker`.
            image: descriptor of the compiled module.

        Raises:
            InvalidArgumentError: it cannot be started.
            FailedPreconditionError: it was ended before it had this worker.
            BackendError: the worker does not answer.
        """
        notes = self.place.notes
        self.worker = worker.exec_id
        try:
            if self.killed:
                raise ended_before_start(self.container, self.exec_id)
            self.pid = (await self.place.inner.state(self.container, worker.exec_id)).pid
            self.report = new_report()
            note = GuestNote(self.container, self.exec_id, self.given.spec, worker.exec_id, notes.client)
            # Written before the guest can run: whoever comes after us finds it, whatever happens.
            await notes.guest(note, self.report)
            notes.not_idle(self.container, worker.exec_id)
            answer = await worker.hand_over(request, image, self.report, self.given.streams)
            if answer == "gone":
                await self._check_gone(worker)
            await notes.guest(attrs.evolve(note, started=True))
            self.started = True
            self.settled.set()
        except BaseException as error:
            if self.exec_id:
                self.worker = None
                self._close_report()
                await end_worker(self.place.inner, self.container, worker.exec_id)
                notes.forget_guest(self.container, self.exec_id)
            if isinstance(error, InvalidArgumentError):
                raise not_started(self.given.spec.argv[0], self.place.label, error) from error
            raise
        finally:
            worker.close()
        self.given.close()

    async def _check_gone(self, worker: Worker) -> None:
        """A worker has ended without an answer: a kill may have been so quick, or the worker has a mistake.

        Raises:
            BackendError: it has ended by itself.
        """
        with anyio.move_on_after(_END_SECONDS):
            exit = await self.place.inner.wait(self.container, worker.exec_id)
            if exit.signal is not None:
                return
            raise BackendError(
                f"a worker of sandbox {self.place.label!r} ended with {exit.code} ({exit.reason}) and started no guest",
                log=worker.last_words(),
            )

    def ended(self, exit: Exit) -> tuple[Exit, int]:
        """Its worker has ended so. How it ended, which never changes, and the refusals of memory that are news."""
        if self.exit is not None:
            return self.exit, 0
        self.exit = told(exit, self.report)
        return self.exit, self.exit.oom_kills - exit.oom_kills

    def close(self) -> None:
        """Close what this process holds of it. Repeating is harmless."""
        self.settled.set()
        self.given.close()
        self._close_report()

    def _close_report(self) -> None:
        if self.report >= 0:
            os.close(self.report)
            self.report = -1
