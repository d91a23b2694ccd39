"""Guests in processes when the process that started them is killed: all gone, or taken over with their exact ends."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from tests.programs import program

from unisandbox import Engine
from unisandbox.api import Exit
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.wasm.process import WasmProcessBackend
from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.engine.registry import Backend
from unisandbox.sandbox import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

HOST = """
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.wasm.process import WasmProcessBackend

async def main():
    backends = {"wasm+process": WasmProcessBackend(), "runc": RuncBackend()}
    async with Engine.open(sys.argv[1], policy=sys.argv[3], backends=backends) as engine:
        sandbox = await engine.create(isolation="wasm+process", rootfs=sys.argv[2], name="w")
        for argv in (["do", "out", "trap", ";", "sleep", "0.3", ";", "abort"],
                     ["do", "out", "code", ";", "read", ";", "exit", "9"],
                     ["do", "out", "stay", ";", "sleep", "1000"]):
            process = await sandbox.exec(argv, stdin="pipe")
            tell(id=process.id)
        tell(ready=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


def backends() -> dict[str, Backend]:
    return {"wasm+process": WasmProcessBackend(), "runc": RuncBackend()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    directory.mkdir()
    GuestPrograms().make_root(directory)
    return directory


def killed_host(tmp_path: Path, root: Path, policy: str) -> list[str]:
    """One that starts three guests and is killed: their ids."""
    with program(HOST, str(tmp_path / "state"), str(root), policy) as host:
        ids = []
        while "ready" not in (words := host.heard()):
            ids.append(words["id"])
        host.kill()
    return ids


async def whole(process: Process) -> tuple[bytes, Exit]:
    data = b"".join([output.data async for output in process if output.stream == "stdout"])
    return data, await process.wait()


async def test_guests_are_adopted_with_their_output_and_exact_ends(tmp_path: Path, root: Path) -> None:
    trap, code, stay = killed_host(tmp_path, root, "keep")
    async with Engine.open(tmp_path / "state", backends=backends()) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
        sandbox = await engine.get("w")
        processes = {process.id: process for process in await sandbox.processes()}
        assert set(processes) == {trap, code, stay}
        output, end = await whole(processes[trap])
        assert (output, end.code, end.signal, end.reason) == (b"trap", 134, None, "trap")
        assert end.detail.startswith("unreachable\n")
        await processes[code].stdin.send(b"go\n")
        output, end = await whole(processes[code])
        assert (output[:4], end.code, end.reason) == (b"code", 9, "exited")
        assert (await sandbox.metrics()).pids == 1
        await processes[stay].kill()
        assert (await whole(processes[stay]))[1].signal == 9
        assert (await sandbox.run(["echo", "on"])).stdout == b"on\n"


async def test_with_policy_stop_everything_goes_with_the_host(tmp_path: Path, root: Path) -> None:
    killed_host(tmp_path, root, "stop")
    async with Engine.open(tmp_path / "state", backends=backends()) as engine:
        assert all(found.action == "removed" for found in engine.recovery.sandboxes)
        assert await engine.list() == []


async def test_one_that_attaches_can_run_wait_and_kill(tmp_path: Path, root: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep", backends=backends()) as owner:
        sandbox = await owner.create(isolation="wasm+process", rootfs=root, name="w")
        process = await sandbox.exec(["do", "out", "go", ";", "sleep", "1000"])
        assert await process.stdout.receive() == b"go"
        async with Engine.attach(tmp_path / "state", backends=backends()) as engine:
            other = await engine.get("w")
            assert (await other.run(["exit", "5"])).exit_code == 5
            assert (await other.metrics()).pids == 1
        with anyio.fail_after(10):
            await process.kill()
            assert (await process.wait()).signal == 9
        await sandbox.remove()


async def test_the_inner_backend_is_lent_by_the_engine(root: Path) -> None:
    async with Engine.open(backends={"wasm+process": WasmProcessBackend()}) as engine:
        sandbox = await engine.create(isolation="wasm+process", rootfs=root)  # the installed "runc"
        assert (await sandbox.status()).backend == "wasm+process"
        assert [status.backend for status in await engine.list()] == ["wasm+process"]


async def test_a_ttl_ends_guests_and_workers(root: Path) -> None:
    async with Engine.open(backends=backends()) as engine:
        sandbox = await engine.create(isolation="wasm+process", rootfs=root, ttl=8)
        process = await sandbox.exec(["sleep", "1000"])
        with anyio.fail_after(10):
            assert (await process.wait()).reason in {"signaled", "lost"}
