"""Which backend a sandbox gets, and why; what it is refused before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from unisandbox.api import Probe, Resources, SandboxError, SandboxSpec, UnavailableError, UnsupportedError
from unisandbox.api.by_fields import by_fields
from unisandbox.engine.registry import Backend, Registry
from unisandbox.host.keeper.records import Policy

_ROOTFS_HINT: Final = "Use 'host', or unpack the image and give the directory's path (with a '/' in it)."


@attrs.frozen
@by_fields
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
        UnsupportedError: with "auto", no backend here has such a root file system.
        InvalidArgumentError: no backend has that name.
        UnavailableError: it cannot run here, or with "auto" none that has such a root file system can.
    """
    if spec.isolation != "auto":
        backend = registry.get(spec.isolation)
        probe = await _probe(spec.isolation, backend)
        if not probe.available:
            raise _unavailable(f"isolation {spec.isolation!r} cannot run on this host", [probe])
        return backend, Choice(backend.name, f"it was asked for by name; {probe.reason}", (probe,))
    probes = await probe_all(registry)
    available = [registry.get(probe.backend) for probe in probes if probe.available]
    # Those that cannot have such files are none to choose: a Wasm sandbox has no use for this machine's programs.
    candidates = [(b.rank, b) for b in available if spec.rootfs.kind in b.capabilities.rootfs]
    if not candidates and not available:
        raise _unavailable("no backend can run on this host", probes)
    able = [probe for probe in probes if not probe.available and _has_rootfs(registry, probe.backend, spec.rootfs.kind)]
    if not candidates and able:
        raise _unavailable(f"no backend that has a rootfs of kind {spec.rootfs.kind!r} can run on this host", able)
    if not candidates:
        raise UnsupportedError(
            f"rootfs kind {spec.rootfs.kind!r}",
            "auto",
            reason=f"none of the available backends has it ({', '.join(sorted(b.name for b in available))})",
            hint=_ROOTFS_HINT,
        )
    rank, backend = max(candidates, key=lambda pair: pair[0])
    others = ", ".join(sorted(b.name for _, b in candidates if b is not backend)) or "none"
    return backend, Choice(
        backend.name,
        f"'auto' takes the available backend of the highest rank ({rank}) that has a rootfs of kind"
        f" {spec.rootfs.kind!r}; others: {others}",
        tuple(probes),
    )


def check_resources(backend: Backend, resources: Resources) -> None:
    """Refuse a limit that the backend does not know."""
    if resources.cpu_seconds is not None and not backend.capabilities.cpu_seconds:
        raise UnsupportedError(
            "resources.cpu_seconds", backend.name, hint="Use run(..., timeout=), or isolation='wasm'."
        )


def check_supported(backend: Backend, spec: SandboxSpec, policy: Policy) -> None:
    """Refuse what the engine would have to do for a backend that has nothing to do it with."""
    check_resources(backend, spec.resources)
    if spec.cgroup_parent and not backend.capabilities.cgroup_parent:
        raise UnsupportedError("cgroup_parent", backend.name)
    if spec.security.devices == "all" and not backend.capabilities.host_devices:
        raise UnsupportedError("devices of the host", backend.name)
    if spec.ttl is not None and not backend.capabilities.ttl:
        raise UnsupportedError("ttl", backend.name, hint="Call remove() yourself, e.g. after anyio.sleep().")
    if policy == "keep" and not backend.capabilities.survives_host_crash:
        raise UnsupportedError(
            "policy 'keep'",
            backend.name,
            reason="its sandboxes end with this process",
            hint="Open the engine with policy='stop'.",
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
        probes.append(await _probe(name, backend, deep=deep))
    return probes


async def _probe(name: str, backend: Backend, *, deep: bool = False) -> Probe:
    try:
        return await backend.probe(deep=deep)
    except Exception as error:  # whatever is wrong with this one, a stranger's perhaps, the others can be had
        import logging  # a tenth of what importing the engine takes, and for this only

        logging.getLogger("unisandbox.engine").debug("the probe of backend %s failed", name, exc_info=True)
        return Probe(
            name,
            available=False,
            reason=f"its probe failed: {type(error).__name__}: {error}",
            hint="That is a bug of this backend: tell those who make it.",
            deep=deep,
        )


def _has_rootfs(registry: Registry, name: str, kind: str) -> bool:
    try:
        return kind in registry.get(name).capabilities.rootfs
    except SandboxError:
        return False  # it cannot be imported, and has said nothing


def _unavailable(what: str, probes: Sequence[Probe]) -> UnavailableError:
    reasons = "; ".join(f"{probe.backend}: {probe.reason}" for probe in probes) or "none is installed"
    hint = " ".join(dict.fromkeys(probe.hint for probe in probes if probe.hint))
    return UnavailableError(f"{what}: {reasons}", hint=hint)
