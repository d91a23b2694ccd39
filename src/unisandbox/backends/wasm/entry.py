"""The backend `wasm` as the engine finds it: what it can be told, and what it opens."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from unisandbox.api import Capabilities, Probe, Sandboxer
from unisandbox.backends.wasm.capabilities import CAPABILITIES, COPYING, NAME
from unisandbox.backends.wasm.settings import Settings

if TYPE_CHECKING:
    from unisandbox.host.services import Host


class WasmBackend:
    """The entry point `wasm` of the group `unisandbox.backends`."""

    name: Final = NAME
    # Below what runs programs of any machine; with "auto" it is none to choose while one of these is there.
    rank: Final = 0

    def __init__(
        self,
        *,
        trust_signals: bool = False,
        fuel: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        compile_memory: int | None = None,
        compile_seconds: float | None = None,
    ) -> None:
        """A backend with other settings than the usual ones, for `Engine.open(backends={"wasm": WasmBackend(...)})`.

        Args:
            trust_signals: 1.2 to 1.4 x faster guests; changes this process's handlers of SIGSEGV, SIGILL, SIGFPE and
                SIGBUS. All engines of the process that use it share them.
            fuel: instructions (as wasmtime counts them) that each guest may execute; guests run slower.
            cache: directory for compiled modules; None: $XDG_CACHE_HOME/unisandbox/wasm.
            compile_memory: bytes that the compilation of one module may take; None: 2 GiB.
            compile_seconds: seconds that it may take; None: 120.
        """
        self._trust_signals = trust_signals
        self._settings = Settings(fuel, cache, compile_memory, compile_seconds)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do where it runs."""
        from unisandbox.backends.wasm.probe import unmountable

        return COPYING if unmountable() else CAPABILITIES

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here; see `probe.probe`."""
        from unisandbox.backends.wasm.probe import probe

        return await probe(deep=deep)

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine.

        Raises:
            UnavailableError: wasmtime is missing.
        """
        from unisandbox.backends.wasm.probe import require_wasmtime

        require_wasmtime()
        from unisandbox.backends.wasm.sandboxer import WasmSandboxer

        return WasmSandboxer(
            host,
            trust_signals=self._trust_signals,
            fuel=self._settings.fuel,
            cache=self._settings.cache,
            compile_limits=self._settings.compile_limits,
        )


backend: Final = WasmBackend()
