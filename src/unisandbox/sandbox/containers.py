"""More containers in one sandbox: own files and main process, shared network, hostname and limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.lowlevel

from unisandbox.api import (
    ContainerSpec,
    ContainerStatus,
    DeadlineExceededError,
    Exit,
    FailedPreconditionError,
    Mount,
    NotFoundError,
    ProcessSpec,
    Resources,
    Rootfs,
    TaskService,
)
from unisandbox.api.checks import check_signal
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.entry import Entry
from unisandbox.sandbox.opening import Opening
from unisandbox.sandbox.process import pid_of


class Container:
    """A container that was added to a sandbox; its main process runs.

    It stands for this very one: when that was removed, a later container of the same name is another one, which nothing
    here ends or asks.

    Attributes:
        name: unique within the sandbox.
    """

    def __init__(self, entry: Entry, name: str, pid: int | None, *, has_program: bool = True) -> None:
        self.name = name
        self._pid = pid
        self._has_program = has_program
        self._entry = entry
        self._identity = entry.telling.identity_of(name)
        self._exit: Exit | None = None

    def __repr__(self) -> str:
        return f"<Container {self.name} of sandbox {self._entry.sandbox_id}>"

    @property
    def pid(self) -> int:
        """The main process's id on the host; 0 when it had ended before it was found.

        Raises:
            UnsupportedError: it is no process of its own, but runs in this one (a Wasm guest).
            FailedPreconditionError: it has no main process; see `Containers.get`.
        """
        self._check_program()
        return pid_of(self._pid, self._entry)

    async def wait(self) -> Exit:
        """Wait until the main process has ended; with it everything in the container ends. May be repeated.

        Raises:
            NotFoundError: it was removed, and how it ended is not known here.
            FailedPreconditionError: it has no main process; see `Containers.get`.
        """
        self._check_program()
        if self._exit is None:
            self._exit = await self._ended()
            self._entry.telling.container_exited(self.name, self._identity, self._exit)
        else:
            await anyio.lowlevel.checkpoint()
        return self._exit

    async def _ended(self) -> Exit:
        try:
            self._check_there()
            with self._entry.in_our_words():
                return await self._entry.last_task.wait(self.name)
        except NotFoundError:
            exit = self._entry.telling.exit_of(self.name, self._identity)
            if exit is None:
                raise
            await anyio.lowlevel.checkpoint()
            return exit

    @property
    def _is_replaced(self) -> bool:
        return self._entry.telling.is_replaced(self.name, self._identity)

    def _check_there(self) -> None:
        if self._is_replaced:
            raise NotFoundError(
                f"this container {self.name!r} of sandbox {self._entry.label!r} was removed",
                hint="containers.get() gives a later one of its name, if there is one.",
            )

    def _check_program(self) -> None:
        if not self._has_program:
            raise FailedPreconditionError(
                f"container {self.name!r} of sandbox {self._entry.label!r} has no main process: only what run and exec"
                " start is in it",
                hint="Take the processes that exec() gives, or kill(), stop() or remove() the sandbox.",
            )

    async def _look(self) -> None:
        """Before it is used by its name: another process may have removed it, and given that to another one."""
        if self._entry.engine_open:
            await self._entry.sharing.try_to_look(shield=True)

    async def _end(self, task: TaskService) -> None:
        """End everything in it, at once: whatever cuts this after its first step has not kept it alive."""
        self._kill_now(task)
        await self._look()
        self._kill_now(task)  # also what other processes have started in it

    def _kill_now(self, task: TaskService) -> None:
        if not self._is_replaced:
            with self._entry.in_our_words():
                task.kill_now(self.name)

    async def logs(self, stream: Literal["stdout", "stderr"] = "stdout", *, tail: int | None = None) -> bytes:
        """The last of what the main process wrote, at most 1 MiB of each stream; also after its end.

        Args:
            stream: which.
            tail: so many lines at most, the last ones; None: all that is kept.

        Raises:
            NotFoundError: nothing is kept of this container.
        """
        return await self._entry.programs.logs(self.name, self._identity, stream, tail=tail).kept()

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
        return self._entry.programs.logs(self.name, self._identity, stream, offset=offset, tail=tail)

    async def signal(self, number: int) -> None:
        """Send a signal to the main process.

        Raises:
            InvalidArgumentError: it is no signal's number.
            NotFoundError: the container was removed.
            FailedPreconditionError: it has no main process (see `Containers.get`), or another engine has taken the
                sandbox over.
        """
        check_signal(number)
        self._entry.sharing.check_ours()
        self._check_program()
        await self._look()
        self._check_there()
        with self._entry.in_our_words():
            await self._entry.task.kill(self.name, signal=number)

    async def status(self) -> ContainerStatus:
        """The state at this moment.

        Raises:
            NotFoundError: it was removed.
            FailedPreconditionError: another engine has taken the sandbox over.
        """
        self._entry.sharing.check_ours()
        await self._look()
        self._check_there()
        with self._entry.in_our_words():
            state = await self._entry.task.state(self.name)
        return ContainerStatus(self.name, state.state, state.pid, state.exit)

    async def kill(self) -> Exit:
        """End everything in the container at once; how it ended, also when that was before.

        Raises:
            NotFoundError: it was removed, and how it ended is not known here.
            FailedPreconditionError: it has no main process (see `Containers.get`), or another engine has taken the
                sandbox over; the container goes on.
        """
        self._entry.sharing.check_ours()
        self._check_program()
        await self._end(self._entry.last_task)
        return await self.wait()

    async def remove(self) -> None:
        """End it if need be and free everything of it. May be repeated.

        Raises:
            FailedPreconditionError: another engine has taken the sandbox over, or this one is closed and has kept it;
                the container goes on.
            DeadlineExceededError: it could not be removed in time; what is left of it is removed later.
        """
        if self._entry.removed or self._entry.ended_with_engine():
            await anyio.lowlevel.checkpoint()
            return
        with contextlib.suppress(NotFoundError):  # the sandbox is gone, and this with it
            await self._remove()
        await anyio.lowlevel.checkpoint_if_cancelled()  # what was begun is finished

    async def _remove(self) -> None:
        self._entry.sharing.check_ours()
        await self._end(self._entry.task)
        if self._is_replaced:
            return
        if not await self._entry.cleaning.run(self._free, seconds=CLEANING_SECONDS):
            raise DeadlineExceededError(
                f"container {self.name!r} of sandbox {self._entry.label!r} could not be removed within"
                f" {CLEANING_SECONDS:g} s",
                hint="Something in it may sit in the kernel (a disk, a network file system). Remove it again later.",
            )

    async def _free(self) -> None:
        with self._entry.in_our_words():
            exit = await self._entry.programs.remove(self.name, self._identity)
        self._exit = self._exit or exit
        self._entry.telling.container_exited(self.name, self._identity, self._exit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        if self._entry.engine_open:
            await self.remove()


class Containers:
    """The containers of a sandbox beside the one that `run` and `exec` use."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def add(
        self,
        *,
        argv: Sequence[str],
        rootfs: Rootfs | str | os.PathLike[str] | None = "host",
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        resources: Resources | None = None,
        mounts: Sequence[Mount] = (),
    ) -> Opening[Container]:
        """Start a container with `argv` as its main process, by default with a root file system of its own.

        It shares the network, the hostname, /dev/shm and the limits of the sandbox, with `share_pid` also the view of
        processes.

        Args:
            argv: the program and its arguments.
            rootfs: as for a sandbox; None: the sandbox's own files.
            name: unique within the sandbox; None: a new one.
            env, cwd, user: for every process in it; None is the sandbox's.
            resources: limits below those of the sandbox; None: only the sandbox's count.
            mounts: beside the sandbox's.

        Raises:
            AlreadyExistsError: the name is taken.
            InvalidArgumentError: the program cannot be started.
        """
        variables = {} if env is None else env
        spec = ContainerSpec(
            name=self._entry.programs.next_container_name() if name is None else name,
            process=ProcessSpec(argv=argv, env=variables, user=user),
            rootfs=None if rootfs is None else Rootfs.parse(rootfs),
            resources=resources,
            mounts=mounts,
            env=variables,
            cwd=cwd,
            user=user,
        )

        async def open() -> Container:
            pid = await self._entry.programs.add(spec)
            return Container(self._entry, spec.name, pid)

        return Opening("containers.add()", open)

    async def get(self, name: str) -> Container:
        """The container of that name, whoever has added it.

        "main" is the one of `run`, `exec` and `launch`. Without a launched program it has no main process: it can be
        looked at and removed, but not waited for, signalled or killed.

        Raises:
            NotFoundError: there is none.
        """
        task = await self._entry.known_task()
        has_program = name != self._entry.main or await self._entry.held.launched()
        state = await task.state(name)
        return Container(self._entry, name, 0 if state.state == "stopped" else state.pid, has_program=has_program)

    async def list(self) -> list[ContainerStatus]:
        """The containers that there are now."""
        return list((await self._entry.status()).containers)
