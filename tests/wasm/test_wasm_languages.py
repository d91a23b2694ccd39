"""Python and JavaScript in Wasm sandboxes, from guests that come as a package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from unisandbox import DeadlineExceededError, Engine, Resources, Sandbox
from unisandbox.backends.wasm import WasmBackend

# CPython is compiled at the first run on a machine: 25 s of processor time.
pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.timeout(300)]

TOP = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def guests() -> Path:
    """The directory that `tools/wasm_guests.py` makes; kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "unisandbox" / "wasm-guests"
    done = subprocess.run(
        [sys.executable, TOP / "tools" / "wasm_guests.py", directory], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the guests cannot be fetched: {done.stderr.strip()[-200:]}")
    return directory


@pytest.fixture
async def sandbox(guests: Path) -> AsyncIterator[Sandbox]:
    async with Engine.open(backends={"wasm": WasmBackend()}) as engine:
        limits = Resources(memory="256M", cpu_seconds=20)
        async with engine.create(isolation="wasm", rootfs=guests, resources=limits) as made:
            yield made


async def test_python_source_runs(sandbox: Sandbox) -> None:
    done = await sandbox.run(["python", "-c", "import json, sys; print(json.dumps([6 * 7, sys.argv[1]]))", "word"])
    assert (done.text, done.exit_code) == ('[42, "word"]\n', 0)
    assert (await sandbox.run(["python", "-c", "raise SystemExit(7)"])).exit_code == 7
    assert (await sandbox.run(["python", "-"], input="print(input.__name__)")).text == "input\n"
    failed = await sandbox.run(["python", "-c", "undefined"])
    assert failed.exit_code == 1
    assert b"NameError" in failed.stderr


async def test_javascript_source_runs(sandbox: Sandbox) -> None:
    assert (await sandbox.run(["qjs", "-e", "console.log(6 * 7)"])).text == "42\n"
    assert (await sandbox.run(["qjs", "-e", "throw 1"])).exit_code == 1


async def test_source_files_and_what_they_write_are_the_sandbox_s(sandbox: Sandbox) -> None:
    await sandbox.files.write("/home/program.py", "open('/tmp/out', 'w').write(open('/home/in').read().upper())")
    await sandbox.files.write("/home/in", "given")
    assert (await sandbox.run(["python", "/home/program.py"])).exit_code == 0
    assert await sandbox.files.read("/tmp/out") == b"GIVEN"


async def test_what_loops_is_ended_and_what_eats_is_refused(sandbox: Sandbox) -> None:
    await sandbox.run(["python", "-c", ""])
    with pytest.raises(DeadlineExceededError):
        await sandbox.run(["python", "-c", "while True: pass"], timeout=1)
    eaten = await sandbox.run(["python", "-c", "data = []\nwhile True: data.append(bytes(1 << 20))"], timeout=60)
    assert b"MemoryError" in eaten.stderr or eaten.exit.reason == "oom"
    assert ((await sandbox.metrics()).memory_peak_bytes or 0) <= 256 << 20
