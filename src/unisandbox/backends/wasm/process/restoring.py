"""What other processes have done to the guests of a sandbox, learnt from the notes that they have left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from unisandbox.backends.wasm.containers import Containers
from unisandbox.backends.wasm.given import Given
from unisandbox.backends.wasm.process.container import Container
from unisandbox.backends.wasm.process.guest import Guest
from unisandbox.backends.wasm.process.notes import GuestNote
from unisandbox.backends.wasm.process.pool import end_worker
from unisandbox.backends.wasm.process.workers import Workers, Workplace


class Restorer:
    """Brings the containers that this process knows to what the notes of one sandbox say.

    Args:
        place: where its workers work.
        containers: those that are known; changed.
        learn: notes how a guest ended whose container is gone.
        delete: removes a container.
    """

    def __init__(
        self,
        place: Workplace,
        containers: Containers[Container],
        *,
        learn: Callable[[str, Guest], Awaitable[object]],
        delete: Callable[[str], Awaitable[object]],
    ) -> None:
        self._place, self._containers = place, containers
        self._inner, self._notes = place.inner, place.notes
        self._learn, self._delete = learn, delete

    async def run(self, *, exclusive: bool) -> None:
        """Take over what others have started, and let go of what they have ended.

        Args:
            exclusive: nobody else makes a container meanwhile.
        """
        specs, notes = await self._notes.read()
        there = set(self._inner.container_ids)
        await self._let_go(there)
        for name in self._inner.container_ids:
            if name in specs and self._containers.find(name) is None:
                self._containers.add(Container(specs[name], Workers(self._place, name), made=True))
        for name, worker in await self._notes.abandoned():
            if name in there:
                await end_worker(self._inner, name, worker)
            self._notes.not_idle(name, worker)
        self._close_untold(notes)
        for note in notes:
            await self._take_over(note, exclusive=exclusive)
        if exclusive:
            await self._end_cut([note for note in notes if not note.exec_id])

    async def _let_go(self, there: Collection[str]) -> None:
        """Forget the containers that have ended, once it is learnt how their guests have."""
        for container in self._containers.all:
            if container.made and container.spec.name not in there:
                for guest in container.processes.values():
                    if guest.worker is not None:
                        await self._learn(container.spec.name, guest)
                container.close()
                self._containers.discard(container)

    def _close_untold(self, notes: Sequence[GuestNote]) -> None:
        """Forget the guests that another process has deleted."""
        told_of = {(note.container, note.exec_id) for note in notes}
        for container in self._containers.all:
            for exec_id, guest in list(container.processes.items()):
                if guest.started and (container.spec.name, exec_id) not in told_of:
                    container.processes.pop(exec_id).close()

    async def _end_cut(self, mains: Sequence[GuestNote]) -> None:
        """Remove containers whose start was cut: nobody was told that they run, and nobody could end them.

        Args:
            mains: notes of main processes. A start that has failed leaves one, too, for whoever asked for it.
        """
        cut = [container for container in self._containers.all if container.is_being_started]
        for container in cut:
            clients = [note.client for note in mains if note.container == container.spec.name]
            if all([await self._notes.is_abandoned(client) for client in clients]):
                await self._delete(container.spec.name)

    async def _take_over(self, note: GuestNote, *, exclusive: bool) -> None:
        container = self._containers.find(note.container)
        if container is None:
            if exclusive:
                self._notes.forget_container(note.container)
            return
        if note.exec_id in container.processes:
            return
        if note.started:
            report = await self._notes.report(note.container, note.exec_id)
            guest = Guest(
                self._place,
                note.container,
                note.exec_id,
                Given(note.spec),
                worker=note.worker,
                report=report,
                started=True,
            )
            if container.processes.setdefault(note.exec_id, guest) is not guest:
                guest.close()  # another task of this process was quicker
        elif await self._notes.is_abandoned(note.client):
            # Nobody was told that it runs.
            if note.exec_id:
                await end_worker(self._inner, note.container, note.worker)
            self._notes.forget_guest(note.container, note.exec_id)
