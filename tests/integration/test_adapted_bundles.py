"""Bundles of an engine in a pod: its config counts, and what is the sandbox's own is the sandbox's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import pytest
from anyio import run_process

from unisandbox import Engine, InvalidArgumentError, Resources, Sandbox, UnsupportedError
from unisandbox.api import CreateTask, ExecTask, Stdio, TaskService, Terminal
from unisandbox.api.network import Dns
from unisandbox.api.spec import Security
from unisandbox.api.task import SANDBOX_NAMESPACES, RootMount
from unisandbox.backends.runc import RuncBackend
from unisandbox.host import boundary
from unisandbox.oci.features import find_runtimes

pytestmark = [pytest.mark.anyio, pytest.mark.root]

RUNTIMES: Final = [program.name for program in anyio.run(find_runtimes)]
KINDS: Final = {"network": "net", "ipc": "ipc", "uts": "uts"}


def config(*args: str, **changes: Any) -> dict[str, Any]:
    """A config as containerd writes it for a pod whose process id is 0."""
    spaces = [{"type": kind, "path": SANDBOX_NAMESPACES + own} for kind, own in KINDS.items()]
    made: dict[str, Any] = {
        "ociVersion": "1.3.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/bin:/bin", "A=1"],
            "cwd": "/",
            "capabilities": {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "rprivate", "ro"]},
        ],
        "linux": {
            "cgroupsPath": "/k8s.io/c1",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "mount"}, *spaces],
        },
    }
    linux = changes.pop("linux", {})
    return {**made, **changes, "linux": {**made["linux"], **linux}}


@attrs.frozen
class Pod:
    sandbox: Sandbox
    directory: Path

    @property
    def task(self) -> TaskService:
        return self.sandbox._entry.task

    def layers(self, count: int = 1) -> RootMount:
        """Layers as a snapshotter has them."""
        names = [f"a-rather-long-name-of-a-layer-{number:03}" for number in range(count)]
        for name in (*names, "upper", "work"):
            (self.directory / name).mkdir()
        for name in ("proc", "dev", "usr", "tmp", "etc"):
            (self.directory / names[-1] / name).mkdir()
        for name in ("bin", "lib", "lib64"):
            (self.directory / names[-1] / name).symlink_to(f"usr/{name}")
        (self.directory / names[0] / "top").touch()
        lower = ":".join(str(self.directory / name) for name in names)
        upper, work = f"upperdir={self.directory}/upper", f"workdir={self.directory}/work"
        return RootMount("overlay", "overlay", ("index=off", work, upper, f"lowerdir={lower}"))

    async def create(self, text: dict[str, Any], *rootfs: RootMount, **options: Any) -> None:
        request = CreateTask(
            "c1", bundle=str(self.directory), config=json.dumps(text), rootfs=rootfs or (self.layers(),), **options
        )
        await self.task.create(request)

    async def output(self, text: dict[str, Any], *rootfs: RootMount) -> str:
        """What its program writes, to its end."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            await self.create(text, *rootfs, stdio=Stdio(stdout=writer, stderr=writer))
            await self.task.start("c1")
            os.close(writer)
            writer = -1
            said = await read_to_end(reader)
            await self.task.wait("c1")
            await self.task.delete("c1")
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        return said.decode()


async def read_to_end(fd: int, until: bytes = b"") -> bytes:
    os.set_blocking(fd, False)
    got = b""
    with anyio.fail_after(20):
        while not until or until not in got:
            await anyio.wait_readable(fd)
            try:
                piece = os.read(fd, 65536)
            except OSError:  # a terminal whose last process has ended
                break
            if not piece:
                break
            got += piece
    return got


@pytest.fixture(params=[pytest.param(name) for name in ("crun", "runc", "youki")])
async def pod(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pod]:
    name = str(request.param)
    if name not in RUNTIMES:
        pytest.skip(f"{name} is not installed")
    async with Engine.open(backends={"runc": RuncBackend(name)}) as engine:
        sandbox = await engine.create(
            isolation="runc",
            userns="host",
            hostname="pod-1",
            dns=Dns(servers=("10.0.0.10",)),
            resources=Resources.unlimited(),
            **getattr(request.function, "options", {}),
        )
        yield Pod(sandbox, tmp_path)


def having(**options: Any) -> Callable[[Any], Any]:
    """What the test's pod is to have, too."""

    def add(test: Any) -> Any:
        test.options = options
        return test

    return add


async def test_an_engines_container_has_the_sandboxes_namespaces_names_and_shared_memory(pod: Pod) -> None:
    script = "hostname; cat /etc/hostname /etc/resolv.conf; grep -c pod-1 /etc/hosts; ls /top; touch /dev/shm/x /w"
    script += "; for n in net ipc uts; do readlink /proc/self/ns/$n; done"
    said = await pod.output(config("sh", "-c", script))
    status = await pod.sandbox.status()
    inodes = [f"{kind}:[{status.namespaces[kind]}]" for kind in ("net", "ipc", "uts")]
    assert said.split("\n") == ["pod-1", "pod-1", "nameserver 10.0.0.10", "1", "/top", *inodes, ""]
    assert (pod.directory / "upper/w").exists(), "what it writes is in the engine's own layer"
    assert sorted(os.listdir(pod.directory)) == ["a-rather-long-name-of-a-layer-000", "upper", "work"]


async def test_an_overlay_may_have_more_layers_than_one_page_of_options_holds(pod: Pod) -> None:
    assert await pod.output(config("ls", "/top"), pod.layers(120)) == "/top\n"


async def test_limits_of_an_engines_config_are_those_of_its_cgroup(pod: Pod) -> None:
    resources = {"memory": {"limit": 64 << 20}, "cpu": {"quota": 50_000, "period": 100_000, "shares": 512}}
    await pod.create(config("sleep", "60", linux={"resources": resources, "cgroupsPath": "/k8s.io/c1"}))
    await pod.task.start("c1")
    assert (await pod.task.stats("c1")).memory_limit_bytes == 64 << 20
    await pod.task.kill("c1", signal=signal.SIGKILL)
    assert (await pod.task.wait("c1")).signal == signal.SIGKILL


REFUSED: Final[list[tuple[dict[str, Any], str]]] = [
    ({"process": {"args": ["true"], "cwd": "/", "scheduler": {"policy": "SCHED_FIFO"}}}, "process.scheduler"),
    ({"linux": {"timeOffsets": {"boottime": {"secs": 1}}}}, "linux.timeOffsets"),
    ({"linux": {"namespaces": [{"type": "time"}]}}, "'time'"),
    ({"linux": {"devices": [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]}}, "devices"),
    ({"linux": {"resources": {"devices": [{"allow": True, "access": "rwm"}]}}}, "device"),
    ({"linux": {"resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}}}, "hugepageLimits"),
    ({"linux": {"resources": {"cpu": {"cpus": "0"}}}}, "resources.cpu.cpus"),
    ({"mounts": [{"destination": "/x", "type": "bind", "source": "/usr", "options": ["shared"]}]}, "'shared'"),
    ({"mounts": [{"destination": "/x", "type": "tmpfs", "source": "x", "options": ["rslave"]}]}, "rslave"),
    (
        {"mounts": [{"destination": "/x", "type": "bind", "source": "/usr", "options": ["idmap"]}]},
        "'/x' with mapped ids",
    ),
    ({"mounts": [{"destination": "/x", "type": "bind", "source": "/usr", "options": ["ridmap"]}]}, "no user namespace"),
    ({"mounts": [{"destination": "/x", "type": "tmpfs", "source": "x", "options": ["idmap"]}]}, "'/x' with mapped ids"),
    ({"linux": {"rootfsPropagation": "unbindable"}}, "unbindable"),
    ({"linux": {"resources": {"unified": {"memory.high": "1"}}}}, "memory.high"),
]


async def test_what_cannot_be_expressed_is_refused_by_name_and_leaves_nothing(pod: Pod) -> None:
    layers = pod.layers()
    for changes, word in REFUSED:
        with pytest.raises(UnsupportedError, match=word):
            await pod.create(config("true", **changes), layers)
    assert list(pod.task.container_ids) == []


async def test_a_namespace_that_the_sandbox_does_not_have_is_an_error_and_not_the_hosts(pod: Pod) -> None:
    for path in (SANDBOX_NAMESPACES + "pid", SANDBOX_NAMESPACES + "net"):
        with pytest.raises(InvalidArgumentError, match="namespace"):
            await pod.create(config("true", linux={"namespaces": [{"type": "pid", "path": path}]}), RootMount("bind"))


async def test_the_first_process_and_an_added_one_may_have_a_terminal(pod: Pod) -> None:
    await pod.create(config("sh", "-c", "tty; stty size; read x; echo got $x; sleep 60"), terminal=True)
    first = (await pod.task.start("c1")).terminal
    assert first is not None
    text = json.dumps({**config("sh", "-c", "tty; exit 3")["process"], "terminal": True})
    await pod.task.exec(ExecTask("c1", "e1", oci_process=text))
    second = (await pod.task.start("c1", "e1")).terminal
    assert second is not None
    try:
        os.write(first, b"word\n")
        assert b"got word" in await read_to_end(first, b"got word")
        await pod.task.resize_pty("c1", "e1", Terminal(rows=40, columns=100))
        assert b"/dev/" in await read_to_end(second, b"/dev/pts/")
        assert (await pod.task.wait("c1", "e1")).code == 3
    finally:
        os.close(first)
        os.close(second)
    await pod.task.delete("c1")


async def test_an_added_process_is_as_its_oci_object_says(pod: Pod) -> None:
    await pod.create(config("sleep", "60"))
    assert (await pod.task.state("c1")).pid, "a created container's process can be told"
    await pod.task.start("c1")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    text = json.dumps(
        {**config("sh", "-c", "id -u; echo $B; pwd")["process"], "env": ["PATH=/bin", "B=2"]}
        | {"user": {"uid": 7, "gid": 8}, "cwd": "/tmp"}
    )
    await pod.task.exec(ExecTask("c1", "e" * 64, oci_process=text, stdio=Stdio(stdout=writer)))
    await pod.task.start("c1", "e" * 64)
    os.close(writer)
    assert await read_to_end(reader) == b"7\n2\n/tmp\n"
    os.close(reader)
    await pod.task.wait("c1", "e" * 64)
    await pod.task.delete("c1", "e" * 64)


@pytest.fixture
def passing(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host that passes on what is mounted below it."""
    place = tmp_path / "passing"
    for name in ("later", "inner"):
        (place / name).mkdir(parents=True)
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "--make-rshared", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", place], check=True)


async def code_of(pod: Pod, exec_id: str, script: str) -> int:
    """How a process more in the container ends, which may mount."""
    process = mounting(config("sh", "-c", script))["process"]
    await pod.task.exec(ExecTask("c1", exec_id, oci_process=json.dumps(process)))
    await pod.task.start("c1", exec_id)
    with anyio.fail_after(20):
        return (await pod.task.wait("c1", exec_id)).code


def mounting(text: dict[str, Any]) -> dict[str, Any]:
    capabilities = {name: ["CAP_SYS_ADMIN"] for name in ("bounding", "effective", "permitted")}
    return {**text, "process": {**text["process"], "capabilities": capabilities}}


def showing(place: Path, propagation: str) -> dict[str, Any]:
    """A config as containerd writes it for a mount with propagation."""
    text = mounting(config("sleep", "1000", linux={"rootfsPropagation": propagation}))
    options = ["rbind", propagation, "rw"]
    text["mounts"].append({"destination": "/shown", "type": "bind", "source": str(place), "options": options})
    return text


@pytest.mark.parametrize(("propagation", "to", "back"), [("rprivate", 1, 1), ("rslave", 0, 1), ("rshared", 0, 0)])
async def test_what_is_mounted_later_is_passed_on_as_asked_and_is_there_after_the_container(
    pod: Pod, passing: Path, propagation: str, to: int, back: int
) -> None:
    await pod.create(showing(passing, propagation))
    await pod.task.start("c1")
    await run_process(["mount", "-t", "tmpfs", "later", str(passing / "later")])
    (passing / "later/file").touch()
    assert await code_of(pod, "e1", "test -e /shown/later/file") == to
    assert await code_of(pod, "e2", "mount -t tmpfs inner /shown/inner && : > /shown/inner/file") == 0
    assert (passing / "inner/file").exists() is (back == 0)
    await pod.task.delete("c1")
    assert (passing / "later/file").exists(), "the host's mounts are the host's"
    assert (passing / "inner/file").exists() is (back == 0)


async def test_a_mount_that_passes_nothing_on_cannot_be_shared(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    await run_process(["mount", "--bind", str(tmp_path / "plain"), str(tmp_path / "plain")])
    try:
        await run_process(["mount", "--make-private", str(tmp_path / "plain")])
        layers = pod.layers()
        for propagation in ("rslave", "rshared"):
            with pytest.raises(InvalidArgumentError, match="passes nothing on"):
                await pod.create(showing(tmp_path / "plain", propagation), layers)
    finally:
        await run_process(["umount", str(tmp_path / "plain")])


@pytest.mark.parametrize("exec_id", ["init", "main"])
async def test_an_added_process_cannot_have_the_name_of_a_cgroup_of_ours(pod: Pod, exec_id: str) -> None:
    """On cgroup v2 it would meet the container's first process there."""
    await pod.create(config("sleep", "60"))
    await pod.task.start("c1")
    with pytest.raises(InvalidArgumentError, match=exec_id):
        await pod.task.exec(ExecTask("c1", exec_id, oci_process=json.dumps(config("true")["process"])))
    assert (await pod.task.state("c1")).state == "running"


async def test_an_added_process_whose_start_is_cut_does_not_run_on(pod: Pod) -> None:
    """The runtime has started it, and its terminal has not come yet."""
    await pod.create(config("sleep", "60"))
    await pod.task.start("c1")
    text = json.dumps({**config("sleep", "1000")["process"], "terminal": True})
    await pod.task.exec(ExecTask("c1", "e1", oci_process=text))
    before = len(os.listdir("/proc/self/fd"))
    with anyio.CancelScope() as scope:
        boundary.watch(lambda name, _: scope.cancel() if name == "after runtime.exec" else None)
        try:
            await pod.task.start("c1", "e1")
        finally:
            boundary.watch(None)
    assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == before
    with anyio.fail_after(20):
        while len(await pod.task.pids("c1")) > 1:
            await anyio.sleep(0.01)
    await pod.task.delete("c1", "e1")


@having(share_pid=True)
async def test_what_is_left_running_in_a_shared_pid_namespace_ends_with_the_first_process(pod: Pod) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    spaces = [{"type": "mount"}, {"type": "pid", "path": SANDBOX_NAMESPACES + "pid"}]
    left = config("sh", "-c", "sleep 1000 & exit 4", linux={"namespaces": spaces})
    await pod.create(left, stdio=Stdio(stdout=writer))
    await pod.task.start("c1")
    os.close(writer)
    assert (await pod.task.wait("c1")).code == 4
    assert await read_to_end(reader) == b"", "nobody holds its stream open"
    os.close(reader)


# The kernel's log, which root may write to without any capability.
LOG: Final = {"path": "/dev/mine", "type": "c", "major": 1, "minor": 11, "fileMode": 0o600, "uid": 0, "gid": 0}
OPENED: Final = ": >> /dev/null && echo usual; test -e /dev/mine && : >> /dev/mine && echo more"


@having(security=Security(devices="all"))
async def test_in_a_sandbox_with_the_hosts_devices_each_container_has_those_that_its_config_allows(pod: Pod) -> None:
    deny = {"allow": False, "access": "rwm"}
    layers = pod.layers()
    for allowed, devices, said in (
        ([deny], [], "usual\n"),
        ([deny, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rwm"}], [LOG], "usual\nmore\n"),
        ([{"allow": True, "access": "rwm"}], [LOG], "usual\nmore\n"),
    ):
        linux = {"devices": devices, "resources": {"devices": allowed}}
        program = config("bash", "-c", OPENED, linux=linux)
        assert await pod.output(program, layers) == said
