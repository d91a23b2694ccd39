"""What the readers of events are told of one sandbox: the end of each container and process once, whoever sees it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

from unisandbox.api import EventKind, Exit, RecoveryAction, SandboxError, TaskService
from unisandbox.engine.events import EventLog, SharedEventLog
from unisandbox.host.ends import HeldEnd, TellsEnds
from unisandbox.host.latest import Latest

ENDS_KEPT: Final = 1024
"""Of so many containers it is known that their end was told; whoever waits for an older one may tell it again."""


def tell_recovered(log: EventLog | SharedEventLog, sandbox_id: str, action: RecoveryAction, reason: str) -> None:
    """A recovery has done this with a sandbox, or with what no record speaks of. That one was removed is told once."""
    identity = action if sandbox_id and action == "removed" else ""
    log.emit("sandbox.recovered", sandbox_id, detail={"action": action, "reason": reason}, identity=identity)


class Telling:
    """Of one sandbox.

    Args:
        log: where it is told.
        sandbox_id: of the sandbox.
        task: its task service, when it has been started.
    """

    def __init__(self, log: EventLog | SharedEventLog, sandbox_id: str, task: Callable[[], TaskService | None]) -> None:
        self._log = log
        self._sandbox_id = sandbox_id
        self._task = task
        # How containers ended whose end was told, as far as that is known; by name and identity.
        self._told: Latest[tuple[str, str], Exit | None] = Latest(ENDS_KEPT)
        # What identifies those of whom the task service says nothing, or nothing yet.
        self._made: Latest[str, str] = Latest(ENDS_KEPT)
        # What the task service calls those that handles were got of before it said anything.
        self._became: Latest[str, str] = Latest(ENDS_KEPT)

    def emit(
        self,
        kind: EventKind,
        *,
        container_id: str = "",
        exec_id: str = "",
        exit: Exit | None = None,
        detail: Mapping[str, str] | None = None,
        identity: str = "",
        end: HeldEnd | None = None,
    ) -> None:
        """Tell it; see `SharedEventLog.emit`."""
        self._log.emit(
            kind,
            self._sandbox_id,
            container_id=container_id,
            exec_id=exec_id,
            exit=exit,
            detail=detail,
            identity=identity,
            end=end,
        )

    def identity_of(self, container_id: str) -> str:
        """What tells the last container of this name from a later one; empty when it is not known."""
        task = _teller(self._task())
        told = "" if task is None else task.identity_of(container_id)
        return told or self._made.get(container_id, "")

    def is_replaced(self, container_id: str, identity: str) -> bool:
        """Whether there is, or was, a later container of this name than the one with this identity."""
        return self.identity_of(container_id) not in {"", identity, self._became.get(identity, identity)}

    def exit_of(self, container_id: str, identity: str) -> Exit | None:
        """How this very container ended, if that was told here."""
        return self._told.get((container_id, self._became.get(identity, identity)))

    def identities(self) -> dict[str, str]:
        """What `identity_of` says of each container."""
        task = self._task()
        return {} if task is None else {name: self.identity_of(name) for name in task.container_ids}

    def container_begins(self, container_id: str) -> None:
        """There is about to be a new container of this name: from now on an earlier one is replaced."""
        self._told.pop((container_id, ""), None)
        self._made[container_id] = os.urandom(8).hex()

    def container_created(self, container_id: str) -> None:
        """There is a new container of this name."""
        task = _teller(self._task())
        identity = "" if task is None else task.identity_of(container_id)
        if identity and (made := self._made.pop(container_id, "")):
            self._became[made] = identity
        self.emit("container.created", container_id=container_id)

    def container_started(self, container_id: str) -> None:
        """Its main process runs, and its end will be told by the keeper if that can see it."""
        self._started(container_id, "", self._end_of(container_id))

    def container_exited(self, container_id: str, identity: str, exit: Exit | None) -> None:
        """A container has ended."""
        identity = self._became.get(identity, identity)
        told = (container_id, identity)
        if told not in self._told:
            self.emit("container.exited", container_id=container_id, exit=exit, identity=identity)
        self._told[told] = self._told.get(told) or exit

    async def containers_exited(self, containers: Mapping[str, str]) -> None:
        """These, which are `identities`, have ended."""
        task = self._task()
        for container_id, identity in containers.items():
            if task is not None and (container_id, identity) not in self._told:
                exit = None
                with contextlib.suppress(SandboxError):  # a container without a main process, or one never started
                    exit = await task.wait(container_id)
                self.container_exited(container_id, identity, exit)

    def process_started(self, container_id: str, exec_id: str) -> None:
        """A process was started; on a state directory its end will be told by the keeper, whoever waits."""
        self._started(container_id, exec_id, self._end_of(container_id, exec_id))

    def taken_over(self) -> None:
        """What others have started is known here, too: who did may have been killed before he told of it."""
        task = _teller(self._task())
        taken: Sequence[tuple[str, str]] = [] if task is None else task.taken_over()
        for container_id, exec_id in taken:
            end = self._end_of(container_id, exec_id)
            if end is not None:
                self._started(container_id, exec_id, end._replace(late=True))

    def _started(self, container_id: str, exec_id: str, end: HeldEnd | None) -> None:
        if exec_id:
            self.emit("process.started", container_id=container_id, exec_id=exec_id, end=end)
        else:
            identity = self.identity_of(container_id)
            self.emit("container.started", container_id=container_id, identity=identity, end=end)

    def process_exited(self, container_id: str, exec_id: str, exit: Exit | None) -> None:
        """A process has ended, and whoever started it knows how."""
        if exit is None and self._end_of(container_id, exec_id) is not None:
            return  # the keeper will tell, and knows how
        if exit is not None and exit.reason == "oom":
            self.emit("process.oom", container_id=container_id, exec_id=exec_id, exit=exit)
        self.emit("process.exited", container_id=container_id, exec_id=exec_id, exit=exit)

    def _end_of(self, container_id: str, exec_id: str = "") -> HeldEnd | None:
        task = _teller(self._task())
        return None if task is None else task.end_of(container_id, exec_id)


@functools.cache
def _tells_ends(kind: type) -> bool:
    return issubclass(kind, TellsEnds)


def _teller(task: TaskService | None) -> TellsEnds | None:
    """The task service, if it can tell of ends. Asked for each class: of an object it takes 13 us (Python 3.11)."""
    kind: type = type(task)
    return cast("TellsEnds", task) if _tells_ends(kind) else None
