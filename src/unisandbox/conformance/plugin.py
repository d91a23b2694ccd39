"""The options of the conformance tests.

    pytest --pyargs unisandbox.conformance --backend runc

Without `--backend` every installed backend is tested. What a backend's `Capabilities` do not claim is a skip that
says so, and so is a backend that cannot run on this host. The root file system that is used (`--rootfs`) needs a
POSIX shell, coreutils and python3.
"""

from __future__ import annotations

import contextlib

import pytest

from unisandbox.conformance.selection import COUNTS

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
        default="host",
        help="root file system of the sandboxes, as for Sandbox.create(); default: host",
    )


# After the conftest.py files of the command line.
@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> None:
    add_long(parser)


def add_long(parser: pytest.Parser) -> None:
    """Know `--long`, unless a conftest.py has it already, with the same meaning."""
    with contextlib.suppress(ValueError):
        parser.addoption("--long", action="store_true", help="run the big counts in full instead of at a tenth")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _NEEDS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often the counted tests ran, so that a short run is not taken for a long one."""
    counts = config.stash.get(COUNTS, {})
    if counts:
        terminalreporter.section("counts of the conformance tests")
        for (test, full), count in sorted(counts.items()):
            terminalreporter.write_line(f"{test}: {count} of {full}")
