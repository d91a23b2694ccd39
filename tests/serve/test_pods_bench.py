"""The benchmark of pods measures every contender, and leaves nothing of its containerd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        "UNISANDBOX_CONTAINERD_LAB" not in os.environ, reason="needs a real containerd: make test-serve"
    ),
]


@pytest.mark.timeout(300)
def test_quick_run_measures_the_shim_ours_and_the_floor(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.pods", "--quick", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["missing"] == []
    assert {"containerd's shim, runc", "unisandbox, runc", "nothing (the floor)"} <= found["parallel_ms"].keys()
    assert len(found["serial_ms"]["unisandbox, runc: pod and container"]) == 3
    of_shim, ours = found["memory"]["containerd's shim, runc"], found["memory"]["unisandbox, runc"]
    assert [row["processes"] for row in of_shim] == [2, 6], "a shim and a pause container for each pod"
    assert ours[0]["processes"] == ours[1]["processes"], "no process for a further pod"
    assert (tmp_path / "pods.svg").stat().st_size > 1000
