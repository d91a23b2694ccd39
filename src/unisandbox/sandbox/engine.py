"""The engine as users see it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from typing_extensions import Unpack

from unisandbox.api import Event, Probe, SandboxStatus
from unisandbox.engine.choice import Choice
from unisandbox.engine.core import EngineCore
from unisandbox.engine.registry import Backend
from unisandbox.sandbox.opening import Opening
from unisandbox.sandbox.sandbox import Sandbox, SandboxOptions, make_spec


class Engine:
    """Manages sandboxes on one state directory, in the caller's process.

    Attributes:
        id: 10 characters; part of the name of everything that the engine makes on the host.
    """

    def __init__(self, core: EngineCore) -> None:
        self.id: str = core.host.engine_id
        self._core = core

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str] | None = None, *, backends: Mapping[str, Backend] | None = None
    ) -> Opening[Engine]:
        """Open an engine.

        Args:
            directory: where its state is kept; made if need be; None: a temporary one.
            backends: backends by name beside the installed ones.

        Raises:
            FailedPreconditionError: another engine owns the directory; its process is named.
            UnavailableError: this host cannot carry an engine; what is missing is said.

        Example:
            async with Engine.open("/var/lib/my-engine") as eng:
                sb = await eng.create(rootfs="host", name="w")
        """

        async def open() -> Engine:
            return cls(await EngineCore.open(directory, backends=backends))

        return Opening("Engine.open()", open)

    def __repr__(self) -> str:
        return f"<Engine {self.id}>"

    def create(self, **options: Unpack[SandboxOptions]) -> Opening[Sandbox]:
        """Create a sandbox; as `Sandbox.create`, in this engine."""
        spec = make_spec(**options)

        async def open() -> Sandbox:
            return Sandbox(await self._core.create(spec))

        return Opening("Engine.create()", open)

    async def get(self, ref: str) -> Sandbox:
        """The sandbox with that id or name.

        Raises:
            NotFoundError: there is none.
        """
        return Sandbox(self._core.get(ref))

    async def list(self) -> list[SandboxStatus]:
        """Every sandbox, the oldest first."""
        return [await entry.status() for entry in self._core.entries()]

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """What happens, from the event after number `after` on, until the engine closes."""
        return self._core.events.read(after)

    async def explain(self, **options: Unpack[SandboxOptions]) -> Choice:
        """Which backend `create` with the same options would take, and why; nothing is created."""
        return await self._core.explain(make_spec(**options))

    async def probe(self, *, deep: bool = False) -> Sequence[Probe]:
        """What every installed backend says about this host; with `deep` something really runs."""
        return await self._core.probe(deep=deep)

    async def close(self) -> None:
        """Remove every sandbox of this engine and leave nothing on the host. May be repeated."""
        await self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _leave(self) -> None:
        await self.close()
