"""What ended processes leave in a container: their cgroups stay as long as something is in them, and are swept then."""

from __future__ import annotations

from typing import Final

import anyio

from unisandbox.host.pidfd import has_ended
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.processes import Container, Process, oom_kills_of

_GONE_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.001


def free(container: Container, process: Process, ledger: Ledger) -> None:
    """Forget a process that has ended; what it left in the background goes on."""
    container.processes.pop(process.exec_id, None)
    ledger.forget_process(container.name, process.exec_id)
    process.close()
    if process.cgroup is not None:
        container.lingering[process.cgroup] = 0


def sweep(container: Container, ledger: Ledger) -> None:
    """Free what has ended meanwhile: background work, and processes whose delete was cut by a cancellation."""
    for process in list(container.processes.values()):
        if process.deleted and (process.pid is None or has_ended(process.pidfd)):
            free(container, process, ledger)
    # A few cgroups at a time keep this call short.
    known = list(container.lingering)
    for cgroup in {*known[:4], *known[-1:]}:
        container.lingering[cgroup] = max(container.lingering[cgroup], oom_kills_of(cgroup))
        if cgroup.remove():
            container.oom_kills += container.lingering.pop(cgroup)


async def wait_swept(container: Container, process: Process, ledger: Ledger) -> None:
    """Wait a moment until nothing is left of a process that was freed and killed with all that it had started."""
    with anyio.move_on_after(_GONE_SECONDS):
        while process.cgroup in container.lingering:
            await anyio.sleep(_LOOK_SECONDS)
            sweep(container, ledger)
