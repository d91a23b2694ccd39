"""Fixtures of the conformance tests: a backend, an engine, sandboxes, and the proof that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import anyio
import pytest
from typing_extensions import Unpack

from unisandbox import Engine, Opening, Sandbox, SandboxError, UnavailableError
from unisandbox.api import Capabilities
from unisandbox.conformance import selection
from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.conformance.hosts import Hosts, keeper_pid
from unisandbox.conformance.inventory import RUN_PREFIX, leaves_nothing_behind, own_cgroups, tolerating
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.scope import run_cgroup
from unisandbox.conformance.waiting import bound
from unisandbox.sandbox import SandboxOptions

# The options are known when pytest was told of the plugin in time; its other hooks are needed in every case.
pytest_plugins: list[str] = ["unisandbox.conformance.plugin"]


class Create(Protocol):
    """Makes a sandbox of the backend under test, with the root file system of this run unless another is given."""

    def __call__(self, **options: Unpack[SandboxOptions]) -> Opening[Sandbox]: ...


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    selection.parametrize(metafunc)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    spared = selection.spare(config, items)
    if spared:
        config.hook.pytest_deselected(items=spared)
    selection.note(items)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    bound(pyfuncitem)


@pytest.fixture(params=selection.event_loops())
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every test marked `anyio` runs on both event loops."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _conformance_cgroup() -> Iterator[None]:
    """A cgroup of its own for this run, unless somebody has seen to it already."""
    if any(path.rsplit("/", 1)[-1] == f"{RUN_PREFIX}{os.getpid()}" for path in own_cgroups().values()):
        yield
        return
    with run_cgroup():
        yield


@pytest.fixture(scope="session")
def guest_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root file system for backends that do not run this machine's programs."""
    path = tmp_path_factory.mktemp("guest")
    GuestPrograms().make_root(path)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def _used_once(_conformance_cgroup: None, pytestconfig: pytest.Config, guest_root: str) -> None:
    """What a backend is known to leave in this process, once and for all, is there before the first listing."""
    for candidate in selection.candidates(pytestconfig):
        if not candidate.why_not and candidate.backend is not None and candidate.backend.capabilities.host_exceptions:
            rootfs = selection.rootfs(pytestconfig, candidate, guest_root)
            # Should this fail, tests will say so, and better.
            with contextlib.suppress(SandboxError):
                anyio.run(_use, candidate, rootfs)


async def _use(candidate: selection.Candidate, rootfs: str) -> None:
    async with Engine.open() as engine, engine.create(**selection.options(candidate, rootfs)) as sandbox:
        programs = selection.programs(candidate)
        # With a file written and one read: what does the work with files may be made at the first need.
        await sandbox.run(programs.stores("/tmp/once", "line"))
        await sandbox.run(programs.shows("/tmp/once"))


@pytest.fixture(scope="session")
def _untold(pytestconfig: pytest.Config) -> list[tuple[str, str]]:
    """What every backend does not claim here, and warns of."""
    told: list[tuple[str, str]] = []
    for candidate in selection.candidates(pytestconfig):
        if not candidate.why_not and candidate.backend is not None:
            needs = selection.without(candidate.backend.capabilities)
            told += [(selection.WITHOUT, f"{candidate.name} {need}") for need in needs]
            told += [(selection.WARNING, f"{candidate.name} {warning}") for warning in candidate.warnings]
    return told


@pytest.fixture(autouse=True)
def _capabilities_told(_untold: list[tuple[str, str]], request: pytest.FixtureRequest) -> None:
    """It is in the results, when they are written (--junitxml): with the first test, as xdist hands on nothing else.

    (`record_property` would warn, unless the family of the results is the older one.)
    """
    request.node.user_properties.extend(_untold)
    _untold.clear()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_used_once: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, mount, cgroup, fd, thread, file or changed state behind; none can forget it.

    It is set up before every other fixture of the test and torn down after them. Only the threads that the backend
    names in its `host_exceptions` ("thread NAME") may stay.
    """
    candidate = selection.of(request.node)
    exceptions = candidate.backend.capabilities.host_exceptions if candidate and candidate.backend else ()
    threads = [name.removeprefix("thread ") for name in exceptions if name.startswith("thread ")]
    with tolerating(threads), leaves_nothing_behind():
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> selection.Candidate:
    """The backend under test."""
    candidate: selection.Candidate = request.param
    return candidate


@pytest.fixture
def capabilities(backend: selection.Candidate) -> Capabilities:
    """What the backend under test claims."""
    assert backend.backend is not None
    return backend.backend.capabilities


@pytest.fixture
def count(
    backend: selection.Candidate, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> Callable[[int], int]:
    """How often a test repeats; see `selection.scaled`."""
    return lambda full: selection.scaled(pytestconfig, backend, full, request.node.originalname)


@pytest.fixture
def programs(backend: selection.Candidate) -> Programs:
    """The programs that sandboxes of the backend under test run."""
    return selection.programs(backend)


@pytest.fixture
def rootfs(pytestconfig: pytest.Config, backend: selection.Candidate, guest_root: str) -> str:
    """The root file system of this run: the one that was asked for, or one in which the programs are."""
    return selection.rootfs(pytestconfig, backend, guest_root)


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    """An engine of its own for the test, on a temporary state directory."""
    async with Engine.open() as opened:
        yield opened


@pytest.fixture
def create(engine: Engine, backend: selection.Candidate, rootfs: str) -> Create:
    """Make sandboxes of the backend under test."""

    def create(**options: Unpack[SandboxOptions]) -> Opening[Sandbox]:
        # The user's own words come last.
        given: SandboxOptions = {**selection.options(backend, rootfs), **options}
        return engine.create(**given)

    return create


@pytest.fixture
def hosts(backend: selection.Candidate, rootfs: str, anyio_backend: str) -> Hosts:
    """Host processes of their own, which may be killed."""
    return Hosts(backend, rootfs, anyio_backend)


@pytest.fixture
async def state(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Path]:
    """The state directory of the engines of one test, which has to end them all."""
    directory = tmp_path / "state"
    yield directory
    try:
        await keeper_pid(directory)
    except UnavailableError:
        return  # no engine is left there, as it should be
    async with Engine.open(directory, on_recover="stop"):
        pass
    pytest.fail("the test has left an engine with policy 'keep' behind, which was ended now")


@pytest.fixture
async def sandbox(create: Create) -> AsyncIterator[Sandbox]:
    """A sandbox with the default limits."""
    async with create() as made:
        yield made
