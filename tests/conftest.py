"""Fixtures of every test: both event loops, the size of big counts, and the proof that nothing is left behind."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import hypothesis
import pytest
from tests.places import own_places

from unisandbox.conformance.inventory import Inventory, leaves_nothing_behind, settle
from unisandbox.conformance.plugin import add_shared_options
from unisandbox.conformance.scope import run_cgroup
from unisandbox.conformance.turns import of_the_other_loop
from unisandbox.conformance.waiting import bound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# How long an example takes says nothing about it on a machine that does other things, too.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


# Of a run that is shared out among workers: what was there before, and what was left.
BEFORE = pytest.StashKey[Inventory]()
LEFT = pytest.StashKey[list[str]]()
BY_TURNS = frozenset({"integration", "faults", "security", "wasm"})
OF_THE_MACHINE = tuple(
    f"left behind: {kind} " for kind in ("cgroup", "hidden cgroup directory", "unix socket", "loop device")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_shared_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if is_worker(config) and os.geteuid() == 0:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        stack.enter_context(own_places(config.option.basetemp))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """What no worker can tell (see `Inventory`) is looked at when all of them have ended."""
    before = session.config.stash.get(BEFORE, None)
    yield
    left = [] if before is None else [line for line in settle(before) if line.startswith(OF_THE_MACHINE)]
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[LEFT] = left


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None) and not is_worker(session.config):
        session.config.stash[BEFORE] = Inventory.take()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(LEFT, []):
        terminalreporter.write_line(f"ERROR after all tests: {line}", red=True)


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs a part of the tests for another one."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--by-turns") and not config.getoption("--long"):
        spared = of_the_other_loop(items, lambda item: item.path.parent.name in BY_TURNS)
        config.hook.pytest_deselected(items=spared)
        out = set(spared)
        items[:] = [item for item in items if item not in out]
    # What takes longest is begun first, so that no worker has it before it when the others have nothing left.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root on this host"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    bound(pyfuncitem)


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> Callable[[int], int]:
    """How often a test repeats: the whole number with --long, else a tenth of it and at least once."""
    if pytestconfig.getoption("--long"):
        return lambda full: full
    return lambda full: max(1, full // 10)


@pytest.fixture(params=[pytest.param("asyncio"), pytest.param("trio")])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every test marked `anyio` runs on both event loops."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> None:
    """What starts a run in the background lets it ignore these, and so would all that the tests start."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _run_cgroup() -> Iterator[None]:
    with run_cgroup():
        yield


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_run_cgroup: None) -> Iterator[None]:
    """Fail a test that leaves a process, mount, cgroup, fd, thread, file or changed state behind; none can forget it.

    It is set up before every other fixture of the test and torn down after them.
    """
    with leaves_nothing_behind():
        yield
