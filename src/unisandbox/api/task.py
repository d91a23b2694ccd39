"""The task service: drives the containers of one sandbox. Verbs and meanings are those of containerd's Task v2/v3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import attrs

from unisandbox.api.exits import Exit
from unisandbox.api.spec import ContainerSpec, ProcessSpec, Resources, Terminal
from unisandbox.api.status import ContainerState, Metrics


@attrs.frozen
class Stdio:
    """File descriptors of the caller that become a process's standard streams; None is /dev/null.

    The task service duplicates what it needs before the call returns; the caller closes its own.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


@attrs.frozen
class CreateTask:
    """Allocate a container. Exactly one of `container` and `bundle` is given.

    Attributes:
        container: what it shall be like; the task service makes everything that it needs.
        bundle: an OCI bundle directory made by somebody else (containerd, iSulad), run as it is.
        container_id: its id; for `container` the name is the id.
        terminal: of the main process of a `bundle`.
        stdio: of the main process.
    """

    container_id: str
    container: ContainerSpec | None = None
    bundle: str = ""
    terminal: bool = False
    stdio: Stdio = attrs.field(factory=Stdio)


@attrs.frozen
class ExecTask:
    """Allocate one more process in a running container; `start` starts it."""

    container_id: str
    exec_id: str
    process: ProcessSpec
    stdio: Stdio = attrs.field(factory=Stdio)


@attrs.frozen
class StartedTask:
    """A process runs.

    Attributes:
        pid: its id on the host.
        terminal: the master side of its terminal, now the caller's to close; None without a terminal.
    """

    pid: int
    terminal: int | None = None


@attrs.frozen
class TaskState:
    """What is known of a container or process at this moment."""

    container_id: str
    exec_id: str
    state: ContainerState
    pid: int | None = None
    exit: Exit | None = None


class TaskService(Protocol):
    """Drives the containers of one sandbox; one object per sandbox.

    `exec_id` empty means the container's main process. All endings are idempotent.
    """

    @property
    def container_ids(self) -> Sequence[str]:
        """The containers that there are, the oldest first."""
        ...

    async def create(self, request: CreateTask) -> None:
        """Make the container ready to start; nothing of the user's runs yet."""
        ...

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """Start the main process or an exec'd one.

        Raises:
            InvalidArgumentError: the program cannot be started; the reason and the shell's code (126, 127) are in it.
        """
        ...

    async def exec(self, request: ExecTask) -> None:
        """Allocate one more process in a running container."""
        ...

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """Send a signal to a process, or with `all` to everything that it has started."""
        ...

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """End a process and everything that it has started, by one synchronous system call; never waits."""
        ...

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """Wait until the process has ended. Any number of tasks may wait; the answer never changes."""
        ...

    async def delete(self, container_id: str, exec_id: str = "") -> Exit | None:
        """Free everything of an ended process or container, and what it left running. Repeating is harmless."""
        ...

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """The state at this moment; never waits for a process."""
        ...

    async def pids(self, container_id: str) -> Sequence[int]:
        """Process ids on the host of everything in the container."""
        ...

    async def stats(self, container_id: str) -> Metrics:
        """What the container uses now."""
        ...

    async def resize_pty(self, container_id: str, exec_id: str, size: Terminal) -> None:
        """Change the size of a process's terminal."""
        ...

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """Close the task service's own copy of a process's standard input, where it has one."""
        ...


@runtime_checkable
class SupportsPause(Protocol):
    """A task service that can stop all processes of a container and let them go on."""

    async def pause(self, container_id: str) -> None:
        """Stop every process of the container."""
        ...

    async def resume(self, container_id: str) -> None:
        """Let them go on."""
        ...


@runtime_checkable
class SupportsUpdate(Protocol):
    """A task service that can change the limits of a running container."""

    async def update(self, container_id: str, resources: Resources) -> None:
        """Set the new limits; all of them or none."""
        ...


@runtime_checkable
class SupportsCheckpoint(Protocol):
    """A task service that can write the state of a container to disk."""

    async def checkpoint(self, container_id: str, path: str) -> None:
        """Write the state into the directory `path`."""
        ...
