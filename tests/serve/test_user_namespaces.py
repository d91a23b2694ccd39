"""Pods with user namespaces of their own, whose ids the engine chooses, as it makes their networks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.serve.client import CONTAINER, Engine, engine_at

from unisandbox.api import InvalidArgumentError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Mount
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.api.task import SANDBOX_NAMESPACES
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
