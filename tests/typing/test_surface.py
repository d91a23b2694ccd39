"""What type checkers and users get from `Opening` and the public surface."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unisandbox import Engine, InvalidArgumentError, Opening, Sandbox

SURFACE = Path(__file__).with_name("surface.py")
ROOT = Path(__file__).parents[2]


def test_mypy_infers_the_surface() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(SURFACE)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_infers_the_surface(tmp_path: Path) -> None:
    settings = {
        "include": ["surface.py"],
        "extraPaths": [str(ROOT / "src")],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "reportPrivateUsage": False,
        "reportUnusedExpression": False,
        "reportUnusedCoroutine": False,
        "reportUnnecessaryTypeIgnoreComment": True,
        "enableTypeIgnoreComments": False,
    }
    # A directory of its own, for its settings are not those of the package.
    (tmp_path / "surface.py").write_text(SURFACE.read_text())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path), "--outputjson"],
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    found = report["generalDiagnostics"]

    assert report["summary"]["filesAnalyzed"] == 1
    assert not [f"{item['range']['start']['line'] + 1}: {item['message']}" for item in found]


@pytest.mark.parametrize("make", [Sandbox.create, Engine.open], ids=["Sandbox.create", "Engine.open"])
def test_an_opening_that_nobody_used_warns(make: Callable[[], Opening[Sandbox]]) -> None:
    with pytest.warns(ResourceWarning, match="neither awaited nor entered"):
        make()  # nobody holds it, so that it ends here


def test_a_wrong_option_is_refused_at_once_and_warns_of_nothing() -> None:
    with pytest.raises(InvalidArgumentError, match="no/path"):
        Sandbox.create(name="no/path")
    with pytest.raises(TypeError, match="memory"):
        Sandbox.create(memory="1G")  # type: ignore[call-arg]
    gc.collect()
