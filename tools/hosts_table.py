"""docs/hosts.md: what works on which host, from the results of test runs.

    python tools/hosts_table.py add NAME RESULTS.xml...       put these in the place of the run that had this name
    python tools/hosts_table.py version NAME RESULTS.xml...   the same for a version of Python or of a runtime
    python tools/hosts_table.py write                         write the page anew
    python tools/hosts_table.py --check                       the page is what this tool makes of what is kept

RESULTS.xml is what pytest --junitxml writes of the conformance tests of the namespace backend, on that host. Only what
is without a failure is taken. What is kept of it is in docs/hosts.json, and of versions, with whatever other tests were
run, in docs/versions.json.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
PAGE, DATA, VERSIONS = (ROOT / "docs" / name for name in ("hosts.md", "hosts.json", "versions.json"))
TESTS = ROOT / "src/unisandbox/conformance"
_BACKEND: Final = "runc "
# How the probe of the backend begins what is lost with a version of a runtime.
_NOT_WITH: Final = re.compile(r"not with \S+ \S+: (.*)\. Remedy: .*")
_PART: Final = "unisandbox.conformance.test_"
# A test counts once, on however many event loops it ran.
_LOOP: Final = re.compile(r"(?<=[\[-])(asyncio|trio)-?")

# Why a host does without a capability; a new one has to be explained here.
WHY: Final = {
    "networks:namespace": "a given network namespace belongs to others, and only root of its owner may enter it",
    "networks:user": "pasta is not installed (Debian's package passt), or /dev/net/tun may not be opened",
    "own_ids": "all sandboxes of one user have the ids that are subordinate to him",
    "users": "without subordinate ids his own is the only one, and that is root's inside",
    "userns_host": "without a user namespace an ordinary user can make none of the others",
    "host_devices": "to make a device file takes the host's root",
    "cgroup_parent": "a cgroup elsewhere is not his to write",
    "large_disks": "a disk image needs a loop device, and the host's root to mount it; a layer in memory is limited",
    "writable_dirs": "before Linux 6.6 a tmpfs holds no extended attributes of users, and an overlay needs them to hide"
    " what is removed below; and fuse-overlayfs is not installed, or /dev/fuse may not be opened",
    "limits:memory": "no cgroup is his to write: cgroup v1, or v2 where no subtree was delegated",
    "limits:pids": "as limits:memory",
    "limits:cpu": "as limits:memory",
    "pause": "to stop all processes takes a cgroup",
    "exact_exits": "the kernel counts kills for memory by cgroup; exit codes and signals are exact all the same",
    "process_trees": "who has left his parents and his session is only found by his cgroup; he ends with his container",
}

_HEAD: Final = """\
# What works on which host

Made by `tools/hosts_table.py` from the results of test runs; do not edit it. The tests are those of the contract
(`src/unisandbox/conformance`), of the namespace backend. A cell says how many passed on that host, and how many were
not run since the backend does not claim there what they need: that is in the second table. Nothing failed, or the run
would not be here. "-" was not run there.

`unisandbox doctor` says what holds for your host, and names the setting or the program that is in the way, with the
remedy. How it is done without root is in [adr/0018](adr/0018-without-root.md). `make test-hosts` tests an ordinary user
with a delegated subtree of cgroups; with UNISANDBOX_HOSTS_RESULTS=FILE its results can be put into this table. It has
fewer of the many variants of a test, since it is emulated. What works inside containers of Docker, podman and
Kubernetes, and with which flags, is in [containers.md](containers.md); services of systemd's are in
[systemd.md](systemd.md).

"""
_LOST: Final = """
## What is lost, and why

The names are those of `Capabilities`. What the backend has on no host is not here.

"""
_VERSIONS: Final = """
## Versions of Python and of runtimes

Made on the first host of those above with parts of what `make test-pythons` and `make test-runtimes` run. Counted are
tests that passed: those of the contract, and the others. Not tried: Python without its lock (3.14t).

"""

Run = dict[str, Any]


def main() -> None:
    arguments = sys.argv[1:]
    runs: dict[str, Run] = json.loads(DATA.read_text()) if DATA.exists() else {}
    versions: dict[str, Run] = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    match arguments:
        case ["add", name, *results] if results:
            runs[name] = read(*map(Path, results))
            DATA.write_text(json.dumps(runs, indent=1, sort_keys=False) + "\n")
            PAGE.write_text(page(runs, versions))
        case ["version", name, *results] if results:
            versions[name] = read_version(*map(Path, results))
            VERSIONS.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")
            PAGE.write_text(page(runs, versions))
        case ["write"]:
            PAGE.write_text(page(runs, versions))
        case ["--check"]:
            if PAGE.read_text() != page(runs, versions):
                sys.exit("hosts_table: docs/hosts.md is not what is made of what is kept: make it anew with `write`")
            print("docs/hosts.md is what is made of docs/hosts.json and docs/versions.json")
        case _:
            sys.exit(__doc__)


class Results:
    """Of one run, in which nothing failed.

    Attributes:
        passed: the tests of the contract, each by its part and its name.
        without: those of which the backend does not claim here what they need.
        others: the other tests that passed.
        told: what is said of the whole, as names and values.
    """

    def __init__(self, *results: Path) -> None:
        # They were written by a pytest of ours.
        roots = [ET.parse(path).getroot() for path in results]  # noqa: S314
        self.passed: set[tuple[str, str]] = set()
        self.without: set[tuple[str, str]] = set()
        self.others: set[tuple[str, str]] = set()
        for case in (case for root in roots for case in root.iter("testcase")):
            name = f"{case.get('classname')}.{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                sys.exit(f"hosts_table: {name} failed: such a run says nothing about its host")
            above, found, part = (case.get("classname") or "").rpartition(_PART)
            test = part if found else f"{above}{part}", _LOOP.sub("", case.get("name") or "")
            if found and "not claimed" in {item.get("name") for item in case.iter("property")}:
                self.without.add(test)
            elif case.find("skipped") is None:
                (self.passed if found else self.others).add(test)
        if not self.passed | self.others:
            sys.exit(f"hosts_table: {', '.join(map(str, results))}: no test has passed")
        self.told = [
            (item.get("name") or "", item.get("value") or "") for root in roots for item in root.iter("property")
        ]

    def of_the_backend(self, name: str) -> set[str]:
        """What is told under this name of the backend that counts here."""
        return {value.removeprefix(_BACKEND) for key, value in self.told if key == name and value.startswith(_BACKEND)}


def read(*results: Path) -> Run:
    """What is kept of a run: by part, how many tests passed and how many could not be had; and all that is lacking."""
    found = Results(*results)
    if not found.passed:
        sys.exit(f"hosts_table: {', '.join(map(str, results))}: no test of the contract has passed")
    counts = Counter(part for part, _ in found.passed), Counter(part for part, _ in found.without)
    parts = {part: [counted[part] for counted in counts] for part in sorted({*counts[0], *counts[1]})}
    return {"parts": parts, "lacking": sorted(found.of_the_backend("unisandbox backend without"))}


def read_version(*results: Path) -> Run:
    """What is kept of a run with a version: how many tests passed, and what is lost with it."""
    found = Results(*results)
    warnings = map(_NOT_WITH.fullmatch, found.of_the_backend("unisandbox backend warning"))
    return {
        "contract": len(found.passed),
        "others": len(found.others),
        "lost": sorted({match.group(1) for match in warnings if match}),
    }


def page(runs: dict[str, Run], versions: dict[str, Run] | None = None) -> str:
    """The whole page."""
    parts = sorted({part for run in runs.values() for part in run["parts"]})
    rows = [[_title(part), *(_cell(run["parts"].get(part)) for run in runs.values())] for part in parts]
    rows.append(["all that were run", *(_cell(_total(run)) for run in runs.values())])
    anywhere = sorted({name for run in runs.values() for name in run["lacking"]})
    # What is lacking on every host is the backend's own.
    lost = [name for name in anywhere if not all(name in run["lacking"] for run in runs.values())]
    if unexplained := set(lost) - set(WHY):
        sys.exit(f"hosts_table: say in WHY why a host is without {', '.join(sorted(unexplained))}")
    losses = [
        [f"`{name}`", *("lost" if name in run["lacking"] else "" for run in runs.values()), WHY[name]] for name in lost
    ]
    made = _HEAD + _table(["", *runs], rows) + _LOST + _table(["without", *runs, "why"], losses)
    if versions:
        rows = [_version(name, run) for name, run in sorted(versions.items())]
        made += _VERSIONS + _table(["", "of the contract", "others", "lost with it"], rows)
    return made


def _version(name: str, run: Run) -> list[str]:
    return [name, *(str(run[kind] or "-") for kind in ("contract", "others")), "; ".join(run["lost"])]


def _total(run: Run) -> list[int]:
    return [sum(numbers[i] for numbers in run["parts"].values()) for i in (0, 1)]


def _cell(numbers: list[int] | None) -> str:
    if numbers is None:
        return "-"
    passed, without = numbers
    return f"{passed} passed" + (f", {without} not claimed" if without else "")


def _title(part: str) -> str:
    """The first words of the module's own."""
    docstring = ast.get_docstring(ast.parse((TESTS / f"test_{part}.py").read_text())) or part
    return docstring.partition("\n")[0].partition(":")[0].rstrip(".")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
