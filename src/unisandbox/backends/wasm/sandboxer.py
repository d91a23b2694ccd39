"""The sandboxer: a sandbox is a tree of files and what its guests share; it lives in this process and ends with it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    ContainerSpec,
    ContainerStatus,
    CreateSandbox,
    Exit,
    FileBounds,
    InvalidArgumentError,
    Metrics,
    Mount,
    NotFoundError,
    RecoverSandbox,
    Resources,
    Rootfs,
    SandboxSpec,
    SandboxStatus,
    StartedSandbox,
    UnsupportedError,
    short_name,
)
from unisandbox.api.filesystem import parents_first
from unisandbox.backends.wasm.artefacts import Images, Root
from unisandbox.backends.wasm.capabilities import NAME
from unisandbox.backends.wasm.checks import check_copied_mounts, check_mounts, check_resources, check_spec
from unisandbox.backends.wasm.compiled import Compiled
from unisandbox.backends.wasm.compiling import CompileLimits, Compiler
from unisandbox.backends.wasm.copied import Bounds, CopyMaker
from unisandbox.backends.wasm.domain import Domain
from unisandbox.backends.wasm.given import Surroundings
from unisandbox.backends.wasm.modules import Modules
from unisandbox.backends.wasm.probe import unmountable
from unisandbox.backends.wasm.programs import Programs
from unisandbox.backends.wasm.shares import Shares
from unisandbox.backends.wasm.store import Store, default_directory
from unisandbox.backends.wasm.task import WasmTasks
from unisandbox.backends.wasm.tree import Layer, SandboxTree, Sources, TreeMaker
from unisandbox.host.keeper import Guard
from unisandbox.host.services import Host


@attrs.define(eq=False)
class _Sandbox:
    """What is known of one. `task` is None before its start, and when only its remains are to be freed."""

    sandbox_id: str
    spec: SandboxSpec
    short: str
    image: str
    created_at: float
    root: Root | None = None
    #: All that its files are made of: its own root, and those of its containers.
    roots: list[Root] = attrs.field(factory=list)
    sources: Sources | None = None
    tree: SandboxTree | None = None
    bounds: Bounds | None = None
    shares: Shares | None = None
    task: WasmTasks | None = None
    started_at: float | None = None
    stopped_at: float | None = None
    ended: anyio.Event = attrs.field(factory=anyio.Event)

    @property
    def label(self) -> str:
        return self.spec.name or self.sandbox_id

    @property
    def layer(self) -> Layer:
        return Layer.of(self.spec.resources)


class WasmSandboxer:
    """See `Sandboxer`. One object per engine."""

    def __init__(
        self,
        host: Host,
        *,
        trust_signals: bool,
        fuel: int | None,
        cache: str | os.PathLike[str] | None,
        compile_limits: CompileLimits,
    ) -> None:
        """See `WasmBackend`."""
        settings = {"trust_signals": trust_signals, "fuel": fuel is not None}
        self._host = host
        self._settings = settings
        self._fuel = fuel
        self._domain: Domain | None = None
        store = Store(cache if cache is not None else default_directory())
        self._modules = Modules(Compiled(Compiler(host, settings, compile_limits), store, **settings))
        self._programs = Programs()
        self._unmountable = unmountable()
        self._copies = CopyMaker(host)
        self._trees = self._copies if self._unmountable else TreeMaker(host)
        self._images = Images(host)
        self._sandboxes: dict[str, _Sandbox] = {}

    async def create(self, request: CreateSandbox) -> None:
        """See `Sandboxer.create`: opens what will be mounted."""
        spec = request.spec
        if request.sandbox_id in self._sandboxes:
            raise AlreadyExistsError(f"sandbox {request.sandbox_id!r} exists already")
        check_spec(spec, NAME)
        self._check_mounts(spec.mounts)
        self._check_owner()
        sandbox = self._new(request.sandbox_id, spec)
        sandbox.root = await self._take_root(sandbox, spec.rootfs.path)
        try:
            sandbox.sources = Sources.open(sandbox.root.path, spec.mounts, sandbox.label)
        except BaseException:
            await self._free_roots(sandbox)
            raise
        self._sandboxes[request.sandbox_id] = sandbox
        if sandbox.layer.in_memory or self._unmountable:
            await anyio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._host.keeper.guard([Guard(f"{sandbox.short}/image", "unlink", (sandbox.image,))])

    def _check_mounts(self, mounts: Sequence[Mount]) -> None:
        check_mounts(mounts, NAME)
        if self._unmountable:
            check_copied_mounts(mounts, NAME, self._unmountable)

    def _new(self, sandbox_id: str, spec: SandboxSpec) -> _Sandbox:
        host, short = self._host, short_name(self._host.engine_id, sandbox_id)
        image = os.path.join(host.disk_dir, f"unisandbox-{host.engine_id}-{short}.img")
        return _Sandbox(sandbox_id, spec, short, image, time.time())

    async def _take_root(self, sandbox: _Sandbox, path: str) -> Root:
        root = await self._images.take(path)
        sandbox.roots.append(root)
        return root

    async def _free_roots(self, sandbox: _Sandbox) -> None:
        roots, sandbox.roots = sandbox.roots, []
        await self._images.free(*roots)

    def _check_owner(self) -> None:
        if not self._host.keeper.hello.owner:
            raise UnsupportedError(
                "attach",
                NAME,
                reason="its sandboxes live in the process that makes them, and the engine is another one's",
                hint="Open an engine of this process: Engine.open().",
            )

    async def start(self, sandbox_id: str) -> StartedSandbox:
        """See `Sandboxer.start`: makes the tree, and looks at it."""
        sandbox = self._get(sandbox_id)
        if sandbox.task is None:
            await self._make(sandbox)
        assert sandbox.task is not None  # noqa: S101 (it was made)
        sandbox.stopped_at, sandbox.ended = None, anyio.Event()
        return StartedSandbox(sandbox.task)

    async def _make(self, sandbox: _Sandbox) -> None:
        spec, sources = sandbox.spec, sandbox.sources
        assert sources is not None and sandbox.root is not None  # noqa: S101, PT018 (opened by `create`)
        if self._domain is None:
            self._domain = Domain.get(**self._settings)
        if sandbox.tree is None:
            sandbox.tree = await self._trees.make(
                sandbox.short,
                sandbox.label,
                sandbox.layer,
                sandbox.image,
                sources,
                mounts=spec.mounts,
                readonly=spec.rootfs.readonly,
            )
        root, host = os.fstat(sandbox.tree.root), os.stat("/")
        below = os.fstat(sources.root)
        if sandbox.tree.disk is None and root.st_dev in {below.st_dev, host.st_dev}:
            raise BackendError(f"sandbox {sandbox.label!r}: its root directory is not its own")
        sandbox.shares = Shares.of(spec.resources)
        sandbox.task = WasmTasks(
            sandbox.label,
            around=Surroundings.of(spec, sandbox.root),
            shares=sandbox.shares,
            fuel=self._fuel,
            domain=self._domain,
            modules=self._modules,
            programs=self._programs,
            tree=lambda container: self._tree_of(sandbox, container),
            free_tree=self._trees.free,
            own_tree=sandbox.tree,
        )
        sandbox.started_at = time.time()

    async def _tree_of(self, sandbox: _Sandbox, container: ContainerSpec) -> SandboxTree:
        """The files of a container that has some of its own: its layer is a part of the sandbox's."""
        rootfs = container.rootfs or sandbox.spec.rootfs
        mounts = parents_first((*sandbox.spec.mounts, *container.mounts))
        self._check_mounts(mounts)
        root = await self._take_root(sandbox, rootfs.path)
        sources = Sources.open(root.path, mounts, f"{sandbox.label}/{container.name}")
        try:
            return await self._trees.make(
                sandbox.short,
                sandbox.label,
                sandbox.layer,
                "",
                sources,
                mounts=mounts,
                readonly=rootfs.readonly,
                above=sandbox.tree,
                name=container.name,
            )
        finally:
            sources.close()

    async def prefetch(self, rootfs: Rootfs, program: str) -> None:
        """See `SupportsPrefetch`: finds the module and compiles it, unless it was compiled before."""
        check_spec(SandboxSpec(rootfs=rootfs), NAME)
        if self._domain is None:
            self._domain = Domain.get(**self._settings)
        root = await self._images.take(rootfs.path)
        try:
            sources = Sources.open(root.path, (), "prefetch")
            try:
                found = await self._programs.find(program, root.env, sources.root, sources.root, cwd=root.cwd)
                try:
                    module = self._modules.loaded(found) or await self._modules.get(self._domain, found, "")
                finally:
                    found.close()
            finally:
                sources.close()
        finally:
            await self._images.free(root)
        module.check()

    async def stop(self, sandbox_id: str, *, grace: float) -> None:
        """See `Sandboxer.stop`: a guest cannot put its end off, so no grace is needed."""
        sandbox = self._get(sandbox_id)
        if sandbox.task is not None:
            if grace > 0:
                await sandbox.task.ask_to_end()
            for container_id in sandbox.task.container_ids:
                await sandbox.task.delete(container_id)
        sandbox.stopped_at = time.time()
        sandbox.ended.set()

    # The next three read like those of "runc", since both answer the contract from a task service. They are not one
    # thing: here a sandbox ends by `stop` alone, there by the death of its first process, too, with namespaces and pids
    # to tell of; and what is below the backends knows containers, but no sandboxes.

    def kill_now(self, sandbox_id: str) -> None:
        """See `Sandboxer.kill_now`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.task is not None:
            for container_id in sandbox.task.container_ids:
                sandbox.task.kill_now(container_id)

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
        if task is not None:
            for container_id in task.container_ids:
                state = await task.state(container_id)
                containers.append(ContainerStatus(container_id, state.state, None, state.exit))
        await anyio.lowlevel.checkpoint_if_cancelled()
        return SandboxStatus(
            id=sandbox_id,
            name=spec.name,
            backend=NAME,
            state="created" if task is None else "stopped" if sandbox.stopped_at else "ready",
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            stopped_at=sandbox.stopped_at,
            containers=tuple(containers),
            labels=spec.labels,
            annotations=spec.annotations,
        )

    async def update(self, sandbox_id: str, resources: Resources) -> None:
        """See `Sandboxer.update`: memory, cpu and pids at once, the rest for processes that are started from now on."""
        sandbox = self._get(sandbox_id)
        if not isinstance(resources, Resources):
            raise InvalidArgumentError(f"resources must be Resources, got {resources!r}")
        if resources.disk not in {0, sandbox.layer.size}:
            raise UnsupportedError(
                "a change of the disk limit of a living sandbox", NAME, hint="Leave disk= out: it stays as it is."
            )
        check_resources(resources, NAME)
        if sandbox.shares is not None and sandbox.task is not None:
            sandbox.shares.update(resources, sandbox.task.running)
        # The layer stays what it was made with.
        sandbox.spec = attrs.evolve(sandbox.spec, resources=attrs.evolve(resources, disk=sandbox.layer.size))
        await anyio.lowlevel.checkpoint()

    async def metrics(self, sandbox_id: str) -> Metrics:
        """See `Sandboxer.metrics`."""
        sandbox = self._get(sandbox_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if sandbox.task is None or sandbox.tree is None:
            return Metrics()
        return attrs.evolve(
            sandbox.task.metrics(), disk_bytes=sandbox.tree.usage(), disk_limit_bytes=sandbox.layer.size
        )

    async def remove(self, sandbox_id: str) -> None:
        """See `Sandboxer.remove`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        keeper = self._host.keeper
        await self.stop(sandbox_id, grace=0)
        if sandbox.tree is not None:
            await self._trees.free(sandbox.tree)
        if sandbox.sources is not None:
            sandbox.sources.close()
        if self._unmountable or sandbox.tree is None:
            await self._copies.remove(sandbox.short)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sandbox.image)
        if keeper.alive and (not sandbox.layer.in_memory or sandbox.tree is None or sandbox.tree.short):
            await keeper.drop(prefix=f"{sandbox.short}/")
            if isinstance(self._trees, TreeMaker):
                self._trees.sweep(sandbox.short)
            await keeper.unguard([f"{sandbox.short}/image"])
        await self._free_roots(sandbox)
        self._sandboxes.pop(sandbox_id, None)

    async def recover(self, request: RecoverSandbox) -> StartedSandbox | None:
        """See `Sandboxer.recover`: what another process has made lives there, or is gone with it.

        Raises:
            UnsupportedError: it lives in another process.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        if request.lived and not self._host.keeper.hello.owner:
            self._check_owner()
        sandbox = self._sandboxes.get(request.sandbox_id)
        if sandbox is None:
            # Of a process that is gone: its file system image may be left, which `remove` finds by its name.
            self._sandboxes[request.sandbox_id] = self._new(request.sandbox_id, request.spec)
            return None
        if not request.lived or sandbox.task is None:
            return None
        if not request.started:
            sandbox.stopped_at = sandbox.stopped_at or time.time()
        return StartedSandbox(sandbox.task)

    async def list(self) -> Sequence[SandboxStatus]:
        """See `Sandboxer.list`."""
        return [await self.status(sandbox_id) for sandbox_id in list(self._sandboxes)]

    def root_fd(self, sandbox_id: str) -> int:
        """See `Sandboxer.root_fd`."""
        sandbox = self._get(sandbox_id)
        if sandbox.tree is None:
            raise NotFoundError(f"sandbox {sandbox.label!r} has no files before it is started")
        return os.dup(sandbox.tree.root)

    def file_bounds(self, sandbox_id: str) -> FileBounds | None:
        """See `SupportsFileBounds.file_bounds`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.tree is None or sandbox.tree.disk is None:
            return None
        if sandbox.bounds is None:
            sandbox.bounds = Bounds(sandbox.tree)
        return sandbox.bounds

    def host_ids(self, sandbox_id: str) -> tuple[int, int]:
        """See `Sandboxer.host_ids`: guests have no ids; what they write belongs to this process's user."""
        self._get(sandbox_id)
        return (0, 2**32 - 1) if os.geteuid() == 0 else (os.geteuid(), 1)

    def abandon(self) -> None:
        """See `Sandboxer.abandon`: the guests end, and the trees with the last descriptor of them."""
        for sandbox in self._sandboxes.values():
            if sandbox.task is not None:
                sandbox.task.abandon()
            if sandbox.tree is not None:
                sandbox.tree.close()
            if sandbox.sources is not None:
                sandbox.sources.close()
        self._sandboxes.clear()
        self._modules.clear()
        if self._domain is not None:
            self._domain.close()
            self._domain = None

    def _get(self, sandbox_id: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"no sandbox {sandbox_id!r}")
        return sandbox
