"""A stranger's backend, in a package of its own, is found, and passes the conformance suite like ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from unisandbox.conformance.selection import WITHOUT

pytestmark = [pytest.mark.root, pytest.mark.slow]

PACKAGE: Final = Path(__file__).resolve().parent.parent.parent / "examples" / "backend_plugin"
SOURCES: Final = Path(__file__).resolve().parent.parent.parent / "src"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a Python that has the example installed, beside what is here."""
    target = tmp_path_factory.mktemp("site")
    install = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", *install, "--disable-pip-version-check", "--root-user-action=ignore", str(PACKAGE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": f"{SOURCES}:{target}"}


def test_it_is_found_by_its_entry_point_and_never_preferred(installed: Mapping[str, str]) -> None:
    code = """
import anyio, sys
from unisandbox import Engine, Security, UnsupportedError

async def main():
    async with Engine.open() as engine:
        assert "unisandbox_unshare" not in sys.modules
        probes = {probe.backend: probe.available for probe in await engine.probe()}
        assert probes["runc"] and probes["unshare"], probes
        assert (await engine.explain()).backend == "runc"
        try:
            await engine.create(isolation="unshare")
        except UnsupportedError as error:
            print(error)
        async with engine.create(isolation="unshare", security=Security(seccomp="unconfined")) as sandbox:
            print((await sandbox.run(["echo", "here"])).text)

anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "seccomp is not supported by backend 'unshare'. Use isolation='runc', or "
        "security=Security(seccomp='unconfined').",
        "here",
        "",
    ]


def test_no_field_of_a_sandbox_is_taken_and_ignored(installed: Mapping[str, str]) -> None:
    code = """
import anyio
from unisandbox import Engine, Security, UnsupportedError
from unisandbox.api import SandboxSpec

async def main():
    async with Engine.open() as engine:
        spec = SandboxSpec(
            isolation="unshare", security=Security(seccomp="unconfined"), user_ids=(200_000, 1000)
        )
        try:
            await engine._core.create(spec)
        except UnsupportedError as error:
            print(error.capability)

anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "user_ids\n", "")


@pytest.mark.timeout(3600)
def test_a_backend_that_is_not_installed_is_told_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "unisandbox.conformance"]
    done = subprocess.run(
        [*command, "--backend", "runc", "--backend", "nosuch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.fullmatch(r"ERROR: --backend nosuch: not installed; there are: .*runc.*", said), said


@pytest.mark.timeout(1800)
def test_it_passes_the_conformance_suite(
    installed: Mapping[str, str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    arguments = ["-m", "pytest", "--pyargs", "unisandbox.conformance", "--backend", "unshare", "-qrs", "--tb=short"]
    # What the loops differ in is the library's, and tested with its own backend; so is most of files and streams.
    some = "not trio and (capabilities or defaults or exits or fences or lifecycle or recovery or sharing)"
    arguments += ["--long"] if pytestconfig.getoption("--long") else ["-k", some]
    results = tmp_path / "results.xml"
    arguments += ["--junitxml", str(results), "-W", "error::pytest.PytestWarning"]
    # Another directory than ours: the suite runs as it would for a stranger, without our pytest settings.
    done = subprocess.run(
        [sys.executable, *arguments], env=installed, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:]
    counts = re.search(r"(\d+) passed, (\d+) skipped", done.stdout)
    assert counts is not None
    passed, skipped = map(int, counts.groups())
    # A suite that skips most is no proof.
    assert passed > 4 * skipped
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all("does not claim" in line for line in reasons), reasons
    assert f'<property name="{WITHOUT}" value="unshare ' in results.read_text()
