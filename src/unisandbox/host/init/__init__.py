"""Init, the PID 1 of a container: its program, its protocol, and the host's side of a spawn.

May know: the kernel, anyio, the contracts' errors. Must not know: sandboxes, OCI, users by name, what cgroups are.
What comes back from init is a stranger's word and is checked here, so that nobody above has to.
"""

from unisandbox.host.init.binary import binary_path, open_binary
from unisandbox.host.init.protocol import KILLED, RLIMITS, ExecFailed, SpawnRequest, capability_mask
from unisandbox.host.init.spawn import Ended, Started, began, ended, ended_now, has_told, spawn, status_of

__all__ = [
    "KILLED",
    "RLIMITS",
    "Ended",
    "ExecFailed",
    "SpawnRequest",
    "Started",
    "began",
    "binary_path",
    "capability_mask",
    "ended",
    "ended_now",
    "has_told",
    "open_binary",
    "spawn",
    "status_of",
]
