"""Whatever becomes of the process that has Wasm sandboxes, nothing of them stays on the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.wasm.sandboxes import make_root

from unisandbox import Engine, UnsupportedError

pytestmark = pytest.mark.root

PROGRAM = """
import anyio
from pathlib import Path
from unisandbox import Engine, Resources
from unisandbox.backends.wasm import WasmBackend
async def main():
    backend = WasmBackend(cache=Path({cache!r}))
    engine = await Engine.open({state!r}, backends={{"wasm": backend}})
    for limits in (Resources(), Resources(memory="16M", disk="48M")):
        sandbox = await engine.create(isolation="wasm", rootfs={root!r}, resources=limits)
        await sandbox.run(["store", "/tmp/x", "1"])
        await sandbox.exec(["sleep", "600"])
        await sandbox.exec(["spin"])
    print("ready", flush=True)
    {then}
anyio.run(main)
"""


def _leave(tmp_path: Path, root: Path, state: str | None, then: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(cache=str(tmp_path / "cache"), state=state, root=str(root), then=then)
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stdout.readline() == "ready\n"
    return host


@pytest.mark.parametrize("state", [False, True], ids=["temporary engine", "engine with a state directory"])
def test_a_host_that_is_killed_leaves_nothing(tmp_path: Path, state: bool) -> None:
    directory = str(tmp_path / "state") if state else None
    with _leave(tmp_path, make_root(tmp_path / "root"), directory, "await anyio.sleep(600)") as host:
        host.kill()
    # The inventory of this test waits for the keeper's guards, and finds what they leave.


def test_hosts_that_end_with_living_guests_end_well(tmp_path: Path, count: Callable[[int], int]) -> None:
    root = make_root(tmp_path / "root")
    for number in range(count(30)):
        then = ("await engine.close()", "raise SystemExit(0)", "import sys; sys.exit(0)")[number % 3]
        with _leave(tmp_path, root, None, then) as host:
            assert host.wait(timeout=30) == 0


@pytest.mark.anyio
async def test_the_next_engine_finds_that_they_are_gone(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    state = tmp_path / "state"
    with _leave(tmp_path, root, str(state), "await anyio.sleep(600)") as host:
        host.kill()
    deadline = time.monotonic() + 30
    async with Engine.open(state) as engine:
        assert time.monotonic() < deadline
        assert await engine.list() == []


@pytest.mark.anyio
async def test_another_process_of_the_engine_can_list_and_not_use_them(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    state = tmp_path / "state"
    with _leave(tmp_path, root, str(state), "await anyio.sleep(600)") as host:
        async with Engine.attach(state) as other:
            listed = await other.list()
            assert [status.state for status in listed] == ["ready", "ready"]
            sandbox = await other.get(listed[0].id)
            with pytest.raises(UnsupportedError):
                await sandbox.run(["true"])
            with pytest.raises(UnsupportedError):
                await sandbox.remove()
            with pytest.raises(UnsupportedError):
                await other.create(isolation="wasm", rootfs=root)
            assert [status.state for status in await other.list()] == ["ready", "ready"]
        host.kill()
