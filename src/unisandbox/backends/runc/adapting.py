"""A bundle of an engine (containerd, iSulad) as a container of a sandbox: its config with what is the sandbox's own.

Its root file system and whatever it shows of the host are mounted in the sandbox's mount namespace, below a directory
of its own: nothing is mounted where others see it, and all of it ends with that directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from unisandbox.api import InvalidArgumentError, UnsupportedError
from unisandbox.api.task import SANDBOX_NAMESPACES, CreateTask, RootMount
from unisandbox.backends.runc.pod import DEVICES, MOST_SOURCES, Pod, too_many_sources
from unisandbox.backends.runc.rootfs import Op
from unisandbox.host import mounts
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import DeviceRule, Limits
from unisandbox.oci import foreign
from unisandbox.oci.features import RuntimeProgram

_KINDS: Final = {"network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid", "user": "user"}
"""The kinds of namespaces that a sandbox can have: OCI's words to those of proc(5)."""

_ETC: Final = ("hosts", "hostname", "resolv.conf")


class Adapted:
    """One bundle of our own, as far as it can be made without doing anything.

    Attributes:
        config: what the runtime is told.
        limits: of its cgroup.
        devices: that it may use; None: those of the sandbox.
        joined: the kinds of the sandbox's namespaces that it has joined when it was made.
        ops: operations that mount its root file system and sources, below the sandbox's directory.
        sources: detached trees, by number in `ops`; close them.
    """

    def __init__(
        self,
        request: CreateTask,
        pod: Pod,
        program: RuntimeProgram,
        *,
        pin: Callable[[str], str],
        entered: Mapping[str, str],
    ) -> None:
        """Read and check it.

        Args:
            request: with `config`.
            pod: the sandbox.
            program: the runtime that it is for.
            pin: the path of one of the sandbox's namespaces.
            entered: those that the runtime enters by itself, so that the config must not name them.
        """
        self._pod = pod
        self._directory = f"/c/{request.container_id}"
        self.config: foreign.Config = foreign.parse(request.config)
        foreign.check(self.config, program, all_devices=pod.spec.security.devices == "all")
        linux = foreign.linux_of(self.config)
        resources = linux.get("resources") or {}
        self.limits: Limits = foreign.limits(resources)
        self.devices: Sequence[DeviceRule] | None = _devices(resources, pod)
        self.joined: frozenset[str] = frozenset()
        self._join(linux, pin, entered)
        # The cgroup is ours, with the limits from here.
        linux.pop("cgroupsPath", None)
        linux.pop("resources", None)
        self.config["ociVersion"] = program.oci_version
        self.config["process"]["terminal"] = request.terminal
        self.config["process"].pop("consoleSize", None)
        self.ops: list[Op] = [
            {"op": "mkdir", "path": self._directory, "parents": True},
            {"op": "mkdir", "path": f"{self._directory}/root"},
        ]
        self.sources: list[int] = []
        try:
            self._mount_root(request.bundle, request.rootfs)
            for mount in foreign.binds(self.config):
                mount["source"] = os.path.realpath(os.path.join(request.bundle, str(mount.get("source") or "")))
            if pod.mapped and not program.features.whole_binds:
                self._take_apart()
            self._mount_sources()
        except BaseException:
            self.close()
            raise
        self._add_own()

    def close(self) -> None:
        """Close the sources."""
        for fd in self.sources:
            os.close(fd)
        self.sources.clear()

    def _join(self, linux: foreign.Config, pin: Callable[[str], str], entered: Mapping[str, str]) -> None:
        """Let it join the sandbox's namespaces; where the sandbox has the host's, it has too."""
        spaces: list[foreign.Config] = []
        joined: set[str] = set()
        for space in linux.get("namespaces") or []:
            path = str(space.get("path") or "")
            if not path.startswith(SANDBOX_NAMESPACES):
                spaces.append(space)
                continue
            kind = _KINDS.get(str(space.get("type")), "")
            if path != SANDBOX_NAMESPACES + kind:
                raise InvalidArgumentError(f"{path!r} is no namespace of the sandbox of type {space.get('type')!r}")
            if kind not in self._pod.pins:
                if kind == "pid":
                    raise InvalidArgumentError(
                        f"sandbox {self._pod.label!r} has no pid namespace that its containers share"
                    )
                continue  # it is the host's
            joined.add(kind)
            if kind not in entered:
                spaces.append({**space, "path": pin(kind)})
        if self._pod.mapped and ("user" not in joined or not self._has_ids(linux)):
            raise InvalidArgumentError(f"all containers of sandbox {self._pod.label!r} are in its user namespace")
        linux["namespaces"] = spaces
        self.config["linux"] = linux
        self.joined = frozenset(joined)

    def _has_ids(self, part: foreign.Config) -> bool:
        return foreign.has_ids(part, self._pod.first_id, self._pod.ids)

    def _mount_root(self, bundle: str, rootfs: Sequence[RootMount]) -> None:
        root = self.config["root"]
        path = f"{self._directory}/root"
        given = rootfs or (RootMount("bind", os.path.join(bundle, root["path"]), ("rbind",)),)
        self.ops.append(root_op(given, path, self._pod, self.sources))
        self.config["root"] = {**root, "path": f"{self._pod.work}{path}"}

    def _take_apart(self) -> None:
        """Name each mount below a source, for a runtime that would not show it."""
        mounted: list[foreign.Config] = []
        for mount in self.config.get("mounts") or []:
            if not foreign.is_bind(mount) or "rbind" not in (mount.get("options") or []):
                mounted.append(mount)
                continue
            mounted += foreign.taken_apart(mount, mounts.seen_below(mount["source"]))
        self.config["mounts"] = mounted

    def _mount_sources(self) -> None:
        for number, mount in enumerate(foreign.binds(self.config)):
            path = f"{self._directory}/m{number}"
            recursive = "rbind" in (mount.get("options") or [])
            idmap = foreign.idmap(mount)
            if idmap:
                self._check_ids(mount)
            propagation = foreign.propagation(mount)
            op = bind_op(
                mount["source"],
                path,
                self._pod,
                self.sources,
                recursive=recursive,
                propagation=propagation,
                idmap=idmap,
            )
            self.ops.append(op)
            # It has them already.
            for name in ("uidMappings", "gidMappings"):
                mount.pop(name, None)
            mount["options"] = [option for option in mount.get("options") or [] if option not in foreign.IDMAP_OPTIONS]
            mount["source"] = f"{self._pod.work}{path}"

    def _check_ids(self, mount: foreign.Config) -> None:
        where = f"mount {mount.get('destination')!r}"
        if not self._pod.mapped:
            raise UnsupportedError(f"{where} with mapped ids", "runc", reason="its sandbox has no user namespace")
        if foreign.names_ids(mount) and not self._has_ids(mount):
            raise UnsupportedError(f"{where} with other ids than the sandbox's", "runc")

    def _add_own(self) -> None:
        """What is the sandbox's: names, and shared memory where it would be private."""
        listed = self.config.get("mounts") or []
        taken = {os.path.normpath(str(mount.get("destination"))): mount for mount in listed}
        access = "ro" if self.config["root"].get("readonly") else "rw"
        own = {f"/etc/{name}": f"{self._pod.etc}/{name}" for name in _ETC if f"/etc/{name}" not in taken}
        if "ipc" in self.joined and taken.get("/dev/shm", {"type": "tmpfs"}).get("type") == "tmpfs":
            listed = [mount for mount in listed if os.path.normpath(str(mount.get("destination"))) != "/dev/shm"]
            own["/dev/shm"] = f"{self._pod.work}/shm"
        for destination, source in own.items():
            options = ["rbind", "rprivate", "rw" if destination == "/dev/shm" else access]
            listed.append({"destination": destination, "type": "bind", "source": source, "options": options})
        self.config["mounts"] = listed

    def write(self, directory: str) -> None:
        """Make the bundle's directory, readable by nobody else, with its config.json."""
        reached("before bundle.write", directory)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(f"{directory}/config.json", flags, 0o600), "w", encoding="utf-8") as file:
            json.dump(self.config, file)
        reached("after bundle.write", directory)

    def steps(self, mnt: int, user: int | None) -> list[Mapping[str, object]]:
        """The job that mounts it all.

        Args:
            mnt: number among the request's descriptors of the sandbox's mount namespace.
            user: the same of its user namespace; None: it has none.
        """
        steps: list[Mapping[str, object]] = [{"do": "enter", "fd": mnt}]
        if user is not None:
            steps.append({"do": "given", "fd": user, "name": "user"})
        return [*steps, {"do": "mounts", "root": self._pod.work, "ops": self.ops}]


def root_op(rootfs: Sequence[RootMount], path: str, pod: Pod, sources: list[int], attributes: Sequence[str] = ()) -> Op:
    """The operation that mounts what an engine says is a root file system.

    Args:
        rootfs: what it says: one mount.
        path: where, below the sandbox's directory.
        pod: the sandbox.
        sources: the request's descriptors, to which it adds those that it opens.
        attributes: of the mount, beside what is said.
    """
    if len(rootfs) != 1 or rootfs[0].target:
        raise UnsupportedError("a root file system of several mounts", "runc")
    mount = rootfs[0]
    if mount.type == "overlay":
        ids = (pod.first_id, pod.ids) if pod.mapped else None
        return {**foreign.overlay_op(mount, ids, attributes), "path": path}
    options = set(mount.options)
    if mount.type != "bind" and not {"bind", "rbind"} & options:
        raise UnsupportedError(f"a root file system of type {mount.type!r}", "runc")
    if unknown := sorted(options - {"bind", "rbind", "ro", "rw"}):
        raise UnsupportedError(f"option {unknown[0]!r} of a root file system's bind mount", "runc")
    attributes = [*attributes, *["readonly"] * ("ro" in options)]
    source = os.path.realpath(mount.source)
    return bind_op(source, path, pod, sources, recursive="rbind" in options, attributes=attributes)


def bind_op(
    source: str,
    path: str,
    pod: Pod,
    sources: list[int],
    *,
    recursive: bool,
    attributes: Sequence[str] = (),
    propagation: str = "private",
    idmap: Literal["", "mount", "tree"] = "",
) -> Op:
    """The operation that mounts a source, a path without links, which is added to `sources`."""
    if len(sources) >= MOST_SOURCES:
        raise too_many_sources()
    # Links were followed before: in a volume others may make some meanwhile, and then it is refused.
    try:
        sources.append(mounts.detached_tree(source, recursive=recursive))
        passes_on = propagation == "private" or mounts.passes_on(source, propagation)
    except OSError as error:
        raise InvalidArgumentError(f"mount source {source!r} cannot be used: {error.strerror}") from error
    if not passes_on:
        raise InvalidArgumentError(
            f"mount source {source!r} is on a mount that passes nothing on, and shall be {propagation}",
            hint="mount --make-rshared it on the host.",
        )
    if propagation == "shared" and pod.mapped:
        raise UnsupportedError("a shared mount in a user namespace", "runc", reason="the kernel passes nothing out")
    return {
        "op": "bind",
        "source": {"fd": len(sources) - 1},
        "path": path,
        "create": True,
        "detached": True,
        "propagation": propagation,
        "idmap": bool(idmap),
        "idmap_below": idmap == "tree",
        "attributes": list(attributes),
    }


def _devices(resources: Mapping[str, Any], pod: Pod) -> Sequence[DeviceRule] | None:
    more = foreign.devices(resources)
    if pod.spec.security.devices == "all":
        return None if more is None else (*DEVICES, *more)
    if more is None or more:
        what = "all devices" if more is None else f"device {more[0]}"
        raise UnsupportedError(f"access to {what}", "runc", reason=f"sandbox {pod.label!r} has the usual ones only")
    return None
