"""What happens to containers, told to containerd as its shims tell it.

An end, and what the kernel kills for memory, is told when it happens, whoever waits for it; what a former server could
not tell any more is told by the next one. Source: containerd, cmd/containerd-shim-runc-v2/task/service.go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import anyio.abc
import attrs
from betterproto2 import Message

from unisandbox.api import Exit, NotFoundError, SandboxError, SupportsOomNotice
from unisandbox.api.proto.containerd import events
from unisandbox.serve.moments import moment
from unisandbox.serve.pods import Place, facts_of
from unisandbox.serve.publishing import Publisher
from unisandbox.serve.stdio import Told

_logger: Final = logging.getLogger("unisandbox.serve")

_TOPICS: Final[dict[type[Message], str]] = {
    events.TaskCreate: "/tasks/create",
    events.TaskStart: "/tasks/start",
    events.TaskOom: "/tasks/oom",
    events.TaskExit: "/tasks/exit",
    events.TaskDelete: "/tasks/delete",
    events.TaskExecAdded: "/tasks/exec-added",
    events.TaskExecStarted: "/tasks/exec-started",
    events.TaskPaused: "/tasks/paused",
    events.TaskResumed: "/tasks/resumed",
}
"""Source: containerd, core/runtime/events.go."""

_Key = tuple[str, str, str]


@attrs.define(eq=False)
class _Life:
    """What was told of a process: of its end, and of a first one how many were killed for memory in its container."""

    pid: int
    told: Told = Told()  # noqa: RUF009 (it is a tuple)
    telling: anyio.Event | None = None


class Telling:
    """Tells of the containers of all pods.

    Args:
        publisher: whom.
        group: where ends are waited for.
    """

    def __init__(self, publisher: Publisher, group: anyio.abc.TaskGroup) -> None:
        self._publisher = publisher
        self._group = group
        self._lives: dict[_Key, _Life] = {}

    def tell(self, place: Place, event: Message) -> None:
        """Tell of something; never waits."""
        self._publish(place, event)

    def expect(self, place: Place, container: str, exec_id: str, pid: int, told: Told = Told()) -> None:  # noqa: B008
        """A process is there whose end is to be told."""
        if self._publisher.wanted:
            self._lives[place.entry.sandbox_id, container, exec_id] = _Life(pid, told)

    def started(self, place: Place, container: str, pid: int) -> None:
        """The expected first process of a container runs: this is its id, if not before."""
        if life := self._lives.get((place.entry.sandbox_id, container, "")):
            life.pid = pid

    def watch(self, place: Place, container: str, exec_id: str) -> None:
        """An expected process runs: tell how it ends."""
        life = self._lives.get((place.entry.sandbox_id, container, exec_id))
        if life is not None:
            self._group.start_soon(self._watch, place, container, exec_id, life)

    def forget(self, beginning: Sequence[str]) -> None:
        """What is called so is gone; an end that happens at this moment is still told."""
        for key in [key for key in self._lives if key[: len(beginning)] == tuple(beginning)]:
            del self._lives[key]

    async def adopt(self, place: Place) -> None:
        """Go on with what a former server has told of a pod; a process of which that is not known costs no other."""
        if not self._publisher.wanted:
            return
        for (container, exec_id), told in (await place.streams.told()).items():
            try:
                await self._adopt(place, container, exec_id, told)
            except NotFoundError:
                pass  # it is gone
            except (SandboxError, OSError) as error:
                _logger.error(
                    "the end of %s in pod %s is not told: %r", exec_id or container, place.entry.sandbox_id, error
                )

    async def _adopt(self, place: Place, container: str, exec_id: str, told: Told) -> None:
        state = await place.task.state(container, exec_id)
        kills = told.oom_kills
        if kills and not told.exit:
            # Those of processes that are gone are not counted any more.
            kills = min(kills, await _oom_kills(place, container))
        if state.state == "created" and exec_id:
            return
        self.expect(place, container, exec_id, state.pid or 0, told._replace(oom_kills=kills))
        if state.state != "created":
            self.watch(place, container, exec_id)

    async def ended(self, place: Place, container: str, exec_id: str, exit: Exit) -> int:
        """Tell of an end unless that was done; the process id that it had, 0 when that is not known."""
        life = self._lives.get((place.entry.sandbox_id, container, exec_id))
        if life is None:
            return 0
        await self._tell_end(place, container, exec_id, life, exit)
        return life.pid

    # --- watching ---

    async def _watch(self, place: Place, container: str, exec_id: str, life: _Life) -> None:
        try:
            exit: Exit | None = None
            async with anyio.create_task_group() as group:
                if not exec_id:
                    group.start_soon(self._watch_memory, place, container, life)
                with contextlib.suppress(SandboxError):  # it is gone with its pod, and nobody knows how
                    exit = await place.task.wait(container, exec_id)
                group.cancel_scope.cancel()
            if exit is not None:
                await self._tell_end(place, container, exec_id, life, exit)
        except Exception as error:
            _logger.error(
                "the end of %s in pod %s is not told: %r", exec_id or container, place.entry.sandbox_id, error
            )

    async def _watch_memory(self, place: Place, container: str, life: _Life) -> None:
        task = place.task
        if not isinstance(task, SupportsOomNotice):
            return
        try:
            while True:
                self._tell_kills(place, container, life, await task.more_oom_kills(container, life.told.oom_kills))
        except (SandboxError, OSError) as error:
            # Its end is told all the same, with what was killed.
            _logger.debug("memory of %s in pod %s is not watched: %r", container, place.entry.sandbox_id, error)

    async def _tell_end(self, place: Place, container: str, exec_id: str, life: _Life, exit: Exit) -> None:
        if life.telling is not None:
            await life.telling.wait()
            return
        life.telling = anyio.Event()
        try:
            first = self._lives.get((place.entry.sandbox_id, container, ""), life)
            kills = first.told.oom_kills + int(exit.reason == "oom" and not first.told.oom_kills)
            self._tell_kills(place, container, first, max(kills, await _oom_kills(place, container)))
            if not life.told.exit:
                life.told = life.told._replace(exit=True)
                event = events.TaskExit(
                    container_id=container,
                    id=exec_id or container,
                    pid=life.pid,
                    exit_status=exit.code,
                    exited_at=moment(exit.exited_at),
                )
                self._publish_once(place, container, exec_id, life, event)
        finally:
            life.telling.set()

    def _tell_kills(self, place: Place, container: str, life: _Life, kills: int) -> None:
        if kills > life.told.oom_kills:
            life.told = life.told._replace(oom_kills=kills)
            self._publish_once(place, container, "", life, events.TaskOom(container_id=container))

    def _publish_once(self, place: Place, container: str, exec_id: str, life: _Life, event: Message) -> None:
        """What containerd has is written down, so that the next server does not tell it again."""
        told = life.told
        key = (place.entry.sandbox_id, container, exec_id)

        def note() -> None:
            # Else it would be taken for that of a later process of this name, or stay when its pod is gone.
            if self._lives.get(key) is life and not place.entry.removed:
                place.streams.note_told(container, exec_id, told)

        self._publish(place, event, note)

    def _publish(self, place: Place, event: Message, then: Callable[[], None] = lambda: None) -> None:
        namespace = facts_of(place.entry).namespace
        self._publisher.publish(place.entry.sandbox_id, namespace, _TOPICS[type(event)], event, then)


async def _oom_kills(place: Place, container: str) -> int:
    """How many are counted now that were killed for memory in a container."""
    with contextlib.suppress(SandboxError, OSError):  # its cgroup is gone already
        return (await place.task.stats(container)).oom_kills or 0
    return 0
