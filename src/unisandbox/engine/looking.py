"""What is told of a sandbox when somebody looks at it: its state, and what it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from unisandbox.api import (
    FailedPreconditionError,
    Metrics,
    NotFoundError,
    SandboxStatus,
    UnsupportedError,
)
from unisandbox.engine.record import status_of

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore
    from unisandbox.engine.entry import Entry


async def status(core: EngineCore, entry: Entry) -> SandboxStatus:
    """The state of a sandbox at this moment; never waits for another call.

    Raises:
        NotFoundError: it was removed.
        UnavailableError: the keeper is dead, and what ran in the sandbox with it.
    """
    entry.check_alive()
    core.check_keeper()
    if core.host.shared and entry.known:
        await entry.sharing.await_expiry()
        entry.check_alive()
        if entry.state == "unread" and not entry.sharing.is_whole:
            return entry.sharing.written_down()
        try:
            await entry.sharing.look()
        except NotFoundError:
            if entry.removed:
                raise
            # Its ttl is over; its name is not free yet.
            return attrs.evolve(entry.sharing.written_down(), state="stopped")
        except FailedPreconditionError:
            if entry.sharing.is_whole:
                raise
            return entry.sharing.written_down()  # its removal was begun since we looked, or was cut
        except UnsupportedError:
            return _as_written(entry)  # it lives in another process, and cannot be used from here
        if entry.state == "unread":
            return _as_written(entry)  # a change by another task is about to read it
    with entry.in_our_words():
        told = await entry.sandboxer.status(entry.sandbox_id)
    record = entry.record
    return attrs.evolve(
        told,
        generation=record.generation,
        expires_at=record.expires_at,
        started_at=record.started_at or told.started_at,
        stopped_at=(record.stopped_at or told.stopped_at) if told.state == "stopped" else None,
    )


async def metrics(entry: Entry) -> Metrics:
    """What it uses now.

    Raises:
        NotFoundError: it was removed.
    """
    await entry.sharing.reach()
    with entry.in_our_words():
        return await entry.sandboxer.metrics(entry.sandbox_id)


def _as_written(entry: Entry) -> SandboxStatus:
    return status_of(entry.record, "ready" if entry.record.phase == "ready" else "stopped")
