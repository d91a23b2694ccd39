"""Which backends, event loops and counts a run of the conformance tests has."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable

import anyio
import attrs
import pytest
from _pytest.mark import ParameterSet

from unisandbox.api import Capabilities, Probe, Resources, SandboxError, Security
from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.conformance.programs import MachinePrograms, Programs
from unisandbox.conformance.turns import of_the_other_loop
from unisandbox.engine.registry import Backend, Registry
from unisandbox.sandbox import SandboxOptions

# Counts are written for a backend that starts in this time; slower ones get fewer, in proportion.
_REFERENCE_START_SECONDS = 0.02
# One that takes longer has each test on one of the event loops, by turns: what they differ in is not the backend.
_SLOW_START_SECONDS = 0.1
# With --slow-host.
_SLOW_HOST_FACTOR = 10
_LIMITS = frozenset({"cpu", "memory", "pids"})
# What a sandbox is limited in when nobody says anything.
_LIMITED = frozenset({"memory", "pids"})


@attrs.frozen
class Candidate:
    """A backend that was looked at.

    Attributes:
        name: as in `isolation=`.
        backend: None when it cannot be imported.
        why_not: why it is not tested here; empty when it is.
        warnings: what its probe warns of.
    """

    name: str
    backend: Backend | None
    why_not: str = ""
    warnings: tuple[str, ...] = ()


TESTED = "unisandbox backend"
LACKING = "not claimed"
WITHOUT = "unisandbox backend without"
WARNING = "unisandbox backend warning"
_CANDIDATES: pytest.StashKey[list[Candidate]] = pytest.StashKey()
SPARED: pytest.StashKey[Counter[str]] = pytest.StashKey()
COUNTS: pytest.StashKey[dict[tuple[str, int], int]] = pytest.StashKey()


def candidates(config: pytest.Config) -> list[Candidate]:
    """The backends of this run, probed once."""
    if _CANDIDATES not in config.stash:
        config.stash[_CANDIDATES] = [*_probed(config.getoption("unisandbox_backends", default=None))]
    return config.stash[_CANDIDATES]


def check_wanted(config: pytest.Config) -> None:
    """Raise UsageError, which is one line before anything is collected, for a backend that is not installed."""
    installed = Registry().names()
    for name in config.getoption("unisandbox_backends", default=None) or ():
        if name not in installed:
            raise pytest.UsageError(f"--backend {name}: not installed; there are: {', '.join(installed)}")


def _probed(wanted: Iterable[str] | None) -> Iterable[Candidate]:
    registry = Registry()
    names = list(dict.fromkeys(wanted or registry.names()))
    for name in names:
        try:
            backend = registry.get(name)
        except SandboxError as error:
            yield Candidate(name, None, str(error))
            continue
        probe: Probe = anyio.run(backend.probe)
        why_not = "" if probe.available else f"cannot run on this host: {probe.reason}. {probe.hint}".rstrip()
        yield Candidate(name, backend, why_not, tuple(probe.warnings))


def programs(candidate: Candidate) -> Programs:
    """The programs that sandboxes of this backend run."""
    assert candidate.backend is not None
    return MachinePrograms() if candidate.backend.capabilities.processes else GuestPrograms()


def rootfs(config: pytest.Config, candidate: Candidate, guest_root: str) -> str:
    """The root file system that was asked for, or else one in which the programs are."""
    assert candidate.backend is not None
    usual = "host" if candidate.backend.capabilities.processes else guest_root
    return str(config.getoption("unisandbox_rootfs", default=None) or usual)


def options(candidate: Candidate, rootfs: str) -> SandboxOptions:
    """What a sandbox of this backend is asked for at least: what it lacks of the defaults is done without by name."""
    assert candidate.backend is not None
    given: SandboxOptions = {"isolation": candidate.name, "rootfs": rootfs}
    if not candidate.backend.capabilities.seccomp:
        given["security"] = Security(seccomp="unconfined")
    if not candidate.backend.capabilities.limits >= _LIMITED:
        given["resources"] = Resources(memory=None, pids=None)
    return given


def options_in_source(candidate: Candidate, rootfs: str) -> str:
    """The same as arguments in the text of a program, which has imported `Security` and `Resources`."""
    given = options(candidate, rootfs)
    source = f"isolation={candidate.name!r}, rootfs={rootfs!r}"
    source += ", security=Security(seccomp='unconfined')" if "security" in given else ""
    return source + (", resources=Resources(memory=None, pids=None)" if "resources" in given else "")


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Multiply a test that uses a backend by the backends of this run; skip what they do not claim."""
    if "backend" not in metafunc.fixturenames:
        return
    found = candidates(metafunc.config)
    params = []
    for candidate in found:
        why_not = f"{candidate.name}: {candidate.why_not}" if candidate.why_not else ""
        if lacks := lacking(candidate, metafunc.definition):
            why_not = f"{candidate.name} does not claim {', '.join(lacks)}"
        marks = [pytest.mark.skip(reason=why_not)] if why_not else []
        params.append(pytest.param(candidate, id=candidate.name, marks=marks))
    if not params:
        params.append(pytest.param(None, id="none", marks=pytest.mark.skip(reason="no backend is installed")))
    metafunc.parametrize("backend", params, indirect=True)


def lacking(candidate: Candidate, test: pytest.Item) -> list[str]:
    """What the test needs and the backend does not claim."""
    if candidate.why_not or candidate.backend is None:
        return []
    needs = dict.fromkeys(name for mark in test.iter_markers("needs") for name in mark.args)
    return [name for name in needs if not claims(candidate.backend.capabilities, name)]


def of(test: pytest.Item) -> Candidate | None:
    """The backend that this test is of, if it is of one."""
    callspec = getattr(test, "callspec", None)
    candidate = None if callspec is None else callspec.params.get("backend")
    return candidate if isinstance(candidate, Candidate) else None


def note(tests: Iterable[pytest.Item]) -> None:
    """Write down of every test which backend it is of and what that lacks for it, for the summary."""
    for test in tests:
        if candidate := of(test):
            test.user_properties.append((TESTED, candidate.name))
            test.user_properties += [(LACKING, name) for name in lacking(candidate, test)]


def claims(capabilities: Capabilities, need: str) -> bool:
    """Whether the capabilities hold `need`: "tty", or "networks:host" for a member of a set."""
    name, _, member = need.partition(":")
    value: object = getattr(capabilities, name)
    return member in value if isinstance(value, frozenset) else bool(value)


def without(capabilities: Capabilities) -> list[str]:
    """All that is not claimed, as in `claims`."""
    sets = {
        "rootfs": ("host", "dir", "image"),
        "networks": ("none", "user", "host", "namespace"),
        "limits": sorted(_LIMITS),
    }
    needs = [field.name for field in attrs.fields(Capabilities) if field.type in {bool, "bool"}]
    needs += [f"{name}:{member}" for name, members in sets.items() for member in members]
    return [need for need in needs if not claims(capabilities, need)]


def event_loops() -> list[ParameterSet]:
    """Parameters for the fixture `anyio_backend`: both event loops, where both are installed."""
    missing = importlib.util.find_spec("trio") is None
    return [
        pytest.param("asyncio"),
        pytest.param("trio", marks=pytest.mark.skip(reason="trio is not installed") if missing else ()),
    ]


def spare(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """Take out, and return, the half of the tests of backends that start slowly, or of all: see `--by-turns`."""
    if config.getoption("long", default=False) or importlib.util.find_spec("trio") is None:
        return []

    def takes_turns(item: pytest.Item) -> bool:
        candidate = of(item)
        if candidate is None or candidate.backend is None:
            return False
        return config.getoption("by_turns", default=False) or _start_seconds(config, candidate) > _SLOW_START_SECONDS

    spared = of_the_other_loop(items, takes_turns)
    counts = config.stash.setdefault(SPARED, Counter[str]())
    counts.update(candidate.name for candidate in map(of, spared) if candidate is not None)
    out = set(spared)
    items[:] = [item for item in items if item not in out]
    return spared


def scaled(config: pytest.Config, candidate: Candidate, full: int, test: str = "") -> int:
    """How often a test repeats with this backend: all with --long, else a tenth; fewer when it starts slowly."""
    factor = min(1.0, _REFERENCE_START_SECONDS / _start_seconds(config, candidate))
    count = max(1, round(full * factor * (1 if config.getoption("long", default=False) else 0.1)))
    config.stash.setdefault(COUNTS, {})[f"{test} [{candidate.name}]", full] = count
    return count


def _start_seconds(config: pytest.Config, candidate: Candidate) -> float:
    seconds = candidate.backend.capabilities.start_seconds if candidate.backend else _REFERENCE_START_SECONDS
    return seconds * (_SLOW_HOST_FACTOR if config.getoption("unisandbox_slow_host", default=False) else 1)
