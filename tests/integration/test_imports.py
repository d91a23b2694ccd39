"""What a first sandbox imports: told by names and numbers, since times depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import unisandbox

SOURCE = str(Path(next(iter(unisandbox.__path__))).parent)

# Each costs more than most of our modules together, and brings others.
HEAVY = {
    "bz2", "click", "csv", "decimal", "email", "http", "importlib.metadata", "lzma", "multiprocessing", "pathlib",
    "pydoc", "random", "secrets", "shutil", "tempfile", "trio", "unittest", "urllib", "wasmtime", "xml", "zipfile",
}  # fmt: skip
# Backends are found by it. It brings some of the others.
FINDING = "import importlib.metadata; importlib.metadata.entry_points(group='unisandbox.backends')"
# Defining a class is what attrs costs most for; each of its methods is compiled anew.
MOST_CLASSES = 52
MOST_COMPARED = 2

REPORT = """
def compiled(kind, method):
    return getattr(vars(kind).get(method), "__code__", compiled.__code__).co_filename.startswith("<attrs generated")

def below(kind):
    for found in type.__subclasses__(kind):
        yield found
        yield from below(found)

ours = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in below(object)
        if kind.__module__.startswith("unisandbox") and "__attrs_attrs__" in vars(kind)}
print(json.dumps({
    "modules": sorted(sys.modules),
    "classes": sorted(ours),
    "compared": sorted(name for name, kind in ours.items() if compiled(kind, "__eq__") or compiled(kind, "__repr__")),
}))
"""
FIRST = """
async def main():
    async with Engine.open() as engine, engine.create(rootfs="host") as sandbox:
        await sandbox.run(["/bin/true"], check=True)

asyncio.run(main())
"""
NOTHING = "asyncio.run(anyio.to_thread.run_sync(int))"


def told(program: str) -> dict[str, Any]:
    """What the report says after a program, in a fresh interpreter."""
    code = f"import sys; sys.path.insert(0, {SOURCE!r})\nimport anyio, asyncio, attrs, json\n{program}\n{REPORT}"
    # As users run it: what pytest's environment asks for would be imported too.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    return told(f"from unisandbox import Engine, Sandbox\n{FIRST}")


@pytest.fixture(scope="module")
def without() -> set[str]:
    """What anyio and attrs import by themselves, of whatever version they are."""
    return set(told(NOTHING)["modules"])


@pytest.mark.root
def test_a_first_sandbox_imports_nothing_heavy(first: dict[str, Any], without: set[str]) -> None:
    added = set(first["modules"]) - without - set(told(FINDING)["modules"])
    assert "unisandbox.backends.runc.sandboxer" in added
    assert not added & HEAVY
    third_party = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert third_party <= {"unisandbox"}


@pytest.mark.root
def test_a_first_sandbox_has_few_classes_generated(first: dict[str, Any]) -> None:
    assert len(first["classes"]) <= MOST_CLASSES, first["classes"]
    assert len(first["compared"]) <= MOST_COMPARED, first["compared"]


def test_the_engine_and_the_sandbox_are_imported_without_any_backend(without: set[str]) -> None:
    added = set(told("from unisandbox import Engine, Sandbox")["modules"]) - without
    assert not added & HEAVY
    assert not any(name.startswith(("unisandbox.backends", "unisandbox.oci", "unisandbox.cli")) for name in added)
