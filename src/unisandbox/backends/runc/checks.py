"""What this backend refuses, before anything is done."""

from __future__ import annotations

import functools
from typing import Final

from unisandbox.api import (
    ContainerSpec,
    InvalidArgumentError,
    Resources,
    SandboxSpec,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api.resources import DEFAULT_NOFILE
from unisandbox.backends.runc.capabilities import CAPABILITIES
from unisandbox.backends.runc.pod import LEASED_IDS
from unisandbox.backends.runc.sysctls import checked_sysctls
from unisandbox.host.power import obstacles, remedies
from unisandbox.host.power.remedies import Obstacle
from unisandbox.network.pasta import obstacle
from unisandbox.oci.features import RuntimeProgram

# With less the kernel refuses cgroups below, or kills crun while it makes a container; measured.
_LEAST_MEMORY: Final = 1 << 20
_LEAST_PIDS: Final = 3


def check_sandbox(spec: SandboxSpec, runtime: RuntimeProgram, most_files: int) -> None:
    """Refuse what cannot be done, before anything is; `most_files` as for `check_resources`."""
    if spec.rootfs.kind not in CAPABILITIES.rootfs:
        raise UnsupportedError(
            f"rootfs kind {spec.rootfs.kind!r} ({spec.rootfs.ref!r})",
            "runc",
            hint="Use 'host', or unpack the image and give the directory's path (with a '/' in it).",
        )
    if spec.network.kind == "user":
        _check_user_network(spec)
    elif spec.network.kind not in CAPABILITIES.networks:
        raise UnsupportedError(f"network {spec.network.kind!r}", "runc")
    if spec.annotations:
        raise UnsupportedError("annotations", "runc", reason=f"it knows none, got {sorted(spec.annotations)}")
    if spec.userns == "private" and (none := obstacles.no_user_namespaces()):
        raise UnsupportedError(
            "a user namespace of its own",
            "runc",
            reason=none.reason,
            hint="Use userns='host' if you trust what runs in it.",
        )
    if spec.userns == "private" and (hidden := _masked()):
        raise UnavailableError(
            f"a user namespace of its own cannot be had: {hidden.reason}",
            hint=f"{hidden.remedy}, or use userns='host' if you trust what runs in it.",
        )
    if spec.user_ids is not None:
        _check_ids(*spec.user_ids)
    if spec.security.devices == "all" and spec.userns == "private":
        raise UnsupportedError(
            "devices of the host in a user namespace of its own",
            "runc",
            hint="Use userns='host' if you trust it so far.",
        )
    if spec.share_pid and spec.userns == "private" and not runtime.features.held_userns:
        raise UnsupportedError(
            "share_pid in a user namespace of its own",
            "runc",
            reason=f"{runtime.name} cannot join the pid namespace",
            hint="Install a runtime that can: apt install crun.",
        )
    if spec.security.seccomp == "default" and not runtime.features.seccomp:
        raise UnsupportedError(
            "seccomp='default'",
            "runc",
            reason=f"{runtime.path} is built without seccomp",
            hint="Install one that has it (apt install crun), or use seccomp='unconfined' if you trust what runs.",
        )
    check_resources(spec.resources, most_files)
    checked_sysctls(spec.sysctls, spec.network)


def _check_user_network(spec: SandboxSpec) -> None:
    why, remedy = obstacle()
    if why:
        raise UnsupportedError("network 'user'", "runc", reason=why, hint=remedy)
    if spec.userns == "host":
        raise UnsupportedError(
            "network 'user' with userns='host'",
            "runc",
            reason="its helper has its rights from the sandbox's own user namespace",
            hint="Leave userns= out, or use network='host'.",
        )


def _check_ids(first: int, count: int) -> None:
    if first < LEASED_IDS.stop and LEASED_IDS.start < first + count:
        raise InvalidArgumentError(
            f"user_ids {first} to {first + count - 1} may be another sandbox's: engines lease the ids from"
            f" {LEASED_IDS.start} to {LEASED_IDS.stop - 1} to sandboxes that are given none",
            hint="Give others, or none.",
        )


@functools.cache
def _masked() -> Obstacle | None:
    """What is mounted is looked at once."""
    return remedies.of_all(obstacles.masked())


def check_resources(resources: Resources, most_files: int) -> None:
    """Refuse limits that cannot hold, before anything is done.

    Args:
        resources: of a sandbox.
        most_files: that any process of the engine can have open.
    """
    if resources.cpu_seconds is not None:
        raise UnsupportedError("resources.cpu_seconds", "runc", hint="Use run(..., timeout=), or isolation='wasm'.")
    _check_memory(resources)
    _check_pids(resources)
    # The default is a bound; see `Resources`.
    if resources.nofile is not None and resources.nofile != DEFAULT_NOFILE and resources.nofile > most_files:
        raise InvalidArgumentError(
            f"nofile must be at most {most_files}, the hard limit of the process that opened this engine (ulimit -Hn),"
            f" got {resources.nofile}"
        )


def _check_pids(resources: Resources) -> None:
    if resources.pids is not None and resources.pids < _LEAST_PIDS:
        raise InvalidArgumentError(
            f"pids must be at least {_LEAST_PIDS} (init, the runtime and a program), got {resources.pids}"
        )


def _check_memory(resources: Resources) -> None:
    if resources.memory is None and resources.swap:
        raise InvalidArgumentError(
            "swap is counted beyond memory, which is not limited here", hint="Give memory= too, or leave swap= out."
        )
    if resources.memory is not None and resources.memory < _LEAST_MEMORY:
        raise InvalidArgumentError(
            f"memory must be at least {_LEAST_MEMORY} bytes (init, the runtime and a program), got {resources.memory}"
        )


def check_container(container: ContainerSpec, sandbox: Resources, most_files: int) -> None:
    """Refuse what a container cannot have, before anything is done.

    Args:
        container: wanted.
        sandbox: the limits of its sandbox.
        most_files: that any process of the engine can have open.
    """
    if container.rootfs is None and container.mounts:
        raise UnsupportedError(
            f"mounts in container {container.name!r}",
            "runc",
            reason="it has the sandbox's own files, and all that share those would see them",
            hint="Give the sandbox these mounts, or the container a rootfs of its own, such as 'host'.",
        )
    resources = container.resources
    if resources is not None:
        _check_memory(resources)
        _check_pids(resources)
        _check_below(resources, sandbox, most_files)
    if resources is not None and resources.cpu_seconds is not None:
        raise UnsupportedError("resources.cpu_seconds", "runc", hint="Use isolation='wasm'.")
    if resources is not None and resources.disk not in {None, 0}:
        raise UnsupportedError(
            "a disk limit of one container", "runc", hint="All containers share that of the sandbox; leave disk= out."
        )
    if container.rootfs is not None and container.rootfs.kind == "image":
        raise UnsupportedError("rootfs kind 'image'", "runc", hint="Unpack it and use Rootfs.dir(path).")


def _check_below(resources: Resources, sandbox: Resources, most_files: int) -> None:
    """What no cgroup limits is a number of each process: a larger one of the container's would count for nothing."""
    most = {"nofile": most_files if sandbox.nofile is None else min(sandbox.nofile, most_files), "core": sandbox.core}
    for name, limit in most.items():
        wanted = getattr(resources, name)
        is_default = name == "nofile" and wanted == DEFAULT_NOFILE  # a bound; see `Resources`
        if wanted is not None and limit is not None and wanted > limit and not is_default:
            raise InvalidArgumentError(
                f"resources.{name} of a container must be at most {limit}, which its sandbox has, got {wanted}",
                hint="Give the sandbox more, or the container less.",
            )
