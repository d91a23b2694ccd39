"""The workers of one container: who gets the next guest, who waits for one, who has left and is to be freed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import attrs

from unisandbox.api import FailedPreconditionError, ProcessSpec, SandboxError, TaskService
from unisandbox.api.units import MIB
from unisandbox.backends.wasm.process.interior import GUEST, Interior
from unisandbox.backends.wasm.process.notes import Notes
from unisandbox.backends.wasm.process.pool import IdleWorkers, Worker, channel, log_file, start_worker
from unisandbox.host import syscalls

# Below that a worker that waits would take too much of what the guests may have.
_LEAST_MEMORY_FOR_IDLE: Final = 128 * MIB


@attrs.define(eq=False)
class Workplace:
    """Where the workers of a sandbox work.

    Attributes:
        sandbox_id, label: of the sandbox.
        inner: drives the containers of the inner sandbox.
        interior, idle: the engine's.
        notes: what outlives this process.
        fuel: instructions that each guest may execute.
        user_ids: the host's first id and how many, of its user namespace as asked for; None: it has the host's, or one
            that nobody has asked for.
        container_root: a descriptor of the root of a container in it.
    """

    sandbox_id: str
    label: str
    inner: TaskService
    interior: Interior
    idle: IdleWorkers
    notes: Notes
    fuel: int | None
    user_ids: tuple[int, int] | None
    container_root: Callable[[str], int]
    _started: int = attrs.field(default=0, init=False)

    @property
    def spec(self) -> ProcessSpec:
        """Of a worker's process."""
        argv = (*self.interior.argv, *(() if self.fuel is None else ("fuel",)))
        return ProcessSpec(argv, env=self.interior.env, cwd="/")

    def root_of(self, container: str) -> int:
        """A descriptor of the files that the guests of a container have for their own, the caller's to close."""
        root = self.container_root(container)
        try:
            return syscalls.openat2(root, GUEST, os.O_PATH | os.O_DIRECTORY, resolve=syscalls.RESOLVE_IN_ROOT)
        finally:
            os.close(root)

    def new_id(self) -> str:
        """An exec id that no other worker of the inner sandbox has, whoever started it."""
        self._started += 1
        return f"worker{self._started}-{self.notes.client}"


class Workers:
    """Those of one container.

    Args:
        place: of its sandbox.
        container: its name.
    """

    def __init__(self, place: Workplace, container: str) -> None:
        self._place = place
        self._container = container
        #: Of the main process, until it has its guest.
        self._main: Worker | None = None
        #: Those that were let go, and are to be freed once they have ended.
        self._leaving: list[str] = []
        self._filling = False
        self._closed = False

    def main(self) -> tuple[int, int]:
        """Expect one that will be the container's main process: its standard input, the caller's, and error, ours."""
        ours, theirs = channel()
        self._main = Worker("", ours, -1)
        with theirs:
            self._main.log = log_file()
            return theirs.detach(), self._main.log

    async def get(self, exec_id: str) -> Worker:
        """One for this guest, the caller's to close: the one that waits, or else a new one."""
        place, name = self._place, self._container
        if not exec_id:
            worker, self._main = self._main, None
            if worker is None:
                raise FailedPreconditionError(f"container {name!r} of sandbox {place.label!r} was started before")
            await place.inner.start(name)
            return worker
        idle = place.idle.take(place.sandbox_id, name)
        if idle is not None:
            if not idle.is_gone:
                return idle
            self._let_go(idle)
        return await self._new()

    async def _new(self) -> Worker:
        place = self._place
        return await start_worker(place.inner, self._container, place.new_id(), place.spec.argv, place.spec.env)

    async def refill(self, memory: int | None) -> None:
        """Let one get ready for the next guest, and free those that have left. Nothing depends on it.

        Args:
            memory: limit of the sandbox.
        """
        await self._free_leaving()
        place, name = self._place, self._container
        if not place.idle.wanted or self._filling or place.idle.has(place.sandbox_id, name):
            return
        if memory is not None and memory < _LEAST_MEMORY_FOR_IDLE:
            return
        self._filling = True
        try:
            worker = await self._new()
        except (SandboxError, OSError):
            return  # a limit is reached, say; the next guest will be told
        finally:
            self._filling = False
        if self._closed:
            worker.close()  # its container was removed meanwhile
            return
        place.idle.put(place.sandbox_id, name, worker, self._leaving.append)
        await place.notes.idle(name, worker.exec_id)

    async def _free_leaving(self) -> None:
        inner, name = self._place.inner, self._container
        for exec_id in list(self._leaving):
            try:
                if (await inner.state(name, exec_id)).state != "stopped":
                    continue
                await inner.delete(name, exec_id)
            except SandboxError:
                pass  # gone already
            self._leaving.remove(exec_id)
            self._place.notes.not_idle(name, exec_id)

    def release(self) -> None:
        """Let the one go that waits."""
        idle = self._place.idle.take(self._place.sandbox_id, self._container)
        if idle is not None:
            self._let_go(idle)

    def _let_go(self, worker: Worker) -> None:
        worker.close()
        self._leaving.append(worker.exec_id)

    def close(self) -> None:
        """Close what this process holds of them: those without a guest end. Repeating is harmless."""
        self._closed = True
        self.release()
        if self._main is not None:
            self._main.close()
            self._main = None
