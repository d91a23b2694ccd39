"""What the tests of runtimes share: a keeper with its private place, and bundles of this machine's programs."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from unisandbox.host.keeper import Keeper
from unisandbox.host.null import open_null
from unisandbox.oci.bundle import held_path
from unisandbox.oci.calls import NOWHERE
from unisandbox.oci.features import RuntimeProgram
from unisandbox.oci.made import Created
from unisandbox.oci.runtime import Runtime

UNIFIED = "/sys/fs/cgroup/unified"
FIRST_ID = 1_000_000
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]


@attrs.frozen
class Lab:
    """A runtime with its keeper, and a place in the keeper's private mounts."""

    runtime: Runtime
    keeper: Keeper
    work: str
    entered: dict[str, Mapping[str, str]] = attrs.field(factory=dict, init=False)

    def seen(self, path: str) -> str:
        """A path of the keeper's, as the test reaches it."""
        return f"/proc/{self.keeper.pid}/root{path}"

    async def bundle(self, args: Sequence[str], *, userns: bool = False, **config: object) -> str:
        """A bundle that runs a program of this machine; with `userns` it joins namespaces that the keeper holds."""
        name = uuid.uuid4().hex
        bundle, root = f"{self.work}/{name}", f"{self.work}/{name}-root"
        os.mkdir(self.seen(root), 0o755)
        os.mkdir(self.seen(bundle), 0o700)
        owner = FIRST_ID if userns else 0
        rows = [[0, FIRST_ID, 65536]]
        kinds = [*(["user"] if userns else []), "net", "ipc", "uts"]
        namespaces = {"do": "namespaces", "kinds": kinds, **({"uid_map": rows, "gid_map": rows} if userns else {})}
        ops: list[dict[str, object]] = [{"op": "tmpfs", "path": "/", "size": 1 << 20, "inodes": 100}]
        ops += [{"op": "mkdir", "path": path} for path in ("/proc", "/dev", "/usr", "/tmp")]
        ops += [{"op": "symlink", "path": f"/{path}", "target": f"usr/{path}"} for path in ("bin", "lib", "lib64")]
        ops += [{"op": "file", "path": "/tmp/not-executable", "content": ""}]
        ops = [{**op, "uid": owner, "gid": owner} for op in ops]
        ops += [{"op": "bind", "path": "/usr", "source": "/usr", "attributes": ["readonly", "nosuid", "nodev"]}]
        held = {kind: f"{name}/{kind}" for kind in kinds}
        result = await self.keeper.job([namespaces, {"do": "mounts", "root": root, "ops": ops}], hold=held)
        paths = {kind: held_path(self.keeper.pid, result.held[held[kind]]) for kind in kinds}
        if userns and not self.runtime.program.features.held_userns:
            self.entered[bundle] = {kind: paths.pop(kind) for kind in ("net", "ipc", "uts")}
        self.write(bundle, config_json(self.runtime.program, args, root, paths, config))
        return bundle

    def write(self, bundle: str, config: object) -> None:
        """Write a config.json."""
        Path(self.seen(bundle), "config.json").write_text(json.dumps(config), encoding="utf-8")

    async def create(self, container_id: str, bundle: str, **options: object) -> Created:
        """Create with a null device as stdio, if the options do not say otherwise: crun gives it away."""
        null = open_null()
        try:
            entered = self.entered.get(bundle, NOWHERE)
            given: dict[str, object] = {"stdio": (null, null, null), "entered": entered, **options}
            return await self.runtime.create(container_id, bundle, **given)  # type: ignore[arg-type]
        finally:
            os.close(null)

    async def exit_code(self, created: Created) -> int:
        """Wait for its end and close its pidfd."""
        try:
            record = await self.keeper.wait_exit(created.pid, created.start_time)
            return os.waitstatus_to_exitcode(record.status)
        finally:
            if created.pidfd >= 0:
                os.close(created.pidfd)

    def left(self) -> list[str]:
        """States, logs, pid-files and requests that are still there."""
        states = f"{self.seen(self.runtime.root)}"
        found = [f"{kind}/{name}" for kind in ("state", "log") for name in _list(f"{states}/{kind}")]
        for bundle in _list(self.seen(self.work)):
            found += [name for name in _list(f"{self.seen(self.work)}/{bundle}") if name.endswith((".pid", ".json"))]
        return [name for name in found if name != "config.json"]


def config_json(
    program: RuntimeProgram, args: Sequence[str], root: str, paths: Mapping[str, str], more: Mapping[str, object]
) -> dict[str, object]:
    """A config.json that joins the namespaces at `paths`."""
    names = {"net": "network"}
    joined = [{"type": names.get(kind, kind), "path": path} for kind, path in paths.items()]
    linux: dict[str, object] = {"namespaces": [{"type": "mount"}, {"type": "pid"}, *joined]}
    if "user" in paths:
        rows = [{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]
        linux |= {"uidMappings": rows, "gidMappings": rows}
    return {
        "ociVersion": program.oci_version,
        "process": process_json(args),
        "root": {"path": root, "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        ],
        "linux": linux,
        **more,
    }


def process_json(args: Sequence[str], cwd: str = "/") -> dict[str, object]:
    """An OCI process object."""
    return {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/usr/bin:/bin"],
        "cwd": cwd,
        "noNewPrivileges": True,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
    }


@asynccontextmanager
async def lab(program: RuntimeProgram, place: Path) -> AsyncIterator[Lab]:
    """A keeper for one test. Its private place is below /run: the mapped root of a sandbox must come through to it."""
    work = f"/run/unisandbox-test-{uuid.uuid4().hex[:12]}"
    hide = [UNIFIED] if os.path.isdir(UNIFIED) else []
    keeper = await Keeper.start(f"{place}/keeper", workdir=work, hide=hide)
    try:
        yield Lab(Runtime(program=program, root=f"{work}/runtime", keeper=keeper), keeper, work)
        await keeper.close()
    finally:
        keeper.abandon(wait=10.0)
        os.rmdir(work)


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
