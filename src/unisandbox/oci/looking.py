"""What is seen of the containers of a task service, and of what runs in them, by a look that changes nothing there."""

from __future__ import annotations

import os

import attrs

from unisandbox.api import Metrics, NotFoundError, TaskState
from unisandbox.host.ends import HeldEnd
from unisandbox.oci.ends import end_now
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.plan import metrics_of
from unisandbox.oci.processes import Container, Process, all_oom_kills_of, awaits_start, members, state_of


def identity(container: Container) -> str:
    """See `TellsEnds.identity_of`."""
    created = container.created
    return "" if created is None else f"{created.pid}.{created.start_time}"


def end(container: Container, process: Process, ledger: Ledger) -> HeldEnd | None:
    """See `TellsEnds.end_of`. A bundle's process has no init of ours that would tell the keeper."""
    if not process.exec_id and container.with_init and process.spec is None:
        return ledger.end_of_init(container.name) if container.created is not None else None
    if process.life is None:
        return None
    counter = process.cgroup.oom_counter if process.cgroup is not None else None
    return ledger.end(container.name, process.exec_id, counter)


def state(container: Container, process: Process) -> TaskState:
    """See `TaskService.state`."""
    seen = state_of(container, process)
    if seen == "stopped" and process.exit is None and process.life is not None:
        process.exit = end_now(process)  # nobody has waited for it here, and init has told
    # An ended process has no pid any more: the kernel may have given it to another one.
    pid = process.pid if seen != "stopped" else None
    if seen == "created" and (waiting := awaits_start(container, process)) is not None:
        pid = waiting.pid
    return TaskState(container.name, process.exec_id, seen, pid, process.exit)


def pids(container: Container) -> list[int]:
    """See `TaskService.pids`. Our init is not among them."""
    init = container.created.pid if container.created is not None else 0
    there = members(container.plan.cgroup, init)
    return [pid for pid in there if pid != init or not container.with_init]


def metrics(container: Container, label: str) -> Metrics:
    """See `TaskService.stats`; `label` is the sandbox's."""
    try:
        found = metrics_of(container.plan.cgroup)
    except OSError as error:
        if any(map(os.path.isdir, container.plan.cgroup.dirs)):
            raise
        raise NotFoundError(f"container {container.name!r} of sandbox {label!r} is being removed") from error
    if found.oom_kills is None:
        return found  # not counted here
    return attrs.evolve(found, oom_kills=all_oom_kills_of(container))
