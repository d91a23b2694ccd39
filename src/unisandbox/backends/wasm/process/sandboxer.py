"""The sandboxer of guests in processes: every sandbox is one of "runc" under the same id, and its guests are workers.

So everything that the inner sandbox has under that id (cgroups, files, guards, notes, leases) has the names that the
engine expects of ours, and ends as the engine, the keeper and `doctor` end it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Final

import attrs

from unisandbox.api import (
    CreateSandbox,
    Exit,
    InvalidArgumentError,
    Metrics,
    NotFoundError,
    RecoverSandbox,
    Resources,
    Rootfs,
    Sandboxer,
    SandboxError,
    SandboxSpec,
    SandboxStatus,
    Security,
    StartedSandbox,
    SupportsContainerRoots,
    TaskService,
    UnsupportedError,
)
from unisandbox.backends.wasm.artefacts import Images as Layouts
from unisandbox.backends.wasm.artefacts import Root
from unisandbox.backends.wasm.checks import check_resources, check_spec, files_of
from unisandbox.backends.wasm.given import Surroundings
from unisandbox.backends.wasm.process.capabilities import NAME
from unisandbox.backends.wasm.process.images import Images
from unisandbox.backends.wasm.process.interior import Interior
from unisandbox.backends.wasm.process.notes import Notes
from unisandbox.backends.wasm.process.pool import IdleWorkers
from unisandbox.backends.wasm.process.task import WasmProcessTasks
from unisandbox.backends.wasm.process.workers import Workplace
from unisandbox.backends.wasm.programs import Programs
from unisandbox.host.services import Host

# A worker has the thread of its guest, one that watches it, and those of wasmtime that do its work on files.
_THREADS: Final = 16
# Of a worker itself: its Python, wasmtime and what it was handed over.
_WORKER_FILES: Final = 64
# Reading and changing files whoever they belong to, as guests of the in-process mode do; they have no users.
_CAPABILITIES: Final = frozenset({"CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID"})


@attrs.define(eq=False)
class _Sandbox:
    spec: SandboxSpec
    #: The files below it, and what their image says.
    root: Root
    #: O_PATH descriptor of their directory; -1 when another process has opened it and it is gone.
    lower: int = -1
    inner: TaskService | None = None
    task: WasmProcessTasks | None = None

    def close(self) -> None:
        """Close what this process holds of it."""
        if self.task is not None:
            self.task.abandon()
            self.task = self.inner = None
        if self.lower >= 0:
            os.close(self.lower)
            self.lower = -1


class WasmProcessSandboxer:
    """See `Sandboxer`. One object per engine."""

    def __init__(
        self, host: Host, inner: Sandboxer, images: Images, interior: Interior, idle: IdleWorkers, *, fuel: int | None
    ) -> None:
        self._host = host
        self._inner = inner
        self._images = images
        self._interior = interior
        self._idle = idle
        self._fuel = fuel
        self._programs = Programs()
        self._roots = Layouts(host, components=True)
        self._sandboxes: dict[str, _Sandbox] = {}

    async def create(self, request: CreateSandbox) -> None:
        """See `Sandboxer.create`."""
        spec = request.spec
        check_spec(spec, NAME, is_process=True)
        root = await self._roots.take(spec.rootfs.path)
        sandbox = _Sandbox(spec, root, _open_directory(root.path))
        try:
            if sandbox.lower < 0:
                raise InvalidArgumentError(
                    f"root directory of {spec.name or 'new'!r} cannot be used: {spec.rootfs.path} is no directory"
                )
            await self._inner.create(CreateSandbox(request.sandbox_id, _inner_spec(spec, root.path)))
        except BaseException:
            sandbox.close()
            await self._roots.free(root)
            raise
        self._sandboxes[request.sandbox_id] = sandbox

    async def start(self, sandbox_id: str) -> StartedSandbox:
        """See `Sandboxer.start`."""
        sandbox = self._get(sandbox_id)
        return StartedSandbox(self._task(sandbox_id, sandbox, (await self._inner.start(sandbox_id)).task))

    def _task(self, sandbox_id: str, sandbox: _Sandbox, inner: TaskService) -> WasmProcessTasks:
        if sandbox.task is None or sandbox.inner is not inner:
            if sandbox.task is not None:
                sandbox.task.abandon()
            sandbox.inner = inner
            notes = Notes(self._host.keeper, self._host.prefix(sandbox_id), kept=self._host.shared)
            label = sandbox.spec.name or sandbox_id
            place = Workplace(
                sandbox_id,
                label,
                inner,
                self._interior,
                self._idle,
                notes,
                self._fuel,
                sandbox.spec.user_ids,
                functools.partial(self._container_root, sandbox_id),
            )
            sandbox.task = WasmProcessTasks(
                sandbox.spec.resources,
                place,
                around=Surroundings.of(sandbox.spec, sandbox.root),
                root_fd=lambda: self._inner.root_fd(sandbox_id),
                lower=sandbox.lower,
                programs=self._programs,
                images=self._images,
            )
        return sandbox.task

    def _container_root(self, sandbox_id: str, container_id: str) -> int:
        if not isinstance(self._inner, SupportsContainerRoots):
            raise UnsupportedError("a container with files of its own", NAME)
        return self._inner.container_root_fd(sandbox_id, container_id)

    async def recover(self, request: RecoverSandbox) -> StartedSandbox | None:
        """See `Sandboxer.recover`."""
        sandbox = self._sandboxes.get(request.sandbox_id)
        path = request.spec.rootfs.path
        started = await self._inner.recover(attrs.evolve(request, spec=_inner_spec(request.spec, path)))
        if sandbox is None:
            sandbox = self._sandboxes.setdefault(request.sandbox_id, _Sandbox(request.spec, Root(path)))
        if started is None:
            sandbox.close()
            return None
        if sandbox.lower < 0 and not sandbox.root.image:
            with contextlib.suppress(SandboxError):  # a layout that was removed meanwhile: its files are still there
                sandbox.root = await self._roots.take(path)
        if sandbox.lower < 0:
            sandbox.lower = _open_directory(sandbox.root.path)
        task = self._task(request.sandbox_id, sandbox, started.task)
        await task.restore(exclusive=request.exclusive)
        return attrs.evolve(started, task=task)

    async def stop(self, sandbox_id: str, *, grace: float) -> None:
        """See `Sandboxer.stop`: a guest cannot put its end off."""
        task = self._get(sandbox_id).task
        if task is not None:
            task.release_idle()
        await self._inner.stop(sandbox_id, grace=grace)
        if task is not None:
            for container_id in task.container_ids:
                await task.delete(container_id)

    def kill_now(self, sandbox_id: str) -> None:
        """See `Sandboxer.kill_now`."""
        self._inner.kill_now(sandbox_id)

    async def wait(self, sandbox_id: str) -> Exit:
        """See `Sandboxer.wait`."""
        return await self._inner.wait(sandbox_id)

    async def status(self, sandbox_id: str) -> SandboxStatus:
        """See `Sandboxer.status`."""
        sandbox = self._get(sandbox_id)
        status = await self._inner.status(sandbox_id)
        containers = [] if sandbox.task is None else [await sandbox.task.status(one) for one in status.containers]
        return attrs.evolve(status, backend=NAME, containers=tuple(containers))

    async def update(self, sandbox_id: str, resources: Resources) -> None:
        """See `Sandboxer.update`: the limit of processor time holds for guests that are started from now on."""
        sandbox = self._get(sandbox_id)
        if not isinstance(resources, Resources):
            raise InvalidArgumentError(f"resources must be Resources, got {resources!r}")
        check_resources(resources, NAME)
        await self._inner.update(sandbox_id, _inner_resources(resources))
        sandbox.spec = attrs.evolve(sandbox.spec, resources=resources)
        if sandbox.task is not None:
            sandbox.task.resources = resources

    async def metrics(self, sandbox_id: str) -> Metrics:
        """See `Sandboxer.metrics`: `pids` are guests, everything else counts their processes too."""
        sandbox = self._get(sandbox_id)
        metrics = await self._inner.metrics(sandbox_id)
        if sandbox.task is None:
            return metrics
        oom_kills = None if metrics.oom_kills is None else metrics.oom_kills + sandbox.task.oom_kills
        return attrs.evolve(
            metrics,
            pids=await sandbox.task.running(),
            pids_limit=sandbox.task.resources.pids,
            oom_kills=oom_kills,
        )

    async def remove(self, sandbox_id: str) -> None:
        """See `Sandboxer.remove`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.task is not None:
            await self.stop(sandbox_id, grace=0)
        await self._inner.remove(sandbox_id)
        if sandbox is not None:
            sandbox.close()
            if self._sandboxes.pop(sandbox_id, None) is not None:
                await self._roots.free(sandbox.root)

    async def list(self) -> Sequence[SandboxStatus]:
        """See `Sandboxer.list`."""
        return [await self.status(sandbox_id) for sandbox_id in list(self._sandboxes)]

    def root_fd(self, sandbox_id: str) -> int:
        """See `Sandboxer.root_fd`."""
        return self._inner.root_fd(sandbox_id)

    def host_ids(self, sandbox_id: str) -> tuple[int, int]:
        """See `Sandboxer.host_ids`."""
        return self._inner.host_ids(sandbox_id)

    def abandon(self) -> None:
        """See `Sandboxer.abandon`; the engine abandons the inner one itself."""
        for sandbox in self._sandboxes.values():
            sandbox.close()
        self._sandboxes.clear()
        self._idle.close()
        self._images.close()

    def _get(self, sandbox_id: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"no sandbox {sandbox_id!r}")
        return sandbox


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def _inner_spec(spec: SandboxSpec, root: str) -> SandboxSpec:
    """The sandbox of namespaces for a sandbox of guests: the guest's environment is not there."""
    return attrs.evolve(
        spec,
        isolation="runc",
        rootfs=Rootfs.dir(root, readonly=spec.rootfs.readonly),
        resources=_inner_resources(spec.resources),
        env={},
        cwd="/",
        user=None,
        security=Security(capabilities=_CAPABILITIES, seccomp=spec.security.seccomp),
    )


def _inner_resources(resources: Resources) -> Resources:
    """`pids` counts guests, which `task` does; here it bounds what a guest that has broken out could start."""
    return attrs.evolve(
        resources,
        cpu_seconds=None,
        pids=None if resources.pids is None else (resources.pids + 1) * _THREADS,
        nofile=None if resources.nofile is None else files_of(resources) + _WORKER_FILES,
    )
