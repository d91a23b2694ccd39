"""Which backends, event loops and counts a run of the conformance tests has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import anyio
import attrs
import pytest
from _pytest.mark import ParameterSet

from unisandbox.api import Capabilities, Probe, SandboxError
from unisandbox.engine.registry import Backend, Registry

# Counts are written for a backend that starts in this time; slower ones get fewer, in proportion.
_REFERENCE_START_SECONDS = 0.02


@attrs.frozen
class Candidate:
    """A backend that was looked at.

    Attributes:
        name: as in `isolation=`.
        backend: None when it cannot be imported.
        why_not: why it is not tested here; empty when it is.
    """

    name: str
    backend: Backend | None
    why_not: str = ""


_CANDIDATES: pytest.StashKey[list[Candidate]] = pytest.StashKey()
COUNTS: pytest.StashKey[dict[tuple[str, int], int]] = pytest.StashKey()


def candidates(config: pytest.Config) -> list[Candidate]:
    """The backends of this run, probed once."""
    if _CANDIDATES not in config.stash:
        config.stash[_CANDIDATES] = [*_probed(config.getoption("unisandbox_backends", default=None))]
    return config.stash[_CANDIDATES]


def _probed(wanted: Iterable[str] | None) -> Iterable[Candidate]:
    registry = Registry()
    names = list(dict.fromkeys(wanted or registry.names()))
    for name in names:
        if name not in registry.names():
            raise pytest.UsageError(f"--backend {name}: not installed; there are: {', '.join(registry.names())}")
        try:
            backend = registry.get(name)
        except SandboxError as error:
            yield Candidate(name, None, str(error))
            continue
        probe: Probe = anyio.run(backend.probe)
        why_not = "" if probe.available else f"cannot run on this host: {probe.reason}. {probe.hint}".rstrip()
        yield Candidate(name, backend, why_not)


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Multiply a test that uses a backend by the backends of this run; skip what they do not claim."""
    if "backend" not in metafunc.fixturenames:
        return
    found = candidates(metafunc.config)
    needs = [name for mark in metafunc.definition.iter_markers("needs") for name in mark.args]
    params = []
    for candidate in found:
        why_not = f"{candidate.name}: {candidate.why_not}" if candidate.why_not else ""
        if not why_not and candidate.backend is not None:
            lacking = [name for name in needs if not claims(candidate.backend.capabilities, name)]
            if lacking:
                why_not = f"{candidate.name} does not claim {', '.join(lacking)}"
        marks = [pytest.mark.skip(reason=why_not)] if why_not else []
        params.append(pytest.param(candidate, id=candidate.name, marks=marks))
    if not params:
        params.append(pytest.param(None, id="none", marks=pytest.mark.skip(reason="no backend is installed")))
    metafunc.parametrize("backend", params, indirect=True)


def claims(capabilities: Capabilities, need: str) -> bool:
    """Whether the capabilities hold `need`: "tty", or "networks:host" for a member of a set."""
    name, _, member = need.partition(":")
    value: object = getattr(capabilities, name)
    return member in value if isinstance(value, frozenset) else bool(value)


def event_loops() -> list[ParameterSet]:
    """Parameters for the fixture `anyio_backend`: both event loops, where both are installed."""
    missing = importlib.util.find_spec("trio") is None
    return [
        pytest.param("asyncio"),
        pytest.param("trio", marks=pytest.mark.skip(reason="trio is not installed") if missing else ()),
    ]


def scaled(config: pytest.Config, candidate: Candidate, full: int, test: str = "") -> int:
    """How often a test repeats with this backend: all with --long, else a tenth; fewer when it starts slowly."""
    seconds = candidate.backend.capabilities.start_seconds if candidate.backend else _REFERENCE_START_SECONDS
    factor = min(1.0, _REFERENCE_START_SECONDS / seconds) * (1 if config.getoption("long", default=False) else 0.1)
    count = max(1, round(full * factor))
    config.stash.setdefault(COUNTS, {})[f"{test} [{candidate.name}]", full] = count
    return count
