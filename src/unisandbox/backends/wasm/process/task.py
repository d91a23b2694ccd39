"""The task service of guests in processes: containers are those of the inner sandbox, each guest a worker in one.

A guest's id of ours is that of the process that was asked for; the inner sandbox knows it by the id of its worker,
which may have waited for it. The main process of a container is the inner container's main process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    ContainerStatus,
    CreateTask,
    ExecTask,
    Exit,
    FailedPreconditionError,
    Metrics,
    NotFoundError,
    Resources,
    SandboxError,
    StartedTask,
    SupportsPause,
    TaskState,
    Terminal,
    UnsupportedError,
)
from unisandbox.api.checks import check_signal
from unisandbox.backends.wasm.checks import check_process, files_of
from unisandbox.backends.wasm.containers import Containers
from unisandbox.backends.wasm.given import (
    Given,
    Surroundings,
    check_room,
    found,
    is_deadly,
)
from unisandbox.backends.wasm.process.bundles import limits_text, process_of
from unisandbox.backends.wasm.process.capabilities import NAME
from unisandbox.backends.wasm.process.container import Container
from unisandbox.backends.wasm.process.guest import Guest
from unisandbox.backends.wasm.process.images import Images
from unisandbox.backends.wasm.process.interior import GUEST
from unisandbox.backends.wasm.process.making import asked_for, make_inner, set_limits
from unisandbox.backends.wasm.process.restoring import Restorer
from unisandbox.backends.wasm.process.workers import Workers, Workplace
from unisandbox.backends.wasm.programs import Programs
from unisandbox.oci import foreign

_SETTLED_SECONDS: Final = 10.0


class WasmProcessTasks:
    """See `TaskService`, `SupportsPause`, `SupportsUpdate`. One object per sandbox.

    Args:
        resources: as asked for.
        place: where its workers work.
        around: of every process that does not say otherwise.
        root_fd: a descriptor of the sandbox's root.
        lower: descriptor of the user's directory below it; -1: unknown.
        programs, images: the engine's.
    """

    def __init__(
        self,
        resources: Resources,
        place: Workplace,
        *,
        around: Surroundings,
        root_fd: Callable[[], int],
        lower: int,
        programs: Programs,
        images: Images,
    ) -> None:
        #: As asked for, or updated.
        self.resources: Resources = resources
        #: Guests that ended because they were refused memory; the kernel counts those that it has killed.
        self.oom_kills: int = 0
        self._place, self._around = place, around
        self._inner, self._notes, self._label = place.inner, place.notes, place.label
        self._root_fd, self._lower = root_fd, lower
        self._programs, self._images = programs, images
        self._containers: Containers[Container] = Containers(self._label)
        #: Held from the count of the guests that run until the next one is counted, too.
        self._counting = anyio.Lock()

    @property
    def container_ids(self) -> list[str]:
        """The containers, the oldest first."""
        return self._containers.ids

    # --- beginning ---

    async def create(self, request: CreateTask) -> None:
        """See `TaskService.create`."""
        container, bundle = asked_for(request, self._place.user_ids)
        made = Container(container, Workers(self._place, container.name))
        self._containers.add(made)
        try:
            await self._notes.container(container)
            stdio = None
            if container.process is not None:
                made.processes[""] = Guest(self._place, container.name, "", Given.of(container.process, request.stdio))
                stdio = made.workers.main()
            await make_inner(self._place, container, stdio, self._root_fd, bundle)
            made.made = True
        except BaseException:
            self._containers.discard(made)
            made.close()
            self._notes.forget_container(container.name)
            raise

    async def exec(self, request: ExecTask) -> None:
        """See `TaskService.exec`."""
        container = self._containers.get(request.container_id)
        if container.spec.rootfs is not None and request.oci_process:
            spec = process_of(request, container.spec)
        else:
            spec = request.given(NAME)
            check_process(spec, NAME)
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._containers.expect(container, request.exec_id)
        container.processes[request.exec_id] = Guest(
            self._place, request.container_id, request.exec_id, Given.of(spec, request.stdio)
        )

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """See `TaskService.start`; compiles the module when it is not known yet.

        Raises:
            InvalidArgumentError: there is no such module (exit code 127), or it cannot be started (126).
            FailedPreconditionError: as many guests run as `pids` allows, or the start was overtaken by a kill.
            DeadlineExceededError: it takes too long to compile.
        """
        container = self._containers.get(container_id)
        if not exec_id and container.spec.process is None:
            await self._inner.start(container_id)
            return StartedTask(None)
        guest = self._containers.process(container, exec_id)
        if guest.worker is not None or guest.starting is not None:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} was started before")
        guest.starting = anyio.Event()
        try:
            await self._start(container, guest)
        finally:
            guest.has_place = False
            guest.starting.set()
            guest.starting = None
        if container.spec.rootfs is not None:
            return StartedTask(guest.pid)
        await container.workers.refill(self.resources.memory)
        return StartedTask(None)

    async def _start(self, container: Container, guest: Guest) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        spec = guest.given.spec
        own = container.spec.rootfs is not None
        around = Surroundings(spec.env, spec.cwd or "/") if own else self._around.within(container.spec, spec)
        root = self._place.root_of(container.spec.name) if own else self._root_fd()
        try:
            lower = root if own or self._lower < 0 else self._lower
            async with found(self._programs, spec.argv[0], around, root, lower, self._label) as program:
                image = await self._images.get(program, self._label)
        finally:
            os.close(root)
        try:
            await self._take_place(guest)

            async def begin() -> None:
                self._containers.check_startable(container, guest.exec_id, killed=guest.killed)
                request = self._request(guest, around)
                await guest.begin(await container.workers.get(guest.exec_id), request, image.fd)

            await self._place.idle.in_turn(self._place.sandbox_id, begin)
        finally:
            os.close(image.fd)

    async def _take_place(self, guest: Guest) -> None:
        """Raises FailedPreconditionError: as many guests run, or are about to, as `pids` allows."""
        async with self._counting:
            if self.resources.pids is not None:
                guests = self._guests
                about_to = sum(each.has_place for each in guests)
                running = await self._alive(each for each in guests if not each.has_place)
                check_room(self.resources.pids, about_to + len(running), f"sandbox {self._label!r}")
            guest.has_place = True

    def _request(self, guest: Guest, around: Surroundings) -> dict[str, object]:
        """What a worker is told; see `worker`."""
        return {
            "argv": guest.given.spec.argv,
            "env": dict(around.env),
            "cwd": around.cwd,
            "root": GUEST,
            "memory": self.resources.memory,
            "cpu_seconds": self.resources.cpu_seconds,
            "fuel": self._place.fuel,
            "files": files_of(self.resources),
        }

    def release_idle(self) -> None:
        """Let those go that wait here."""
        for container in self._containers.all:
            container.workers.release()

    # --- going on ---

    async def running(self) -> int:
        """How many guests run now."""
        return len(await self._alive(self._guests))

    @property
    def _guests(self) -> list[Guest]:
        return [guest for container in self._containers.all for guest in container.processes.values()]

    async def _alive(self, guests: Iterable[Guest]) -> list[TaskState]:
        states = []
        for guest in [each for each in guests if each.started]:
            if guest.exit is None:
                try:
                    state = await self._inner.state(guest.container, guest.worker or "")
                except NotFoundError:
                    continue
                if state.state != "stopped":
                    states.append(state)
        return states

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """See `TaskService.state`."""
        container = self._containers.get(container_id)
        if not exec_id and container.spec.process is None:
            return await self._inner.state(container_id)
        guest = self._containers.process(container, exec_id)
        if not guest.started:
            await anyio.lowlevel.checkpoint_if_cancelled()
            return TaskState(container_id, exec_id, "created")
        state = await self._inner.state(container_id, guest.worker or "")
        if state.exit is not None:
            self._ended(guest, state.exit)
        # An engine knows its processes by their ids, too.
        pid = state.pid if container.spec.rootfs is not None else None
        return TaskState(container_id, exec_id, state.state, pid, guest.exit)

    async def status(self, inner: ContainerStatus) -> ContainerStatus:
        """What the status of an inner container is for us."""
        container = self._containers.find(inner.name)
        if container is None or container.is_being_started:
            return inner
        state = await self.state(inner.name)
        return ContainerStatus(inner.name, state.state, None, state.exit)

    async def pids(self, container_id: str) -> Sequence[int]:
        """See `TaskService.pids`: the processes of the guests that run."""
        guests = self._containers.get(container_id).processes.values()
        return [state.pid for state in await self._alive(guests) if state.pid is not None]

    async def stats(self, container_id: str) -> Metrics:
        """See `TaskService.stats`: everything but `pids` counts the workers, too."""
        metrics = await self._inner.stats(container_id)
        container = self._containers.find(container_id)
        guests = () if container is None else container.processes.values()
        return attrs.evolve(metrics, pids=len(await self._alive(guests)), pids_limit=None)

    async def resize_pty(self, container_id: str, exec_id: str, size: Terminal) -> None:
        """No guest has a terminal."""
        self._containers.process(self._containers.get(container_id), exec_id)
        await anyio.lowlevel.checkpoint()
        raise UnsupportedError("tty", NAME)

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """There is nothing to close: a guest has our only copies."""
        self._containers.get(container_id)
        await anyio.lowlevel.checkpoint()

    async def pause(self, container_id: str) -> None:
        """See `SupportsPause.pause`."""
        await self._pausing().pause(container_id)

    async def resume(self, container_id: str) -> None:
        """See `SupportsPause.resume`."""
        await self._pausing().resume(container_id)

    async def update(self, container_id: str, resources: Resources | str) -> None:
        """See `SupportsUpdate.update`: for containers that were made of a bundle."""
        container = self._containers.get(container_id)
        if container.spec.rootfs is None or not isinstance(resources, str):
            raise UnsupportedError("resources of one container", NAME, hint="Use Sandbox.update.")
        await set_limits(self._inner, container_id, limits_text(foreign.parse_resources(resources)))

    def _pausing(self) -> SupportsPause:
        if not isinstance(self._inner, SupportsPause):
            raise UnsupportedError("pause", NAME)
        return self._inner

    # --- ending ---

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """See `TaskService.kill`: each signal does to a guest's process what it does by default."""
        container = self._containers.get(container_id)
        check_signal(signal)
        if not exec_id and container.spec.process is None:
            chosen = list(container.processes.values()) if all else []
        else:
            chosen = [self._containers.process(container, exec_id)]
        await anyio.lowlevel.checkpoint_if_cancelled()
        for guest in chosen:
            if guest.worker is None:
                guest.killed = guest.killed or is_deadly(signal)
            elif signal:
                await self._inner.kill(container_id, guest.worker, signal=signal)

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.kill_now`."""
        container = self._containers.find(container_id)
        if container is None:
            return
        for name, guest in container.processes.items():
            if exec_id in {"", name} and guest.worker is None:
                guest.killed = True
        if not exec_id:
            self._inner.kill_now(container_id)
        elif exec_id in container.processes and container.processes[exec_id].worker is not None:
            self._inner.kill_now(container_id, container.processes[exec_id].worker or "")

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """See `TaskService.wait`."""
        gone = self._containers.exit_of_gone(container_id, exec_id)
        if gone is not None:
            await anyio.lowlevel.checkpoint()
            return gone
        container = self._containers.get(container_id)
        if not exec_id and container.spec.process is None:
            return await self._inner.wait(container_id)
        guest = self._containers.process(container, exec_id)
        if guest.exit is not None:
            await anyio.lowlevel.checkpoint()
            return guest.exit
        if not guest.started and container.spec.rootfs is not None and not exec_id:
            await guest.settled.wait()  # engines wait for a first process before they start it
            if not guest.started:
                raise NotFoundError(f"container {container_id!r} of sandbox {self._label!r} was removed")
        if not guest.started:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has not been started")
        return self._ended(guest, await self._inner.wait(container_id, guest.worker or ""))

    def _ended(self, guest: Guest, exit: Exit) -> Exit:
        """How it ended, noted once."""
        exit, refused = guest.ended(exit)
        self.oom_kills += refused
        return exit

    async def delete(self, container_id: str, exec_id: str = "") -> Exit | None:
        """See `TaskService.delete`; what still runs is ended."""
        container = self._containers.find(container_id)
        if container is None:
            if not exec_id:
                await self._inner.delete(container_id)
                self._notes.forget_container(container_id)
            return self._containers.forget_exit(container_id, exec_id)
        if exec_id:
            return await self._delete_guest(container, exec_id)
        container.workers.release()
        await self._overtake(container.processes.values())
        await self._inner.delete(container_id)
        for guest in container.processes.values():
            if guest.worker is not None:
                await self._learn(container_id, guest)
        if self._containers.discard(container):
            self._notes.forget_container(container_id)
        container.close()
        main = container.processes.get("")
        return None if main is None else main.exit

    async def _overtake(self, guests: Iterable[Guest]) -> None:
        """End those whose start is under way: the end of its worker ends a start, and without one it begins nothing."""
        beginning = [(guest, guest.starting) for guest in guests if guest.starting is not None]
        for guest, _ in beginning:
            self.kill_now(guest.container, guest.exec_id)
        with anyio.move_on_after(_SETTLED_SECONDS):
            for guest, over in beginning:
                if guest.worker is not None:
                    await over.wait()
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def _learn(self, container_id: str, guest: Guest) -> None:
        """How a guest ended whose container is gone."""
        worker = guest.worker or ""
        if guest.started:
            try:
                exit = self._ended(guest, await self._inner.wait(container_id, worker))
                self._containers.keep_exit(container_id, guest.exec_id, exit)
            except SandboxError:
                pass  # another process has deleted it
        await self._inner.delete(container_id, worker)

    async def _delete_guest(self, container: Container, exec_id: str) -> Exit | None:
        guest = container.processes.get(exec_id)
        if guest is None:
            await anyio.lowlevel.checkpoint()
            return None
        await self._overtake([guest])
        if guest.worker is not None:
            self._inner.kill_now(container.spec.name, guest.worker)
            exit = await self._inner.delete(container.spec.name, guest.worker)
            if exit is not None:
                self._ended(guest, exit)
        container.processes.pop(exec_id, None)
        self._notes.forget_guest(container.spec.name, exec_id)
        guest.close()
        return guest.exit

    def abandon(self) -> None:
        """Close what this process holds; ends only the workers that wait: they read the end of their channels."""
        for container in self._containers.all:
            container.close()
        self._containers.clear()

    async def restore(self, *, exclusive: bool) -> None:
        """Take over the guests that other processes have started, and let go of those that they have ended.

        Args:
            exclusive: nobody else makes a container meanwhile.
        """
        if self._notes.kept:
            restorer = Restorer(self._place, self._containers, learn=self._learn, delete=self.delete)
            await restorer.run(exclusive=exclusive)
