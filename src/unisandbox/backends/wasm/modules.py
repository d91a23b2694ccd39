"""Modules ready to run in this process: the last ones that were used stay in memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from unisandbox.backends.wasm.compiled import Compiled
from unisandbox.backends.wasm.domain import Domain, GuestModule
from unisandbox.backends.wasm.programs import Program

# Modules that are mapped although no guest runs them; each costs addresses, and pages of memory that were touched.
_LOADED: Final = 64


class Modules:
    """The modules of one engine."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._loaded: OrderedDict[str, GuestModule] = OrderedDict()

    def loaded(self, program: Program) -> GuestModule | None:
        """The module, if it is in memory; never waits."""
        module = self._loaded.get(program.digest)
        if module is not None:
            self._loaded.move_to_end(program.digest)
        return module

    async def get(self, domain: Domain, program: Program, owner: str) -> GuestModule:
        """The module of a program, for the sandbox `owner`.

        Raises:
            InvalidArgumentError: it is no valid module; exit code 126.
            DeadlineExceededError: it takes too long to compile.
            FailedPreconditionError: the store can be written by others.
            UnsupportedError: it is a component.
        """

        async def load(fd: int) -> GuestModule:
            # By the descriptor that was checked: a path could mean another file by now.
            module = self._loaded[program.digest] = domain.load(f"/proc/self/fd/{fd}")
            while len(self._loaded) > _LOADED:
                self._loaded.popitem(last=False)
            return module

        return await self._compiled.get(program, owner, lambda: self.loaded(program), load)

    def clear(self) -> None:
        """Forget what is in memory, and unmap what no guest runs any more: a module keeps its file open."""
        for module in self._loaded.values():
            module.module.close()
        self._loaded.clear()
