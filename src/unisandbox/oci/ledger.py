"""What outlives this process of a sandbox's containers: facts as notes and descriptors, both held by the keeper.

Another process (the next engine, a command line) reads them, and drives the same containers. They need no disk: without
the keeper nothing of a container lives, since its init is the keeper's child and ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from unisandbox.api import ContainerSpec, ProcessSpec
from unisandbox.api.plain import container_spec_of, plain, process_spec_of
from unisandbox.host.ends import HeldEnd
from unisandbox.host.keeper import Guard, Keeper
from unisandbox.oci.processes import Container, Process

# No exec id begins with it; see `check_id`.
_MAIN: Final = "-"


class ContainerFacts(NamedTuple):
    """What is known of a container.

    Attributes:
        name: within the sandbox.
        spec: as asked for; None for a bundle of somebody else.
        bundle: the directory of such a bundle, or empty.
        pid, start_time: of its first process; 0 until it was made: what there is of it then is what a creation that was
            cut has left.
        started: its main process was started.
    """

    name: str
    spec: ContainerSpec | None
    bundle: str = ""
    pid: int = 0
    start_time: int = 0
    started: bool = False

    @property
    def has_init_alone(self) -> bool:
        """Whether it has no main process, but our init."""
        return self.spec is not None and self.spec.process is None


class ProcessFacts(NamedTuple):
    """What is known of a process.

    Attributes:
        container, exec_id: which one; an empty exec id is the container's main process.
        spec: as asked for; None for the main process of a bundle.
        pid, start_time: on the host; the start time is 0 where init is its parent.
        started: its program runs or has run. Otherwise it may still stand before its exec, and nobody was told of it.
        killed_by_us: SIGKILL was sent.
        client: number of the keeper's connection of whoever starts it.
    """

    container: str
    exec_id: str
    spec: ProcessSpec | None
    pid: int
    start_time: int = 0
    started: bool = False
    killed_by_us: bool = False
    client: int = 0


class Ledger:
    """The facts of one sandbox.

    Args:
        keeper: who holds them.
        prefix: ends with "/"; everything of the sandbox is held below it.
        kept: whether anybody could ever read them. A private engine's sandboxes end with its process: it writes none.
    """

    def __init__(self, keeper: Keeper, prefix: str, *, kept: bool) -> None:
        self._keeper = keeper
        self._prefix = prefix
        self.kept = kept
        #: The number of this process's connection.
        self.client: int = keeper.hello.client

    def _container(self, name: str) -> str:
        return f"{self._prefix}c/{name}"

    def _process(self, container: str, exec_id: str) -> str:
        return f"{self._prefix}p/{container}/{exec_id or _MAIN}"

    def _killed(self, container: str, exec_id: str) -> str:
        return f"{self._prefix}k/{container}/{exec_id or _MAIN}"

    def end(self, container: str, exec_id: str, counter: tuple[str, str] | None) -> HeldEnd | None:
        """Where the keeper sees the end of a process whose "life" it holds; None where nothing is held."""
        if not self.kept:
            return None
        return HeldEnd(f"{self._process(container, exec_id)}/life", self._killed(container, exec_id), counter)

    def end_of_init(self, container: str) -> HeldEnd | None:
        """The same of a container that has no main process, but our init."""
        if not self.kept:
            return None
        return HeldEnd(f"{self._container(container)}/pidfd", self._killed(container, ""), None, is_init=True)

    def guard(self, container: str, pid: int, start_time: int) -> Guard:
        """How to end a container that no cgroup ends: by its first process."""
        return Guard(f"{self._prefix}process/{container}", "kill_process", (f"/{pid}/{start_time}",))

    # --- writing ---

    async def container(self, facts: ContainerFacts, descriptors: Mapping[str, int] | None = None) -> None:
        """Write down a container, and let the keeper hold copies of `descriptors` ("control", "pidfd", "master").

        When one ends that has no main process the keeper tells whoever wanted to know; see `end_of_init`.
        """
        if not self.kept:
            return
        name = self._container(facts.name)
        if descriptors:
            stamp = [f"{name}/pidfd"] if facts.has_init_alone else []
            await self._keeper.spools.hold_now({f"{name}/{what}": fd for what, fd in descriptors.items()}, stamp=stamp)
        await self._keeper.notes.write(name, _text(facts))

    async def process(self, facts: ProcessFacts, descriptors: Mapping[str, int] | None = None) -> None:
        """Write down a process, and let the keeper hold copies of `descriptors` ("life", "pidfd", "master").

        When the end of "life" comes the keeper tells whoever wanted to know; see `end`.
        """
        if not self.kept:
            return
        name = self._process(facts.container, facts.exec_id)
        if descriptors:
            held = {f"{name}/{what}": fd for what, fd in descriptors.items()}
            await self._keeper.spools.hold_now(held, stamp=[path for path in held if path.endswith("/life")])
        await self._keeper.notes.write(name, _text(facts))

    def killed_now(self, facts: ProcessFacts) -> None:
        """The same of a process that is about to get SIGKILL from us, without an await."""
        if self.kept:
            self._keeper.notes.write_now(self._killed(facts.container, facts.exec_id), "yes")
            self._keeper.notes.write_now(self._process(facts.container, facts.exec_id), _text(facts))

    def forget_container(self, name: str) -> None:
        """A container is gone, with all its processes."""
        if self.kept:
            self._keeper.drop_now([self._container(name)], prefix=f"{self._container(name)}/")
            self._keeper.drop_now(prefix=f"{self._prefix}p/{name}/")
            self._keeper.drop_now(prefix=f"{self._prefix}k/{name}/")

    def forget_process(self, container: str, exec_id: str) -> None:
        """A process is gone, and whoever asked for it knows how it ended."""
        if self.kept:
            name = self._process(container, exec_id)
            self._keeper.drop_now([name, self._killed(container, exec_id)], prefix=f"{name}/")

    def facts(self, container: Container, process: Process, pid: int, *, started: bool) -> ProcessFacts:
        """What there is to say of a process of ours."""
        return ProcessFacts(
            container.name,
            process.exec_id,
            process.spec,
            pid,
            process.start_time,
            started,
            process.killed_by_us,
            self.client,
        )

    # --- reading ---

    async def read(self) -> tuple[list[ContainerFacts], list[ProcessFacts]]:
        """Everything that is written down.

        Raises:
            BackendError, ValueError: a note is none of ours.
        """
        containers, processes = [], []
        for name, note in (await self._keeper.notes.read(f"{self._prefix}c/")).items():
            containers.append(_container_of(name, json.loads(note)))
        for name, note in (await self._keeper.notes.read(f"{self._prefix}p/")).items():
            processes.append(_process_of(name, json.loads(note)))
        return containers, processes

    async def read_process(self, container: str, exec_id: str) -> ProcessFacts | None:
        """What is written down of one process now."""
        name = self._process(container, exec_id)
        note = await self._keeper.notes.find(name)
        return None if note is None else _process_of(name, json.loads(note))

    async def is_abandoned(self, facts: ProcessFacts) -> bool:
        """Whether whoever was starting a process is gone."""
        return facts.client != self.client and facts.client not in await self._keeper.clients()

    async def take_container(self, name: str, what: str) -> int:
        """A copy of a container's descriptor. Raises FileNotFoundError."""
        return await self._keeper.take(f"{self._container(name)}/{what}")

    async def take_process(self, container: str, exec_id: str, what: str) -> int:
        """A copy of a process's descriptor. Raises FileNotFoundError."""
        return await self._keeper.take(f"{self._process(container, exec_id)}/{what}")


def container_facts(container: Container) -> ContainerFacts:
    """What there is to say of a container that was made."""
    created = container.created
    assert created is not None  # noqa: S101 (called for what was made)
    return ContainerFacts(
        container.name,
        container.spec,
        "" if container.with_init else container.plan.bundle,
        created.pid,
        created.start_time,
        container.started,
    )


def _text(facts: ContainerFacts | ProcessFacts) -> str:
    data = facts._asdict()
    return json.dumps({**data, "spec": None if facts.spec is None else plain(facts.spec)})


def _container_of(name: str, data: dict[str, object]) -> ContainerFacts:
    spec = data.pop("spec")
    facts = ContainerFacts(spec=None if spec is None else container_spec_of(spec), **data)  # type: ignore[arg-type]
    if not name.endswith(f"/c/{facts.name}"):
        raise ValueError(f"note {name!r} is of container {facts.name!r}")
    return facts


def _process_of(name: str, data: dict[str, object]) -> ProcessFacts:
    spec = data.pop("spec")
    facts = ProcessFacts(spec=None if spec is None else process_spec_of(spec), **data)  # type: ignore[arg-type]
    if not name.endswith(f"/p/{facts.container}/{facts.exec_id or _MAIN}"):
        raise ValueError(f"note {name!r} is of process {facts.exec_id!r} of container {facts.container!r}")
    return facts
