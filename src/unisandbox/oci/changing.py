"""Changing the limits of a living container: what may be changed, and what is said when the kernel refuses."""

from __future__ import annotations

import errno
from typing import Final

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    SandboxError,
    UnsupportedError,
)
from unisandbox.host.cgroups import Limits
from unisandbox.oci import foreign
from unisandbox.oci.plan import limits_of
from unisandbox.oci.processes import Container, state_of

# What of the resources no cgroup limits: it is fixed when a container is made.
_FIXED: Final = ("disk", "nofile", "core", "cpu_seconds")


def change_limits(container: Container, resources: Resources | str, label: str) -> None:
    """See `SupportsUpdate.update`. Only what a cgroup limits can be changed; the rest must be as it is.

    Args:
        container: whose.
        resources: to what.
        label: of the sandbox, for messages.
    """
    what = f"container {container.name!r} of sandbox {label!r}"
    cgroup = container.plan.cgroup
    try:
        if isinstance(resources, str):
            limits = _changed(cgroup.limits(), resources)
        else:
            limits = _given(resources, (container.spec and container.spec.resources) or Resources())
        if state_of(container, container.processes[""]) == "stopped":
            raise FailedPreconditionError(f"{what} has ended")
        cgroup.set_limits(limits)
    except OSError as error:
        raise refusal(error, what) from error


def _changed(now: Limits, text: str) -> Limits:
    resources = foreign.parse_resources(text)
    if resources.get("devices"):
        raise UnsupportedError("a change of resources.devices of a living container", "runc")
    return foreign.limits(resources, now)


def _given(resources: Resources, now: Resources) -> Limits:
    if fixed := [name for name in _FIXED if getattr(resources, name) != getattr(now, name)]:
        raise UnsupportedError(
            f"a change of {', '.join(fixed)} of a living container",
            "runc",
            hint="Leave it out, or give what it was made with.",
        )
    return limits_of(resources)


def refusal(error: OSError, what: str) -> SandboxError:
    """What to raise when the kernel has refused limits of `what`."""
    if error.errno == errno.EBUSY:
        return FailedPreconditionError(f"the limits of {what} stay as they are: {error.strerror}")
    if error.errno in {errno.EINVAL, errno.ERANGE}:
        return InvalidArgumentError(f"the limits of {what} stay as they are: {error.strerror}")
    if error.errno in {errno.ENOENT, errno.ENODEV}:
        return NotFoundError(f"{what} is being removed")
    return BackendError(f"the limits of {what} cannot be changed: {error.strerror}")
