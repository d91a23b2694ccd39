"""What outlives this process of a sandbox's containers: facts as notes and descriptors, both held by the keeper.

Another process (the next engine, a command line) reads them, and drives the same containers. They need no disk: without
the keeper nothing of a container lives, since its init is the keeper's child and ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import attrs

from unisandbox.api import ContainerSpec, ProcessSpec
from unisandbox.api.plain import container_spec_of, plain, process_spec_of
from unisandbox.host.keeper import Keeper

# No exec id begins with it; see `check_id`.
_MAIN: Final = "-"


@attrs.frozen
class ContainerFacts:
    """What is known of a container.

    Attributes:
        name: within the sandbox.
        spec: as asked for; None for a bundle of somebody else.
        bundle: the directory of such a bundle, or empty.
        pid, start_time: of its first process; 0 until it was made: what there is of it then is what a creation that was
            cut has left.
        started: its main process was started.
        paused: it was stopped by `pause`.
    """

    name: str
    spec: ContainerSpec | None
    bundle: str = ""
    pid: int = 0
    start_time: int = 0
    started: bool = False
    paused: bool = False


@attrs.frozen
class ProcessFacts:
    """What is known of a process.

    Attributes:
        container, exec_id: which one; an empty exec id is the container's main process.
        spec: as asked for; None for the main process of a bundle.
        pid, start_time: on the host; the start time is 0 where init is its parent.
        started: its program runs or has run. Otherwise it still stood before its exec, and nobody was told of it.
        killed_by_us: SIGKILL was sent.
    """

    container: str
    exec_id: str
    spec: ProcessSpec | None
    pid: int
    start_time: int = 0
    started: bool = False
    killed_by_us: bool = False


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

    def _container(self, name: str) -> str:
        return f"{self._prefix}c/{name}"

    def _process(self, container: str, exec_id: str) -> str:
        return f"{self._prefix}p/{container}/{exec_id or _MAIN}"

    # --- writing ---

    async def container(self, facts: ContainerFacts, descriptors: Mapping[str, int] | None = None) -> None:
        """Write down a container, and let the keeper hold copies of `descriptors` ("control", "pidfd")."""
        if not self.kept:
            return
        name = self._container(facts.name)
        if descriptors:
            await self._keeper.hold_now({f"{name}/{what}": fd for what, fd in descriptors.items()})
        await self._keeper.note(name, _text(facts))

    async def process(self, facts: ProcessFacts, descriptors: Mapping[str, int] | None = None) -> None:
        """Write down a process, and let the keeper hold copies of `descriptors` ("life", "pidfd", "master").

        When the end of "life" comes the keeper notes the time.
        """
        if not self.kept:
            return
        name = self._process(facts.container, facts.exec_id)
        if descriptors:
            held = {f"{name}/{what}": fd for what, fd in descriptors.items()}
            await self._keeper.hold_now(held, stamp=[path for path in held if path.endswith("/life")])
        await self._keeper.note(name, _text(facts))

    def process_now(self, facts: ProcessFacts) -> None:
        """The same without descriptors and without an await."""
        if self.kept:
            name = self._process(facts.container, facts.exec_id)
            self._keeper.note_now(name, _text(facts))

    def forget_container(self, name: str) -> None:
        """A container is gone, with all its processes."""
        if self.kept:
            self._keeper.drop_now([self._container(name)], prefix=f"{self._container(name)}/")
            self._keeper.drop_now(prefix=f"{self._prefix}p/{name}/")

    def forget_process(self, container: str, exec_id: str) -> None:
        """A process is gone, and whoever asked for it knows how it ended."""
        if self.kept:
            name = self._process(container, exec_id)
            self._keeper.drop_now([name], prefix=f"{name}/")

    # --- reading ---

    async def read(self) -> tuple[list[ContainerFacts], list[ProcessFacts]]:
        """Everything that is written down.

        Raises:
            BackendError, ValueError: a note is none of ours.
        """
        containers, processes = [], []
        for name, note in (await self._keeper.notes(f"{self._prefix}c/")).items():
            containers.append(_container_of(name, json.loads(note)))
        for name, note in (await self._keeper.notes(f"{self._prefix}p/")).items():
            processes.append(_process_of(name, json.loads(note)))
        return containers, processes

    async def ends(self) -> Mapping[tuple[str, str], float]:
        """When processes ended (Unix time in seconds), by container and exec id; of those that have."""
        ends = {}
        for name, at in (await self._keeper.stamps(f"{self._prefix}p/")).items():
            _, _, container, exec_id, _ = name.rsplit("/", 4)
            ends[container, "" if exec_id == _MAIN else exec_id] = at
        return ends

    async def take_container(self, name: str, what: str) -> int:
        """A copy of a container's descriptor. Raises FileNotFoundError."""
        return await self._keeper.take(f"{self._container(name)}/{what}")

    async def take_process(self, container: str, exec_id: str, what: str) -> int:
        """A copy of a process's descriptor. Raises FileNotFoundError."""
        return await self._keeper.take(f"{self._process(container, exec_id)}/{what}")


def _text(facts: ContainerFacts | ProcessFacts) -> str:
    data = attrs.asdict(facts, recurse=False)
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
