"""What an engine lends to its backends: the keeper, the cgroups and the directories."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from unisandbox.api import Sandboxer, UnavailableError
from unisandbox.api.names import short_name
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.keeper import Keeper


async def _alone(name: str) -> Sandboxer:
    raise UnavailableError(f"backend {name!r} is to be had from an engine, and there is none")


@attrs.frozen(eq=False, repr=False)
class Host:
    """The mechanisms of one engine.

    Attributes:
        engine_id: part of the name of everything that the engine makes.
        state_dir: survives the keeper; holds records.
        disk_dir: on a disk; for files that may be large.
        work_dir: the keeper's private file system in memory; the same path in its mount namespace only.
        keeper: the helper process.
        cgroups: the engine's cgroup tree.
        shared: other processes may attach to the engine, or a later one may take it over: what they need to know is
            held by the keeper.
        sandboxer: another backend's sandboxer in this engine, by name, for a backend that builds on it. Raises
            InvalidArgumentError or UnavailableError when it cannot be had.
    """

    engine_id: str
    state_dir: str
    disk_dir: str
    work_dir: str
    keeper: Keeper
    cgroups: Cgroups
    shared: bool = False
    sandboxer: Callable[[str], Awaitable[Sandboxer]] = attrs.field(default=_alone, eq=False, repr=False)

    def prefix(self, sandbox_id: str) -> str:
        """What the names of everything begin with that the keeper holds, guards and leases for a sandbox."""
        return f"{short_name(self.engine_id, sandbox_id)}/"
