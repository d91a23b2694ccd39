"""The service of systemd's that a process is in, which ends with the service, and the way out of it.

When a service stops, systemd kills every process in its cgroup and below (KillMode=control-group, the default), and
removes what is empty there. What is to outlive the service must be elsewhere, and so must its cgroups. Changes nothing.
Source: systemd.kill(5); systemd's CGROUP_DELEGATION.md; sd_booted(3).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final

from unisandbox.api.errors import FailedPreconditionError
from unisandbox.host.cgroups.hierarchy import Mount, memberships, read_mounts

_BOOTED: Final = "/run/systemd/system"
# Which hierarchy systemd goes by: this one on v1 and hybrid hosts, there also (or only) the one of v2.
_LEGACY: Final = "name=systemd"


def service_in(groups: Mapping[str, str]) -> str:
    """The service that owns these cgroups (see `memberships`); "" for none.

    A scope below a service (of a user's manager) is its own master: it goes on until its last process has ended.
    """
    for key in (_LEGACY, "unified"):
        for part in reversed(groups.get(key, "").split("/")):
            if part.endswith(".scope"):
                break
            if part.endswith(".service"):
                return part
    return ""


def service_of(pid: int | str = "self") -> str:
    """The service with which a process ends; "" for none, and where systemd does not run.

    Raises:
        ProcessLookupError: there is no such process.
    """
    return service_in(memberships(pid)) if os.path.isdir(_BOOTED) else ""


def ways_out(mounts: Iterable[Mount] | None = None) -> tuple[str, ...]:
    """The files into which a process writes "0" to be in no service any more: the tops of systemd's hierarchies.

    Nothing has to be made or removed there, and also v2 allows processes in the very root beside cgroups with
    controllers. Whether it is one, and may be entered, only trying tells: look with `service_of` after it.
    """
    tops = {
        f"{mount.directory}/cgroup.procs": None
        for mount in (read_mounts() if mounts is None else mounts)
        if (mount.unified or _LEGACY in mount.controllers) and not service_in({"unified": mount.root})
    }
    return tuple(tops)


def check_outlives(pid: int, what: str) -> None:
    """See that a process goes on when a service stops.

    Args:
        pid: the process.
        what: it is, for the error.

    Raises:
        FailedPreconditionError: it is in a service, which is named.
    """
    name = service_of(pid)
    if name:
        raise FailedPreconditionError(
            f"policy 'keep' cannot be kept: {what} (process {pid}) is in the cgroup of {name}, in which systemd kills "
            "everything when the service stops, and it could not be moved out",
            hint="Run the service as root with a writable /sys/fs/cgroup, start the program in a scope of its own "
            "(systemd-run --scope), or use policy='stop'.",
        )
