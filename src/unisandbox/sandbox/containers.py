"""More containers in one sandbox: own files and main process, shared network, hostname and limits."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from unisandbox.api import (
    ContainerSpec,
    ContainerStatus,
    Exit,
    Mount,
    ProcessSpec,
    Resources,
    Rootfs,
)
from unisandbox.engine.entry import Entry
from unisandbox.sandbox.opening import Opening


class Container:
    """A container that was added to a sandbox; its main process runs.

    Attributes:
        name: unique within the sandbox.
        pid: the main process's id on the host; 0 when it had ended before it was found.
    """

    def __init__(self, entry: Entry, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._entry = entry
        self._exit: Exit | None = None

    def __repr__(self) -> str:
        return f"<Container {self.name} of sandbox {self._entry.sandbox_id}>"

    async def wait(self) -> Exit:
        """Wait until the main process has ended; with it everything in the container ends. May be repeated."""
        if self._exit is None:
            self._exit = await self._entry.last_task.wait(self.name)
            self._entry.container_exited(self.name, self._exit)
        return self._exit

    async def logs(self, stream: Literal["stdout", "stderr"] = "stdout", *, tail: int | None = None) -> bytes:
        """The last of what the main process wrote, at most 1 MiB of each stream; also after its end.

        Args:
            stream: which.
            tail: so many lines at most, the last ones; None: all that is kept.

        Raises:
            NotFoundError: nothing is kept of this container.
        """
        return await self._entry.logs(self.name, stream, tail=tail).kept()

    def follow(
        self, stream: Literal["stdout", "stderr"] = "stdout", *, offset: int = 0, tail: int | None = None
    ) -> AsyncIterator[bytes]:
        """What the main process writes, from the oldest that is kept on, until its stream ends or it is removed.

        Args:
            stream: which.
            offset: bytes since its start that are not wanted.
            tail: begin with so many lines, the last of those that are kept then; None: with all.

        Raises:
            NotFoundError: nothing is kept of this container.
        """
        return self._entry.logs(self.name, stream, offset=offset, tail=tail)

    async def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        await self._entry.task.kill(self.name, signal=number)

    async def status(self) -> ContainerStatus:
        """The state at this moment."""
        state = await self._entry.task.state(self.name)
        return ContainerStatus(self.name, state.state, state.pid, state.exit)

    async def kill(self) -> Exit:
        """End everything in the container at once."""
        self._entry.last_task.kill_now(self.name)
        return await self.wait()

    async def remove(self) -> None:
        """End it if need be and free everything of it. May be repeated."""
        if self._entry.removed:
            return
        self._entry.task.kill_now(self.name)
        await self._entry.cleaning.run(self._free)
        self._entry.container_exited(self.name, self._exit)

    async def _free(self) -> None:
        await self._entry.last_task.delete(self.name)
        await self._entry.drop_logs(self.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.remove()

    async def _leave(self) -> None:
        await self.remove()


class Containers:
    """The containers of a sandbox beside the one that `run` and `exec` use."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def add(
        self,
        *,
        argv: Sequence[str],
        rootfs: Rootfs | str | os.PathLike[str] = "host",
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        user: str | int | None = None,
        resources: Resources | None = None,
        mounts: Sequence[Mount] = (),
    ) -> Opening[Container]:
        """Start a container with a root file system of its own and `argv` as its main process.

        It shares the network, the hostname, /dev/shm and the limits of the sandbox, with `share_pid` also the view of
        processes.

        Args:
            argv: the program and its arguments.
            rootfs: as for a sandbox.
            name: unique within the sandbox; None: a new one.
            env, cwd, user: for every process in it.
            resources: limits below those of the sandbox; None: only the sandbox's count.
            mounts: beside the sandbox's.

        Raises:
            AlreadyExistsError: the name is taken.
            InvalidArgumentError: the program cannot be started.
        """
        spec = ContainerSpec(
            name=name or self._entry.next_container_name(),
            process=ProcessSpec(argv=argv, env=env or {}, user=user),
            rootfs=Rootfs.parse(rootfs),
            resources=resources,
            mounts=mounts,
            env=env or {},
            cwd=cwd,
            user=user,
        )

        async def open() -> Container:
            pid = await self._entry.add_container(spec)
            return Container(self._entry, spec.name, pid)

        return Opening("containers.add()", open)

    async def get(self, name: str) -> Container:
        """The container of that name, whoever has added it.

        Raises:
            NotFoundError: there is none.
        """
        task = await self._entry.known_task()
        state = await task.state(name)
        return Container(self._entry, name, state.pid or 0)

    async def list(self) -> list[ContainerStatus]:
        """The containers that there are now."""
        return list((await self._entry.status()).containers)
