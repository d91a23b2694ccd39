"""The limits of a sandbox are changed while it lives."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import attrs

from unisandbox.api import BackendError, Resources, Sandboxer
from unisandbox.engine.record import plain_spec

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore
    from unisandbox.engine.entry import Entry


async def update(core: EngineCore, entry: Entry, sandboxer: Sandboxer, resources: Resources) -> None:
    """Change the limits of the whole sandbox.

    Raises:
        UnavailableError: the keeper has ended.
    """
    if isinstance(resources, Resources):
        core.check_resources(entry.backend, resources)
    await entry.programs.check_usable()
    async with entry.sharing.changing():
        entry.check_alive()
        before, spec = entry.record, entry.spec
        if isinstance(resources, Resources):
            # Written first: a full disk refuses it, and what comes after us shall know. The disk's limit stays.
            spec = attrs.evolve(spec, resources=attrs.evolve(resources, disk=spec.resources.disk_limit))
            entry.save(before._replace(spec=plain_spec(spec)))
        try:
            with anyio.CancelScope(shield=True):
                await sandboxer.update(entry.sandbox_id, resources)
        except BaseException:
            with contextlib.suppress(BackendError):
                entry.save(before)
            raise
        entry.spec = spec
