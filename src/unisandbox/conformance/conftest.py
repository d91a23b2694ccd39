"""Fixtures of the conformance tests: a backend, an engine, sandboxes, and the proof that nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import pytest
from typing_extensions import Unpack

from unisandbox import Engine, Opening, Sandbox
from unisandbox.api import Capabilities
from unisandbox.conformance import selection
from unisandbox.conformance.inventory import RUN_PREFIX, leaves_nothing_behind, own_cgroups
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


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_conformance_cgroup: None) -> Iterator[None]:
    """Fail a test that leaves a process, mount, cgroup, fd, thread, file or changed state behind; none can forget it.

    It is set up before every other fixture of the test and torn down after them.
    """
    with leaves_nothing_behind():
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
def rootfs(pytestconfig: pytest.Config) -> str:
    """The root file system of this run."""
    return str(pytestconfig.getoption("unisandbox_rootfs", default="host"))


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
        given: SandboxOptions = {"isolation": backend.name, "rootfs": rootfs, **options}
        return engine.create(**given)

    return create


@pytest.fixture
async def sandbox(create: Create) -> AsyncIterator[Sandbox]:
    """A sandbox with the default limits."""
    async with create() as made:
        yield made
