"""Compiled modules and components: from the store, else compiled, once, whoever asks at the same time.

One after the other for each sandbox: what somebody gives to be compiled is waited for by himself. What is known already
is not waited for at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from unisandbox.api import InvalidArgumentError
from unisandbox.backends.wasm.compiling import Compiler
from unisandbox.backends.wasm.config import configuration_key
from unisandbox.backends.wasm.places import Turns
from unisandbox.backends.wasm.programs import Program
from unisandbox.backends.wasm.store import Store

T = TypeVar("T")


class Compiled:
    """Those of one engine and one configuration of wasmtime."""

    def __init__(self, compiler: Compiler, store: Store, *, trust_signals: bool, fuel: bool) -> None:
        self._compiler = compiler
        self._store = store
        self._settings = {"trust_signals": trust_signals, "fuel": fuel}
        self._of_module = Turns()
        self._of_owner = Turns()

    async def get(
        self, program: Program, owner: str, known: Callable[[], T | None], load: Callable[[int], Awaitable[T]]
    ) -> T:
        """What is made of the artefact of a program.

        Args:
            program: the module or component.
            owner: the sandbox that it is for.
            known: what was made of it before, if that is still there.
            load: makes it of a descriptor of the artefact, which is closed then. A stored artefact that it refuses with
                InvalidArgumentError (of another build of the same version) is compiled anew.

        Raises:
            InvalidArgumentError: it is no valid module or component; exit code 126.
            DeadlineExceededError: it takes too long to compile.
            FailedPreconditionError: the store can be written by others.
        """
        key = hashlib.sha256(f"{program.digest} {configuration_key(**self._settings)}".encode()).hexdigest()
        async with self._of_module.of(program.digest):
            made = known() or await self._stored(key, load)
        if made is not None:
            return made
        # In this order: who waits for his own turn has nothing that others wait for.
        async with self._of_owner.of(owner), self._of_module.of(program.digest):
            made = known()
            return made if made is not None else await self._obtain(program, key, load)

    async def _obtain(self, program: Program, key: str, load: Callable[[int], Awaitable[T]]) -> T:
        async with self._store.alone(key):
            # Another process may have been compiling it.
            made = await self._stored(key, load)
            return made if made is not None else await self._compile(program, key, load)

    async def _stored(self, key: str, load: Callable[[int], Awaitable[T]]) -> T | None:
        fd = await self._store.find(key)
        if fd < 0:
            return None
        try:
            with contextlib.suppress(InvalidArgumentError):
                return await load(fd)
            return None
        finally:
            os.close(fd)

    async def _compile(self, program: Program, key: str, load: Callable[[int], Awaitable[T]]) -> T:
        artefact = await self._compiler.compile(program)
        try:
            await self._store.keep(key, artefact)
            return await load(artefact)
        finally:
            os.close(artefact)
