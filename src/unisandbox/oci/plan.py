"""What a container of the SDK needs, and who makes it: the seam between backends and the OCI task service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from unisandbox.api import ContainerSpec, CreateTask, Metrics, ProcessSpec, Resources
from unisandbox.host.cgroups import Cgroup, Limits
from unisandbox.host.init import SpawnRequest


class Plan(NamedTuple):
    """Everything that a container of the SDK needs, ready on the host.

    Attributes:
        oci_id: the container's name for the runtime.
        bundle: the directory with config.json.
        cgroup: the container's own, with its limits.
        request: how its processes start: a program's spec to what init is asked for.
        admitted: the host's user id of init, which lets processes be born in cgroups that admit it; None: it may not.
        entered: paths of the namespaces that the runtime enters first, by kind; see `Runtime.create`.
        mounts: name of the mount namespace, held by the keeper, in which the root file system is; empty: the keeper's.
        extra_fds: become fds 3, 4 ... of its first process, behind init's control socket.
        verify: raises when the container is not what it shall be; given the pid of its first process.
        verify_process: the same for what init spawns; called for the first one, before its exec.
        explain: a hint for a program that was not found, or "".
    """

    oci_id: str
    bundle: str
    cgroup: Cgroup
    request: Callable[[ProcessSpec], Awaitable[SpawnRequest]]
    admitted: int | None
    entered: Mapping[str, str]
    mounts: str
    extra_fds: Sequence[int]
    verify: Callable[[int], Awaitable[None]]
    verify_process: Callable[[int], None]
    explain: Callable[[ProcessSpec], str]


class Planner(Protocol):
    """Who knows how containers of a sandbox are made: the backend."""

    async def prepare(self, request: CreateTask) -> Plan:
        """Make root file system, cgroup and bundle for the `container` of a request."""
        ...

    async def adopt(self, container_id: str, bundle: str) -> Plan:
        """Make what a bundle of somebody else needs around it."""
        ...

    async def adapt(self, request: CreateTask) -> Plan:
        """Make a bundle of our own from `config` and `rootfs` of a request; see `CreateTask`."""
        ...

    async def restore(
        self, container_id: str, container: ContainerSpec | None, bundle: str, *, half_made: bool = False
    ) -> Plan:
        """The plan that `prepare` (or, for a bundle, `adopt` or `adapt`) has made before, perhaps in another process.

        Args:
            container_id, container, bundle: as they were given to `prepare` or `adopt`; the bundle that `adapt` made.
            half_made: it may have been cut in between; what is missing for undoing it is made.

        Raises:
            FileNotFoundError: it is being removed, or was not made whole.
        """
        ...

    async def free(self, container_id: str) -> None:
        """Free what `prepare`, `adopt` or `adapt` made; repeating is harmless."""
        ...


def limits_of(resources: Resources) -> Limits:
    """What of the resources a cgroup limits."""
    return Limits(memory=resources.memory, swap=resources.swap, cpu=resources.cpu, pids=resources.pids)


def metrics_of(cgroup: Cgroup) -> Metrics:
    """What a cgroup and all below it use."""
    stats = cgroup.stats()
    return Metrics(
        memory_bytes=stats.memory_bytes,
        memory_inactive_file_bytes=stats.memory_inactive_file_bytes,
        memory_peak_bytes=stats.memory_peak_bytes,
        memory_limit_bytes=stats.memory_limit_bytes,
        cpu_seconds=stats.cpu_seconds,
        pids=stats.pids,
        pids_limit=stats.pids_limit,
        oom_kills=stats.oom_kills,
    )
