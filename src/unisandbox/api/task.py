"""The task service: drives the containers of one sandbox. Verbs and meanings are those of containerd's Task v2/v3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.errors import UnsupportedError
from unisandbox.api.exits import Exit
from unisandbox.api.resources import Resources
from unisandbox.api.spec import ContainerSpec, ProcessSpec, Terminal
from unisandbox.api.status import ContainerState, Metrics


@attrs.frozen
@by_fields
class Stdio:
    """File descriptors of the caller that become a process's standard streams; None is /dev/null.

    The task service duplicates what it needs before the call returns; the caller closes its own.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


@attrs.frozen
@by_fields
class RootMount:
    """What an engine (containerd) says is to be mounted as a container's root file system.

    Attributes:
        type: "overlay" or "bind".
        source: a directory of the host, for "bind".
        options: as for mount(8).
        target: where in it this is mounted, with type "bind"; empty: it is the root itself.
    """

    type: str
    source: str = ""
    options: tuple[str, ...] = ()
    target: str = ""


SANDBOX_NAMESPACES: Final = "/proc/0/ns/"
"""How the path of a namespace in `CreateTask.config` begins that is the sandbox's own; its kind follows, as in proc(5).

It is what containerd writes for a sandbox whose process id is 0, and no path that there is.
"""


@attrs.frozen
@by_fields
class CreateTask:
    """Allocate a container. Exactly one of `container` and `bundle` is given.

    Attributes:
        container: what it shall be like; the task service makes everything that it needs.
        bundle: an OCI bundle directory made by somebody else (containerd, iSulad), run as it is.
        container_id: its id; for `container` the name is the id.
        terminal: of the main process of a `bundle`.
        stdio: of the main process.
        config: with `bundle`: the text of an OCI config.json that counts instead of the bundle's, where nothing is
            written. The sandbox adds what is its own: the namespaces that `SANDBOX_NAMESPACES` stands for, a cgroup
            with the limits of `linux.resources`, the runtime's version, /etc/hosts, /etc/hostname and /etc/resolv.conf
            where the config mounts none, and /dev/shm where it would be a private one. Sources of mounts are opened
            once, by the caller's process.
        rootfs: with `config`: what to mount as its root file system; empty: the directory that `root.path` names.
        rootfs_at: with `container`, which must have a root file system of its own: the directory in it where `rootfs`
            is mounted, below the container's mounts. The first of it is the root, and the others have a `target` in
            it; their sources are opened once, by the caller's process, and "bind" is without what is mounted below.
    """

    container_id: str
    container: ContainerSpec | None = None
    bundle: str = ""
    terminal: bool = False
    stdio: Stdio = attrs.field(factory=Stdio)
    config: str = attrs.field(default="", repr=False)
    rootfs: tuple[RootMount, ...] = ()
    rootfs_at: str = ""


@attrs.frozen
@by_fields
class ExecTask:
    """Allocate one more process in a running container; `start` starts it.

    Attributes:
        container_id, exec_id: in which, and what it is called from now on.
        process: what to run; None with `oci_process`.
        stdio: its streams.
        oci_process: the text of an OCI process object, for a container that was made from a `bundle`.
    """

    container_id: str
    exec_id: str
    process: ProcessSpec | None = None
    stdio: Stdio = attrs.field(factory=Stdio)
    oci_process: str = attrs.field(default="", repr=False)

    def given(self, backend: str) -> ProcessSpec:
        """`process`, for a backend that knows nothing else.

        Raises:
            UnsupportedError: it is an OCI process object.
        """
        if self.process is None:
            raise UnsupportedError("exec of an OCI process object", backend)
        return self.process


@attrs.frozen
@by_fields
class StartedTask:
    """A process runs.

    Attributes:
        pid: its id on the host; None: it is no process of its own (a guest that is a thread of this one).
        terminal: the master side of its terminal, now the caller's to close; None without a terminal.
    """

    pid: int | None
    terminal: int | None = None


@attrs.frozen
@by_fields
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
    """A task service that can change the limits of a living container."""

    async def update(self, container_id: str, resources: Resources | str) -> None:
        """Set the new limits; all of them or none.

        Args:
            container_id: whose.
            resources: its limits from now on; or the text of an OCI object `linux.resources`: what it does not say, or
                says as 0, stays as it is, and a negative number takes a limit away.

        Raises:
            UnsupportedError: a limit that cannot be changed, or not be set here; it is named.
            FailedPreconditionError: the container has ended, or uses more than the new limit.
        """
        ...


@runtime_checkable
class SupportsOomNotice(Protocol):
    """A task service that can tell at once that the kernel has killed processes for memory."""

    async def more_oom_kills(self, container_id: str, than: int = 0) -> int:
        """Wait until more than so many processes of the container were killed for memory; how many were.

        Raises:
            UnavailableError: nobody counts them on this host.
        """
        ...


@runtime_checkable
class SupportsCheckpoint(Protocol):
    """A task service that can write the state of a container to disk."""

    async def checkpoint(self, container_id: str, path: str) -> None:
        """Write the state into the directory `path`."""
        ...
