"""What an engine lends to its backends: the keeper, the cgroups and the directories."""

from __future__ import annotations

import attrs

from unisandbox.api.names import short_name
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.keeper import Keeper


@attrs.frozen
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
    """

    engine_id: str
    state_dir: str
    disk_dir: str
    work_dir: str
    keeper: Keeper
    cgroups: Cgroups
    shared: bool = False

    def prefix(self, sandbox_id: str) -> str:
        """What the names of everything begin with that the keeper holds, guards and leases for a sandbox."""
        return f"{short_name(self.engine_id, sandbox_id)}/"

    def outside(self, path: str) -> str:
        """`path` of the keeper's mount namespace as this process can reach it.

        Source: proc(5), /proc/PID/root is the process's view of the file system, mount namespace included.
        """
        return f"/proc/{self.keeper.pid}/root{path}"
