"""What outlives this process of the guests of one sandbox: notes and reports, held by the keeper.

The inner sandbox's own notes tell of its processes; these tell which of them is which guest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

from unisandbox.api import BackendError, ContainerSpec, ProcessSpec
from unisandbox.api.plain import container_spec_of, plain, process_spec_of
from unisandbox.host.keeper import Keeper

# No exec id begins with it; see `check_id`.
_MAIN: Final = "-"


@attrs.frozen
class GuestNote:
    """One guest.

    Attributes:
        container, exec_id: as its sandbox has them.
        spec: what was asked for.
        worker: the inner sandbox's exec id of its process.
        client: number of the keeper's connection of whoever starts it.
        started: whoever asked for it was, or is about to be, told that it runs.
    """

    container: str
    exec_id: str
    spec: ProcessSpec
    worker: str
    client: int
    started: bool = False


class Notes:
    """Those of one sandbox.

    Args:
        keeper: who holds them.
        prefix: what everything of the sandbox begins with.
        kept: whether anybody could ever read them.
    """

    def __init__(self, keeper: Keeper, prefix: str, *, kept: bool) -> None:
        self._keeper = keeper
        self._prefix = f"{prefix}wasm/"
        self.kept = kept
        #: The number of this process's connection.
        self.client: int = keeper.hello.client

    def _guest(self, container: str, exec_id: str) -> str:
        return f"{self._prefix}p/{container}/{exec_id or _MAIN}"

    async def container(self, spec: ContainerSpec) -> None:
        """Write down a container, before it is made."""
        if self.kept:
            await self._keeper.notes.write(f"{self._prefix}c/{spec.name}", json.dumps(plain(spec)))

    async def guest(self, note: GuestNote, report: int = -1) -> None:
        """Write down a guest, and let the keeper hold its report."""
        if not self.kept:
            return
        name = self._guest(note.container, note.exec_id)
        if report >= 0:
            await self._keeper.spools.hold_now({f"{name}/report": report})
        data = attrs.asdict(note, recurse=False)
        await self._keeper.notes.write(name, json.dumps({**data, "spec": plain(note.spec)}))

    def forget_container(self, name: str) -> None:
        """A container is gone, with its guests."""
        if self.kept:
            self._keeper.drop_now([f"{self._prefix}c/{name}"], prefix=f"{self._prefix}p/{name}/")
            self._keeper.drop_now(prefix=f"{self._prefix}w/{name}/")

    def forget_guest(self, container: str, exec_id: str) -> None:
        """A guest is gone, and whoever asked for it knows how it ended."""
        if self.kept:
            name = self._guest(container, exec_id)
            self._keeper.drop_now([name], prefix=f"{name}/")

    async def idle(self, container: str, worker: str) -> None:
        """Write down a worker that waits for a guest: it ends with this process, and somebody has to free it."""
        if self.kept:
            await self._keeper.notes.write(f"{self._prefix}w/{container}/{worker}", str(self.client))

    def not_idle(self, container: str, worker: str) -> None:
        """It has a guest, or is gone."""
        if self.kept:
            self._keeper.drop_now([f"{self._prefix}w/{container}/{worker}"])

    async def abandoned(self) -> list[tuple[str, str]]:
        """(container, exec id) of the workers whose processes are gone while they waited."""
        if not self.kept:
            return []
        found = await self._keeper.notes.read(f"{self._prefix}w/")
        clients = {self.client, *await self._keeper.clients()} if found else set()
        gone = [name for name, client in found.items() if not (client.isdecimal() and int(client) in clients)]
        return [(name.split("/")[-2], name.split("/")[-1]) for name in gone]

    async def read(self) -> tuple[Mapping[str, ContainerSpec], list[GuestNote]]:
        """Everything that is written down: containers by name, and guests.

        Raises:
            BackendError: a note is none of ours.
        """
        containers: dict[str, ContainerSpec] = {}
        guests: list[GuestNote] = []
        for name, text in (await self._keeper.notes.read(self._prefix)).items():
            try:
                data: Any = json.loads(text)
                if name.startswith(f"{self._prefix}c/"):
                    spec = container_spec_of(data)
                    containers[spec.name] = spec
                elif name.startswith(f"{self._prefix}p/"):
                    guests.append(GuestNote(**{**data, "spec": process_spec_of(data["spec"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise BackendError(f"note {name!r} of the keeper cannot be read: {error}") from error
        return containers, guests

    async def report(self, container: str, exec_id: str) -> int:
        """A copy of a guest's report; -1 when there is none."""
        try:
            return await self._keeper.take(f"{self._guest(container, exec_id)}/report")
        except FileNotFoundError:
            return -1

    async def is_abandoned(self, client: int) -> bool:
        """Whether the process with this connection is gone."""
        return client != self.client and client not in await self._keeper.clients()
