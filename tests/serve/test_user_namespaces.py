"""Pods with user namespaces of their own, whose ids the engine chooses, as it makes their networks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from tests.serve.client import CONTAINER, Engine, engine_at

from unisandbox.api import InvalidArgumentError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Mount
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.api.task import SANDBOX_NAMESPACES
from unisandbox.host import mounts as host_mounts
from unisandbox.host import namespaces
from unisandbox.serve import cri
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import serving
from unisandbox.wire.status import StatusError

pytestmark = [pytest.mark.anyio, pytest.mark.root]

FIRST: Final = 1000
COUNT: Final = 100_000
ROW: Final = {"containerID": 0, "hostID": FIRST, "size": COUNT}
MAPPINGS: Final = {"uidMappings": [ROW], "gidMappings": [ROW]}
KINDS: Final = {"network": "net", "ipc": "ipc", "uts": "uts", "user": "user"}


@pytest.fixture
def netns() -> Iterator[str]:
    """A network namespace as containerd makes it for such a pod: in a user namespace with the pod's ids."""
    rows = [(0, FIRST, COUNT)]
    made = namespaces.create(["user", "net"], uid_map=rows, gid_map=rows)
    yield f"/proc/self/fd/{made['net']}"
    for fd in made.values():
        os.close(fd)


def mapped(*rows: cri.IdMapping, gids: Any = None, pid: int = cri.CONTAINER) -> cri.LinuxPodSandboxConfig:
    uids = list(rows) or [cri.IdMapping(host_id=FIRST, length=COUNT)]
    users = cri.UserNamespace(mode=cri.POD, uids=uids, gids=uids if gids is None else gids)
    modes = cri.NamespaceOption(pid=pid, userns_options=users)
    return cri.LinuxPodSandboxConfig(security_context=cri.SecurityContext(namespace_options=modes))


def bundle(engine: Engine, *args: str, pid: bool = False, **changes: Any) -> tuple[Path, list[Mount]]:
    """What containerd says of a container of such a pod, whose snapshotter maps ids."""
    made = engine.bundle(*args)
    config = json.loads((made / "config.json").read_text())
    kinds = {**KINDS, **({"pid": "pid"} if pid else {})}
    spaces = [{"type": kind, "path": SANDBOX_NAMESPACES + own} for kind, own in kinds.items()]
    config["linux"] |= {**MAPPINGS, "namespaces": [{"type": "mount"}, *([] if pid else [{"type": "pid"}]), *spaces]}
    config["linux"] |= changes.pop("linux", {})
    config["process"]["capabilities"] = {}
    config["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]})
    config["mounts"].append({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"})
    config["mounts"] += changes.pop("mounts", [])
    (made / "config.json").write_text(json.dumps(config))
    os.chown(engine.place / "upper", FIRST, FIRST)
    layers = engine.layers(made)
    value = f"0:{FIRST}:{COUNT}"
    layers[0].options += [f"uidmap={value}", f"gidmap={value}"]
    return made, layers


async def run(engine: Engine, *args: str, **changes: Any) -> str:
    """What a container's program writes, to its end."""
    made, layers = bundle(engine, *args, **changes)
    fifos = engine.fifos("main")
    request = v3.CreateTaskRequest(
        id=CONTAINER, bundle=str(made), rootfs=layers, stdout=fifos.path("stdout"), stderr=fifos.path("stderr")
    )
    await engine.tasks(TaskV3.CREATE, request)
    await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    said = await fifos.read() + await fifos.read("stderr")
    assert await engine.wait() == 0, said
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
    fifos.close()
    return said.decode()


@pytest.mark.parametrize("pid", [cri.CONTAINER, cri.POD])
async def test_a_pod_has_the_ids_that_the_engine_chose_for_it(engine: Engine, netns: str, pid: int) -> None:
    await engine.run_pod(netns=netns, linux=mapped(pid=pid))
    volume = engine.place / "volume"
    volume.mkdir()
    (volume / "of-root").touch()
    mounts = [{"destination": "/v", "type": "bind", "source": str(volume), "options": ["rbind", "idmap"], **MAPPINGS}]
    script = (
        "cat /proc/self/uid_map /proc/self/gid_map; stat -c %u / /tmp /v/of-root /dev/shm /etc/hosts /dev/mqueue;"
        " touch /made; ls /sys/class/net; hostname; echo again > /proc/self/fd/2"
    )
    said = (await run(engine, "sh", "-c", script, pid=pid == cri.POD, mounts=mounts)).split()
    assert said == ["0", str(FIRST), str(COUNT)] * 2 + ["0"] * 6 + ["lo", "pod-one", "again"]
    owner = os.stat(engine.place / "upper/made")
    assert (owner.st_uid, owner.st_gid) == (FIRST, FIRST)
    await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id="ab" * 32))


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host's root, with another file system mounted below."""
    path = tmp_path / "volume"
    (path / "below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "volume", path / "below"], check=True)
    yield path
    subprocess.run(["umount", path / "below"], check=True)


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize(
    ("option", "ids", "owners"),
    [
        ("idmap", {}, ["0", "65534"]),
        ("ridmap", {}, ["0", "0"]),
        ("idmap", MAPPINGS, ["0", "65534"]),
        ("ridmap", MAPPINGS, ["0", "0"]),
        ("ro", {}, ["65534", "65534"]),
    ],
)
async def test_the_ids_of_a_volume_are_mapped_as_its_options_say(
    config: ServeConfig,
    netns: str,
    volume: Path,
    tmp_path: Path,
    runtime: str,
    option: str,
    ids: dict[str, Any],
    owners: list[str],
) -> None:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    mount = {"destination": "/v", "type": "bind", "source": str(volume), "options": ["rbind", option], **ids}
    config = attrs.evolve(config, runtime=runtime)
    async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
        await engine.run_pod(netns=netns, linux=mapped())
        assert (await run(engine, "stat", "-c", "%u", "/v", "/v/below", mounts=[mount])).split() == owners
        for entry in server.pods.core.entries():
            await entry.remove()


@pytest.fixture
def mounted_upon(tmp_path: Path) -> Iterator[Path]:
    """A volume with mounts below: one in another, a file, and one that another hides."""
    path = tmp_path / "volume"
    path.mkdir()

    def mount(*words: str | Path) -> None:
        subprocess.run(["mount", *words], check=True)

    mount("-t", "tmpfs", "volume", path)
    try:
        for name in ("below", "hid den/lost"):
            (path / name).mkdir(parents=True)
            mount("-t", "tmpfs", "volume", path / name)
        mount("-t", "tmpfs", "volume", path / "hid den")
        (path / "below/inner").mkdir()
        mount("-t", "tmpfs", "-o", "nosuid", "volume", path / "below/inner")
        mount("-o", "remount,bind,ro,nosuid", path / "below/inner")
        (path / "file").touch()
        mount("--bind", "/etc/hostname", path / "file")
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)  # also what is hidden


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize("options", [["rbind"], ["rbind", "rro"], ["bind"]])
async def test_what_is_mounted_below_a_volume_is_there_once_and_as_it_was(
    config: ServeConfig, netns: str, mounted_upon: Path, tmp_path: Path, runtime: str, options: list[str]
) -> None:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    if runtime == "runc" and "rro" in options:
        pytest.skip("not every runc knows rro")
    mount = {"destination": "/v", "type": "bind", "source": str(mounted_upon), "options": options}
    config = attrs.evolve(config, runtime=runtime)
    async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
        await engine.run_pod(netns=netns, linux=mapped())
        table = await run(engine, "grep", " /v", "/proc/self/mountinfo", mounts=[mount])
        words = [line.split() for line in table.splitlines() if "lost" not in line]  # which nobody sees
        found = {word[4]: {"ro", "nosuid"} & set(word[5].split(",")) for word in words}
        assert len(words) == len(found)
        below = {"/v/below": set(), "/v/below/inner": {"ro", "nosuid"}, "/v/file": set(), "/v/hid\\040den": set()}
        expected: dict[str, set[str]] = {"/v": set(), **(below if "rbind" in options else {})}
        assert found == {point: flags | ({"ro"} if "rro" in options else set()) for point, flags in expected.items()}
        for entry in server.pods.core.entries():
            await entry.remove()


@pytest.fixture
def swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A volume in which somebody puts a link on the way to a mount, right after that was found."""
    volume, secret = tmp_path / "volume", tmp_path / "secret"
    for directory in (volume / "way/inner", secret / "inner"):
        directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "volume", volume / "way/inner"], check=True)
    look = host_mounts.seen_below

    def look_too_early(path: str) -> list[tuple[str, list[str]]]:
        seen = look(path)
        if path == str(volume):
            (volume / "way").rename(volume / "moved")
            (volume / "way").symlink_to(secret)
        return seen

    monkeypatch.setattr(host_mounts, "seen_below", look_too_early)
    yield volume
    subprocess.run(["umount", volume / "moved/inner"], check=True)


@pytest.mark.skipif(shutil.which("crun") is None, reason="crun is not installed")
async def test_no_link_that_is_made_meanwhile_leads_out_of_a_volume(
    config: ServeConfig, netns: str, swapped: Path, tmp_path: Path
) -> None:
    mount = {"destination": "/v", "type": "bind", "source": str(swapped), "options": ["rbind"]}
    async with serving(attrs.evolve(config, runtime="crun")) as server, engine_at(config.socket, tmp_path) as engine:
        await engine.run_pod(netns=netns, linux=mapped())
        made, layers = bundle(engine, "true", mounts=[mount])
        request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(made), rootfs=layers)
        with pytest.raises(InvalidArgumentError, match=r"way/inner.*symbolic links"):
            await engine.tasks(TaskV3.CREATE, request)
        for entry in server.pods.core.entries():
            await entry.remove()


async def test_what_does_not_fit_the_pods_ids_is_refused(engine: Engine, netns: str) -> None:
    await engine.run_pod(netns=netns, linux=mapped())
    made, layers = bundle(engine, "true")
    config = (made / "config.json").read_text()
    other = config.replace(f'"hostID": {FIRST}', '"hostID": 2000')
    wrong = [Mount(type="overlay", options=[*layers[0].options[:-2], "uidmap=0:5:6", "gidmap=0:5:6"])]
    for text, mounts, kind in ((other, layers, InvalidArgumentError), (config, wrong, StatusError)):
        (made / "config.json").write_text(text)
        request = v3.CreateTaskRequest(id=CONTAINER, bundle=str(made), rootfs=mounts)
        with pytest.raises(kind):
            await engine.tasks(TaskV3.CREATE, request)


async def test_ids_that_are_no_ids_or_not_those_of_the_network_are_refused(engine: Engine, netns: str) -> None:
    row = cri.IdMapping(host_id=FIRST, length=COUNT)
    bad = [
        mapped(row, row),
        mapped(row, gids=[cri.IdMapping(host_id=1, length=COUNT)]),
        mapped(cri.IdMapping(host_id=FIRST, container_id=1, length=COUNT)),
        mapped(cri.IdMapping(host_id=0, length=COUNT)),
        mapped(cri.IdMapping(host_id=FIRST)),
        cri.LinuxPodSandboxConfig(
            security_context=cri.SecurityContext(
                namespace_options=cri.NamespaceOption(userns_options=cri.UserNamespace(mode=cri.CONTAINER))
            )
        ),
    ]
    for linux in bad:
        with pytest.raises(InvalidArgumentError):
            await engine.call(ControllerV1.CREATE, engine.pod(netns=netns, linux=linux))
    with pytest.raises(StatusError, match="host's network"):
        await engine.call(ControllerV1.CREATE, engine.pod(linux=mapped()))
    await engine.call(ControllerV1.CREATE, engine.pod(netns=netns, linux=mapped(attrs_evolved(row, 5000))))
    with pytest.raises(InvalidArgumentError, match="is another one"):
        await engine.call(ControllerV1.START, v1.ControllerStartRequest(sandbox_id="ab" * 32))


def attrs_evolved(row: cri.IdMapping, first: int) -> cri.IdMapping:
    return cri.IdMapping(host_id=first, length=row.length)


async def test_such_a_pod_is_what_it_was_after_a_restart(config: ServeConfig, netns: str, tmp_path: Path) -> None:
    async with serving(config), engine_at(config.socket, tmp_path) as engine:
        address = (await engine.run_pod(netns=netns, linux=mapped(pid=cri.POD))).address
    async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
        await engine.connect(address)
        assert (await run(engine, "cat", "/proc/self/uid_map", pid=True)).split() == ["0", str(FIRST), str(COUNT)]
        for entry in server.pods.core.entries():
            await entry.remove()
