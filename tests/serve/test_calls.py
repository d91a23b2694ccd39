"""What engines call, in their order, and what they must get: real containers, without an engine's binary."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from tests.serve.client import CONTAINER, DEADLINE, POD, Engine, Fifos, engine_at, process, shared

from unisandbox.api import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
)
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Sandbox
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.serve import cri, tasks
from unisandbox.serve.config import ANNOTATION, ServeConfig, read
from unisandbox.serve.daemon import Server, serving
from unisandbox.serve.pods import cgroup_path
from unisandbox.serve.stdio import Ends, copy_terminal
from unisandbox.wire.status import StatusError

pytestmark = [pytest.mark.anyio, pytest.mark.root]

Connect = Callable[..., AbstractAsyncContextManager[Engine]]


@pytest.mark.parametrize("version", [2, 3])
async def test_a_pod_and_a_container_live_and_end_as_containerd_calls_them(
    server: Server, config: ServeConfig, tmp_path: Path, version: int
) -> None:
    async with engine_at(config.socket, tmp_path, version=version) as engine:
        started = await engine.run_pod(linux=shared())
        assert (started.pid, started.version) == (0, 3), "less than 3 makes containerd start a shim"
        now = await engine.status()
        assert (now.sandbox_id, now.state, now.address) == (POD, "SANDBOX_READY", started.address)
        assert json.loads(now.info["unisandbox"])["backend"] == "runc"
        platform = (await engine.call(ControllerV1.PLATFORM, v1.ControllerPlatformRequest(sandbox_id=POD))).platform
        assert platform is not None
        assert platform.os == "linux"

        fifos = engine.fifos("main")
        bundle = engine.bundle("sh", "-c", "echo err >&2; hostname; cat /etc/hostname; read x < /proc/1/fd/0; sleep 9")
        created = await engine.create(bundle, fifos)
        connected = await engine.tasks(TaskV3.CONNECT, v3.ConnectRequest(id=CONTAINER))
        assert connected.task_pid == created.pid > 0
        async with anyio.create_task_group() as group:
            codes: list[int] = []

            async def wait() -> None:
                codes.append(await engine.wait())

            group.start_soon(wait)  # containerd does not wait for the start before it waits for the end
            await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
            assert await fifos.read(until=b"pod-one\npod-one\n") == b"pod-one\npod-one\n"
            state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
            assert (state.status, state.bundle, state.pid) == (TaskStatus.RUNNING, str(bundle), created.pid)
            pids = [one.pid for one in (await engine.tasks(TaskV3.PIDS, v3.PidsRequest(id=CONTAINER))).processes]
            assert created.pid in pids
            await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=signal.SIGKILL))
        assert codes == [128 + signal.SIGKILL]
        with pytest.raises(NotFoundError, match="already finished"):
            await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=signal.SIGKILL))
        gone = await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
        assert (gone.exit_status, gone.exited_at is not None) == (137, True)
        assert await fifos.read() == b"", "its end is seen once nobody can write any more"
        assert await fifos.read("stderr") == b"err\n"
        fifos.close()

        async with anyio.create_task_group() as group:
            group.start_soon(engine.call, ControllerV1.WAIT, v1.ControllerWaitRequest(sandbox_id=POD))
            await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD))
        await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD))
        assert (await engine.status()).state == "SANDBOX_NOTREADY"
        await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
        with pytest.raises(NotFoundError):
            await engine.status()
    assert os.listdir(Path(config.socket).parent) == ["s.sock"]


async def test_processes_that_are_added_have_streams_terminals_and_exact_ends(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000")
    fifos = engine.fifos("e1", stdin=True)
    async with anyio.create_task_group() as group:
        await engine.exec("e1", fifos, "sh", "-c", "cat; exit 3")
        codes: list[int] = []

        async def wait() -> None:
            codes.append(await engine.wait("e1"))

        group.start_soon(wait)
        os.write(fifos.ends["stdin"], b"typed\n")
        assert await fifos.read(until=b"\n") == b"typed\n"
        os.close(fifos.ends["stdin"])
        await engine.tasks(TaskV3.CLOSE_IO, v3.CloseIoRequest(id=CONTAINER, exec_id="e1", stdin=True))
    assert codes == [3]
    assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))).exit_status == 3
    os.close(fifos.ends["stdout"])
    os.close(fifos.ends["stderr"])

    screen = engine.fifos("e2", stdin=True)
    await engine.exec("e2", screen, "sh", "-c", "tty; read x; stty size; exit 4", terminal=True)
    resize = v3.ResizePtyRequest(id=CONTAINER, exec_id="e2", width=97, height=31)
    await engine.tasks(TaskV3.RESIZE_PTY, resize)
    os.write(screen.ends["stdin"], b"\n")
    shown = await screen.read()
    assert b"/dev/pts/0" in shown
    assert b"31 97" in shown
    assert await engine.wait("e2") == 4
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e2"))
    screen.close()
    with pytest.raises(FailedPreconditionError, match="still runs"):
        await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    await engine.tasks(TaskV3.PAUSE, v3.PauseRequest(id=CONTAINER))
    paused = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
    assert paused.status == TaskStatus.PAUSED
    await engine.tasks(TaskV3.RESUME, v3.ResumeRequest(id=CONTAINER))
    stats = (await engine.tasks(TaskV3.STATS, v3.StatsRequest(id=CONTAINER))).stats
    assert stats is not None
    assert stats.type_url.startswith("io.containerd.cgroups.v")
    main.close()


async def on_screen(engine: Engine, name: str, *args: str) -> Fifos:
    screen = engine.fifos(name, stdin=True)
    await engine.exec(name, screen, *args, terminal=True)
    return screen


def _is_full(fifo: str) -> bool:
    with open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as end:
        return not select.select([], [end], [], 0)[1]


async def test_a_terminal_that_nobody_reads_is_freed_with_its_process(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "LAST_OUTPUT_SECONDS", 0.05)
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000")
    before = len(os.listdir("/proc/self/fd"))
    screen = await on_screen(engine, "e1", "sh", "-c", "head -c 300000 /dev/zero & exec sleep 1000")
    with anyio.fail_after(DEADLINE):
        while not _is_full(screen.path("stdout")):
            await anyio.sleep(0.01)
    await anyio.wait_all_tasks_blocked()
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, exec_id="e1", signal=signal.SIGKILL))
    assert await engine.wait("e1") == 128 + signal.SIGKILL
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))
    with anyio.fail_after(DEADLINE):
        while len(os.listdir("/proc/self/fd")) > before + len(screen.ends):
            await anyio.sleep(0.01)
    screen.close()
    main.close()


async def test_a_terminal_that_cannot_be_copied_ends_neither_server_nor_container(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_descriptor_left(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def copy(master: int, ends: Ends) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", no_descriptor_left)
            await copy_terminal(master, ends)

    monkeypatch.setattr(tasks, "copy_terminal", copy)
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000")
    screen = await on_screen(engine, "e1", "sleep", "1000")
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, exec_id="e1", signal=signal.SIGKILL))
    assert await engine.wait("e1") == 128 + signal.SIGKILL
    assert "is not copied any more" in caplog.text
    assert (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).status == TaskStatus.RUNNING
    screen.close()
    main.close()


async def test_no_more_input_can_be_said_of_a_terminal_at_any_time(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    await engine.create(engine.bundle("sleep", "1000"), fifos, terminal=True)
    close = v3.CloseIoRequest(id=CONTAINER, stdin=True)
    for _ in range(2):
        await engine.tasks(TaskV3.CLOSE_IO, close)
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    fifos.close()


async def test_what_was_added_and_not_started_ends_with_its_container(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000")
    spec = AnyMessage(value=json.dumps(process("true")).encode())
    await engine.tasks(TaskV3.EXEC, v3.ExecProcessRequest(id=CONTAINER, exec_id="e1", spec=spec))
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            with pytest.raises(FailedPreconditionError, match="has not been started"):
                await engine.wait("e1")

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=signal.SIGKILL))
        with anyio.fail_after(DEADLINE):
            await engine.wait()
    state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER, exec_id="e1"))
    assert state.status == TaskStatus.CREATED
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))
    with pytest.raises(NotFoundError):
        await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER, exec_id="e1"))
    main.close()


async def test_iSulads_calls_are_answered_too(server: Server, config: ServeConfig, tmp_path: Path) -> None:
    """No namespace, options without a type, the root file system by Update, version 2 of the task service."""
    async with engine_at(config.socket, tmp_path, namespace="", version=2) as engine:
        await engine.run_pod(linux=shared())
        bundle = engine.bundle("echo", "fine", mount_rootfs=False)
        root = tmp_path / "mounted"
        (bundle / "rootfs").rename(root)
        tasks = {"tasks": [{"task_id": CONTAINER, "rootfs": [{"type": "bind", "source": str(root)}]}]}
        said = AnyMessage(type_url="github.com/containerd/containerd/Tasks", value=json.dumps(tasks).encode())
        announced = v1.ControllerUpdateRequest(
            sandbox_id=POD, sandbox=Sandbox(extensions={"tasks": said}), fields=["extensions.tasks"]
        )
        await engine.call(ControllerV1.UPDATE, announced)
        await engine.call(ControllerV1.PLATFORM, v1.ControllerPlatformRequest(sandbox_id=POD))
        fifos = engine.fifos("main")
        request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(bundle), stdout=fifos.path("stdout"))
        await engine.tasks(TaskV3.CREATE, request)
        await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
        assert await engine.wait() == 0
        assert await fifos.read(until=b"\n") == b"fine\n"
        await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
        await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD, timeout_secs=10))
        await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
        fifos.close()


async def test_containers_of_a_pod_with_a_shared_pid_namespace_see_each_other(engine: Engine) -> None:
    await engine.run_pod(linux=shared(pid=cri.POD))
    fifos = await engine.run("sh", "-c", "echo $$; sleep 1000", kinds=("ipc", "uts", "pid"))
    assert (await fifos.read(until=b"\n")).strip() != b"1", "the first process there is the pod's"
    fifos.close()


def first_of_its_namespace(pid: int) -> int:
    """The process 1 of a process's pid namespace."""
    space = os.readlink(f"/proc/{pid}/ns/pid")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{name}/ns/pid") == space:
                status = Path(f"/proc/{name}/status").read_text()
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                    return int(name)
    raise AssertionError("it has none")


async def test_a_pod_whose_shared_pid_namespace_has_ended_is_told_by_status_and_wait(engine: Engine) -> None:
    started = await engine.run_pod(linux=shared(pid=cri.POD))
    fifos = await engine.run("sleep", "1000", kinds=("ipc", "uts", "pid"))
    state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
    assert (await engine.status()).state == "SANDBOX_READY"
    waited: list[v1.ControllerWaitResponse] = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            with anyio.fail_after(DEADLINE):
                waited.append(await engine.call(ControllerV1.WAIT, v1.ControllerWaitRequest(sandbox_id=POD)))

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        os.kill(first_of_its_namespace(state.pid), signal.SIGKILL)
    now = await engine.status()
    assert (now.state, now.exited_at) == ("SANDBOX_NOTREADY", waited[0].exited_at)
    assert now.exited_at is not None
    assert now.exited_at > (started.created_at or now.exited_at)
    assert await engine.wait() == 128 + signal.SIGKILL, "with it everything in the namespace has ended"
    with anyio.fail_after(DEADLINE):
        again = await engine.call(ControllerV1.WAIT, v1.ControllerWaitRequest(sandbox_id=POD))
    assert again == waited[0]
    with pytest.raises(FailedPreconditionError, match="has ended"):
        await engine.tasks(TaskV3.CREATE, v3.CreateTaskRequest(id="ee" * 32, bundle=str(engine.place / "bundle")))
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD))
    assert (await engine.status()).state == "SANDBOX_NOTREADY"
    await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
    fifos.close()


async def test_a_pod_that_another_namespace_made_is_not_there(engine: Engine, config: ServeConfig) -> None:
    await engine.run_pod(linux=shared())
    async with engine_at(config.socket, engine.place, namespace="moby") as other:
        with pytest.raises(NotFoundError):
            await other.status()
        with pytest.raises(NotFoundError):
            await other.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
    other = attrs.evolve(engine, namespace="moby")
    with pytest.raises(NotFoundError):
        await other.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))


async def test_ids_and_paths_that_are_no_good_are_refused_at_the_door(engine: Engine, tmp_path: Path) -> None:
    for bad in ("../evil", "a/b", "", "x" * 77):
        with pytest.raises(InvalidArgumentError):
            await engine.call(ControllerV1.CREATE, engine.pod(bad))
    await engine.run_pod(linux=shared())
    with pytest.raises(AlreadyExistsError):
        await engine.call(ControllerV1.CREATE, engine.pod())
    bundle = engine.bundle("true")
    plain = tmp_path / "plain"
    plain.write_text("")
    for changes in (
        {"id": "../evil"},
        {"bundle": f"{bundle}/../bundle"},
        {"bundle": str(tmp_path / "missing")},
        {"stdout": str(plain)},
        {"stdout": str(tmp_path / "no-fifo")},
    ):
        given: dict[str, Any] = {"id": CONTAINER, "bundle": str(bundle), "rootfs": engine.layers(bundle), **changes}
        with pytest.raises(InvalidArgumentError):
            await engine.tasks(TaskV3.CREATE, v3.CreateTaskRequest(**given))
    assert plain.read_text() == ""


@pytest.mark.parametrize("by", ["annotation", "handler", "default"])
async def test_a_pod_of_modules_in_the_server_itself_is_refused_when_it_is_created(tmp_path: Path, by: str) -> None:
    config = ServeConfig(
        root=str(tmp_path / "root"),
        socket=str(tmp_path / "run/s.sock"),
        isolation="wasm" if by == "default" else "runc",
        handlers={"wasm": "wasm"},
        annotation=("wasm",),
    )
    # They would end with it, and could hold it up.
    async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
        annotations = {ANNOTATION: "wasm"} if by == "annotation" else {}
        request = engine.pod(linux=shared(), annotations=annotations)
        if by == "handler":
            said = json.dumps({"Metadata": {"RuntimeHandler": "wasm"}}).encode()
            request.sandbox = Sandbox(extensions={"metadata": AnyMessage(value=said)})
        with pytest.raises(StatusError, match=r"bundles is not supported by backend 'wasm'.*'wasm.process'") as refused:
            await engine.call(ControllerV1.CREATE, request)
        assert refused.value.status.code == 12
        with pytest.raises(NotFoundError):
            await engine.status()
        assert server.pods.core.entries() == []


async def test_what_pods_cannot_have_is_refused_when_they_are_created(
    engine: Engine,
) -> None:
    linux = cri.LinuxPodSandboxConfig(security_context=cri.SecurityContext(privileged=True))
    with pytest.raises(StatusError) as refused:
        await engine.call(ControllerV1.CREATE, engine.pod(linux=linux))
    assert refused.value.status.code == 12
    with pytest.raises(NotFoundError):
        await engine.status()


async def test_a_pods_cgroup_is_below_the_one_that_the_engine_names(engine: Engine, server: Server) -> None:
    place = server.pods.core.host.cgroups.places[0]
    top = f"/uni-{os.getpid()}"
    try:
        await engine.run_pod(linux=shared(cgroup_parent=f"{top}/pod"))
        fifos = await engine.run("sh", "-c", "cat /proc/self/cgroup; sleep 1000")
        assert f"{top}/pod/unisandbox-".encode() in await fifos.read(until=b"/c-")
        fifos.close()
        await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
        assert next(os.walk(f"{place.mount.directory}{top}/pod"))[1] == [], "nothing of ours is left in it"
    finally:
        for where in server.pods.core.host.cgroups.places:
            for name in (f"{top}/pod", top):
                os.rmdir(where.mount.directory + name)


def test_a_slice_lies_below_those_that_its_name_begins_with() -> None:
    assert cgroup_path("kubepods-burstable-pod1.slice") == (
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"
    )
    assert cgroup_path("/kubepods/pod1/") == "/kubepods/pod1"
    assert cgroup_path("") == ""


async def test_streams_that_are_not_served_are_refused(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    bundle = engine.bundle("true")
    request = v3.CreateTaskRequest(
        id=CONTAINER, bundle=str(bundle), rootfs=engine.layers(bundle), stdout="ttrpc+unix:///run/x?streaming_id=1"
    )
    with pytest.raises(StatusError, match="ttrpc"):
        await engine.tasks(TaskV3.CREATE, request)


def update_of(**resources: Any) -> v3.UpdateTaskRequest:
    """As containerd sends it; see its client's `WithResources`."""
    kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    return v3.UpdateTaskRequest(id=CONTAINER, resources=AnyMessage(type_url=kind, value=json.dumps(resources).encode()))


async def test_limits_can_be_changed_while_a_container_runs(engine: Engine, server: Server) -> None:
    devices = [{"allow": False, "access": "rwm"}]
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000", resources={"memory": {"limit": 64 << 20}, "devices": devices})
    pod = await server.pods.entry(POD, None)

    async def now() -> tuple[int | None, int | None]:
        used = await pod.task.stats(CONTAINER)
        return used.memory_limit_bytes, used.pids_limit

    # Engines say all of it again, with what cannot be changed.
    await engine.tasks(TaskV3.UPDATE, update_of(memory={"limit": 96 << 20}, pids={"limit": 50}, devices=devices))
    assert await now() == (96 << 20, 50)
    await engine.tasks(TaskV3.UPDATE, update_of(pids={"limit": -1}))
    assert await now() == (96 << 20, None), "what is not said stays"
    refused: list[tuple[type[Exception], dict[str, Any]]] = [
        (StatusError, {"memory": {"limit": 32 << 20}, "cpu": {"cpus": "0"}}),
        (StatusError, {"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}),
        (StatusError, {"devices": [{"allow": True, "access": "rwm"}]}),
        (InvalidArgumentError, {"memory": {"limit": "much"}}),
        (FailedPreconditionError, {"memory": {"limit": 4096}}),
    ]
    for kind, resources in refused:
        with pytest.raises(kind) as told:
            await engine.tasks(TaskV3.UPDATE, update_of(**resources))
        assert kind is not StatusError or told.value.status.code == 12  # type: ignore[attr-defined]
        assert await now() == (96 << 20, None)
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=signal.SIGKILL))
    await engine.wait()
    with pytest.raises(FailedPreconditionError, match="has ended"):
        await engine.tasks(TaskV3.UPDATE, update_of(pids={"limit": 7}))
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    with pytest.raises(NotFoundError):
        await engine.tasks(TaskV3.UPDATE, update_of(pids={"limit": 7}, devices=devices))
    main.close()


async def test_a_start_that_fails_leaves_nothing_and_can_be_asked_for_again(engine: Engine, server: Server) -> None:
    await engine.call(ControllerV1.CREATE, engine.pod(netns="/proc/self/ns/ipc"))
    with pytest.raises(InvalidArgumentError, match="no network namespace"):
        await engine.call(ControllerV1.START, v1.ControllerStartRequest(sandbox_id=POD))
    assert server.pods.core.entries() == []
    await engine.run_pod(linux=shared())


async def test_the_runtime_that_was_chosen_is_used_and_no_other(config: ServeConfig, tmp_path: Path) -> None:
    chosen = attrs.evolve(config, runtime=str(tmp_path / "runc"))
    async with serving(chosen), engine_at(config.socket, tmp_path) as engine:
        with pytest.raises(SandboxError, match=f"{tmp_path}/runc cannot be used as an OCI runtime"):
            await engine.run_pod(linux=shared())
    with pytest.raises(InvalidArgumentError, match="runtime must be a name or an absolute path"):
        attrs.evolve(config, runtime="bin/runc")


def test_a_pods_backend_is_chosen_by_annotation_handler_sandboxer_or_default(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        'isolation = "runc"\nannotation = ["gvisor"]\n'
        '[handlers]\nquick = "wasm+process"\n[sandboxers]\nvmm = "microvm"\n'
    )
    config = read(str(path))
    assert config.backend("", "uni", {}) == "runc"
    assert config.backend("", "vmm", {}) == "microvm"
    assert config.backend("quick", "vmm", {}) == "wasm+process"
    assert config.backend("quick", "vmm", {ANNOTATION: "gvisor"}) == "gvisor"
    with pytest.raises(InvalidArgumentError, match="may not choose 'runc'"):
        config.backend("", "", {ANNOTATION: "runc"})
    for bad in ("x = 1", 'root = "relative"', "root = 1", "[handlers]\na = '../x'", "="):
        path.write_text(bad)
        with pytest.raises(InvalidArgumentError):
            read(str(path))
