"""What the containers of one sandbox of namespaces need: cgroup, bundle, root file system."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Final

import attrs

from unisandbox.api import (
    AlreadyExistsError,
    ContainerSpec,
    CreateTask,
    InvalidArgumentError,
    Mount,
    ProcessSpec,
    Resources,
    Rootfs,
    RootMount,
    UnsupportedError,
)
from unisandbox.api.filesystem import parents_first
from unisandbox.backends.runc import serving, users
from unisandbox.backends.runc.adapting import Adapted, bind_op, root_op
from unisandbox.backends.runc.checks import check_container
from unisandbox.backends.runc.pod import Pod, open_sources, translate_job
from unisandbox.backends.runc.rlimits import Rlimits, most_files_in, process_limits
from unisandbox.backends.runc.rootfs import Op, mount_ops, not_shown, root_attributes, root_ops, until_served
from unisandbox.backends.runc.verifying import Verifier
from unisandbox.host import seccomp
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.identity import CALLER, Identity
from unisandbox.host.init import SpawnRequest
from unisandbox.host.keeper import Guard, JobFailed
from unisandbox.host.power import remedies
from unisandbox.host.removal import remove_tree
from unisandbox.host.services import Host
from unisandbox.oci import foreign
from unisandbox.oci.bundle import Bundle, NamespaceKind, OciMount, OciNamespace, held_path
from unisandbox.oci.calls import NOWHERE
from unisandbox.oci.interpreters import interpreter_of
from unisandbox.oci.plan import Plan, limits_of
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.users import ROOT, Copied, Credentials, Inside, resolve_user

_UNLIMITED: Final = Resources.unlimited()
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What our init needs to become the user that a process asks for; processes do not get more than the spec says.
_INIT_CAPABILITIES: Final = frozenset({"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"})
# With these whoever executes init might read it, so that it could be reached until it has seen to that itself. Where it
# belongs to root inside they are not effective then; it has them again when it begins.
_READING: Final = frozenset({"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"})
# The first to be killed when the host runs out of memory are processes in sandboxes, and init last of them.
_INIT_OOM_SCORE: Final = 100
_JOINED: Final[tuple[tuple[str, NamespaceKind], ...]] = (
    ("user", "user"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("net", "network"),
)
_PROCESS_OOM_SCORE: Final = 500


class PodPlanner:
    """Makes what the containers of one sandbox need; see `oci.plan.Planner`."""

    def __init__(
        self,
        host: Host,
        runtime: Runtime,
        pod: Pod,
        *,
        host_tree: Callable[[Rootfs], Awaitable[str]],
        init_fd: int,
        plain_limits: Rlimits,
    ) -> None:
        self._host = host
        self._runtime = runtime
        self._pod = pod
        self._host_tree = host_tree
        self._init_fd = init_fd
        self._plain_limits = plain_limits
        self._verifier = Verifier(host, pod, runtime.program)
        self._own_roots: set[str] = set()
        self._cgroups: dict[str, Cgroup] = {}

    async def prepare(self, request: CreateTask) -> Plan:
        """Root file system (unless the sandbox's own is shared), cgroup and bundle."""
        pod, container = self._pod, request.container
        assert container is not None  # noqa: S101 (the task service has looked)
        check_container(container, pod.spec.resources, most_files_in(self._plain_limits))
        if pod.keeper_ids is not None and container.rootfs is not None:
            users.check_rootfs(container.rootfs)
        if pod.is_single:
            users.check_user(container.user)
        cgroup = pod.cgroup.child(f"c-{container.name}", limits=limits_of(container.resources or _UNLIMITED))
        self._cgroups[container.name] = cgroup
        plan = self._plan(container, cgroup)
        place = pod.place()
        if container.rootfs is not None:
            place = pod.place(container.name)
            await self._make_root(container, container.rootfs, request)
        await self._guard_own_cgroups(plan.oci_id)
        self._bundle(f"{pod.work}{place.root}").write(self._host.keeper.outside(plan.bundle))
        if plan.admitted is not None:
            cgroup.admit(plan.admitted)
        return plan

    def _plan(self, container: ContainerSpec, cgroup: Cgroup) -> Plan:
        pod = self._pod
        rootfs, root = pod.spec.rootfs, "root"
        if container.rootfs is not None:
            rootfs, root = container.rootfs, f"root-{container.name}"
        quick = pod.spec.security.no_new_privileges or pod.spec.security.seccomp == "unconfined"
        return Plan(
            oci_id=f"{pod.short}-{container.name}",
            bundle=self._bundle_of(container.name),
            cgroup=cgroup,
            request=lambda process: self._request(container, process, root),
            admitted=self._init_id if quick else None,
            entered=self.entered,
            mounts=pod.held("mnt"),
            extra_fds=(self._init_fd,),
            verify=lambda pid: self._verifier.verify(container.name, pid, root_attributes(rootfs)),
            verify_process=lambda pid: self._verifier.verify_filter(container.name, pid),
            explain=lambda process: self._explain(container, process, rootfs, root),
        )

    async def adopt(self, container_id: str, bundle: str) -> Plan:
        """A bundle of somebody else, run as it is in a cgroup of ours."""
        self._cgroups[container_id] = cgroup = self._pod.cgroup.child(f"c-{container_id}")
        return self._foreign_plan(container_id, bundle, cgroup)

    async def adapt(self, request: CreateTask) -> Plan:
        """A bundle of our own from an engine's config, with the sandbox's namespaces; see `adapting`."""
        pod, name = self._pod, request.container_id
        if pod.keeper_ids is not None:
            raise UnsupportedError("a container from an engine's bundle", "runc", reason=remedies.who())
        bundle = self._bundle_of(name)
        adapted = Adapted(request, pod, self._runtime.program, pin=self.pin, entered=self.entered)
        try:
            self._cgroups[name] = cgroup = pod.cgroup.child(f"c-{name}", limits=adapted.limits)
            if adapted.devices is not None:
                cgroup.allow_devices(adapted.devices)
            plan = self._foreign_plan(name, bundle, cgroup, adapted.joined)
            await self._guard_own_cgroups(plan.oci_id)
            self._own_roots.add(name)
            fds = list(adapted.sources)
            steps = adapted.steps(len(fds), len(fds) + 1 if pod.mapped else None)
            with contextlib.ExitStack() as opened:
                fds.append(opened.enter_context(self._open("mnt")))
                if pod.mapped:
                    fds.append(self._host.keeper.open_held(pod.pins["user"], os.O_RDONLY))
                    opened.callback(os.close, fds[-1])
                await self._host.keeper.job(steps, fds=fds)
            adapted.write(self._host.keeper.outside(bundle))
        except JobFailed as error:
            raise translate_job(error, f"{pod.label}/{name}") from error
        finally:
            adapted.close()
        return plan

    def _bundle_of(self, container_id: str) -> str:
        """The directory of a bundle of our own, as the keeper sees it."""
        return f"{self._pod.work}/b/{container_id}"

    def _foreign_plan(
        self, container_id: str, bundle: str, cgroup: Cgroup, joined: Collection[str] = frozenset()
    ) -> Plan:
        is_ours = bundle == self._bundle_of(container_id)
        return Plan(
            oci_id=f"{self._pod.short}-{container_id}",
            bundle=bundle,
            cgroup=cgroup,
            request=_no_request,
            admitted=None,
            entered=self.entered if is_ours else NOWHERE,
            mounts=self._pod.held("mnt") if is_ours else "",
            extra_fds=(),
            verify=lambda pid: self._verifier.verify_bundle(container_id, pid, joined),
            verify_process=lambda _: None,
            explain=lambda _: "",
        )

    async def restore(
        self, container_id: str, container: ContainerSpec | None, bundle: str, *, half_made: bool = False
    ) -> Plan:
        """The plan of a container that was made before, perhaps by another process; see `Planner.restore`."""
        pod = self._pod
        name = f"c-{container_id}"
        try:
            cgroup = pod.cgroup.find(name)
        except FileNotFoundError:
            if not half_made:
                raise
            cgroup = pod.cgroup.child(name)  # its creation was cut before it had one
        self._cgroups[container_id] = cgroup
        if container is None:
            if os.path.isdir(self._host.keeper.outside(f"{pod.work}/c/{container_id}")):  # noqa: ASYNC240 (in memory)
                self._own_roots.add(container_id)
            return self._foreign_plan(container_id, bundle, cgroup)
        if container.rootfs is not None:
            self._own_roots.add(container_id)
            if pod.is_served(container.rootfs):
                await serving.restore(self._host, pod, container_id)
        return self._plan(container, cgroup)

    async def free(self, container_id: str) -> None:
        """Unmount and remove what `prepare`, `adopt` or `adapt` made."""
        cgroup = self._cgroups.pop(container_id, None)
        if cgroup is not None:
            cgroup.remove()
        await self._unguard_own_cgroups(f"{self._pod.short}-{container_id}")
        # Only the bundle's own files lie there, and no mount.
        reached("before bundle.remove", container_id)
        with contextlib.suppress(OSError):
            remove_tree(self._host.keeper.outside(self._bundle_of(container_id)))
        reached("after bundle.remove", container_id)
        if container_id in self._own_roots:
            work = self._pod.work
            paths = (f"{work}/c/{container_id}", f"{work}/rw/c/{container_id}")
            steps: list[Mapping[str, object]] = [{"do": "enter", "fd": 0}, {"do": "unmount", "path": paths[0]}]
            steps += [{"do": "remove_tree", "path": path} for path in paths]
            await serving.end(self._pod, container_id)
            names = [self._pod.held(f"root-{container_id}"), *serving.held_names(self._pod, container_id)]
            await self._host.keeper.drop(names, guards=True)
            # Asked for by name: when its ttl is over its mounts have ended with their namespace, and the number may be
            # another's.
            with contextlib.suppress(FileNotFoundError):
                fd = await self._host.keeper.take(self._pod.held("mnt"))
                try:
                    await self._host.keeper.job(steps, fds=[fd])
                finally:
                    os.close(fd)
            self._pod.fds.pop(f"root-{container_id}", None)
            self._own_roots.discard(container_id)

    async def _guard_own_cgroups(self, oci_id: str) -> None:
        """A runtime that insists on cgroups of its own leaves them behind when it dies."""
        dirs = self._runtime.own_cgroups(oci_id)
        if dirs:
            await self._host.keeper.guard([Guard(self._own_cgroups_guard(oci_id), "rmdir_cgroup", dirs)])

    async def _unguard_own_cgroups(self, oci_id: str) -> None:
        if self._runtime.own_cgroups(oci_id):
            await self._host.keeper.unguard([self._own_cgroups_guard(oci_id)])

    def _own_cgroups_guard(self, oci_id: str) -> str:
        return f"{self._pod.short}/{oci_id}/own-cgroups"

    async def _make_root(self, container: ContainerSpec, rootfs: Rootfs, request: CreateTask) -> None:
        pod = self._pod
        mounts = parents_first((*(() if container.own_mounts_only else pod.spec.mounts), *container.mounts))
        place = pod.place(container.name)
        sources = open_sources(rootfs, mounts, container.name)
        try:
            ops: list[Op] = [{"op": "mkdir", "path": f"/c/{container.name}", "parents": True}]
            # The engine's tree is seen in the mount namespaces that were made after it: surely in those of sandboxes
            # that are made of it.
            seen = pod.spec.rootfs.kind == "host" and pod.spec.rootfs.local == rootfs.local
            shared = await self._host_tree(rootfs) if rootfs.kind == "host" and seen else ""
            is_served = pod.is_served(rootfs)
            ops += root_ops(place, rootfs, pod.identity, mounts, shared, served=is_served)
            later: list[Op] = []
            if request.rootfs:
                first, later = self._engine_root(request, f"{place.root}{request.rootfs_at}", sources)
                ops += first
            ops += mount_ops(place, mounts, first_fd=int(rootfs.kind == "dir"))
            ops += [
                self._engine_bind(mount, f"{place.root}{request.rootfs_at}", sources) for mount in request.rootfs[1:]
            ]
            ops += later
            self._own_roots.add(container.name)
            steps: list[Mapping[str, object]] = [{"do": "enter", "fd": len(sources)}]
            sources.append(self._host.keeper.open_held(pod.fds["mnt"], os.O_RDONLY))
            if pod.mapped:
                steps.append({"do": "given", "fd": len(sources), "name": "user"})
                sources.append(self._host.keeper.open_held(pod.pins["user"], os.O_RDONLY))
            entering, held = steps.copy(), pod.held(f"root-{container.name}")
            ops, later = until_served(ops)
            steps.append({"do": "mounts", "root": pod.work, "ops": ops})
            rooted: Mapping[str, object] = {"do": "dirfd", "path": f"{pod.work}{place.root}", "name": "root"}
            if is_served:
                device = pod.held(serving.device_of(container.name))
                await self._host.keeper.job(steps, hold={"fuse": device}, fds=sources)
                steps = [*entering, {"do": "mounts", "root": pod.work, "ops": later}, rooted]
                numbers = await serving.served(self._host, pod, container.name, steps, {"root": held}, sources)
            else:
                numbers = (await self._host.keeper.job([*steps, rooted], hold={"root": held}, fds=sources)).held
            pod.fds[f"root-{container.name}"] = numbers[held]
        except JobFailed as error:
            said = [Mount.bind(mount.source, request.rootfs_at + mount.target) for mount in request.rootfs[1:]]
            raise translate_job(error, f"{pod.label}/{container.name}", (*mounts, *said), rootfs) from error
        finally:
            for fd in sources:
                os.close(fd)

    def _engine_root(self, request: CreateTask, path: str, sources: list[int]) -> tuple[list[Op], list[Op]]:
        """What an engine says, at a place in a root: what mounts it, and what is done when all is mounted in it.

        What is opened for it is added to `sources`.
        """
        pod, mounts, later = self._pod, request.rootfs[:1], list[Op]()
        if mounts[0].type == "overlay" and "ro" in mounts[0].options:
            # Not before the places of its mounts are made in it, as the runtimes do it.
            mounts = (attrs.evolve(mounts[0], options=tuple(o for o in mounts[0].options if o != "ro")),)
            later = [{"op": "restrict", "path": path, "attributes": ["readonly"], "recursive": False}]
        made: Op = {"op": "mkdir", "path": path, "parents": True, "uid": pod.first_id, "gid": pod.first_id}
        # As everything else that is mounted in a root of ours.
        return [made, root_op(mounts, path, pod, sources, ("nosuid", "nodev"))], later

    def _engine_bind(self, mount: RootMount, root: str, sources: list[int]) -> Op:
        """What mounts a source in an engine's root file system; it is opened, and added to `sources`."""
        pod, options = self._pod, set(mount.options)
        where = f"mount {mount.target!r}"
        if mount.type != "bind" or not mount.target:
            raise UnsupportedError(f"{where} of type {mount.type!r} in a root file system", "runc")
        if unknown := sorted(options - {"bind", "rbind", "ro", "rw", *foreign.IDMAP_OPTIONS}):
            raise UnsupportedError(f"{where} with option {unknown[0]!r}", "runc")
        idmap = foreign.idmap({"options": mount.options})
        if idmap and not pod.mapped:
            raise UnsupportedError(f"{where} with mapped ids", "runc", reason="its sandbox has no user namespace")
        op = bind_op(
            os.path.realpath(mount.source),
            root + mount.target,
            pod,
            sources,
            recursive="rbind" in options,
            attributes=["nosuid", "nodev", *["readonly"] * ("ro" in options)],
            idmap=idmap,
        )
        kind = os.fstat(sources[-1]).st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise InvalidArgumentError(f"{where}: {mount.source} is a device, and mounts are always nodev")
        return {**op, "uid": pod.first_id, "gid": pod.first_id}

    @property
    def _init_id(self) -> int:
        """The host's user id of init."""
        return self._pod.first_id if self._pod.keeper_ids is None else os.geteuid()

    @property
    def entered(self) -> dict[str, str]:
        """The namespaces in which the runtime itself has to start, since it cannot join them (runc, youki)."""
        features = self._runtime.program.features
        kinds: tuple[str, ...] = ()
        if self._pod.mapped and not features.held_userns:
            kinds = ("net", "ipc", "uts")
        elif self._pod.spec.network.kind == "namespace" and not features.foreign_netns:
            kinds = ("net",)
        return {kind: self.pin(kind) for kind in kinds if kind in self._pod.pins}

    @contextlib.contextmanager
    def _open(self, what: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A descriptor of our own of what the keeper holds."""
        fd = self._host.keeper.open_held(self._pod.fds[what], flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _inside(self, root: str) -> Iterator[Inside]:
        """A root directory of ours, as root inside sees it."""
        pod = self._pod
        # An ordinary user can act here as nobody but himself.
        mine = pod.keeper_ids is not None
        identity = CALLER if mine else Identity(*pod.host_ids, pod.spec.security.capabilities)
        with self._open(root, os.O_PATH | os.O_DIRECTORY) as fd:
            yield Inside(fd, identity)

    def pin(self, kind: str) -> str:
        """The path of a pinned namespace, for the keeper's children: they do not outlive it."""
        return held_path(self._host.keeper.pid, self._pod.pins[kind])

    def _bundle(self, root: str) -> Bundle:
        pod = self._pod
        security = pod.spec.security
        spaces = [OciNamespace("mount")]
        if not self._host.cgroups.namespaces_are_borders:
            # Otherwise init could not start processes in cgroups of their own; see SECURITY.md for what shows.
            spaces.append(OciNamespace("cgroup"))
        spaces.append(OciNamespace("pid", self.pin("pid")) if "pid" in pod.pins else OciNamespace("pid"))
        joined = pod.pins.keys() - self.entered.keys()
        spaces += [OciNamespace(name, self.pin(kind)) for kind, name in _JOINED if kind in joined]
        profile: seccomp.Profile | None = None
        if security.seccomp == "default":
            # A filter that a process may add needs no_new_privs: without it init has to do without clone3, too.
            profile = seccomp.INIT if security.no_new_privileges else seccomp.DEFAULT
        by_annotation = profile is not None and self._runtime.program.features.seccomp_bpf_annotation
        return Bundle(
            oci_version=self._runtime.program.oci_version,
            args=("/proc/self/fd/4",),
            # youki wants a PATH, although the program's path is absolute. Without HOME crun reads the container's
            # /etc/passwd, however large that is. Init's own environment reaches nobody.
            env=("PATH=/usr/bin:/bin", "HOME=/"),
            root=root,
            mounts=self._mounts(),
            namespaces=spaces,
            ids=pod.id_maps if pod.mapped else None,
            capabilities=security.capabilities | _INIT_CAPABILITIES,
            ineffective=_READING if pod.is_single else frozenset(),
            no_new_privileges=security.no_new_privileges,
            oom_score_adj=_INIT_OOM_SCORE,
            seccomp=None if profile is None or by_annotation else profile.to_oci(os.uname().machine),
            seccomp_bpf=_compiled(profile) if profile is not None and by_annotation else b"",
        )

    def _mounts(self) -> list[OciMount]:
        pod = self._pod
        mounts = [
            OciMount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
            OciMount("/dev", "tmpfs", "tmpfs", ("nosuid", "noexec", "strictatime", "mode=755", "size=65536k")),
            OciMount(
                "/dev/pts",
                "devpts",
                "devpts",
                ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *["gid=5"] * (not pod.is_single)),
            ),
            OciMount("/dev/shm", "bind", f"{pod.work}/shm", ("bind", "rw", "nosuid", "noexec", "nodev")),
        ]
        if pod.spec.network.kind in {"none", "user"}:
            # Only for the sandbox's own network: crun would fall back to the host's /sys, writable, without a word.
            mounts.append(OciMount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")))
        return mounts

    async def _request(self, container: ContainerSpec, process: ProcessSpec, root: str) -> SpawnRequest:
        spec = self._pod.spec
        user = process.user or container.user or spec.user
        who = await self._credentials(user, root)
        cwd = process.cwd or container.cwd or spec.cwd
        return SpawnRequest(
            argv=process.argv,
            env={"HOME": who.home, **self._environment(container, process)},
            cwd=cwd,
            uid=who.uid,
            gid=who.gid,
            groups=who.groups,
            capabilities=spec.security.capabilities,
            rlimits=process_limits(self._plain_limits, spec.resources, container.resources or _UNLIMITED),
            no_new_privs=spec.security.no_new_privileges,
            deny_clone3=spec.security.no_new_privileges and spec.security.seccomp == "default",
            keep_groups=self._pod.is_single,
            tty=(process.terminal.rows, process.terminal.columns) if process.terminal else None,
            oom_score_adj=_PROCESS_OOM_SCORE,
        )

    async def _credentials(self, user: str | None, root: str) -> Credentials:
        if user is None:
            return ROOT
        served = root.removeprefix("root").removeprefix("-")
        with self._inside(root) as inside:
            if served in self._pod.layers:
                return self._known(await serving.users_of(self._host, self._pod, served, inside.fd), user)
            return self._known(inside, user)

    def _known(self, inside: Inside | Copied, user: str) -> Credentials:
        if self._pod.is_single:
            return users.root_as(inside, user)
        return resolve_user(inside, user, largest_id=self._pod.ids - 1 if self._pod.mapped else 2**32 - 2)

    def _explain(self, container: ContainerSpec, process: ProcessSpec, rootfs: Rootfs, root: str) -> str:
        """Why a program could not be found."""
        path = self._environment(container, process)["PATH"]
        cwd = process.cwd or container.cwd or self._pod.spec.cwd
        with self._inside(root) as inside:
            interpreter = interpreter_of(inside, process.argv[0], path, cwd)
        if interpreter:
            return f"It is a script for {interpreter!r}, which is missing. {not_shown(interpreter, rootfs)}".strip()
        return not_shown(process.argv[0], rootfs) or ("" if "/" in process.argv[0] else f"Its PATH is {path!r}.")

    def _environment(self, container: ContainerSpec, process: ProcessSpec) -> dict[str, str]:
        env = {"PATH": _PATH, "LANG": "C.UTF-8"}
        if process.terminal is not None:
            env["TERM"] = "xterm"
        return env | {**self._pod.spec.env, **container.env, **process.env}


async def _no_request(_: ProcessSpec) -> SpawnRequest:
    raise AlreadyExistsError("a bundle's processes are started by the runtime")


@functools.cache
def _compiled(profile: seccomp.Profile) -> bytes:
    """The filter, compiled once per process instead of at each start: libseccomp takes 4 to 10 ms."""
    return seccomp.compile_bpf(profile)
