"""The engine as users see it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Final, Literal, Self

import anyio.lowlevel
from typing_extensions import Unpack

from unisandbox.api import (
    BackendError,
    Event,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Probe,
    RecoveryReport,
    SandboxStatus,
    check_name,
)
from unisandbox.engine.choice import Choice
from unisandbox.engine.closing import close
from unisandbox.engine.core import EngineCore
from unisandbox.engine.opening import attach_engine, open_engine
from unisandbox.engine.registry import Backend
from unisandbox.sandbox.opening import Opening
from unisandbox.sandbox.sandbox import Sandbox, SandboxOptions, make_spec

# No event has a number so large.
_EVENTS_END: Final = 1 << 62


class Engine:
    """Manages sandboxes on one state directory, in the caller's process.

    It and all that it gives are used in one event loop at a time: in the one of another thread, while that runs, calls
    raise FailedPreconditionError. When the loop has ended another one of its kind may go on.

    Attributes:
        id: 10 characters; part of the name of everything that the engine makes on the host.
        recovery: what a former engine on the directory had left, and what became of it.
    """

    def __init__(self, core: EngineCore) -> None:
        self.id: str = core.host.engine_id
        self.recovery: RecoveryReport = core.recovery
        self._core = core

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        policy: Literal["stop", "keep"] = "stop",
        on_recover: Literal["adopt", "stop", "report"] = "adopt",
        backends: Mapping[str, Backend] | None = None,
    ) -> Opening[Engine]:
        """Open an engine, as the owner of its state directory.

        Args:
            directory: where its state is kept, and nothing else; made if need be; None: a temporary one.
            policy: what becomes of the sandboxes at the end of this engine, also when its process is killed: "stop"
                ends and frees all of them, "keep" lets them live on for the next one that opens the directory.
            on_recover: what to do with sandboxes that a former engine has left there: "adopt" goes on with those that
                live and frees the rest, "stop" ends and frees all, "report" touches nothing. See `recovery`.
            backends: backends by name beside the installed ones.

        Raises:
            InvalidArgumentError: an argument is wrong; `directory` "" is no path, and "/" and a directory that holds
                somebody else's things are none for an engine.
            FailedPreconditionError: another engine owns the directory; its process is named.
            UnavailableError: this host cannot carry an engine; what is missing is said.

        Example:
            async with Engine.open("/var/lib/my-engine") as eng:
                sb = await eng.create(rootfs="host", name="w")
        """

        if directory is not None:
            _check_directory(directory)
        _check_backends(backends)

        async def open() -> Engine:
            return cls(await open_engine(directory, policy=policy, on_recover=on_recover, backends=backends))

        return Opening("Engine.open()", open)

    @classmethod
    def attach(
        cls, directory: str | os.PathLike[str], *, backends: Mapping[str, Backend] | None = None
    ) -> Opening[Engine]:
        """Use the sandboxes of an engine that another process has open, or has kept, on this directory.

        Everything can be done but owning: the end of this engine ends nothing. Each change takes a short exclusive
        section, so any number of processes may work on one directory. What a process that is gone has left half made
        or half removed there is freed, but for what the owner has only reported; see `recovery`.

        Raises:
            InvalidArgumentError: `directory` cannot be a path; "" is none.
            UnavailableError: no engine is open there, and none was kept.
            FailedPreconditionError: others could write into the directory.
        """

        _check_directory(directory)
        _check_backends(backends)

        async def open() -> Engine:
            return cls(await attach_engine(directory, backends=backends))

        return Opening("Engine.attach()", open)

    def __repr__(self) -> str:
        return f"<Engine {self.id}>"

    def create(self, *, operation_id: str | None = None, **options: Unpack[SandboxOptions]) -> Opening[Sandbox]:
        """Create a sandbox; as `Sandbox.create`, in this engine.

        Args:
            operation_id: asked again under the same one, also by another process after a crash, the sandbox that was
                created the first time is the answer.
            options: see `SandboxOptions`.
        """
        spec = make_spec(**options)
        operation = "" if operation_id is None else check_name(operation_id, "operation id")

        async def open() -> Sandbox:
            return Sandbox(await self._core.create(spec, operation_id=operation))

        return Opening("Engine.create()", open)

    async def get(self, ref: str) -> Sandbox:
        """The sandbox with that id or name.

        Raises:
            InvalidArgumentError: it is no text; a sandbox without a name has None, and is found by its id.
            NotFoundError: there is none.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        return Sandbox(await self._core.get(ref))

    async def list(self) -> list[SandboxStatus]:
        """Every sandbox, the oldest first; of one that cannot be used here what is written down (see `unusable`).

        Raises:
            FailedPreconditionError: the engine is closed.
        """
        self._core.check_open()
        await self._core.refresh()
        statuses = []
        for entry in self._core.entries():
            try:
                statuses.append(await entry.status())
            except NotFoundError:
                continue  # removed meanwhile
            except (BackendError, FailedPreconditionError):
                # Damaged, or taken over meanwhile: the others are to be seen all the same.
                statuses.append(entry.sharing.written_down())
        return sorted([*statuses, *self._core.unusable()], key=lambda status: status.created_at)

    async def remove(self, ref: str, *, operation_id: str | None = None) -> None:
        """End and free the sandbox with that id or name.

        Args:
            ref: its id or name.
            operation_id: under the same one it may be asked again: a sandbox that has got the name meanwhile stays.

        Raises:
            InvalidArgumentError: `ref` is no text; a sandbox without a name has None, and is found by its id.
            NotFoundError: there is none.
        """
        operation = "" if operation_id is None else check_name(operation_id, "operation id")
        await self._core.remove(ref, operation_id=operation)

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """What happens, from the event after number `after` on, until the engine closes.

        The last 4096 are kept: a reader that is slower gets a "gap" event and goes on with the oldest there is. On a
        state directory the numbers go on after a restart, and events of all processes that use it are in it; with a
        number that was never given there (the directory was made anew), too, a reader gets a "gap" event.

        Raises:
            InvalidArgumentError: there can be no such number.
            UnavailableError: while it is read: the keeper has ended, and with it what ran. What is still unread is
                lost, as the numbers of the next engine on the directory show.
        """
        if type(after) is not int or not 0 <= after < _EVENTS_END:
            raise InvalidArgumentError(f"after must be the number of an event, or 0, got {after!r}")
        return self._core.events.read(after, check=self._core.check_dying)

    async def explain(self, **options: Unpack[SandboxOptions]) -> Choice:
        """Which backend `create` with the same options would take, and why; nothing is created."""
        return await self._core.explain(make_spec(**options))

    async def prefetch(self, program: str, **options: Unpack[SandboxOptions]) -> None:
        """Do now what the first start of a program would have to do: a Wasm module is compiled, and kept compiled.

        Args:
            program: as the first word of a command.
            options: as for `create`; nothing is created.

        Raises:
            InvalidArgumentError: there is no such program, or it cannot be started.
            UnsupportedError: the backend's programs need no preparation.

        Example:
            await engine.prefetch("python", isolation="wasm", rootfs="guests")
        """
        await self._core.prefetch(make_spec(**options), program)

    async def probe(self, *, deep: bool = False) -> Sequence[Probe]:
        """What every installed backend says about this host; with `deep` something really runs."""
        return await self._core.probe(deep=deep)

    async def close(self) -> None:
        """End this engine. May be repeated.

        With policy "stop" its owner removes every sandbox and leaves nothing on the host. With "keep", and for one that
        has attached, they live on.
        """
        await close(self._core)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _leave(self) -> None:
        await self.close()


def _check_directory(directory: object) -> None:
    path = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if not isinstance(path, str):
        raise InvalidArgumentError(f"the state directory must be a path, as text or a pathlib.Path, got {directory!r}")


def _check_backends(backends: object) -> None:
    if backends is not None and not isinstance(backends, Mapping):
        raise InvalidArgumentError(f"backends must map names to backends, got {backends!r}")
