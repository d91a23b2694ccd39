"""Pods of WebAssembly modules whose server is killed: they live on, and their ends are exact."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio
import pytest
from tests.keepers import wait_ended
from tests.serve.client import CONTAINER, POD, engine_at, shared
from tests.serve.modules import add, bundle, process, run, state, workers
from tests.serve.test_restarts import removed, server

from unisandbox.api import NotFoundError, SandboxError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.methods import ControllerV1, TaskV3

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def test_a_module_lives_on_when_the_server_is_killed_and_its_end_is_exact(tmp_path: Path) -> None:
    path = str(tmp_path / "run/s.sock")
    settings = 'isolation = "wasm+process"\n'
    with server(tmp_path, ending=signal.SIGKILL, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=shared())
            fifos = await run(engine, "do", "out", "up", ";", "read", ";", "out", "on", ";", "exit", "5", stdin=True)
            await fifos.read(until=b"up")
            pid = (await state(engine)).pid
    with server(tmp_path, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            assert status.state == "SANDBOX_READY"
            await engine.connect(status.address)
            now = await state(engine)
            assert (now.status, now.pid, now.stdout) == (TaskStatus.RUNNING, pid, fifos.path("stdout"))
            more = engine.fifos("exec")
            await add(engine, "one", more, process("exit", "3"))
            await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id="one"))
            assert await engine.wait("one") == 3, "it is used as before"
            more.close()
            os.write(fifos.ends["stdin"], b"\n")
            assert await engine.wait() == 5
            assert await fifos.read() == b"on"
            await removed(engine)
            fifos.close()


_KILLED = """
import os, signal, sys
from unisandbox.backends.wasm.process.notes import Notes
written = Notes.guest
async def guest(self, note, report=-1):
    if note.started == (sys.argv[1] == "told"):
        os.kill(os.getpid(), signal.SIGKILL)
    await written(self, note, report)
Notes.guest = guest
del sys.argv[1]
from unisandbox.cli import main
sys.exit(main())
"""
"""The command line; it ends when it is about to write down a guest, before that can run, or since it runs."""


@pytest.mark.parametrize("when", ["asked", "told"])
async def test_a_start_that_was_cut_leaves_no_container_and_nothing_that_runs(tmp_path: Path, when: str) -> None:
    path, others = str(tmp_path / "run/s.sock"), workers()
    settings = 'isolation = "wasm+process"\n'
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    command = [sys.executable, str(script), when]
    with server(tmp_path, ending=signal.SIGKILL, settings=settings, command=command):
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=shared())
            fifos = engine.fifos("main")
            made = bundle(engine, "do", "out", "up", ";", "sleep", "1000")
            await engine.create(made, fifos)
            with pytest.raises((SandboxError, OSError, anyio.EndOfStream)):
                await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
            assert len(workers() - others) == 1, "its process was there"
    with server(tmp_path, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            assert status.state == "SANDBOX_READY"
            await engine.connect(status.address)
            with pytest.raises(NotFoundError):
                await state(engine)
            assert workers() == others
            again = engine.fifos("again")
            await engine.create(made, again)
            await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
            assert await again.read(until=b"up") == b"up"
            assert len(workers() - others) == 1
            await removed(engine)
            fifos.close()
            again.close()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_a_container_that_was_not_started_ends_with_the_server_and_can_be_made_again(
    tmp_path: Path, ending: signal.Signals
) -> None:
    path, others = str(tmp_path / "run/s.sock"), workers()
    settings = 'isolation = "wasm+process"\n'
    with server(tmp_path, ending=ending, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=shared())
            fifos = engine.fifos("main")
            made = bundle(engine, "exit", "4")
            await engine.create(made, fifos)
    with server(tmp_path, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            assert status.state == "SANDBOX_READY"
            await engine.connect(status.address)
            for call in (state(engine), engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))):
                with pytest.raises(NotFoundError):
                    await call
            with pytest.raises(NotFoundError):
                await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
            assert workers() == others
            again = engine.fifos("again")
            await engine.create(made, again)
            await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
            assert await engine.wait() == 4
            await removed(engine)
            fifos.close()
            again.close()


async def test_what_ended_while_no_server_was_there_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "run/s.sock")
    settings = 'isolation = "wasm+process"\n'
    with server(tmp_path, ending=signal.SIGKILL, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=shared())
            fifos = await run(engine, "sleep", "1000")
            pid = (await state(engine)).pid
    os.kill(pid, signal.SIGUSR1)
    wait_ended(pid)
    with server(tmp_path, settings=settings):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            await engine.connect(status.address)
            assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))).exit_status == 138
            await removed(engine)
            fifos.close()
