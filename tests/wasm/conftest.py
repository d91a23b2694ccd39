"""Fixtures of the Wasm engine room: the domain, and guests that are all gone after a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

pytest.importorskip("wasmtime")

from tests.wasm.guests import LOOKS_FOR_A_FILE, Runner, wait_for
from tests.wasm.sandboxes import engine

from unisandbox import Engine
from unisandbox.backends.wasm.domain import Domain
from unisandbox.backends.wasm.guest import GuestSpec, Preopen
from unisandbox.conformance.inventory import leaves_nothing_behind, tolerating

RUNTIME_THREADS = ("tokio-rt-worker",)
"""wasmtime's own, the declared exception; it never ends them all, nor closes their epolls."""


@pytest.fixture(scope="session", autouse=True)
def _runtime_of_wasmtime(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first call for a file starts wasmtime's runtime for the rest of the process."""
    domain = Domain.get()
    try:
        root = str(tmp_path_factory.mktemp("root"))
        Runner(domain).end(LOOKS_FOR_A_FILE, GuestSpec(["x"], preopens=[Preopen(root, "/")]))
    finally:
        domain.close()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_run_cgroup: None, _runtime_of_wasmtime: None) -> Iterator[None]:
    """As for every test, but for wasmtime's own threads."""
    with tolerating(RUNTIME_THREADS), leaves_nothing_behind():
        yield


@pytest.fixture
def domain() -> Iterator[Domain]:
    """The domain of this process; its threads are gone after the test."""
    domain = Domain.get()
    yield domain
    domain.close()


@pytest.fixture
def runner(domain: Domain) -> Iterator[Runner]:
    """Guests that are all gone after the test."""
    runner = Runner(domain)
    yield runner
    for guest in runner.guests:
        guest.kill()
    for guest in runner.guests:
        wait_for(guest)
    runner.guests.clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "wasm"


@pytest.fixture
async def wasm(cache: Path) -> AsyncIterator[Engine]:
    async with engine(cache) as opened:
        yield opened
