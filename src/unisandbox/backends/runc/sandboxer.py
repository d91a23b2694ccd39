"""The sandboxer of namespaces: an idle sandbox is a few pins in the keeper and no process at all."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
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
    short_name,
)
from unisandbox.backends.runc import serving, users
from unisandbox.backends.runc.asking import ask_to_end
from unisandbox.backends.runc.checks import check_resources, check_sandbox
from unisandbox.backends.runc.making import Maker, clear_network, restore_network
from unisandbox.backends.runc.pidns import SharedPids
from unisandbox.backends.runc.planner import PodPlanner
from unisandbox.backends.runc.pod import DEVICES, Pod, ids_of, open_sources
from unisandbox.backends.runc.rlimits import Rlimits, most_files_in, plain_limits
from unisandbox.backends.runc.rootfs import Layer
from unisandbox.host import subordinate
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroup, Cgroups, Limits, patience
from unisandbox.host.init import open_binary
from unisandbox.host.keeper import Guard
from unisandbox.host.removal import remove_tree
from unisandbox.host.services import Host
from unisandbox.oci.changing import refusal
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.plan import limits_of, metrics_of
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.task import OciTaskService

_DYING_SECONDS: Final = 0.2
# How long the end of killed processes may take: they may sit in the kernel.
_END_SECONDS: Final = 5.0


@attrs.define(eq=False, repr=False)
class _Sandbox:
    pod: Pod
    created_at: float
    task: OciTaskService | None = None
    planner: PodPlanner | None = None
    pids: SharedPids | None = None
    # It cannot be used; what is left of it is freed by name.
    remains: bool = False
    started_at: float | None = None
    stopped_at: float | None = None
    # Its pid namespace has lost its first process.
    lost_at: float | None = None
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class RuncSandboxer:
    """See `Sandboxer`. One object per engine."""

    def __init__(self, host: Host, runtime: Runtime) -> None:
        self._host = host
        self._runtime = runtime
        self._sandboxes: dict[str, _Sandbox] = {}
        self._maker = Maker(host)
        # The engine's own.
        self._root: Cgroup | None = None
        self._init_fd = -1

    async def create(self, request: CreateSandbox) -> None:
        """See `Sandboxer.create`."""
        spec = request.spec
        if request.sandbox_id in self._sandboxes:
            raise AlreadyExistsError(f"sandbox {request.sandbox_id!r} exists already")
        check_sandbox(spec, self._runtime.program, most_files_in(self._plain_limits))
        host = self._host
        if host.keeper.ids is not None:
            users.check_sandbox(spec, host.cgroups, host.keeper.ids)
        short = short_name(host.engine_id, request.sandbox_id)
        cgroups = host.cgroups.below(spec.cgroup_parent)
        dirs = cgroups.dirs_of(short)
        image = self._image(short)
        sources = open_sources(spec.rootfs, spec.mounts, spec.name or "new")
        undo = [
            Guard(f"{short}/cgroup-directories", "rmdir_cgroup", (*dirs, *_own_parents(cgroups, spec))),
            Guard(f"{short}/processes", "kill_cgroup", dirs),
        ]
        if not Layer.of(spec.resources).in_memory:
            undo.append(Guard(f"{short}/image", "unlink", (image,)))
        try:
            await host.keeper.guard(undo)
            cgroup = self._make_cgroup(cgroups, short, limits_of(spec.resources))
        except BaseException:
            for fd in sources:
                os.close(fd)
            with anyio.CancelScope(shield=True):
                await patience.remove(dirs, 1.0)
                await host.keeper.unguard([guard.name for guard in undo])
            raise
        pod = self._pod_of(request.sandbox_id, spec)
        pod.cgroup, pod.sources = cgroup, sources
        self._sandboxes[request.sandbox_id] = _Sandbox(pod, time.time())
        # Root of a user namespace cannot make devices, and nothing is mounted for him in which one could be opened.
        if spec.security.devices == "usual" and host.keeper.ids is None:
            cgroup.allow_devices(DEVICES)

    def _make_cgroup(self, cgroups: Cgroups, short: str, limits: Limits) -> Cgroup:
        if cgroups is not self._host.cgroups:
            return cgroups.root().child(short, limits=limits)
        if self._root is not None:
            with contextlib.suppress(FileNotFoundError):  # another process of the engine has closed, and removed it
                return self._root.child(short, limits=limits)
        if self._host.keeper.ids is not None and not cgroups.places:
            return cgroups.nowhere().child(short, limits=limits)
        self._root = self._host.cgroups.root()
        return self._root.child(short, limits=limits)

    def _pod_of(self, sandbox_id: str, spec: SandboxSpec) -> Pod:
        host = self._host
        short = short_name(host.engine_id, sandbox_id)
        return Pod(
            sandbox_id,
            spec,
            short,
            f"{host.work_dir}/{short}",
            Layer.of(spec.resources),
            self._image(short),
            keeper_ids=host.keeper.ids,
        )

    def _image(self, short: str) -> str:
        return os.path.join(self._host.disk_dir, f"unisandbox-{self._host.engine_id}-{short}.img")

    async def start(self, sandbox_id: str) -> StartedSandbox:
        """See `Sandboxer.start`."""
        sandbox = self._get(sandbox_id)
        pod = sandbox.pod
        if sandbox.task is None:
            await self._maker.make(pod)
            sandbox.planner = await self._planner_of(pod)
            sandbox.task = self._task_of(pod, sandbox.planner)
            sandbox.started_at = time.time()
            if self._host.shared:
                facts = pod.facts(sandbox.created_at, sandbox.started_at)
                await self._host.keeper.notes.write(f"{pod.short}/pod", facts)
        if pod.spec.share_pid and sandbox.pids is None:
            sandbox.pids = await SharedPids.make(self._host, pod, await self._init())
        if sandbox.stopped_at is not None:
            sandbox.started_at, sandbox.stopped_at, sandbox.lost_at = time.time(), None, None
        sandbox.ended = anyio.Event()
        return StartedSandbox(sandbox.task)

    async def _init(self) -> int:
        if self._init_fd < 0:
            fd = open_binary()
            ids = self._host.keeper.ids
            try:
                if ids is not None and not subordinate.are_single(ids):
                    # This user is root inside; what is nobody's there cannot be reached there. See `open_binary`.
                    uid, gid = (subordinate.reserved(rows) for rows in ids)
                    await self._host.keeper.job([{"do": "give", "fd": 0, "uid": uid, "gid": gid}], fds=[fd])
            except BaseException:
                os.close(fd)
                raise
            if self._init_fd >= 0:  # another task was quicker
                os.close(fd)
            else:
                self._init_fd = fd
        return self._init_fd

    @functools.cached_property
    def _plain_limits(self) -> Rlimits:
        return plain_limits(self._host.keeper.pid)  # nobody changes those of the keeper, which all go by

    async def _planner_of(self, pod: Pod) -> PodPlanner:
        return PodPlanner(
            self._host,
            self._runtime,
            pod,
            host_tree=self._maker.host_tree,
            init_fd=await self._init(),
            plain_limits=self._plain_limits,
        )

    def _task_of(self, pod: Pod, planner: PodPlanner) -> OciTaskService:
        ledger = Ledger(self._host.keeper, f"{pod.short}/", kept=self._host.shared)
        return OciTaskService(pod.label, self._host.keeper, self._runtime, planner, ledger)

    async def recover(self, request: RecoverSandbox) -> StartedSandbox | None:
        """See `Sandboxer.recover`."""
        sandbox_id, keeper = request.sandbox_id, self._host.keeper
        sandbox = self._sandboxes.get(sandbox_id)
        short = short_name(self._host.engine_id, sandbox_id)
        note = await keeper.notes.find(f"{short}/pod") if request.lived else None
        if sandbox is None:
            sandbox = _Sandbox(self._pod_of(sandbox_id, request.spec), time.time())
        if note is None:
            if sandbox_id in self._sandboxes:
                self._let_go(sandbox)
            self._sandboxes[sandbox_id] = sandbox
            sandbox.remains = True
            return None
        pod = sandbox.pod
        pod.spec = request.spec  # its limits may have been changed
        sandbox.created_at, sandbox.started_at = pod.restore(note, await keeper.held(f"{short}/"))
        try:
            pod.cgroup = self._host.cgroups.below(pod.spec.cgroup_parent).find(short)
        except FileNotFoundError:
            sandbox.remains = True
        self._sandboxes[sandbox_id] = sandbox
        if sandbox.remains or "root" not in pod.fds:
            sandbox.remains = True
            return None
        sandbox.stopped_at = None if request.started else sandbox.stopped_at or time.time()
        if sandbox.planner is None:
            sandbox.planner = await self._planner_of(pod)
        if sandbox.task is None:
            sandbox.task = self._task_of(pod, sandbox.planner)
        await restore_network(pod, self._host)
        if pod.is_served(pod.spec.rootfs):
            await serving.restore(self._host, pod)
        if pod.spec.share_pid:
            found = await SharedPids.restore(self._host, pod)
            # Not before: others look at it meanwhile.
            former, sandbox.pids = sandbox.pids, found
            if former is not None:
                former.close()
        if pod.spec.share_pid and request.exclusive and (sandbox.pids is None or sandbox.pids.has_ended):
            if sandbox.pids is not None:
                sandbox.pids.close()
                sandbox.pids = None
            await SharedPids.clear(self._host, pod)
            if request.started:
                sandbox.pids = await SharedPids.make(self._host, pod, await self._init())
        if request.started and (sandbox.pids is None or not sandbox.pids.has_ended):
            sandbox.lost_at = None
            if sandbox.ended.is_set():
                sandbox.ended = anyio.Event()
        await sandbox.task.restore(exclusive=request.exclusive)
        return StartedSandbox(sandbox.task)

    async def stop(self, sandbox_id: str, *, grace: float) -> None:
        """See `Sandboxer.stop`."""
        sandbox = self._get(sandbox_id)
        task = sandbox.task
        sandbox.pod.wake()  # what waits for its files could not be killed
        if task is not None:
            if grace > 0:
                await ask_to_end(task, grace)
            for container_id in task.container_ids:
                task.kill_now(container_id)
        try:
            if task is not None:
                for container_id in task.container_ids:
                    await task.delete(container_id)
            if sandbox.pids is not None:
                await sandbox.pids.end(self._host, sandbox.pod)
                sandbox.pids = None
        except UnavailableError:
            await self._end_without_keeper(sandbox)
        sandbox.stopped_at = sandbox.lost_at or time.time()
        sandbox.ended.set()

    async def ask_to_end(self, sandbox_id: str, grace: float) -> None:
        """See `SupportsGrace.ask_to_end`."""
        task = self._get(sandbox_id).task
        if task is not None:
            await ask_to_end(task, grace)

    def kill_now(self, sandbox_id: str) -> None:
        """See `Sandboxer.kill_now`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None and sandbox.task is not None:
            for container_id in sandbox.task.container_ids:
                sandbox.task.kill_now(container_id)

    async def wait(self, sandbox_id: str) -> Exit:
        """See `Sandboxer.wait`."""
        sandbox = self._get(sandbox_id)
        async with anyio.create_task_group() as group:
            if sandbox.pids is not None:
                group.start_soon(self._see_the_end, sandbox, sandbox.pids)
            await sandbox.ended.wait()
            group.cancel_scope.cancel()
        return Exit(code=0, exited_at=sandbox.stopped_at or sandbox.lost_at or time.time())

    async def _see_the_end(self, sandbox: _Sandbox, pids: SharedPids) -> None:
        """Without the first process of its pid namespace it is at its end, although nobody has stopped it."""
        # The keeper is dead: whoever asks for the status is told. Or it knows of it no more, since it was freed.
        with contextlib.suppress(UnavailableError, ProcessLookupError):
            at = await pids.ended_at(self._host.keeper)
            now = sandbox.pids
            if now is not None and pids.is_same(now) and not now.ending:
                sandbox.lost_at = at
                sandbox.ended.set()

    async def status(self, sandbox_id: str) -> SandboxStatus:
        """See `Sandboxer.status`."""
        sandbox = self._get(sandbox_id)
        pod, task = sandbox.pod, sandbox.task
        containers: list[ContainerStatus] = []
        if task is not None:
            for container_id in task.container_ids:
                state = await task.state(container_id)
                containers.append(ContainerStatus(container_id, state.state, state.pid, state.exit))
        await anyio.lowlevel.checkpoint_if_cancelled()
        pids = sandbox.pids
        if pids is not None and pids.has_ended:
            await self._see_the_end(sandbox, pids)
        stopped_at = sandbox.stopped_at or sandbox.lost_at
        return SandboxStatus(
            id=sandbox_id,
            name=pod.spec.name,
            backend="runc",
            state="created" if sandbox.task is None else "stopped" if stopped_at else "ready",
            created_at=sandbox.created_at,
            started_at=sandbox.started_at,
            stopped_at=stopped_at,
            containers=tuple(containers),
            labels=pod.spec.labels,
            annotations=pod.spec.annotations,
            namespaces=dict(pod.inodes),
            netns_path=self._netns_path(pod),
            warnings=pod.warnings,
        )

    def _netns_path(self, pod: Pod) -> str:
        keeper = self._host.keeper
        return f"/proc/{keeper.pid}/fd/{pod.pins['net']}" if "net" in pod.pins and keeper.alive else ""

    async def update(self, sandbox_id: str, resources: Resources) -> None:
        """See `Sandboxer.update`."""
        pod = self._get(sandbox_id).pod
        if not isinstance(resources, Resources):
            raise InvalidArgumentError(f"resources must be Resources, got {resources!r}")
        if resources.disk not in {0, pod.layer.size}:
            raise UnsupportedError(
                "a change of the disk limit of a living sandbox", "runc", hint="Leave disk= out: it stays as it is."
            )
        check_resources(resources, most_files_in(self._plain_limits))
        if pod.keeper_ids is not None:
            users.check_resources(resources, self._host.cgroups.missing)
        try:
            pod.cgroup.set_limits(limits_of(resources))
        except OSError as error:
            raise refusal(error, f"sandbox {pod.spec.name or sandbox_id!r}") from error
        pod.spec = attrs.evolve(pod.spec, resources=attrs.evolve(resources, disk=pod.layer.size))
        await anyio.lowlevel.checkpoint()

    async def metrics(self, sandbox_id: str) -> Metrics:
        """See `Sandboxer.metrics`."""
        pod = self._get(sandbox_id).pod
        await anyio.lowlevel.checkpoint_if_cancelled()
        task = self._get(sandbox_id).task
        metrics = metrics_of(pod.cgroup)
        if task is not None and metrics.oom_kills is not None:
            metrics = attrs.evolve(metrics, oom_kills=task.oom_kills())
        if "rw" not in pod.fds:
            return metrics
        fd = self._host.keeper.open_held(pod.fds["rw"])
        try:
            layer = os.fstatvfs(fd)
        finally:
            os.close(fd)
        return attrs.evolve(
            metrics,
            disk_bytes=(layer.f_blocks - layer.f_bfree) * layer.f_frsize,
            disk_limit_bytes=pod.layer.size,
        )

    async def remove(self, sandbox_id: str) -> None:
        """See `Sandboxer.remove`."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        pod, keeper = sandbox.pod, self._host.keeper
        if sandbox.remains:
            self._let_go(sandbox)
            await self._remove_remains(pod)
            self._sandboxes.pop(sandbox_id, None)
            return
        self.kill_now(sandbox_id)
        for helper in pod.layers.values():
            helper.kill()  # what waits for its files could not be killed
        await self.stop(sandbox_id, grace=0)
        if not keeper.alive:
            await self._end_without_keeper(sandbox)
            self._sandboxes.pop(sandbox_id, None)
            return
        if pod.network is not None:
            await pod.network.end()
        for container in list(pod.layers):
            await serving.end(pod, container)
        if not pod.cgroup.remove():  # somebody is in there, or about to be gone
            pod.cgroup.kill()
            if not await patience.remove(pod.cgroup.dirs, _END_SECONDS):
                raise BackendError(f"sandbox {pod.label!r}: its cgroups {pod.cgroup.dirs} cannot be removed")
        self._leave(pod)
        # With the last descriptor its mount namespace is gone, and all its mounts; what is left are bundles.
        await keeper.drop(prefix=f"{pod.short}/", guards=True)
        remove_tree(self._host.keeper.outside(pod.work))
        pod.close()
        if pod.lease is not None:
            # Everything that had these ids is gone: the next sandbox may have them.
            await self._maker.release(pod)
        self._sandboxes.pop(sandbox_id, None)

    async def _remove_remains(self, pod: Pod) -> None:
        """Free what is left of a sandbox of which only the names are known."""
        keeper = self._host.keeper
        cgroups = self._host.cgroups.below(pod.spec.cgroup_parent)
        dirs = cgroups.dirs_of(pod.short)
        await patience.kill(dirs, 1.0)
        if keeper.alive:
            await clear_network(pod, keeper)
            await serving.clear(self._host, pod)
            await keeper.drop(prefix=f"{pod.short}/")
            remove_tree(self._host.keeper.outside(pod.work))
        if not await patience.remove(dirs, _END_SECONDS):
            raise BackendError(f"sandbox {pod.label!r}: its cgroups {dirs} cannot be removed")
        self._leave(pod)
        with contextlib.suppress(FileNotFoundError):  # it had none, or its guard was quicker
            reached("before image.unlink", pod.image)
            os.unlink(pod.image)
            reached("after image.unlink", pod.image)
        if keeper.alive:
            await keeper.drop([ids_of(pod.short)], prefix=f"{pod.short}/", guards=True)

    def _let_go(self, sandbox: _Sandbox) -> None:
        """Close what this process holds of a sandbox; ends nothing."""
        if sandbox.task is not None:
            sandbox.task.abandon()
        if sandbox.pids is not None:
            sandbox.pids.close()
            sandbox.pids = None
        sandbox.pod.close()

    async def _end_without_keeper(self, sandbox: _Sandbox) -> None:
        """The keeper is dead, and with it mounts, pins and every init; what is left are cgroups and descriptors."""
        if not self._host.keeper.ends_within(_DYING_SECONDS):
            raise BackendError(f"the keeper does not answer for sandbox {sandbox.pod.label!r}")
        sandbox.pod.cgroup.kill()
        self._let_go(sandbox)
        await patience.remove(sandbox.pod.cgroup.dirs, _END_SECONDS)
        await self._runtime.remove_own_cgroups(f"{sandbox.pod.short}-")
        self._leave(sandbox.pod)

    def _leave(self, pod: Pod) -> None:
        """Below a parent of its own the engine's cgroup ends with its last sandbox there."""
        if pod.spec.cgroup_parent:
            self._host.cgroups.below(pod.spec.cgroup_parent).leave()

    async def list(self) -> Sequence[SandboxStatus]:
        """See `Sandboxer.list`."""
        return [await self.status(sandbox_id) for sandbox_id in list(self._sandboxes)]

    def root_fd(self, sandbox_id: str) -> int:
        """See `Sandboxer.root_fd`."""
        self._wake()
        return self._get(sandbox_id).pod.root_fd(self._host.keeper)

    def container_root_fd(self, sandbox_id: str, container_id: str) -> int:
        """See `SupportsContainerRoots.container_root_fd`."""
        self._wake()
        return self._get(sandbox_id).pod.root_fd(self._host.keeper, container_id)

    def _wake(self) -> None:
        """Let every helper go on: who works with the files of one sandbox may wait for another one's (the clerk)."""
        for sandbox in self._sandboxes.values():
            sandbox.pod.wake()

    def host_ids(self, sandbox_id: str) -> tuple[int, int]:
        """See `Sandboxer.host_ids`."""
        return self._get(sandbox_id).pod.host_ids

    def abandon(self) -> None:
        """See `Sandboxer.abandon`."""
        for sandbox in self._sandboxes.values():
            self._let_go(sandbox)
        self._sandboxes.clear()
        if self._init_fd >= 0:
            os.close(self._init_fd)
            self._init_fd = -1

    def _get(self, sandbox_id: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"no sandbox {sandbox_id!r}")
        return sandbox


def _own_parents(cgroups: Cgroups, spec: SandboxSpec) -> tuple[str, ...]:
    """The engine's cgroup below a parent that the sandbox has chosen, which nobody else would remove."""
    return tuple(f"{place.parent}/{cgroups.name}" for place in cgroups.places) if spec.cgroup_parent else ()
