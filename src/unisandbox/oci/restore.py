"""Going on with the containers of one sandbox that another process has made, changed or left half made.

What lives is taken over from the keeper's notes. What was cut in the middle is judged by what is there: a program that
runs is taken over, anything before that is undone, since nobody was told of it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from unisandbox.api import BackendError
from unisandbox.host.cgroups import patience
from unisandbox.host.init import began, has_told
from unisandbox.oci.ledger import ContainerFacts, Ledger, ProcessFacts, container_facts
from unisandbox.oci.made import Created
from unisandbox.oci.plan import Planner
from unisandbox.oci.processes import Container, Process
from unisandbox.oci.runtime import Runtime

# How long the end of a killed process may take: it may sit in the kernel (a disk, a network file system).
_END_SECONDS: Final = 10.0
# Between two looks whether a process has executed its program, of which there is no event.
_LOOK_SECONDS: Final = 0.002


class Restorer:
    """One restoration.

    Args:
        label: of the sandbox, for messages.
        containers: those that this process knows; they are changed.
        ledger: what others have written down.
        planner, runtime: as the task service's.
    """

    def __init__(
        self, label: str, containers: dict[str, Container], ledger: Ledger, planner: Planner, runtime: Runtime
    ) -> None:
        self._label = label
        self._containers = containers
        self._ledger = ledger
        self._planner = planner
        self._runtime = runtime
        self._taken: list[tuple[str, str]] = []

    async def run(self, *, exclusive: bool, let_go: Callable[[str], None]) -> list[tuple[str, str]]:
        """Do it; see `OciTaskService.restore`. Container and exec id of the processes that were taken over.

        Args:
            exclusive: nobody else makes a container meanwhile.
            let_go: closes what this process holds of a container, and forgets it here.
        """
        try:
            containers, processes = await self._ledger.read()
        except (ValueError, TypeError, KeyError) as error:
            raise BackendError(f"what the keeper holds of sandbox {self._label!r} cannot be read: {error}") from error
        made = {facts.name: facts for facts in containers}
        for name, container in list(self._containers.items()):
            facts, created = made.get(name), container.created
            if created is None and not exclusive:
                continue  # this process is making it
            if facts is None or created is None or (created.pid, created.start_time) != (facts.pid, facts.start_time):
                let_go(name)
        for facts in sorted(containers, key=lambda facts: facts.start_time):
            if _is_half_made(facts, processes):
                if exclusive and facts.name not in self._containers:
                    await self._undo(facts)
            elif facts.name in self._containers:
                self._containers[facts.name].started |= facts.started
            else:
                await self._take_over(facts, exclusive=exclusive)
        for process in processes:
            owner = self._containers.get(process.container)
            mine = owner.processes.get(process.exec_id) if owner is not None else None
            if owner is None or (mine is not None and mine.pid is not None):
                continue
            if process.started:
                await self._take_over_process(owner, process)
            elif await self._ledger.is_abandoned(process):
                await self._settle(owner, process)
        if exclusive:
            for container in list(self._containers.values()):
                await self._settle_bundle(container)
        return self._taken

    async def _undo(self, facts: ContainerFacts) -> None:
        """End what a creation that was cut has left: it may be known by its name only."""
        plan = await self._planner.restore(facts.name, facts.spec, facts.bundle, half_made=True)
        plan.cgroup.kill()
        await self._runtime.delete(plan.oci_id, force=True)
        await patience.remove(plan.cgroup.dirs, _END_SECONDS)
        await self._planner.free(facts.name)
        self._ledger.forget_container(facts.name)

    async def _take_over(self, facts: ContainerFacts, *, exclusive: bool) -> None:
        with contextlib.ExitStack() as taken:
            try:
                plan = await self._planner.restore(facts.name, facts.spec, facts.bundle)
                pidfd = await self._ledger.take_container(facts.name, "pidfd")
                taken.callback(os.close, pidfd)
                control, master = None, -1
                if facts.spec is None:
                    with contextlib.suppress(FileNotFoundError):  # it has no terminal
                        master = await self._ledger.take_container(facts.name, "master")
                        taken.callback(os.close, master)
                else:
                    control = socket.socket(fileno=await self._ledger.take_container(facts.name, "control"))
                    taken.callback(control.close)
            except FileNotFoundError:
                # Somebody is removing it at this moment, or was cut while he did.
                if exclusive:
                    await self._undo(facts)
                return
            if facts.name in self._containers:
                return  # another task of this process was quicker
            taken.pop_all()
        container = Container(facts.name, plan, with_init=facts.spec is not None, spec=facts.spec)
        container.started, container.verified = facts.started, True
        container.created = Created(facts.pid, facts.start_time, pidfd, plan.bundle)
        container.control = control
        container.processes[""] = Process("", facts.spec.process if facts.spec else None, [], master=master)
        self._containers[facts.name] = container
        if facts.has_init_alone:
            self._taken.append((facts.name, ""))

    async def _settle_bundle(self, container: Container) -> None:
        """A bundle's first process is its program: it may run although nobody came to write that down."""
        main, created = container.processes[""], container.created
        if container.with_init or created is None or main.pid is not None:
            return
        if not container.started and not self._runtime.was_started(container.plan.oci_id):
            return
        container.started = True
        await self._ledger.container(container_facts(container))
        main.pid, main.start_time, main.pidfd = created.pid, created.start_time, os.dup(created.pidfd)
        with contextlib.suppress(FileNotFoundError):  # on v1 the container's own cgroup is the leaf of its init
            main.cgroup = container.plan.cgroup.find("init")
        main.cgroup = main.cgroup or container.plan.cgroup
        await self._ledger.process(self._ledger.facts(container, main, main.pid, started=True), {"pidfd": main.pidfd})

    async def _take_over_process(self, container: Container, facts: ProcessFacts) -> None:
        process = Process(facts.exec_id, facts.spec, [])
        process.start_time, process.killed_by_us = facts.start_time, facts.killed_by_us
        leaf = facts.exec_id or ("main" if container.with_init else "init")
        with contextlib.suppress(FileNotFoundError):  # on v1 the container's own cgroup is the leaf of its init
            process.cgroup = container.plan.cgroup.find(leaf)
        if process.cgroup is None and not facts.exec_id and not container.with_init:
            process.cgroup = container.plan.cgroup
        try:
            process.pidfd = await self._ledger.take_process(container.name, facts.exec_id, "pidfd")
            if container.with_init:
                life = await self._ledger.take_process(container.name, facts.exec_id, "life")
                process.life = socket.socket(fileno=life)
            if facts.spec is not None and facts.spec.terminal is not None:
                process.master = await self._ledger.take_process(container.name, facts.exec_id, "master")
            elif facts.exec_id and not container.with_init:
                with contextlib.suppress(FileNotFoundError):  # it has no terminal
                    process.master = await self._ledger.take_process(container.name, facts.exec_id, "master")
        except BaseException as error:
            process.close()
            if isinstance(error, FileNotFoundError):
                return  # deleted meanwhile by whoever it belongs to
            raise
        known = container.processes.get(facts.exec_id)
        if self._containers.get(container.name) is not container or (known is not None and known.pid is not None):
            process.close()  # another task of this process was quicker, or has let the container go
            return
        process.pid = facts.pid
        if known is not None:
            process.master, known.master = max(process.master, known.master), -1  # of a bundle's first process
        container.processes[facts.exec_id] = process
        self._taken.append((container.name, facts.exec_id))

    async def _settle(self, container: Container, facts: ProcessFacts) -> None:
        """Whoever was starting a process is gone: take it over if its program has begun, otherwise end it."""
        now = await self._ledger.read_process(facts.container, facts.exec_id)
        if now is None:
            return  # deleted in time
        if not now.started and await self._has_begun(container, now):
            now = now._replace(started=True)
            await self._ledger.process(now)
        if now.started:
            await self._take_over_process(container, now)
            return
        with contextlib.suppress(FileNotFoundError):  # it was not even there
            cgroup = container.plan.cgroup.find(now.exec_id)
            cgroup.kill()
            container.lingering[cgroup] = 0
        self._ledger.forget_process(now.container, now.exec_id)

    async def _has_begun(self, container: Container, facts: ProcessFacts) -> bool:
        """Whether a process executes its program, or has: until then it executes init's."""
        if container.created is None or not container.with_init or not facts.pid:
            return False  # a runtime's exec tells of no half-way
        if facts.spec is None or facts.spec.terminal is not None:
            return False  # nobody has its terminal
        try:
            life = socket.socket(fileno=await self._ledger.take_process(facts.container, facts.exec_id, "life"))
        except FileNotFoundError:
            return False
        with life, anyio.move_on_after(_END_SECONDS):
            stands = True
            while not has_told(life):
                try:
                    of_init, own = (os.stat(f"/proc/{pid}/exe") for pid in (container.created.pid, facts.pid))
                except OSError:  # it, or init, has ended at this very moment: init tells that a moment later
                    stands = False
                    break
                # It may have got its word just before whoever gave it died.
                if not os.path.samestat(of_init, own) and not has_told(life):  # still its pid, and nobody else's
                    return True
                await anyio.sleep(_LOOK_SECONDS)
            return await began(life)
        # Of what died with its init nobody knows; nothing is to be done twice.
        return not stands


def _is_half_made(facts: ContainerFacts, processes: Sequence[ProcessFacts]) -> bool:
    """Whether nobody was told of this container. The caller's own bundle may stand created for as long as he likes."""
    if facts.pid == 0 or facts.spec is None:
        return facts.pid == 0
    if not facts.started:
        return True
    main = [process for process in processes if process.container == facts.name and process.exec_id == ""]
    return facts.spec.process is not None and not any(process.started for process in main)
