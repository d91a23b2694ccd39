"""Whether Wasm guests can have processes of their own on this host."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import attrs

from unisandbox.api import Probe, UnavailableError
from unisandbox.backends.wasm import probe as in_process
from unisandbox.backends.wasm.process.capabilities import NAME
from unisandbox.backends.wasm.process.interior import Interior


async def probe(*, deep: bool = False) -> Probe:
    """See `Backend.probe`: what wasmtime needs, what the backend "runc" needs, and a Python that can be shown."""
    wasm = attrs.evolve(await in_process.probe(deep=deep), backend=NAME)
    if not wasm.available:
        return wasm
    try:
        Interior.of_this_python()
    except UnavailableError as error:
        return Probe(NAME, available=False, reason=error.message, hint=error.hint, facts=wasm.facts)
    points = entry_points(group="unisandbox.backends", name="runc")
    if not points:
        return Probe(NAME, available=False, reason="the backend 'runc' is not installed", facts=wasm.facts)
    runc: Any = next(iter(points)).load()
    inner: Probe = await runc.probe(deep=deep)
    facts = {**wasm.facts, **{f"runc.{name}": fact for name, fact in inner.facts.items()}}
    if not inner.available:
        return attrs.evolve(inner, backend=NAME, facts=facts)
    return attrs.evolve(wasm, reason=f"{wasm.reason}; {inner.reason}", facts=facts, warnings=inner.warnings)
