"""The rooms keep their promises at run time too: what the import contracts cannot see is looked at here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unisandbox

SOURCE = Path(next(iter(unisandbox.__path__)))
GENERATED = SOURCE / "api" / "proto"
ROOMS = sorted(path.parent for path in SOURCE.rglob("__init__.py") if GENERATED not in path.parent.parents)


def _modules_after(statement: str, *options: str) -> set[str]:
    code = f"import sys; sys.path.append({str(SOURCE.parent)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", sorted((SOURCE / "api").glob("*.py")), ids=lambda path: path.name)
def test_contracts_import_only_the_standard_library_attrs_and_typing_extensions(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"attr", "attrs", "typing_extensions"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in allowed or name.startswith("unisandbox.api"), f"{path.name} imports {name}"


def test_keeper_loads_no_third_party_module_and_nothing_heavy() -> None:
    loaded = _modules_after("import unisandbox.host.keeper.server", "-I", "-S")
    heavy = {"attr", "attrs", "anyio", "asyncio", "typing_extensions", "subprocess", "threading", "logging", "tempfile"}
    assert not loaded & (heavy - _modules_after("import ctypes", "-I", "-S")), "from 3.14 on that brings threading"
    third_party = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"unisandbox"}
    assert third_party <= {"__main__"}


def test_plain_import_loads_no_backend_and_no_face_but_the_sdk() -> None:
    loaded = _modules_after("import unisandbox")
    rooms = {name.split(".")[1] for name in loaded if name.startswith("unisandbox.")}
    assert not rooms & {"backends", "cli", "serve", "jupyter", "integrations", "conformance"}
    assert not loaded & {"click", "rich", "trio", "pytest", "grpclib", "betterproto2"}


def test_ttrpc_needs_nothing_of_the_extra_serve() -> None:
    assert not _modules_after("import unisandbox.wire.ttrpc") & {"betterproto2", "grpclib", "google.protobuf"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(SOURCE.parent)))
def test_every_room_says_what_lives_in_it(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text())
    assert ast.get_docstring(tree), f"{room.name}/__init__.py has no docstring"
