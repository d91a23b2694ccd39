"""The server's process ends, in order or not: its pods live on, and the next one has them at once."""

# ruff: noqa: ASYNC220, ASYNC221 - a test may block its own event loop

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from tests.command_line import CLI, SECONDS
from tests.keepers import until, wait_ended
from tests.serve.client import CONTAINER, POD, Engine, engine_at

from unisandbox.api import NotFoundError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.serve import cri

pytestmark = [pytest.mark.anyio, pytest.mark.root]

_GIVEN = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""

LINUX = cri.LinuxPodSandboxConfig(
    security_context=cri.SecurityContext(namespace_options=cri.NamespaceOption(network=cri.NODE, pid=cri.POD))
)


@contextmanager
def server(
    place: Path, *, ending: signal.Signals = signal.SIGTERM, settings: str = "", command: Sequence[str] = CLI
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, which says when it is ready, as systemd wants to hear it.

    Args:
        place: its directory.
        ending: how it is ended unless it ends itself so.
        settings: its configuration.
        command: the command line.
    """
    config = place / "serve.toml"
    config.write_text(settings)
    address = str(place / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address)
        heard.settimeout(SECONDS)
        words = [*command, "serve", "--root", str(place / "root"), "--socket", str(place / "run/s.sock")]
        words += ["--config", str(config)]
        with subprocess.Popen(words, env={**os.environ, "NOTIFY_SOCKET": address}, stderr=subprocess.PIPE) as process:
            try:
                assert heard.recv(100) == b"READY=1"
                os.unlink(address)
                yield process
            finally:
                process.send_signal(ending)
                _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == (0 if ending == signal.SIGTERM else -ending), said
    assert b"Traceback" not in said, said.decode()


async def removed(engine: Engine) -> None:
    """End the pod as an engine does."""
    await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD))
    await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_pods_and_what_runs_in_them_live_on_and_are_had_at_once(tmp_path: Path, ending: signal.Signals) -> None:
    path = str(tmp_path / "run/s.sock")
    fifo: int
    with server(tmp_path, ending=ending):
        async with engine_at(path, tmp_path) as engine:
            started = await engine.run_pod(linux=LINUX)
            script = "echo first; read x < /tmp/go; echo second; exit 5"
            fifos = await engine.run("sh", "-c", f"mkfifo /tmp/go; {script}", kinds=("ipc", "uts", "pid"))
            assert await fifos.read(until=b"first\n") == b"first\n"
            pid = (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).pid
    with server(tmp_path):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            assert (status.state, status.address, status.version) == ("SANDBOX_READY", started.address, 3)
            assert status.created_at == started.created_at
            await engine.call(ControllerV1.PLATFORM, v1.ControllerPlatformRequest(sandbox_id=POD))
            await engine.connect(status.address)
            state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
            assert (state.status, state.pid) == (TaskStatus.RUNNING, pid)
            assert state.stdout == fifos.path("stdout")
            fifo = os.open(f"/proc/{pid}/root/tmp/go", os.O_WRONLY)
            os.write(fifo, b"\n")
            os.close(fifo)
            assert await engine.wait() == 5, "its end is exact, although another process has begun it"
            assert await fifos.read(until=b"second\n") == b"second\n"
            async with anyio.create_task_group() as group:
                group.start_soon(engine.call, ControllerV1.WAIT, v1.ControllerWaitRequest(sandbox_id=POD))
                await removed(engine)
            fifos.close()
    # and what is left is found after each test


async def test_what_ended_while_no_server_was_there_is_told_exactly(tmp_path: Path) -> None:
    path = str(tmp_path / "run/s.sock")
    with server(tmp_path, ending=signal.SIGKILL):
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=LINUX)
            fifos = await engine.run("sh", "-c", "exec sleep 1000", kinds=("ipc", "uts", "pid"))
            pid = (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).pid
    os.kill(pid, signal.SIGUSR1)
    wait_ended(pid)
    with server(tmp_path):
        async with engine_at(path, tmp_path) as engine:
            status = await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            await engine.connect(status.address)
            state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
            assert (state.status, state.exit_status) == (TaskStatus.STOPPED, 128 + signal.SIGUSR1)
            assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))).exit_status == 138
            await removed(engine)
            fifos.close()


async def test_a_server_whose_keeper_is_killed_ends_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "run/s.sock")
    words = [*CLI, "serve", "--root", str(tmp_path / "root"), "--socket", path]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        until(lambda: os.path.exists(path), "the server listens")
        async with engine_at(path, tmp_path) as engine:
            await engine.run_pod(linux=LINUX)
            fifos = await engine.run("sleep", "1000")
            refused = subprocess.run(words, capture_output=True, check=False, timeout=SECONDS)
            found = re.search(rb"its keeper is (\d+)", refused.stderr)
            assert found, refused.stderr
            os.kill(int(found[1]), signal.SIGKILL)
            _, said = process.communicate(timeout=SECONDS)
            fifos.close()
    assert process.returncode == 125, said
    assert b"keeper" in said
    assert b"Traceback" not in said, said.decode()
    with server(tmp_path):
        async with engine_at(path, tmp_path) as engine:
            with pytest.raises(NotFoundError):
                await engine.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD))
            assert os.listdir(tmp_path / "run") == ["s.sock"], "nothing is left of the pod's socket"


async def test_a_second_server_on_the_same_root_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    with server(tmp_path):
        words = [*CLI, "serve", "--root", str(tmp_path / "root"), "--socket", str(tmp_path / "run/s.sock")]
        second = subprocess.run(words, capture_output=True, check=False, timeout=SECONDS)
        assert second.returncode == 125
        assert b"is in use by process" in second.stderr, second.stderr
        async with engine_at(str(tmp_path / "run/s.sock"), tmp_path) as engine:
            await engine.run_pod(linux=LINUX)
            await removed(engine)


async def test_a_server_uses_all_the_file_descriptors_that_it_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard // 2), hard))
    try:
        with server(tmp_path) as process:
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (min(hard, 1 << 20), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_socket_of_systemd_is_used_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run/s.sock"
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        words = [*CLI, "serve", "--root", str(tmp_path / "root"), "--socket", str(path)]
        given = [sys.executable, "-c", _GIVEN, str(listener.fileno()), *words]
        with subprocess.Popen(given, pass_fds=[listener.fileno()], stderr=subprocess.PIPE) as process:
            try:
                async with engine_at(str(path), tmp_path) as engine:
                    await engine.run_pod(linux=LINUX)
                    await removed(engine)
            finally:
                process.terminate()
                _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        assert path.exists(), "it is systemd's"
