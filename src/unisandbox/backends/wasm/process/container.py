"""One container of the task service of guests in processes."""

from __future__ import annotations

import attrs

from unisandbox.api import ContainerSpec
from unisandbox.backends.wasm.process.guest import Guest
from unisandbox.backends.wasm.process.workers import Workers


@attrs.define(eq=False)
class Container:
    """A container with its guests, and the workers that wait there for more.

    Attributes:
        made: the inner container is there.
    """

    spec: ContainerSpec
    workers: Workers
    processes: dict[str, Guest] = attrs.field(factory=dict)
    made: bool = False

    @property
    def is_being_started(self) -> bool:
        """Another process is starting its main process, or was when it ended."""
        return self.made and self.spec.process is not None and "" not in self.processes

    def close(self) -> None:
        """Close what this process holds of it."""
        for guest in self.processes.values():
            guest.close()
        self.workers.close()
