"""Pods of WebAssembly modules, as engines call them: guests in processes, made of the bundles that engines write."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.keepers import until
from tests.serve.client import CONTAINER, POD, Engine, engine_at, shared
from tests.serve.modules import add, bundle, process, run, state, workers
from tests.serve.test_events import Heard
from tests.serve.test_restarts import removed
from tests.serve.test_user_namespaces import COUNT, FIRST, MAPPINGS, mapped
from tests.wasm.test_process_components import RUN

from unisandbox.api import FailedPreconditionError, InvalidArgumentError, NotFoundError
from unisandbox.api.proto.containerd import events
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.io.containerd.cgroups import v1 as v1_metrics
from unisandbox.api.proto.io.containerd.cgroups import v2 as v2_metrics
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.backends.wasm.process.interior import GUEST
from unisandbox.backends.wasm.process.pool import Answer, Worker
from unisandbox.serve import cri
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import serving
from unisandbox.wire import codec
from unisandbox.wire.status import StatusError

pytestmark = [pytest.mark.anyio, pytest.mark.root]

UNIMPLEMENTED = 12


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return ServeConfig(root=str(tmp_path / "root"), socket=str(tmp_path / "run/s.sock"), isolation="wasm+process")


async def test_a_module_runs_as_an_engine_asks_for_it(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    assert json.loads((await engine.status()).info["unisandbox"])["backend"] == "wasm+process"
    steps = ["env", ";", "pwd", ";", "err", "problem", ";", "exit", "7"]
    fifos = engine.fifos("main")
    await engine.create(bundle(engine, "do", *steps), fifos)
    assert (await state(engine)).status == TaskStatus.CREATED
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await engine.wait())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)  # as containerd does, before the start
        await anyio.wait_all_tasks_blocked()
        started = await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    assert started.pid > 0, "engines know a process by it"
    assert codes == [7]
    said = (await fifos.read()).decode().split("\0")
    assert {"PATH=/bin", "HOSTNAME=pod-one", "COLOUR=blue"} <= set(said)
    assert not any(word.startswith("HOME=") for word in said), "an engine says all of the environment"
    assert await fifos.read("stderr") == b"problem"
    ended = await state(engine)
    assert (ended.status, ended.exit_status) == (TaskStatus.STOPPED, 7)
    assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))).exit_status == 7
    with pytest.raises(NotFoundError):
        await state(engine)
    fifos.close()


async def test_standard_input_comes_and_ends_as_the_engine_says(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = await run(engine, "cat", stdin=True)
    os.write(fifos.ends["stdin"], b"words")
    assert await fifos.read(until=b"words") == b"words"
    os.close(fifos.ends["stdin"])
    await engine.tasks(TaskV3.CLOSE_IO, v3.CloseIoRequest(id=CONTAINER, stdin=True))
    assert await engine.wait() == 0
    for name in ("stdout", "stderr"):
        os.close(fifos.ends[name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_ends_a_module_that_sleeps(engine: Engine, number: signal.Signals) -> None:
    await engine.run_pod(linux=shared())
    fifos = await run(engine, "do", "out", "up", ";", "sleep", "1000")
    assert await fifos.read(until=b"up") == b"up"
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=number))
    assert await engine.wait() == 128 + number
    with pytest.raises(NotFoundError, match="already finished"):
        await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=number))
    fifos.close()


async def test_exec_is_another_module_that_sees_the_same_files(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    main = await run(engine, "do", "store", "/note", "kept", ";", "out", "up", ";", "sleep", "1000")
    await main.read(until=b"up")
    fifos = engine.fifos("exec")
    await add(engine, "one", fifos, process("do", "cat", "/note", ";", "exit", "5"))
    started = await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id="one"))
    assert started.pid > 0
    assert await engine.wait("one") == 5
    assert await fifos.read() == b"kept"
    assert (engine.place / "upper/note").read_text() == "kept", "what is written is in the engine's layer"
    assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="one"))).exit_status == 5
    for wrong in (process("true", terminal=True), process("true", user={"uid": 7, "gid": 7})):
        with pytest.raises(StatusError) as refused:
            await add(engine, "two", fifos, wrong)
        assert refused.value.status.code == UNIMPLEMENTED
    await add(engine, "three", fifos, process("/bin/there-is-none"))
    with pytest.raises(InvalidArgumentError, match="no such module"):
        await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id="three"))
    fifos.close()
    main.close()


async def test_volumes_are_seen_where_the_pod_wants_them(engine: Engine, tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    data.mkdir()
    secret.write_text("word")
    mounts = [
        {"destination": "/srv/data", "type": "bind", "source": str(data), "options": ["rbind", "rprivate", "rw"]},
        {"destination": "/dev/secret", "type": "bind", "source": str(secret), "options": ["rbind", "rprivate", "ro"]},
    ]
    await engine.run_pod(linux=shared())
    steps = ["cat", "/dev/secret", ";", "store", "/srv/data/new", "made", ";", "store", "/dev/secret", "lost"]
    fifos = await run(engine, "do", *steps, mounts=mounts, root={"path": "rootfs", "readonly": True})
    assert await engine.wait() != 0, "what is read-only stays as it is"
    assert await fifos.read() == b"word"
    assert ((data / "new").read_text(), secret.read_text()) == ("made", "word")
    fifos.close()


@contextlib.contextmanager
def two_mounts(place: Path) -> Iterator[Path]:
    """A file system with a file, and one with another in its directory "sub"."""
    (place / "volume").mkdir()
    points = [place / "volume", place / "volume/sub"]
    with contextlib.ExitStack() as mounted:
        for point in points:
            point.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(point)], check=True)
            mounted.callback(subprocess.run, ["umount", str(point)], check=True)
            (point / "file").write_text(point.name)
        yield points[0]


@pytest.mark.parametrize(("option", "code"), [("bind", 1), ("rbind", 0)])
async def test_a_volume_that_was_mounted_later_is_seen_with_what_is_below_if_that_is_asked_for(
    engine: Engine, tmp_path: Path, option: str, code: int
) -> None:
    await engine.run_pod(linux=shared())
    with two_mounts(tmp_path) as volume:
        mount = {"destination": "/v", "type": "bind", "source": str(volume), "options": [option, "ro"]}
        fifos = await run(engine, "do", "cat", "/v/file", ";", "cat", "/v/sub/file", mounts=[mount])
        assert min(await engine.wait(), 1) == code
        assert await fifos.read() == (b"volumesub" if option == "rbind" else b"volume")
        fifos.close()
        await removed(engine)


async def test_a_volume_below_a_symbolic_link_of_the_image_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mount = {"destination": "/link/data", "type": "bind", "source": str(tmp_path / "data"), "options": ["rbind"]}
    await engine.run_pod(linux=shared())
    place = bundle(engine, "true", mounts=[mount])
    (place / "rootfs/link").symlink_to("/etc")
    fifos = engine.fifos("main")
    with pytest.raises(InvalidArgumentError, match="/link/data"):
        await engine.create(place, fifos)
    with pytest.raises(NotFoundError):
        await state(engine)
    fifos.close()


async def test_a_component_runs_and_tells_success_or_failure(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    place = bundle(engine, "/fails.wat")
    (place / "rootfs/fails.wat").write_text(f"(component {RUN.replace('i32.const 0', 'i32.const 1')})")
    fifos = engine.fifos("main")
    await engine.create(place, fifos)
    await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    assert await engine.wait() == 1
    fifos.close()


async def test_a_root_that_is_read_only_cannot_be_written(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = await run(engine, "store", "/note", "lost", root={"path": "rootfs", "readonly": True})
    assert await engine.wait() != 0
    assert not (engine.place / "upper/note").exists()
    fifos.close()


@pytest.mark.parametrize("kind", ["layers", "directory"])
async def test_a_device_or_a_set_id_bit_in_an_image_means_nothing(engine: Engine, kind: str) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    place = bundle(engine, "do", "out", "up", ";", "sleep", "1000")
    os.mknod(place / "rootfs/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    layers = engine.layers(place) if kind == "layers" else []
    request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(place), rootfs=layers, stdout=fifos.path("stdout"))
    await engine.tasks(TaskV3.CREATE, request)
    pid = (await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))).pid
    assert await fifos.read(until=b"up") == b"up"
    flags = os.statvfs(f"/proc/{pid}/root{GUEST}").f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    more = engine.fifos("exec")
    await add(engine, "one", more, process("cat", "/null"))
    await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id="one"))
    assert await engine.wait("one") != 0, "a guest reaches no device"
    more.close()
    fifos.close()


async def test_files_are_touched_as_the_user_that_the_pod_names(engine: Engine, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, 1234, 55)
    mine.chmod(0o700)
    mount = {"destination": "/mine", "type": "bind", "source": str(mine), "options": ["rbind", "rw"]}
    user = {"uid": 1234, "gid": 55, "additionalGids": [55]}
    await engine.run_pod(linux=shared())
    steps = ["store", "/mine/new", "made", ";", "store", "/of-root", "lost"]
    fifos = await run(engine, "do", *steps, process={"user": user}, mounts=[mount])
    assert await engine.wait() != 0
    status = (mine / "new").stat()
    assert (status.st_uid, status.st_gid) == (1234, 55)
    assert not (engine.place / "upper/of-root").exists(), "which root's directory does not let them"
    fifos.close()


async def test_a_memory_limit_ends_a_module_that_takes_more_and_can_be_changed(engine: Engine) -> None:
    limit = 96 << 20
    await engine.run_pod(linux=shared())
    limits = {"resources": {"memory": {"limit": limit}, "cpu": {"shares": 512, "quota": 200_000, "period": 100_000}}}
    fifos = await run(engine, "do", "out", "up", ";", "read", ";", "eat", stdin=True, linux=limits)
    await fifos.read(until=b"up")
    assert await memory_limit(engine) == limit
    new = AnyMessage(value=json.dumps({"memory": {"limit": limit // 2}}).encode())
    await engine.tasks(TaskV3.UPDATE, v3.UpdateTaskRequest(id=CONTAINER, resources=new))
    assert await memory_limit(engine) == limit // 2
    os.write(fifos.ends["stdin"], b"\n")
    assert await engine.wait() == 137
    fifos.close()


async def memory_limit(engine: Engine) -> int:
    stats = (await engine.tasks(TaskV3.STATS, v3.StatsRequest(id=CONTAINER))).stats
    assert stats is not None
    if "v2" in stats.type_url:
        second = codec.decode(v2_metrics.Metrics, stats.value).memory
        return second.usage_limit if second is not None else 0
    first = codec.decode(v1_metrics.Metrics, stats.value).memory
    return first.usage.limit if first is not None and first.usage is not None else 0


@pytest.mark.parametrize(
    "changes",
    [
        {"hooks": {"createRuntime": [{"path": "/bin/true"}]}},
        {"process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}]}},
        {"process": {"user": {"uid": 5, "gid": 5, "additionalGids": [6]}}},
        {"linux": {"resources": {"pids": {"limit": 5}}}},
        {"linux": {"resources": {"cpu": {"cpus": "0"}}}},
        {"linux": {"resources": {"devices": [{"allow": True, "type": "c", "major": 10, "minor": 200}]}}},
        {"linux": {"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]}},
        {"linux": {"sysctl": {"kernel.shmmax": "1"}}},
        {"mounts": [{"destination": "/scratch", "type": "tmpfs", "source": "tmpfs"}]},
        {"mounts": [{"destination": "/host", "type": "bind", "source": "/usr", "options": ["rbind", "rshared"]}]},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
async def test_what_a_module_cannot_have_is_refused_and_nothing_is_left_of_it(
    engine: Engine, changes: dict[str, Any]
) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    with pytest.raises(StatusError) as refused:
        await engine.create(bundle(engine, "true", **changes), fifos)
    assert refused.value.status.code == UNIMPLEMENTED, refused.value
    with pytest.raises(NotFoundError):
        await state(engine)
    fifos.close()


async def test_a_module_has_no_terminal(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    with pytest.raises(StatusError, match="tty") as refused:
        await engine.create(bundle(engine, "true", process={"terminal": True}), fifos, terminal=True)
    assert refused.value.status.code == UNIMPLEMENTED
    fifos.close()


async def test_what_is_no_module_is_not_started_and_the_engine_is_told(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    place = bundle(engine, "/bin/program")
    (place / "rootfs/bin/program").write_bytes(b"\x7fELF and more")
    await engine.create(place, fifos)
    with pytest.raises(InvalidArgumentError, match="is no WebAssembly module"):
        await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    with pytest.raises(NotFoundError):
        await state(engine)
    fifos.close()


@pytest.mark.parametrize("wrong", ["privileged", "sysctls"])
async def test_pods_of_modules_cannot_have_what_only_programs_use(tmp_path: Path, wrong: str) -> None:
    config = ServeConfig(
        root=str(tmp_path / "root"),
        socket=str(tmp_path / "run/s.sock"),
        isolation="wasm+process",
        privileged=True,
    )
    security = cri.SecurityContext(privileged=wrong == "privileged")
    linux = cri.LinuxPodSandboxConfig(
        security_context=security, sysctls={"kernel.shmmax": "1"} if wrong == "sysctls" else {}
    )
    async with serving(config), engine_at(config.socket, tmp_path) as engine:
        with pytest.raises(StatusError, match="of WebAssembly modules") as refused:
            await engine.call(ControllerV1.CREATE, engine.pod(linux=linux))
        assert refused.value.status.code == UNIMPLEMENTED


async def test_its_process_id_is_told_however_soon_a_module_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = Worker.hand_over

    async def hand_over_and_see_it_end(self: Worker, *args: Any) -> Answer:
        answer = await hand_over(self, *args)
        if self.exec_id:
            until(lambda: len(workers() - others) == 1, "the module has ended")
        return answer

    monkeypatch.setattr(Worker, "hand_over", hand_over_and_see_it_end)
    others = workers()
    heard = Heard(str(tmp_path / "containerd.sock.ttrpc"))
    config = ServeConfig(
        root=str(tmp_path / "root"), socket=str(tmp_path / "run/s.sock"), isolation="wasm+process", events=heard.path
    )
    async with heard.listening(), serving(config), engine_at(config.socket, tmp_path) as engine:
        await engine.run_pod(linux=shared())
        fifos = engine.fifos("main")
        await engine.create(bundle(engine, "do", "out", "up", ";", "sleep", "1000"), fifos)
        first = (await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))).pid
        assert await fifos.read(until=b"up") == b"up"
        pids = {CONTAINER: first}
        for number in range(6):
            name = f"e{number}"
            await add(engine, name, fifos, process("true"))
            pids[name] = (await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id=name))).pid
            assert await engine.wait(name) == 0
            gone = await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id=name))
            assert gone.pid == pids[name]
        assert all(pids.values())
        await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=9))
        assert await engine.wait() == 137
        assert (await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))).pid == first
        await heard.until("delete")
        assert {end.id: end.pid for end in heard.messages if isinstance(end, events.TaskExit)} == pids
        await removed(engine)
        fifos.close()


async def test_who_waits_for_a_module_that_is_never_started_is_told_when_it_is_gone(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    await engine.create(bundle(engine, "true"), fifos)

    async def wait() -> None:
        with pytest.raises(NotFoundError):
            await engine.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    fifos.close()


async def test_a_stopped_pod_takes_no_container(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = await run(engine, "sleep", "1000")
    await engine.call(ControllerV1.STOP, v1.ControllerStopRequest(sandbox_id=POD))
    with pytest.raises((NotFoundError, FailedPreconditionError)):
        await engine.create(engine.place / "bundle", fifos)
    fifos.close()


async def test_in_a_user_namespace_files_have_the_ids_that_the_engine_chose(engine: Engine, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mounts = [{"destination": "/v", "type": "bind", "source": str(volume), "options": ["rbind", "idmap"], **MAPPINGS}]
    await engine.run_pod(netns="/proc/self/ns/net", linux=mapped())
    steps = ["store", "/v/new", "made", ";", "store", "/note", "kept"]
    made = bundle(engine, "do", *steps, mounts=mounts, linux=MAPPINGS)
    os.chown(engine.place / "upper", FIRST, FIRST)
    layers = engine.layers(made)
    layers[0].options += [f"{name}=0:{FIRST}:{COUNT}" for name in ("uidmap", "gidmap")]
    fifos = engine.fifos("main")
    request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(made), rootfs=layers, stdout=fifos.path("stdout"))
    await engine.tasks(TaskV3.CREATE, request)
    pid = (await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))).pid
    assert pid > 0
    assert await engine.wait() == 0
    assert (engine.place / "upper/note").stat().st_uid == FIRST
    assert (volume / "new").stat().st_uid == 0, "its owner is who made it, through a mount that maps ids"
    fifos.close()


@pytest.mark.parametrize("option", ["idmap", "ridmap"])
async def test_ids_are_mapped_of_a_volume_alone_or_of_what_is_below_too(
    engine: Engine, tmp_path: Path, option: str
) -> None:
    await engine.run_pod(netns="/proc/self/ns/net", linux=mapped())
    with two_mounts(tmp_path) as volume:
        mount = {"destination": "/v", "type": "bind", "source": str(volume), "options": ["rbind", option], **MAPPINGS}
        steps = ["store", "/v/new", "made", ";", "store", "/v/sub/new", "made"]
        made = bundle(engine, "do", *steps, mounts=[mount], linux=MAPPINGS)
        os.chown(engine.place / "upper", FIRST, FIRST)
        layers = engine.layers(made)
        layers[0].options += [f"{name}=0:{FIRST}:{COUNT}" for name in ("uidmap", "gidmap")]
        fifos = engine.fifos("main")
        request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(made), rootfs=layers, stdout=fifos.path("stdout"))
        await engine.tasks(TaskV3.CREATE, request)
        await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
        assert (await engine.wait() == 0) == (option == "ridmap"), "else root's directory is not the guest's to write"
        assert (volume / "new").stat().st_uid == 0
        fifos.close()
        await removed(engine)


async def test_a_bundle_of_other_ids_than_its_pods_is_refused(engine: Engine) -> None:
    await engine.run_pod(linux=shared())
    fifos = engine.fifos("main")
    with pytest.raises(InvalidArgumentError, match="user ids"):
        await engine.create(bundle(engine, "true", linux=MAPPINGS), fifos)
    fifos.close()
