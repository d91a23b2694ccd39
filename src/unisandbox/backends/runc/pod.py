"""One sandbox of namespaces: what it holds on the host, and how its containers are made."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    ContainerSpec,
    InvalidArgumentError,
    Mount,
    ProcessSpec,
    Resources,
    Rootfs,
    SandboxSpec,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.backends.runc.rootfs import Identity, Layer, Op, Place, mount_ops, root_ops
from unisandbox.host import namespaces, seccomp
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.init import SpawnRequest
from unisandbox.host.keeper import Guard, JobFailed
from unisandbox.host.services import Host
from unisandbox.oci.bundle import Bundle, NamespaceKind, OciMount, OciNamespace
from unisandbox.oci.plan import Plan, limits_of
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.users import resolve_user

IDS: Final = 65536
"""How many user ids a sandbox has, as every image may use 0 to 65535."""

HELD: Final = ("root", "rw", "mnt")
"""What the keeper holds of every sandbox beside its namespaces; see `Pod.fds`."""

_PINNED: Final = ("user", "net", "ipc", "uts", "pid")
_STACK: Final = 8 << 20
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What our init needs to become the user that a process asks for; processes do not get more than the spec says.
_INIT_CAPABILITIES: Final = frozenset({"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"})
# The first to be killed when the host runs out of memory are processes in sandboxes, and init last of them.
_INIT_OOM_SCORE: Final = 100
_PROCESS_OOM_SCORE: Final = 500
# What the kernel answers when a mount point does not fit.
_MISTAKES: Final = frozenset(
    {
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.EINVAL,
        errno.EACCES,
    }
)


@attrs.define
class Pod:
    """What one sandbox holds.

    Attributes:
        sandbox_id, spec: as created.
        short: its short name, for cgroups and directories.
        work: its directory in the keeper's file system.
        cgroup: its own, with the limits of the whole sandbox.
        layer: the bounded place for its writes.
        image: path of the disk image of its layer, when it is not in memory.
        first_id: the host's id of root inside.
        lease: number of its range of ids; None without a user namespace.
        pins: number in the keeper of each namespace, by kind.
        inodes: inode number of each pinned namespace.
        fds: numbers in the keeper of what is held beside the namespaces: "root", its root directory, "rw", that of its
            writable layer, "mnt", the mount namespace in which all its mounts are, "root-NAME" of a container's own.
        sources: descriptors of the sources of `spec.mounts`, opened once; of the root directory first, for kind "dir".
    """

    sandbox_id: str
    spec: SandboxSpec
    short: str
    work: str
    layer: Layer
    image: str
    cgroup: Cgroup = attrs.field(init=False)
    first_id: int = 0
    lease: int | None = None
    pins: dict[str, int] = attrs.field(factory=dict)
    inodes: dict[str, int] = attrs.field(factory=dict)
    fds: dict[str, int] = attrs.field(factory=dict)
    sources: list[int] = attrs.field(factory=list)

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.spec.name or self.sandbox_id

    def facts(self, created_at: float, started_at: float) -> str:
        """What another process needs to know of it beside the names that the keeper holds."""
        return json.dumps(
            {
                "first_id": self.first_id,
                "lease": self.lease,
                "inodes": self.inodes,
                "created_at": created_at,
                "started_at": started_at,
            }
        )

    def restore(self, facts: str, held: Mapping[str, int]) -> tuple[float, float]:
        """Take over what another process has made: `created_at` and `started_at`.

        Args:
            facts: what `facts` gave there.
            held: names below its prefix that the keeper holds, with their numbers.
        """
        known = json.loads(facts)
        self.first_id, self.lease, self.inodes = known["first_id"], known["lease"], dict(known["inodes"])
        names = {name.removeprefix(f"{self.short}/"): number for name, number in held.items()}
        self.pins = {kind: names[kind] for kind in _PINNED if kind in names}
        self.fds = {name: number for name, number in names.items() if name in HELD or name.startswith("root-")}
        return known["created_at"], known["started_at"]

    def held(self, what: str) -> str:
        """The name under which the keeper holds something of it."""
        return f"{self.short}/{what}"

    @property
    def mapped(self) -> bool:
        """It has a user namespace of its own."""
        return self.spec.userns == "private"

    @property
    def identity(self) -> Identity:
        """What its /etc says."""
        return Identity.of(self.spec, self.hostname)

    @property
    def hostname(self) -> str:
        """The asked one, or the first 12 characters of the id."""
        return self.spec.hostname or self.sandbox_id[:12]

    def place(self, container: str = "") -> Place:
        """Where a root file system is built: the sandbox's own, or that of one container."""
        return Place(
            work=self.work,
            root=f"/c/{container}/root" if container else "/root",
            layer=f"/rw/c/{container}" if container else "/rw",
            base=f"/c/{container}/base" if container else "/base",
            first_id=self.first_id,
            mapped=self.mapped,
        )

    def close(self) -> None:
        """Close the sources."""
        for fd in self.sources:
            os.close(fd)
        self.sources.clear()


def open_sources(rootfs: Rootfs, mounts: Sequence[Mount], label: str) -> list[int]:
    """Open what will be mounted, once: what is mounted later is what was looked at now.

    Raises:
        InvalidArgumentError: a source does not exist, or the root is no directory.
    """
    fds: list[int] = []
    try:
        if rootfs.kind == "dir":
            fds.append(_open_source(rootfs.path, os.O_DIRECTORY, f"root directory of {label!r}"))
        fds += [_open_source(mount.source, 0, f"mount source of {label!r}") for mount in mounts if mount.source]
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _open_source(path: str, flags: int, what: str) -> int:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    except OSError as error:
        raise InvalidArgumentError(f"{what} cannot be used: {path}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        os.close(fd)
        raise InvalidArgumentError(f"{what} cannot be used: {path} is a device, and mounts are always nodev")
    return fd


def translate_job(error: JobFailed, label: str, mounts: Sequence[Mount] = ()) -> Exception:
    """A job's failure in the words of whoever asked for the sandbox."""
    text = error.strerror or str(error)
    if "mapping the ids" in text:
        return UnavailableError(
            f"cannot make sandbox {label!r}: {text}",
            hint="Keep the directory on ext4, xfs, btrfs or tmpfs, or use userns='host' or Mount(idmap=False).",
        )
    for mount in mounts:
        # Operations say their path; a mount point's ends with the target, or with the directory that it needs.
        targets = {mount.target, os.path.dirname(mount.target)} - {"/"}
        if error.errno in _MISTAKES and any(f"{target} (operation" in text for target in targets):
            return InvalidArgumentError(
                f"mount target {mount.target!r} of {label!r} cannot be used: {os.strerror(error.errno or 0)}",
                hint="It must be free, or of the same kind (file or directory), and in a place that can be written.",
            )
    if text.startswith("sysctl ") and error.errno in {errno.EINVAL, errno.ENOENT, errno.ERANGE}:
        return InvalidArgumentError(f"sandbox {label!r}: {text}")
    if error.errno == errno.EFBIG:
        return InvalidArgumentError(f"sandbox {label!r}: the disk limit is above what the file system can hold")
    if error.do == "namespaces":
        return UnsupportedError(
            "a user namespace of its own",
            "runc",
            reason=text,
            hint="Look at /proc/sys/user/max_user_namespaces, or use userns='host' if you trust what runs.",
        )
    return BackendError(f"cannot make sandbox {label!r}: {error.do or 'job'}: {text}")


class PodPlanner:
    """Makes what the containers of one sandbox need; see `oci.plan.Planner`."""

    def __init__(
        self, host: Host, runtime: Runtime, pod: Pod, *, host_tree: Callable[[Rootfs], Awaitable[str]], init_fd: int
    ) -> None:
        self._host = host
        self._runtime = runtime
        self._pod = pod
        self._host_tree = host_tree
        self._init_fd = init_fd
        self._plain_limits = _plain_limits(host.keeper.pid)
        self._own_roots: set[str] = set()
        self._cgroups: dict[str, Cgroup] = {}

    async def prepare(self, container: ContainerSpec) -> Plan:
        """Root file system (unless the sandbox's own is shared), cgroup and bundle."""
        pod = self._pod
        _check_container(container)
        cgroup = pod.cgroup.child(f"c-{container.name}", limits=limits_of(container.resources or Resources.unlimited()))
        self._cgroups[container.name] = cgroup
        plan = self._plan(container, cgroup)
        place = pod.place()
        if container.rootfs is not None:
            place = pod.place(container.name)
            await self._make_root(container, container.rootfs)
        await self._guard_own_cgroups(plan.oci_id)
        self._bundle(f"{pod.work}{place.root}").write(self._host.outside(plan.bundle))
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
            bundle=f"{pod.work}/b/{container.name}",
            cgroup=cgroup,
            request=lambda process: self._request(container, process, root),
            admitted=pod.first_id if quick else None,
            netns=self.entered_network,
            mounts=pod.held("mnt"),
            extra_fds=(self._init_fd,),
            verify=lambda pid: self._verify(container.name, pid),
            verify_process=lambda pid: self._verify_process(container.name, pid),
            explain=lambda process: _explain(process, rootfs, self._environment(container, process)["PATH"]),
        )

    async def adopt(self, container_id: str, bundle: str) -> Plan:
        """A bundle of somebody else, run as it is in a cgroup of ours."""
        self._cgroups[container_id] = cgroup = self._pod.cgroup.child(f"c-{container_id}")
        return self._foreign_plan(container_id, bundle, cgroup)

    def _foreign_plan(self, container_id: str, bundle: str, cgroup: Cgroup) -> Plan:
        return Plan(
            oci_id=f"{self._pod.short}-{container_id}",
            bundle=bundle,
            cgroup=cgroup,
            request=_no_request,
            admitted=None,
            netns=None,
            mounts="",
            extra_fds=(),
            verify=lambda pid: self._verify_cgroup(container_id, pid),
            verify_process=lambda _: None,
            explain=lambda _: "",
        )

    async def restore(self, container_id: str, container: ContainerSpec | None, bundle: str) -> Plan:
        """The plan of a container that was made before, perhaps by another process."""
        pod = self._pod
        name = f"c-{container_id}"
        try:
            cgroup = pod.cgroup.find(name)
        except FileNotFoundError:
            cgroup = pod.cgroup.child(name)  # its creation was cut before it had one
        self._cgroups[container_id] = cgroup
        if container is None:
            return self._foreign_plan(container_id, bundle, cgroup)
        if container.rootfs is not None:
            self._own_roots.add(container_id)
        return self._plan(container, cgroup)

    async def free(self, container_id: str) -> None:
        """Unmount and remove what `prepare` made."""
        cgroup = self._cgroups.pop(container_id, None)
        if cgroup is not None:
            cgroup.remove()
        await self._host.keeper.unguard([self._own_cgroups_guard(f"{self._pod.short}-{container_id}")])
        # Only the bundle's own files lie there, and no mount.
        shutil.rmtree(self._host.outside(f"{self._pod.work}/b/{container_id}"), ignore_errors=True)
        if container_id in self._own_roots:
            work = self._pod.work
            paths = (f"{work}/c/{container_id}", f"{work}/rw/c/{container_id}")
            steps: list[Mapping[str, object]] = [{"do": "enter", "fd": 0}, {"do": "unmount", "path": paths[0]}]
            steps += [{"do": "remove_tree", "path": path} for path in paths]
            await self._host.keeper.drop([self._pod.held(f"root-{container_id}")])
            with self._open("mnt") as fd:
                await self._host.keeper.job(steps, fds=[fd])
            self._pod.fds.pop(f"root-{container_id}", None)
            self._own_roots.discard(container_id)

    async def _guard_own_cgroups(self, oci_id: str) -> None:
        """A runtime that insists on cgroups of its own leaves them behind when it dies."""
        dirs = self._runtime.own_cgroups(oci_id)
        if dirs:
            await self._host.keeper.guard([Guard(self._own_cgroups_guard(oci_id), "rmdir_cgroup", dirs)])

    def _own_cgroups_guard(self, oci_id: str) -> str:
        return f"{self._pod.short}/{oci_id}/own-cgroups"

    async def _make_root(self, container: ContainerSpec, rootfs: Rootfs) -> None:
        pod = self._pod
        mounts = (*pod.spec.mounts, *container.mounts)
        place = pod.place(container.name)
        sources = open_sources(rootfs, mounts, container.name)
        try:
            ops: list[Op] = [{"op": "mkdir", "path": f"/c/{container.name}", "parents": True}]
            shared = await self._host_tree(rootfs) if rootfs.kind == "host" else ""
            ops += root_ops(place, rootfs, pod.identity, mounts, shared)
            ops += mount_ops(place, mounts, first_fd=int(rootfs.kind == "dir"))
            self._own_roots.add(container.name)
            steps: list[Mapping[str, object]] = [{"do": "enter", "fd": len(sources)}]
            sources.append(os.open(self._path("mnt"), os.O_RDONLY | os.O_CLOEXEC))
            if pod.mapped:
                steps.append({"do": "given", "fd": len(sources), "name": "user"})
                sources.append(os.open(self.pin("user"), os.O_RDONLY | os.O_CLOEXEC))
            steps.append({"do": "mounts", "root": pod.work, "ops": ops})
            steps.append({"do": "dirfd", "path": f"{pod.work}{place.root}", "name": "root"})
            held = pod.held(f"root-{container.name}")
            result = await self._host.keeper.job(steps, hold={"root": held}, fds=sources)
            pod.fds[f"root-{container.name}"] = result.held[held]
        except JobFailed as error:
            raise translate_job(error, f"{pod.label}/{container.name}", mounts) from error
        finally:
            for fd in sources:
                os.close(fd)

    @property
    def entered_network(self) -> str | None:
        """The network namespace in which the runtime itself has to start, since it cannot join it (runc)."""
        if self._pod.spec.network.kind == "namespace" and not self._runtime.program.features.foreign_netns:
            return self.pin("net")
        return None

    def _path(self, what: str) -> str:
        return f"/proc/{self._host.keeper.pid}/fd/{self._pod.fds[what]}"

    @contextlib.contextmanager
    def _open(self, what: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A descriptor of our own of what the keeper holds."""
        fd = os.open(self._path(what), flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def pin(self, kind: str) -> str:
        """The path of a pinned namespace."""
        return f"/proc/{self._host.keeper.pid}/fd/{self._pod.pins[kind]}"

    def pause_bundle(self, root: str) -> Bundle:
        """What the one process of a shared pid namespace runs in: `root` with nothing in it but /proc."""
        return attrs.evolve(
            self._bundle(root, program=["/proc/self/fd/3", "pause"]),
            mounts=[
                OciMount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
                OciMount("/dev", "tmpfs", "tmpfs", ("nosuid", "noexec", "mode=755", "size=64k")),
            ],
            capabilities=frozenset(),
            masked_paths=(),
            readonly_paths=(),
        )

    def _bundle(self, root: str, program: Sequence[str] = ("/proc/self/fd/4",)) -> Bundle:
        pod = self._pod
        security = pod.spec.security
        spaces = [OciNamespace("mount")]
        if not self._host.cgroups.namespaces_are_borders:
            # Otherwise init could not start processes in cgroups of their own; see SECURITY.md for what shows.
            spaces.append(OciNamespace("cgroup"))
        spaces.append(OciNamespace("pid", self.pin("pid")) if "pid" in pod.pins else OciNamespace("pid"))
        kinds: tuple[tuple[str, NamespaceKind], ...] = (("user", "user"), ("ipc", "ipc"), ("uts", "uts"))
        if self.entered_network is None:
            kinds = (*kinds, ("net", "network"))
        spaces += [OciNamespace(name, self.pin(kind)) for kind, name in kinds if kind in pod.pins]
        profile: seccomp.Profile | None = None
        if security.seccomp == "default":
            # A filter that a process may add needs no_new_privs: without it init has to do without clone3, too.
            profile = seccomp.INIT if security.no_new_privileges else seccomp.DEFAULT
        by_annotation = profile is not None and self._runtime.program.features.seccomp_bpf_annotation
        return Bundle(
            oci_version=self._runtime.program.oci_version,
            args=program,
            root=root,
            mounts=self._mounts(),
            namespaces=spaces,
            ids=(pod.first_id, IDS) if pod.mapped else None,
            capabilities=security.capabilities | _INIT_CAPABILITIES,
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
                ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            ),
            OciMount("/dev/shm", "bind", f"{pod.work}/shm", ("bind", "rw", "nosuid", "noexec", "nodev")),
        ]
        if pod.spec.network.kind == "none":
            # Only for the sandbox's own network: crun would fall back to the host's /sys, writable, without a word.
            mounts.append(OciMount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")))
        return mounts

    def _request(self, container: ContainerSpec, process: ProcessSpec, root: str) -> SpawnRequest:
        spec = self._pod.spec
        user = process.user or container.user or spec.user
        with self._open(root, os.O_PATH | os.O_DIRECTORY) as root_fd:
            who = resolve_user(root_fd, user, largest_id=IDS - 1 if self._pod.mapped else 2**32 - 2)
        limits = dict(self._plain_limits)
        own = container.resources or Resources.unlimited()
        for name, values in (
            ("RLIMIT_NOFILE", (spec.resources.nofile, own.nofile)),
            ("RLIMIT_CORE", (spec.resources.core, own.core)),
        ):
            # A container's limit is one below the sandbox's, never above it.
            least = min((value for value in values if value is not None), default=None)
            if least is not None:
                limits[name] = (least, least)
        cwd = process.cwd or (container.cwd if container.cwd != "/" else spec.cwd)
        return SpawnRequest(
            argv=process.argv,
            env={"HOME": who.home, **self._environment(container, process)},
            cwd=cwd,
            uid=who.uid,
            gid=who.gid,
            groups=who.groups,
            capabilities=spec.security.capabilities,
            rlimits=limits,
            no_new_privs=spec.security.no_new_privileges,
            deny_clone3=spec.security.no_new_privileges and spec.security.seccomp == "default",
            tty=(process.terminal.rows, process.terminal.columns) if process.terminal else None,
            oom_score_adj=_PROCESS_OOM_SCORE,
        )

    def _environment(self, container: ContainerSpec, process: ProcessSpec) -> dict[str, str]:
        env = {"PATH": _PATH, "LANG": "C.UTF-8"}
        if process.terminal is not None:
            env["TERM"] = "xterm"
        return env | {**self._pod.spec.env, **container.env, **process.env}

    def _verify(self, name: str, pid: int) -> None:
        """Start tells the truth: the container is in the pinned namespaces, in ones of its own, and in its cgroup."""
        pod = self._pod
        try:
            found = namespaces.process_namespaces(pid)
        except ProcessLookupError as error:
            raise BackendError(f"container {name!r} of sandbox {pod.label!r} ended before it was started") from error
        ours = _own_namespaces()
        for kind, inode in found.items():
            pinned = pod.inodes.get(kind)
            if pinned is not None and inode != pinned:
                raise BackendError(f"container {name!r}: {kind} namespace {inode} is not the pinned one, {pinned}")
            if pinned is None and inode == ours[kind] and not self._shared_with_host(kind):
                raise BackendError(f"container {name!r} of sandbox {pod.label!r} is in the host's {kind} namespace")
        self._verify_cgroup(name, pid)

    def _verify_process(self, name: str, pid: int) -> None:
        """A filter that was asked for is there: a runtime that does not know an annotation says nothing."""
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            filtered = "\nSeccomp:\t2\n" in file.read()
        if not filtered and self._pod.spec.security.seccomp == "default":
            raise BackendError(
                f"container {name!r} of sandbox {self._pod.label!r} has no seccomp filter, although one was given to"
                f" {self._runtime.program.name} {self._runtime.program.version_text}",
                hint="Use a runtime that is built with seccomp.",
            )

    def _shared_with_host(self, kind: str) -> bool:
        spec = self._pod.spec
        return (
            (kind == "user" and spec.userns == "host")
            or (kind == "net" and spec.network.kind == "host")
            or (kind == "cgroup" and self._host.cgroups.namespaces_are_borders)
        )

    def _verify_cgroup(self, name: str, pid: int) -> None:
        if not self._pod.cgroup.holds(pid):
            raise BackendError(f"container {name!r} of sandbox {self._pod.label!r} is not in its cgroup")


def _check_container(container: ContainerSpec) -> None:
    """Refuse what a container cannot have, before anything is done."""
    resources = container.resources
    if resources is not None and resources.disk not in {None, 0}:
        raise UnsupportedError(
            "a disk limit of one container", "runc", hint="All containers share that of the sandbox; leave disk= out."
        )
    if container.rootfs is not None and container.rootfs.kind == "image":
        raise UnsupportedError("rootfs kind 'image'", "runc", hint="Unpack it and use Rootfs.dir(path).")


def _no_request(_: ProcessSpec) -> SpawnRequest:
    raise AlreadyExistsError("a bundle's processes are started by the runtime")


@functools.cache
def _compiled(profile: seccomp.Profile) -> bytes:
    """The filter, compiled once per process instead of at each start: libseccomp takes 4 to 10 ms."""
    return seccomp.compile_bpf(profile)


def _plain_limits(keeper_pid: int) -> Mapping[str, tuple[int, int]]:
    """What a process gets of the limits that no spec speaks of: not what this process happens to run under.

    Soft limits as high as the keeper's hard ones, which nobody inside could raise; the stack as the kernel has
    it, since an unlimited one changes where memory is mapped. Source: getrlimit(2), _STK_LIM of the kernel.
    """
    limits: dict[str, tuple[int, int]] = {}
    for name in ("AS", "CPU", "DATA", "FSIZE", "MEMLOCK", "MSGQUEUE", "NPROC", "RSS", "SIGPENDING"):
        hard = resource.prlimit(keeper_pid, getattr(resource, f"RLIMIT_{name}"))[1]
        limits[f"RLIMIT_{name}"] = (hard, hard)
    hard = resource.prlimit(keeper_pid, resource.RLIMIT_STACK)[1]
    soft = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
    return limits | {"RLIMIT_STACK": (soft, hard)}


@functools.cache
def _own_namespaces() -> Mapping[str, int]:
    return namespaces.process_namespaces(os.getpid())


def _explain(process: ProcessSpec, rootfs: Rootfs, path: str) -> str:
    """Why a program of this machine is not inside."""
    if rootfs.kind != "host":
        return ""
    program = process.argv[0]
    where = shutil.which(program) or ""
    shown = os.path.realpath(where).startswith("/usr/") and (rootfs.local or not where.startswith("/usr/local/"))
    if not where or shown:
        return "" if "/" in program else f"Its PATH is {path!r}."
    return (
        f"{where} exists on this machine, but rootfs 'host' shows only programs below /usr"
        + (" without /usr/local: use Rootfs.host(local=True)." if where.startswith("/usr/local/") else ".")
        + ("" if where.startswith("/usr/local/") else " Install it there, or mount its directory with Mount.bind().")
    )
