"""What is the state of a sandbox, a container, a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.exits import Exit

SandboxState = Literal["created", "ready", "stopped"]
ContainerState = Literal["created", "running", "paused", "stopped"]
FileKind = Literal["file", "directory", "symlink", "fifo", "socket", "device"]


@attrs.frozen
@by_fields
class ContainerStatus:
    """One container.

    Attributes:
        name: its name within the sandbox.
        state: "created", "running", "paused" or "stopped".
        pid: the main process's id on the host, or None when it has none.
        exit: how its main process ended, once it has.
    """

    name: str
    state: ContainerState
    pid: int | None = None
    exit: Exit | None = None


@attrs.frozen
@by_fields
class SandboxStatus:
    """One sandbox.

    Attributes:
        id: generated, never reused.
        name: the user's, or None.
        backend: who runs it.
        state: "created" (allocated), "ready" (verified; takes containers and processes), "stopped".
        generation: 1; rises with each engine that takes over what a former one has left.
        created_at, started_at, stopped_at: seconds since the epoch; None when it has not happened.
        expires_at: when its ttl will be over, in seconds since the epoch; None: never.
        containers: its containers; empty while it is idle.
        labels, annotations: as given.
        namespaces: inode numbers of its pinned namespaces, by kind.
        netns_path: where its network namespace can be opened, or empty.
        warnings: what of it does not work any more although it goes on, each with its remedy.
        unusable: why it cannot be used here, e.g. because its backend is not installed, and the remedy; then all
            else is what is written down of it. Empty when it can.
    """

    id: str
    name: str | None
    backend: str
    state: SandboxState
    generation: int = 1
    created_at: float = 0.0
    started_at: float | None = None
    stopped_at: float | None = None
    expires_at: float | None = None
    containers: tuple[ContainerStatus, ...] = ()
    labels: Mapping[str, str] = attrs.field(factory=dict)
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    namespaces: Mapping[str, int] = attrs.field(factory=dict)
    netns_path: str = ""
    warnings: tuple[str, ...] = ()
    unusable: str = ""


@attrs.frozen
@by_fields
class Metrics:
    """What a sandbox or container uses now. None: the host does not count it.

    Attributes:
        memory_bytes, memory_peak_bytes: memory in use, and the most so far.
        memory_inactive_file_bytes: what of it is page cache that nobody has used lately, which the kernel takes back
            before it kills for memory. The rest is what engines call the working set.
        memory_limit_bytes: the limit, None when not limited.
        cpu_seconds: processor time used.
        pids: processes and threads.
        pids_limit: the limit, None when not limited.
        oom_kills: processes killed for memory.
        disk_bytes, disk_limit_bytes: of the writable layer.
    """

    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    pids_limit: int | None = None
    oom_kills: int | None = None
    disk_bytes: int | None = None
    disk_limit_bytes: int | None = None
    memory_inactive_file_bytes: int | None = None


@attrs.frozen
@by_fields
class FileInfo:
    """One file in a sandbox.

    Attributes:
        name: the last part of its path.
        kind: what it is; links are not followed.
        size: bytes.
        mode: permission bits, 0o000-0o7777.
        mtime: seconds since the epoch.
        uid, gid: as seen inside.
        target: where a symlink points to, as text; empty otherwise.
    """

    name: str
    kind: FileKind
    size: int
    mode: int
    mtime: float
    uid: int = 0
    gid: int = 0
    target: str = ""
