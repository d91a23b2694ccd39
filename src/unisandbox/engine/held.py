"""The processes of one sandbox as the keeper holds them: what was asked for, and our ends of their streams.

While the process that started one lives it reads the streams itself, and the keeper only holds copies. When it is gone
the keeper keeps the last of what is written, until another process has read it that has taken the streams over.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, Protocol

import anyio

from unisandbox.api.plain import plain, process_spec_of
from unisandbox.api.spec import ProcessSpec
from unisandbox.host.keeper.records import Reclaimed
from unisandbox.host.services import Host

StreamName = Literal["stdin", "stdout", "stderr", "terminal"]

SPOOL_BYTES: Final = 1 << 20
"""So much of each stream is kept while nobody reads it."""


class OpenEnd(Protocol):
    """Our end of a stream."""

    @property
    def closed(self) -> bool: ...

    def close(self) -> None: ...


class Handle(Protocol):
    """What a caller has of a process."""

    def is_written_to(self) -> bool:
        """Whether somebody in the sandbox has the other end of an output."""
        ...


class OpenStreams:
    """What this process itself has open of one sandbox's processes, under whichever generation it was opened.

    A handle that its caller has dropped is found again until somebody has waited for its process; and what a process
    leaves in the background is not to be ended by SIGPIPE. All other handles, and the ends of streams, are their
    callers' alone: dropped, they are closed.
    """

    def __init__(self) -> None:
        self._ends: weakref.WeakSet[OpenEnd] = weakref.WeakSet()
        self._not_waited_for: dict[str, Handle] = {}
        self._background: set[Handle] = set()

    @property
    def idle(self) -> bool:
        """Whether there is nothing of it that anybody could ask for."""
        return not self._not_waited_for and all(end.closed for end in self._ends)

    def add(self, exec_id: str, handle: Handle, ends: Iterable[OpenEnd]) -> None:
        """A process runs; a former handle of it is one no more."""
        self._background = {known for known in self._background if known.is_written_to()}
        self._not_waited_for[exec_id] = handle
        self._ends.update(ends)

    def waited_for(self, exec_id: str) -> None:
        """Its end is known."""
        handle = self._not_waited_for.pop(exec_id, None)
        if handle is not None and handle.is_written_to():
            self._background.add(handle)

    def drop(self, exec_id: str, handle: Handle) -> None:
        """The streams of this handle are closed."""
        if self._not_waited_for.get(exec_id) is handle:
            del self._not_waited_for[exec_id]
        self._background.discard(handle)

    def close(self) -> None:
        """Close all of it."""
        for end in tuple(self._ends):
            end.close()
        self._not_waited_for.clear()
        self._background.clear()


class HeldProcess(NamedTuple):
    """A process that the keeper knows of.

    Attributes:
        exec_id: unique in its sandbox.
        spec: what was asked for.
        client: number of the keeper's connection that has its streams.
        operation_id: under which it was started; "" when none was given.
    """

    exec_id: str
    spec: ProcessSpec
    client: int
    operation_id: str = ""


class HeldProcesses:
    """Those of one sandbox. On an engine that nobody else can attach to, nothing is held."""

    def __init__(self, host: Host, sandbox_id: str) -> None:
        self._host = host
        self._prefix = host.prefix(sandbox_id)
        self._launched = False

    def _exec(self, exec_id: str) -> str:
        return f"{self._prefix}exec/{exec_id}"

    def _stream(self, exec_id: str, stream: StreamName) -> str:
        return f"{self._prefix}io/{exec_id}/{stream}"

    async def hold(
        self, exec_id: str, spec: ProcessSpec, streams: Mapping[StreamName, int], operation_id: str = ""
    ) -> None:
        """Before a process is started: what is asked for, and our ends of its streams."""
        if not self._host.shared:
            return
        keeper = self._host.keeper
        held = HeldProcess(exec_id, spec, keeper.hello.client, operation_id)
        await keeper.notes.write(self._exec(exec_id), _text(held))
        await self.hold_streams(exec_id, streams)

    async def hold_streams(self, exec_id: str, streams: Mapping[StreamName, int]) -> None:
        """Let the keeper hold copies of our ends of these streams."""
        if self._host.shared and streams:
            fds = {self._stream(exec_id, stream): fd for stream, fd in streams.items()}
            spool = {self._stream(exec_id, stream): SPOOL_BYTES for stream in streams if stream != "stdin"}
            await self._host.keeper.spools.hold_now(fds, spool=spool)

    def drop_stream(self, exec_id: str, stream: StreamName) -> None:
        """We have closed our end: the keeper's copy shall not keep it open."""
        if self._host.shared:
            self._host.keeper.drop_now([self._stream(exec_id, stream)])

    def forget(self, exec_id: str) -> None:
        """The process has ended, and whoever started it knows how."""
        if self._host.shared:
            self._host.keeper.drop_now([self._exec(exec_id)], prefix=f"{self._prefix}io/{exec_id}/")

    async def launch(self) -> None:
        """The main container gets a program of its own."""
        self._launched = True
        if self._host.shared:
            await self._host.keeper.notes.write(f"{self._prefix}launched", "yes")

    async def launched(self) -> bool:
        """Whether the main container has a program of its own, whoever has launched it."""
        if not self._host.shared:
            return self._launched
        name = f"{self._prefix}launched"
        return await self._host.keeper.notes.find(name) is not None

    def forget_launch(self) -> None:
        """The main container is gone."""
        self._launched = False
        if self._host.shared:
            self._host.keeper.drop_now([f"{self._prefix}launched"])

    async def read(self) -> list[HeldProcess]:
        """All that are held, in the order of their names."""
        if not self._host.shared:
            return []
        notes = await self._host.keeper.notes.read(f"{self._prefix}exec/")
        return [_process_of(name.rpartition("/")[2], json.loads(text)) for name, text in notes.items()]

    async def orphans(self) -> list[HeldProcess]:
        """Those whose streams nobody has any more: the process that started them is gone."""
        held = await self.read()
        if not held:
            return []
        connected = await self._host.keeper.clients()
        return [process for process in held if process.client not in connected]

    async def take_over(self, process: HeldProcess) -> dict[StreamName, Reclaimed] | None:
        """Take the streams of an orphan. None: another one was quicker.

        What was kept stays with the keeper, too, until it is `taken`: whoever takes over from us gets the rest.
        """
        keeper, lock = self._host.keeper, f"{self._prefix}take"
        await keeper.locks.lock(lock)
        try:
            taken = None
            with anyio.CancelScope(shield=True):  # a few short answers: what was given out is not to be lost
                if process in await self.orphans():
                    taken = await self._take_streams(process)
                    mine = process._replace(client=keeper.hello.client)
                    await keeper.notes.write(self._exec(process.exec_id), _text(mine))
            return taken
        finally:
            keeper.locks.unlock(lock)

    def taken(self, exec_id: str, stream: StreamName, got: Reclaimed, left: int) -> None:
        """The caller has all but the last `left` bytes of what was kept of this stream."""
        self._host.keeper.spools.taken(self._stream(exec_id, stream), got, left)

    async def _take_streams(self, process: HeldProcess) -> dict[StreamName, Reclaimed]:
        keeper = self._host.keeper
        names = await keeper.held(f"{self._prefix}io/{process.exec_id}/")
        taken: dict[StreamName, Reclaimed] = {}
        streams: tuple[StreamName, ...] = ("stdin", "stdout", "stderr", "terminal")
        for stream in streams:
            name = self._stream(process.exec_id, stream)
            if name in names:
                taken[stream] = await keeper.spools.reclaim(name)
        return taken


def _text(process: HeldProcess) -> str:
    return json.dumps({"spec": plain(process.spec), "client": process.client, "operation_id": process.operation_id})


def _process_of(exec_id: str, data: dict[str, object]) -> HeldProcess:
    spec, client, operation_id = data["spec"], data["client"], data["operation_id"]
    assert isinstance(spec, dict) and isinstance(client, int)  # noqa: S101, PT018 (written by `_text`)
    return HeldProcess(exec_id, process_spec_of(spec), client, str(operation_id))
