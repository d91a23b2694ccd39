"""The sandboxer: a sandbox is four namespaces and a root file system, held by the keeper, and a cgroup."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    Capabilities,
    ContainerStatus,
    CreateSandbox,
    Exit,
    InvalidArgumentError,
    Metrics,
    NotFoundError,
    RecoverSandbox,
    Resources,
    SandboxSpec,
    SandboxStatus,
    StartedSandbox,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.host.cgroups import Limits, ending
from unisandbox.host.keeper import Guard, JobFailed
from unisandbox.host.services import Host
from unisandbox_unshare import root
from unisandbox_unshare.task import UnshareTasks

CAPABILITIES: Final = Capabilities(
    isolation="namespaces",
    rootfs=frozenset({"host"}),
    exec=True,
    files=True,
    userns=True,
    ttl=True,
    survives_host_crash=True,
    start_seconds=0.08,
)
# Ranges of user ids, of those that unisandbox itself uses: whoever leases them in one directory shares them.
_FIRST_RANGE: Final = 0x7000_0000 // root.IDS
_RANGES: Final = 0x0FFF_0000 // root.IDS
_KINDS: Final = ("user", "net", "ipc", "uts")
_LEAST_PIDS: Final = 4
_END_SECONDS: Final = 5.0


@attrs.define
class _Sandbox:
    """What this process knows of one. `task` is None before its start, and when only its remains are to be freed."""

    spec: SandboxSpec
    created_at: float
    first_id: int = 0
    task: UnshareTasks | None = None
    #: Numbers of what the keeper holds, by name.
    held: Mapping[str, int] = attrs.field(factory=dict)
    started_at: float | None = None
    stopped_at: float | None = None
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class UnshareSandboxer:
    """See `Sandboxer`. Every name derives from `host.prefix(sandbox_id)`, so that all can be found without a record."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sandboxes: dict[str, _Sandbox] = {}

    async def create(self, request: CreateSandbox) -> None:
        """See `Sandboxer.create`: the cgroup with its limits. How to undo it is registered before it is done."""
        sandbox_id, spec, host = request.sandbox_id, request.spec, self._host
        if sandbox_id in self._sandboxes:
            raise AlreadyExistsError(f"sandbox {sandbox_id!r} exists already")
        _check(spec)
        dirs = self._dirs(sandbox_id)
        guards = {"directories": ("rmdir_cgroup", dirs), "processes": ("kill_cgroup", dirs)}
        guards |= {"image": ("unlink", (self._image(sandbox_id),))}
        prefix = host.prefix(sandbox_id)
        await host.keeper.guard([Guard(f"{prefix}{name}", *how) for name, how in guards.items()])  # type: ignore[arg-type]
        self._sandboxes[sandbox_id] = _Sandbox(spec, time.time())
        try:
            host.cgroups.root().child(self._short(sandbox_id), limits=_limits(spec.resources))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.remove(sandbox_id)
            raise

    async def start(self, sandbox_id: str) -> StartedSandbox:
        """See `Sandboxer.start`: one job of the keeper makes namespaces and files; then they are looked at."""
        sandbox = self._get(sandbox_id)
        sandbox.stopped_at, sandbox.ended = None, anyio.Event()
        if sandbox.task is not None:
            await anyio.lowlevel.checkpoint()
            return StartedSandbox(sandbox.task)
        host, spec, prefix = self._host, sandbox.spec, self._host.prefix(sandbox_id)
        leases = os.path.dirname(host.work_dir)
        number = await host.keeper.lease(leases, _FIRST_RANGE, _RANGES, name=f"{prefix}ids")
        sandbox.first_id = number * root.IDS
        rows = [[0, sandbox.first_id, root.IDS]]
        hostname, base = spec.hostname or sandbox_id[:12], self._base(sandbox_id)
        plan = root.ops(base, spec, hostname, sandbox.first_id, self._image(sandbox_id))
        steps: list[Mapping[str, object]] = [
            {"do": "mount_namespace"},
            {"do": "namespaces", "kinds": [*_KINDS], "hostname": hostname, "uid_map": rows, "gid_map": rows},
            {"do": "mounts", "root": host.work_dir, "ops": [{"op": "mkdir", "path": f"/{self._short(sandbox_id)}"}]},
            {"do": "mounts", "root": base, "ops": plan},
            {"do": "dirfd", "path": f"{base}/root", "name": "root"},
            {"do": "dirfd", "path": f"{base}/rw", "name": "rw"},
        ]
        hold = {name: f"{prefix}{name}" for name in ("mnt", "root", "rw", *_KINDS)}
        try:
            held = (await host.keeper.job(steps, hold=hold, timeout=60.0)).held
        except JobFailed as error:
            raise BackendError(f"sandbox {spec.name or sandbox_id!r} cannot be made: {error.strerror}") from error
        sandbox.held = {name.removeprefix(prefix): number for name, number in held.items()}
        for kind in _KINDS:
            if self._inode(sandbox, kind) == os.stat(f"/proc/self/ns/{kind}").st_ino:
                raise BackendError(f"sandbox {spec.name or sandbox_id!r} has the host's own {kind} namespace")
        sandbox.started_at = time.time()
        facts = {name: getattr(sandbox, name) for name in ("first_id", "created_at", "started_at")}
        await host.keeper.notes.write(f"{prefix}sandbox", json.dumps(facts))
        sandbox.task = self._task_of(sandbox_id, spec)
        return StartedSandbox(sandbox.task)

    def _task_of(self, sandbox_id: str, spec: SandboxSpec) -> UnshareTasks:
        cgroup = self._host.cgroups.find(self._short(sandbox_id))
        place = f"{self._base(sandbox_id)}/root"
        prefix = self._host.prefix(sandbox_id)
        return UnshareTasks(spec.name or sandbox_id, spec, cgroup, self._host.keeper, prefix=prefix, root=place)

    async def recover(self, request: RecoverSandbox) -> StartedSandbox | None:
        """See `Sandboxer.recover`: the keeper has notes and holds namespaces, the kernel has the cgroup."""
        sandbox_id, keeper, prefix = request.sandbox_id, self._host.keeper, self._host.prefix(request.sandbox_id)
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            sandbox = self._sandboxes[sandbox_id] = _Sandbox(request.spec, time.time())
        name = f"{prefix}sandbox"
        note = await keeper.notes.find(name) if request.lived else None
        if note is None:
            self._let_go(sandbox)
            return None
        for field, value in json.loads(note).items():
            setattr(sandbox, field, value)
        held = await keeper.held(prefix)
        sandbox.held = {name.removeprefix(prefix): number for name, number in held.items()}
        sandbox.stopped_at = None if request.started else sandbox.stopped_at or time.time()
        try:
            if sandbox.task is None and "root" in sandbox.held:
                sandbox.task = self._task_of(sandbox_id, sandbox.spec)
        except FileNotFoundError:
            pass  # its cgroup is gone, and with it what ran
        if sandbox.task is None or "root" not in sandbox.held:
            self._let_go(sandbox)  # it is half gone: its ttl is over, or its removal was cut
            return None
        await sandbox.task.restore(exclusive=request.exclusive)
        return StartedSandbox(sandbox.task)

    async def stop(self, sandbox_id: str, *, grace: float) -> None:
        """See `Sandboxer.stop`."""
        sandbox = self._get(sandbox_id)
        task = sandbox.task
        try:
            for name in () if task is None else task.container_ids:
                assert task is not None  # the loop is empty otherwise
                running = task.running() if grace > 0 else []
                for exec_id in running:
                    with contextlib.suppress(NotFoundError):  # whoever waited for its end has deleted it
                        await task.kill(name, exec_id, signal=signal.SIGTERM)
                with anyio.move_on_after(grace):
                    for exec_id in running:
                        with contextlib.suppress(NotFoundError):
                            await task.wait(name, exec_id)
                await task.delete(name)
        except UnavailableError:
            # The keeper is dead, and with it what it held; what is left are cgroups.
            if self._host.keeper.alive:
                raise
            ending.kill(self._dirs(sandbox_id), _END_SECONDS)
        sandbox.stopped_at = time.time()
        sandbox.ended.set()

    def kill_now(self, sandbox_id: str) -> None:
        """See `Sandboxer.kill_now`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.task is not None:
            for name in sandbox.task.container_ids:
                sandbox.task.kill_now(name)

    async def remove(self, sandbox_id: str) -> None:
        """See `Sandboxer.remove`: by names alone, so that it does not matter how far anything had come."""
        sandbox, keeper = self._sandboxes.get(sandbox_id), self._host.keeper
        if sandbox is None:
            return
        if sandbox.task is not None:
            await self.stop(sandbox_id, grace=0)
        dirs, prefix = self._dirs(sandbox_id), self._host.prefix(sandbox_id)
        ending.kill(dirs, 1.0)
        if not ending.remove(dirs, _END_SECONDS):
            raise BackendError(f"sandbox {sandbox.spec.name or sandbox_id!r}: its cgroups {dirs} cannot be removed")
        self._let_go(sandbox)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._image(sandbox_id))
        if keeper.alive:
            # With the last of its descriptors its mount namespace ends, and all its mounts.
            await keeper.drop(prefix=prefix)
            with contextlib.suppress(JobFailed):  # it never came so far
                await keeper.job([{"do": "remove_tree", "path": self._base(sandbox_id)}])
            await keeper.unguard([f"{prefix}{name}" for name in ("directories", "processes", "image")])
        self._sandboxes.pop(sandbox_id, None)

    async def wait(self, sandbox_id: str) -> Exit:
        """See `Sandboxer.wait`."""
        sandbox = self._get(sandbox_id)
        await sandbox.ended.wait()
        return Exit(code=0, exited_at=sandbox.stopped_at or time.time())

    async def status(self, sandbox_id: str) -> SandboxStatus:
        """See `Sandboxer.status`."""
        sandbox = self._get(sandbox_id)
        spec, task = sandbox.spec, sandbox.task
        containers = []
        for name in () if task is None else task.container_ids:
            state = await task.state(name)  # type: ignore[union-attr]
            containers.append(ContainerStatus(name, state.state, state.pid, state.exit))
        await anyio.lowlevel.checkpoint_if_cancelled()
        return SandboxStatus(
            id=sandbox_id,
            name=spec.name,
            backend="unshare",
            state="created" if task is None else "stopped" if sandbox.stopped_at else "ready",
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            stopped_at=sandbox.stopped_at,
            containers=tuple(containers),
            labels=spec.labels,
            namespaces={kind: self._inode(sandbox, kind) for kind in _KINDS if kind in sandbox.held},
            netns_path=self._path(sandbox, "net") if "net" in sandbox.held else "",
        )

    async def update(self, sandbox_id: str, resources: Resources) -> None:
        """Not claimed."""
        self._get(sandbox_id)
        raise UnsupportedError("update", "unshare", hint="Give the limits to create().")

    async def metrics(self, sandbox_id: str) -> Metrics:
        """See `Sandboxer.metrics`."""
        sandbox = self._get(sandbox_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if sandbox.task is None:
            return Metrics()
        layer = os.statvfs(self._path(sandbox, "rw"))
        used = (layer.f_blocks - layer.f_bfree) * layer.f_frsize
        return attrs.evolve(sandbox.task.metrics(), disk_bytes=used, disk_limit_bytes=root.disk(sandbox.spec)[0])

    async def list(self) -> Sequence[SandboxStatus]:
        """See `Sandboxer.list`."""
        return [await self.status(sandbox_id) for sandbox_id in list(self._sandboxes)]

    def root_fd(self, sandbox_id: str) -> int:
        """See `Sandboxer.root_fd`."""
        sandbox = self._get(sandbox_id)
        gone = NotFoundError(f"sandbox {sandbox.spec.name or sandbox_id!r} has no files")
        if "root" not in sandbox.held:
            raise gone
        fd = os.open(self._path(sandbox, "root"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Another process may have removed the sandbox, and the keeper may hold something else by this number.
        if f"/{self._short(sandbox_id)}/" not in os.readlink(f"/proc/self/fd/{fd}"):
            os.close(fd)
            raise gone
        return fd

    def host_ids(self, sandbox_id: str) -> tuple[int, int]:
        """See `Sandboxer.host_ids`."""
        return self._get(sandbox_id).first_id, root.IDS

    def abandon(self) -> None:
        """See `Sandboxer.abandon`."""
        for sandbox in self._sandboxes.values():
            self._let_go(sandbox)
        self._sandboxes.clear()

    @staticmethod
    def _let_go(sandbox: _Sandbox) -> None:
        """Close what this process holds; ends nothing."""
        if sandbox.task is not None:
            sandbox.task.forget()
        sandbox.task, sandbox.held = None, {}

    # --- names ---

    def _short(self, sandbox_id: str) -> str:
        return self._host.prefix(sandbox_id).rstrip("/")

    def _base(self, sandbox_id: str) -> str:
        return f"{self._host.work_dir}/{self._short(sandbox_id)}"

    def _image(self, sandbox_id: str) -> str:
        return f"{self._host.disk_dir}/unisandbox-{self._host.engine_id}-{self._short(sandbox_id)}.img"

    def _dirs(self, sandbox_id: str) -> tuple[str, ...]:
        return self._host.cgroups.dirs_of(self._short(sandbox_id))

    def _path(self, sandbox: _Sandbox, what: str) -> str:
        return f"/proc/{self._host.keeper.pid}/fd/{sandbox.held[what]}"

    def _inode(self, sandbox: _Sandbox, kind: str) -> int:
        return os.stat(self._path(sandbox, kind)).st_ino

    def _get(self, sandbox_id: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"no sandbox {sandbox_id!r}")
        return sandbox


def _limits(resources: Resources) -> Limits:
    return Limits(memory=resources.memory, swap=resources.swap, cpu=resources.cpu, pids=resources.pids)


def _check(spec: SandboxSpec) -> None:
    """Refuse what cannot be done, before anything is: nothing is accepted and ignored."""
    lacking = {
        f"rootfs {spec.rootfs.kind!r}": spec.rootfs.kind != "host",
        "rootfs 'host' with /usr/local": spec.rootfs.local,
        f"network {spec.network.kind!r}": spec.network.kind != "none",
        "userns 'host'": spec.userns == "host",
        "user_ids": spec.user_ids is not None,
        "share_pid": spec.share_pid,
        "mounts": bool(spec.mounts),
        "sysctls": bool(spec.sysctls),
        "dns": spec.dns is not None,
        "hosts": bool(spec.hosts),
        f"annotations {sorted(spec.annotations)}": bool(spec.annotations),
    }
    for what, asked in lacking.items():
        if asked:
            raise UnsupportedError(what, "unshare", hint="Use isolation='runc'.")
    if spec.security.seccomp != "unconfined":
        raise UnsupportedError(
            "seccomp", "unshare", hint="Use isolation='runc', or security=Security(seccomp='unconfined')."
        )
    if spec.resources.pids is not None and spec.resources.pids < _LEAST_PIDS:
        raise InvalidArgumentError(f"pids must be at least {_LEAST_PIDS}, got {spec.resources.pids}")
    root.user_of(spec.user)
