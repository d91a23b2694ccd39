"""Kubernetes' own tests of a container runtime (critest): by name, we fail nothing that containerd's own shim passes.

Needs the laboratory script of `make test-serve` and one that runs critest beside it; says so where there is none.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import pytest
from tests.serve.laboratory import SECONDS, Lab

CRITEST: Final = os.environ.get("UNISANDBOX_CRITEST_LAB", "")
SEED: Final = 20261130
# It pulls and starts what it needs first; then one run of all specs each.
MOST: Final = 1500.0

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(4 * MOST),
    pytest.mark.skipif(not CRITEST, reason="needs a real containerd and critest: make test-serve"),
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, CRITEST)
    lab.start(f'events = "{lab.containerd}.ttrpc"\nprivileged = true\n')
    try:
        subprocess.run([CRITEST, "up"], check=True, stdout=subprocess.DEVNULL, timeout=MOST)
        yield lab
    finally:
        subprocess.run([CRITEST, "down"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
        lab.end()


def results(lab: Lab, handler: str) -> dict[str, str]:
    """How each spec ended: "passed", "failed" or "skipped", by its name."""
    report = lab.place / f"{handler}.xml"
    # Its specs have short deadlines of their own: on a busy machine one may pass only when it is tried again.
    words = [f"--ginkgo.seed={SEED}", "--ginkgo.flake-attempts=2", f"--ginkgo.junit-report={report}"]
    with (lab.place / f"{handler}.log").open("wb") as log:
        subprocess.run([CRITEST, "critest", handler, *words], stdout=log, stderr=log, check=False, timeout=MOST)
    cases = ET.parse(report).iter("testcase")  # noqa: S314 (our own child wrote it)
    found = {
        case.get("name", ""): case.get("status", "") for case in cases if (case.get("name") or "").startswith("[It]")
    }
    assert "passed" in found.values(), (lab.place / f"{handler}.log").read_text()[-3000:]
    return found


def test_what_passes_with_containerds_own_shim_passes_with_us(lab: Lab) -> None:
    shim = {name for name, end in results(lab, "runc").items() if end == "passed"}
    for handler in ("uni", "unistream"):
        ours = results(lab, handler)
        count = {end: list(ours.values()).count(end) for end in ("passed", "failed", "skipped")}
        print(f"{handler}: {count}; containerd's own shim passed {len(shim)}")
        worse = {name: ours.get(name, "missing") for name in sorted(shim) if ours.get(name) != "passed"}
        assert worse == {}, lab.said().decode()[-3000:]
