"""What the task service is asked for: refused before anything is done, where it cannot be."""

from __future__ import annotations

from unisandbox.api import (
    AlreadyExistsError,
    CreateTask,
    ExecTask,
    FailedPreconditionError,
    InvalidArgumentError,
    UnsupportedError,
    check_id,
)
from unisandbox.oci.processes import Container
from unisandbox.oci.starting import OWN_LEAVES


def check_create(request: CreateTask) -> None:
    """Raises InvalidArgumentError or UnsupportedError for what no container can be made of."""
    if (request.container is None) == (not request.bundle):
        raise InvalidArgumentError("a container is made from either a spec or a bundle")
    if request.terminal and not request.config:
        raise UnsupportedError("a terminal of a bundle's main process", "runc", hint="Use exec with a terminal.")
    has_place = bool(request.rootfs_at) and request.container is not None and request.container.rootfs is not None
    if (request.config and not request.bundle) or (request.rootfs and not (request.config or has_place)):
        raise InvalidArgumentError("config is of a bundle, and rootfs needs a config or a place in a root")


def check_exec(request: ExecTask, container: Container, label: str) -> None:
    """Whether such a process can be made in a container of the sandbox with this label.

    Raises:
        InvalidArgumentError, UnsupportedError: nowhere, or not in such a container.
        AlreadyExistsError: the container has one of that name.
        FailedPreconditionError: it does not run.
    """
    if check_id(request.exec_id) in OWN_LEAVES:
        raise InvalidArgumentError(f"a process cannot be called {request.exec_id!r}: its cgroup is of that name")
    if request.exec_id in container.processes:
        raise AlreadyExistsError(f"container {container.name!r} has a process {request.exec_id!r} already")
    if not container.started:
        raise FailedPreconditionError(f"container {container.name!r} has not been started")
    if container.plan.cgroup.is_frozen:
        raise FailedPreconditionError(
            f"container {container.name!r} of sandbox {label!r} is paused", hint="resume() it first."
        )
    if (request.process is None) == (not request.oci_process):
        raise InvalidArgumentError("a process is made from either a spec or an OCI process object")
    if request.oci_process and container.with_init:
        request.given("runc")
    if request.process is not None and request.process.terminal is not None and not container.with_init:
        raise UnsupportedError("a terminal for exec in a bundle", "runc", reason="it has no init of ours")
