"""Pods of WebAssembly modules: bundles as engines write them, and the calls that run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.serve.client import CONTAINER, Engine, Fifos
from tests.wasm.sandboxes import make_root, pids_of

from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import TaskV3
from unisandbox.api.task import SANDBOX_NAMESPACES


def process(*args: str, **changes: Any) -> dict[str, Any]:
    """What containerd writes of a process, with all that only means something to programs of the machine."""
    return {
        "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "args": list(args),
        "env": ["PATH=/bin", "HOSTNAME=pod-one", "COLOUR=blue"],
        "cwd": "/",
        "capabilities": {name: ["CAP_KILL", "CAP_MKNOD"] for name in ("bounding", "effective", "permitted")},
        "apparmorProfile": "cri-containerd.apparmor.d",
        "oomScoreAdj": 1000,
        **changes,
    }


def bundle(engine: Engine, *args: str, **changes: Any) -> Path:
    """A bundle as containerd writes it for a pod whose process id is 0; its files are small modules in /bin.

    Args:
        engine: whose place it is in.
        args: the command.
        changes: parts of the config, and `process`, `linux` and `mounts`: additions to these.
    """
    place = engine.place / "bundle"
    make_root(place / "rootfs")
    for name in ("upper", "work"):
        (engine.place / name).mkdir()
    of_process, of_linux, mounts = (changes.pop(name, empty) for name, empty in EMPTY.items())
    spaces = [{"type": kind, "path": SANDBOX_NAMESPACES + kind} for kind in ("ipc", "uts", "pid")]
    config = {
        "ociVersion": "1.3.0",
        "process": process(*args, **of_process),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            *mounts,
        ],
        "annotations": {"io.kubernetes.cri.container-type": "container"},
        "linux": {
            "cgroupsPath": f"/k8s.io/{CONTAINER}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}], "cpu": {"shares": 2}},
            "namespaces": [{"type": "mount"}, *spaces],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            **of_linux,
        },
        **changes,
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


EMPTY: dict[str, Any] = {"process": {}, "linux": {}, "mounts": []}


async def run(engine: Engine, *args: str, stdin: bool = False, **changes: Any) -> Fifos:
    """A container, up to its start."""
    fifos = engine.fifos("main", stdin=stdin)
    await engine.create(bundle(engine, *args, **changes), fifos)
    await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    return fifos


async def state(engine: Engine) -> v3.StateResponse:
    return await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))


async def add(engine: Engine, exec_id: str, fifos: Fifos, given: dict[str, Any]) -> None:
    spec = AnyMessage(value=json.dumps(given).encode())
    paths = {name: fifos.path(name) for name in ("stdout", "stderr")}
    terminal = bool(given.get("terminal"))
    request = v3.ExecProcessRequest(id=CONTAINER, exec_id=exec_id, terminal=terminal, spec=spec, **paths)
    await engine.tasks(TaskV3.EXEC, request)


def workers() -> set[str]:
    """The process ids of the workers of this run of tests: others may go on beside it."""
    return pids_of("process/worker.py")
