"""The backend `wasm+process` as the engine finds it: what it can be told, and what it opens."""

from __future__ import annotations

import os
from typing import Final

from unisandbox.api import Capabilities, InvalidArgumentError, Probe, Sandboxer
from unisandbox.backends.wasm.process.capabilities import CAPABILITIES, NAME
from unisandbox.backends.wasm.settings import Settings
from unisandbox.host.services import Host


class WasmProcessBackend:
    """The entry point `wasm+process` of the group `unisandbox.backends`."""

    name: Final = NAME
    # Below the in-process mode, which is faster.
    rank: Final = -1

    def __init__(
        self,
        *,
        fuel: int | None = None,
        idle_workers: int = 8,
        cache: str | os.PathLike[str] | None = None,
        compile_memory: int | None = None,
        compile_seconds: float | None = None,
    ) -> None:
        """A backend with other settings than the usual ones, for `Engine.open(backends={"wasm+process": ...})`.

        Args:
            fuel: instructions (as wasmtime counts them) that each guest may execute; guests run slower.
            idle_workers: how many started workers may wait for a guest in all sandboxes of one engine, at most one for
                each sandbox; each takes about 15 MB, which count for its sandbox. 0: every guest waits for its own.
            cache: directory for compiled modules; None: $XDG_CACHE_HOME/unisandbox/wasm.
            compile_memory: bytes that the compilation of one module may take; None: 2 GiB.
            compile_seconds: seconds that it may take; None: 120.
        """
        if isinstance(idle_workers, bool) or not isinstance(idle_workers, int) or idle_workers < 0:
            raise InvalidArgumentError(f"idle_workers must be a whole number >= 0, got {idle_workers!r}")
        self._idle_workers = idle_workers
        self._settings = Settings(fuel, cache, compile_memory, compile_seconds)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do where it runs."""
        return CAPABILITIES

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here; see `probe.probe`."""
        from unisandbox.backends.wasm.process.probe import probe

        return await probe(deep=deep)

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine, on top of that engine's sandboxer "runc".

        Raises:
            UnavailableError: wasmtime is missing, this Python cannot be shown to a sandbox, or "runc" cannot be had.
        """
        from unisandbox.backends.wasm.probe import require_wasmtime

        require_wasmtime()
        from unisandbox.backends.wasm.compiled import Compiled
        from unisandbox.backends.wasm.compiling import Compiler
        from unisandbox.backends.wasm.process.images import Images
        from unisandbox.backends.wasm.process.interior import Interior
        from unisandbox.backends.wasm.process.pool import IdleWorkers
        from unisandbox.backends.wasm.process.sandboxer import WasmProcessSandboxer
        from unisandbox.backends.wasm.store import Store, default_directory

        settings = self._settings
        counts = settings.fuel is not None
        compiler = Compiler(host, {"trust_signals": False, "fuel": counts}, settings.compile_limits)
        store = Store(settings.cache if settings.cache is not None else default_directory())
        return WasmProcessSandboxer(
            host,
            await host.sandboxer("runc"),
            Images(Compiled(compiler, store, trust_signals=False, fuel=counts)),
            Interior.of_this_python(),
            IdleWorkers(self._idle_workers),
            fuel=settings.fuel,
        )


backend: Final = WasmProcessBackend()
