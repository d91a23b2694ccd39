"""Which backend a sandbox gets, and why."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from unisandbox.api import Probe, SandboxError, SandboxSpec, UnavailableError
from unisandbox.engine.registry import Backend, Registry


@attrs.frozen
class Choice:
    """The answer of `explain()`.

    Attributes:
        backend: the one that is taken.
        because: why, in one sentence.
        probes: what every backend that was looked at answered.
    """

    backend: str
    because: str
    probes: tuple[Probe, ...] = ()


async def choose(registry: Registry, spec: SandboxSpec) -> tuple[Backend, Choice]:
    """The backend for `spec.isolation`; never another one than was asked for by name.

    Raises:
        InvalidArgumentError: no backend has that name.
        UnavailableError: it cannot run here, or with "auto" none can.
    """
    if spec.isolation != "auto":
        backend = registry.get(spec.isolation)
        probe = await backend.probe()
        if not probe.available:
            raise _unavailable(f"isolation {spec.isolation!r} cannot run on this host", [probe])
        return backend, Choice(backend.name, f"it was asked for by name; {probe.reason}", (probe,))
    probes = await probe_all(registry)
    candidates = [(backend.rank, backend) for backend in (registry.get(p.backend) for p in probes if p.available)]
    if not candidates:
        raise _unavailable("no backend can run on this host", probes)
    rank, backend = max(candidates, key=lambda pair: pair[0])
    others = ", ".join(sorted(b.name for _, b in candidates if b is not backend)) or "none"
    return backend, Choice(
        backend.name,
        f"'auto' takes the available backend of the highest rank ({rank}); others: {others}",
        tuple(probes),
    )


async def probe_all(registry: Registry, *, deep: bool = False) -> list[Probe]:
    """What every installed backend says about this host; needs no engine."""
    probes: list[Probe] = []
    for name in registry.names():
        try:
            backend = registry.get(name)
        except SandboxError as error:
            probes.append(Probe(backend=name, available=False, reason=error.message, hint=error.hint))
            continue
        probes.append(await backend.probe(deep=deep))
    return probes


def _unavailable(what: str, probes: Sequence[Probe]) -> UnavailableError:
    reasons = "; ".join(f"{probe.backend}: {probe.reason}" for probe in probes) or "none is installed"
    hint = " ".join(dict.fromkeys(probe.hint for probe in probes if probe.hint))
    return UnavailableError(f"{what}: {reasons}", hint=hint)
