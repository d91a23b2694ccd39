"""What is known of one sandbox beyond this process, and what follows from it."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

from unisandbox.api import InvalidArgumentError, SandboxSpec, SandboxStatus
from unisandbox.api.plain import plain, sandbox_spec_of
from unisandbox.api.status import SandboxState
from unisandbox.host import pidfd as pidfds

Phase = Literal["creating", "ready", "stopped", "removing"]


class Record(NamedTuple):
    """What is known of one sandbox beyond this process.

    Attributes:
        sandbox_id, name, backend, created_at: as in SandboxStatus.
        phase: what was being done, or was reached.
        generation: rises with each engine that takes the sandbox over.
        boot_id: of the kernel that it lives on; another one means that nothing of it lives.
        owner: pid and start time of the process that wrote this, as it sees itself; for messages. (0, 0) for nobody, a
            start time of 0 is not known.
        client: its number among the keeper's clients: it is at work as long as that one is connected, wherever its
            process is. 0: none of this keeper's.
        spec: the request, as plain data; see `spec_of`.
        started_at, stopped_at: seconds since the epoch; None: not yet.
        expires_at: when its ttl is over, in seconds since the epoch; None: never.
        operation_id: under which it was created; "" when the user gave none.
    """

    sandbox_id: str
    name: str | None
    backend: str
    phase: Phase
    created_at: float
    generation: int = 1
    boot_id: str = ""
    owner: tuple[int, int] = (0, 0)
    client: int = 0
    spec: Mapping[str, object] = {}
    started_at: float | None = None
    stopped_at: float | None = None
    expires_at: float | None = None
    operation_id: str = ""


def check_ref(ref: object) -> None:
    """Raise InvalidArgumentError for what can be neither the name nor the id of a sandbox."""
    if not isinstance(ref, str):
        raise InvalidArgumentError(f"a sandbox is named by its id or name, got {ref!r}", hint="Give its id.")


def boot_id() -> str:
    """The id of this boot of the kernel. Source: random(4), /proc/sys/kernel/random/boot_id."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def this_process() -> tuple[int, int]:
    """Pid and start time of this process; for `Record.owner`."""
    return _process(os.getpid())


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> tuple[int, int]:
    return pid, pidfds.start_time(pid)


# A child is another process, also where its pid is the same: as the first one of a pid namespace within another.
os.register_at_fork(after_in_child=_process.cache_clear)


def status_of(record: Record, state: SandboxState = "created") -> SandboxStatus:
    """What a record says: all that can be told while another process makes, removes or has the sandbox."""
    spec = cast("Mapping[str, Mapping[str, str]]", record.spec)
    return SandboxStatus(
        id=record.sandbox_id,
        name=record.name,
        backend=record.backend,
        state=state,
        generation=record.generation,
        created_at=record.created_at,
        started_at=record.started_at,
        stopped_at=record.stopped_at if state == "stopped" else None,
        expires_at=record.expires_at,
        labels=spec.get("labels", {}),
        annotations=spec.get("annotations", {}),
    )


def plain_spec(spec: SandboxSpec) -> dict[str, object]:
    """The spec as plain data that JSON can hold."""
    return plain(spec)


def spec_of(record: Record) -> SandboxSpec:
    """What the sandbox of a record was asked to be like.

    Raises:
        InvalidArgumentError: this version of unisandbox does not know such a spec; the field is named.
    """
    try:
        return sandbox_spec_of(record.spec)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"record of sandbox {record.sandbox_id!r}: {error.message}", hint=error.hint) from (
            error
        )
