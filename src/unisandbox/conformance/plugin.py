"""The options of the conformance tests.

    pytest --pyargs unisandbox.conformance --backend runc

Without `--backend` every installed backend is tested. What a backend's `Capabilities` do not claim is a skip that
says so, and so is a backend that cannot run on this host. The root file system that is used (`--rootfs`) needs a
POSIX shell, coreutils and python3, or, for a backend that does not claim `processes`, the tool guest in its /bin.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import pytest

from unisandbox.conformance.selection import COUNTS, LACKING, SPARED, TESTED, check_wanted

_NEEDS = (
    "needs(*names): what the backend's Capabilities must claim: a field's name, or 'networks:host' for one of a set"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unisandbox", "conformance of unisandbox's backends")
    group.addoption(
        "--backend",
        action="append",
        dest="unisandbox_backends",
        metavar="NAME",
        help="test this backend (may be repeated); default: every installed one",
    )
    group.addoption(
        "--rootfs",
        dest="unisandbox_rootfs",
        metavar="ROOTFS",
        default=None,
        help="root file system of the sandboxes, as for Sandbox.create(); default: host, or a directory with the Wasm "
        "programs of the tests for a backend that runs none of this machine's",
    )
    group.addoption(
        "--slow-host",
        action="store_true",
        dest="unisandbox_slow_host",
        help="starts take ten times as long here as usual (an emulated machine): fewer repetitions, each test on one "
        "event loop",
    )


# After the conftest.py files of the command line.
@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> None:
    add_shared_options(parser)


def add_shared_options(parser: pytest.Parser) -> None:
    """Know `--long` and `--by-turns`, unless a conftest.py has one already, with the same meaning."""
    for name, meaning in (
        ("--long", "run the big counts in full instead of at a tenth"),
        ("--by-turns", "run tests that take long on one of the event loops each, by turns (not with --long)"),
    ):
        with contextlib.suppress(ValueError):
            parser.addoption(name, action="store_true", help=meaning)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _NEEDS)
    config.addinivalue_line("markers", "root: needs root on this host")
    check_wanted(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often the counted tests ran, what was tested of each backend and what it lacks: nothing goes unsaid."""
    counts = config.stash.get(COUNTS, {})
    if counts:
        terminalreporter.section("counts of the conformance tests")
        for (test, full), count in sorted(counts.items()):
            terminalreporter.write_line(f"{test}: {count} of {full}")
    for name, count in config.stash.get(SPARED, {}).items():
        terminalreporter.write_line(f"{name}: each test on one event loop, by turns: {count} not run (--long: all)")
    if lines := [*_by_backend(terminalreporter.stats)]:
        terminalreporter.section("conformance by backend")
        for line in lines:
            terminalreporter.write_line(line)


def _by_backend(stats: Mapping[str, Sequence[object]]) -> Iterator[str]:
    """A line for each backend, and one for each capability that tests needed and it does not claim."""
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    lacks: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in stats.get(outcome, ()):
            properties = getattr(report, "user_properties", ())
            for name in (value for key, value in properties if key == TESTED):
                outcomes[name][outcome] += 1
                lacks[name].update(value for key, value in properties if key == LACKING)
    for name, counted in sorted(outcomes.items()):
        yield f"{name}: {', '.join(f'{number} {outcome}' for outcome, number in counted.items())}"
        for lacking, number in sorted(lacks[name].items()):
            yield f"  does not claim {lacking}: {number} not run"
