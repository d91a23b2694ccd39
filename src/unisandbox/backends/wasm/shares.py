"""What all guests of a sandbox in this process, or of a container in it, share: memory and processor time."""

from __future__ import annotations

import os
from typing import Final

import attrs

from unisandbox.api import FailedPreconditionError, Resources, UnsupportedError
from unisandbox.backends.wasm.budget import Budget, CpuRate
from unisandbox.backends.wasm.capabilities import NAME

_UNLIMITED: Final = 1 << 62


@attrs.define(eq=False)
class Shares:
    """What all guests of a sandbox, or of a container in it, share.

    Attributes:
        resources: as asked for, or updated.
        memory: their linear memories together.
    """

    resources: Resources
    memory: Budget
    _rate: CpuRate | None
    _above: Shares | None = None

    @property
    def cpu(self) -> CpuRate | None:
        """Their rate of processor time, below that of the sandbox as it is now; None: not limited."""
        above = None if self._above is None else self._above.cpu
        if self._rate is None:
            return above
        self._rate.above = above
        return self._rate

    @classmethod
    def of(cls, resources: Resources, above: Shares | None = None) -> Shares:
        """The limits of a new sandbox, or of a container below those of its sandbox."""
        limit = _UNLIMITED if resources.memory is None else resources.memory
        memory = Budget(limit, None if above is None else above.memory)
        return cls(resources, memory, None if resources.cpu is None else CpuRate(resources.cpu), above)

    def update(self, resources: Resources, running: int) -> None:
        """Change them; all or none. What counts for one process holds for those that are started from now on.

        Raises:
            FailedPreconditionError: more memory is in use.
            UnsupportedError: guests run that were started without a rate.
        """
        memory = _UNLIMITED if resources.memory is None else resources.memory
        if memory < self.memory.used:
            raise FailedPreconditionError(
                f"a memory limit of {memory} bytes cannot be set: {self.memory.used} are in use"
            )
        if resources.cpu is not None and self._rate is None and running:
            raise UnsupportedError(
                "a first cpu limit while guests run",
                NAME,
                reason="they are not measured",
                hint="Give cpu= when the sandbox is created, or stop() it first.",
            )
        if resources.cpu is None and self._rate is not None:
            # Those that run are measured on, against all the processors there are.
            self._rate.cores = float(os.cpu_count() or 1)
            self._rate = None if not running else self._rate
        elif resources.cpu is not None:
            if self._rate is None:
                self._rate = CpuRate(resources.cpu)
            self._rate.cores = resources.cpu
        self.memory.limit = memory
        self.resources = resources
