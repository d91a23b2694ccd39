"""The cgroups that a runtime makes itself and `delete` removes: one for each container, in each of the keeper's.

Nothing stays in them: the waiting init of a container is moved to the cgroup that is ours before `create` returns. A
runtime that is killed leaves them behind, and so does a keeper, with which the runtime's state ends.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from unisandbox.host.cgroups import hierarchy, patience
from unisandbox.oci.calls import Spawner

_KILL_SECONDS: Final = 1.0
_REMOVE_SECONDS: Final = 10.0


class OwnCgroups:
    """Those of one runtime, which are found by the names of its containers.

    Args:
        keeper: the parent of every call.
        are_made: False for a runtime that leaves cgroups alone.
    """

    def __init__(self, keeper: Spawner, *, are_made: bool) -> None:
        self._keeper = keeper
        self._are_made = are_made
        self._known: tuple[str, ...] = ()

    def of(self, container_id: str) -> tuple[str, ...]:
        """Those of one container, whether they are there or not."""
        return tuple(f"{above}/{container_id}" for above in self._above())

    async def remove(self, container_id: str) -> None:
        """Remove those of a container that the runtime has forgotten, or never knew."""
        await _remove([path for path in self.of(container_id) if os.path.isdir(path)])  # noqa: ASYNC240 (kernfs)

    async def remove_all(self, prefix: str) -> None:
        """Remove those of all containers whose ids begin so, also when the keeper has ended."""
        await _remove([path for above in self._above() for path in hierarchy.below(above, prefix)])

    def _above(self) -> tuple[str, ...]:
        """The keeper's own, in which it stays; known for longer than it lives, if any was made while it did."""
        if self._are_made and not self._known and self._keeper.alive:
            with contextlib.suppress(ProcessLookupError):
                self._known = hierarchy.directories_of(self._keeper.pid)
        return self._known


async def _remove(dirs: list[str]) -> None:
    if dirs:
        await patience.kill(dirs, _KILL_SECONDS)
        await patience.remove(dirs, _REMOVE_SECONDS)
