"""The table of hosts: made of runs in which nothing failed, with a reason for everything that is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unisandbox.api import Capabilities
from unisandbox.conformance import selection

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import hosts_table  # noqa: E402

CASE = '<testcase classname="src.unisandbox.conformance.test_exits" name="test_it[{}-runc-{}]">{}</testcase>'
NOT_CLAIMED = '<properties><property name="not claimed" value="limits:memory"/></properties><skipped/>'
WITHOUT = '<property name="unisandbox backend without" value="runc {}"/>'


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.xml"


def write(results: Path, *cases: str, without: str = "limits:memory") -> Path:
    tests = "".join(
        CASE.format(loop, number, case) for number, case in enumerate(cases) for loop in ("asyncio", "trio")
    )
    told = f"<properties>{WITHOUT.format(without)}</properties>"
    first = f'<testcase classname="first" name="it">{told}<skipped/></testcase>'
    results.write_text(f"<testsuites><testsuite>{first}{tests}</testsuite></testsuites>")
    return results


def test_what_passed_and_what_could_not_be_had_is_counted_once_for_both_event_loops(results: Path) -> None:
    run = hosts_table.read(write(results, "", "", NOT_CLAIMED, "<skipped/>"))

    assert run == {"parts": {"exits": [2, 1]}, "lacking": ["limits:memory"]}
    page = hosts_table.page({"here": run, "there": {"parts": {}, "lacking": []}})
    assert "| Exact exits | 2 passed, 1 not claimed | - |" in page
    assert f"| `limits:memory` | lost |  | {hosts_table.WHY['limits:memory']} |" in page


@pytest.mark.parametrize("outcome", ["<failure/>", "<error/>"])
def test_a_run_with_a_failure_is_not_taken(results: Path, outcome: str) -> None:
    with pytest.raises(SystemExit, match="failed"):
        hosts_table.read(write(results, "", outcome))


def test_what_only_some_hosts_lack_needs_a_reason(results: Path) -> None:
    run = hosts_table.read(write(results, "", without="magic"))

    assert "magic" not in hosts_table.page({"here": run})
    with pytest.raises(SystemExit, match=r"WHY .* magic"):
        hosts_table.page({"here": run, "there": {"parts": {}, "lacking": []}})


def test_a_run_without_a_test_of_the_contract_is_not_taken(results: Path) -> None:
    results.write_text('<testsuite><testcase classname="tests.unit.test_x" name="test_x"/></testsuite>')
    with pytest.raises(SystemExit, match="no test of the contract has passed"):
        hosts_table.read(results)


def test_all_that_a_backend_does_not_claim_is_told() -> None:
    told = selection.without(Capabilities(isolation="x", tty=True, limits=frozenset({"memory"}), own_ids=False))

    assert {"own_ids", "exec", "limits:cpu", "limits:pids", "rootfs:host", "networks:host"} <= set(told)
    assert not {"tty", "limits:memory", "networks:none", "processes", "isolation", "notes"} & set(told)


def test_of_a_version_is_told_how_much_passed_and_what_is_lost_with_it(results: Path) -> None:
    write(results, "", NOT_CLAIMED)
    warnings = "".join(
        f'<property name="unisandbox backend warning" value="{value}"/>'
        for value in ("runc not with youki 0.7.0: share_pid. Remedy: apt install crun", "runc it is late", "wasm old")
    )
    other = '<testcase classname="tests.integration.test_x" name="test_it[{}]"/>'
    first = f'<testcase classname="first" name="it"><properties>{warnings}</properties><skipped/></testcase>'
    extra = f"<testsuite>{first}{other.format('asyncio')}{other.format('trio')}</testsuite>"
    results.write_text(results.read_text().replace("</testsuites>", f"{extra}</testsuites>"))

    run = hosts_table.read_version(results)

    assert run == {"contract": 1, "others": 1, "lost": ["share_pid"]}
    here = {"here": hosts_table.read(results)}
    assert "| youki 0.7.0 | 1 | 1 | share_pid |" in hosts_table.page(here, {"youki 0.7.0": run})
