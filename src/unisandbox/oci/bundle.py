"""Writes OCI bundles: a config.json from typed parts. Source: opencontainers runtime-spec 1.0, config-linux.md."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import attrs

from unisandbox.host.boundary import reached

NamespaceKind = Literal["user", "network", "ipc", "uts", "pid", "mount", "cgroup"]

# What Docker and containerd hide too: files that tell about the host, or that change it.
MASKED_PATHS: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class OciMount(NamedTuple):
    """One entry of `mounts`: what the runtime mounts, where, and how."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...] = ()


class OciNamespace(NamedTuple):
    """A namespace that the runtime makes, or with `path` joins."""

    kind: NamespaceKind
    path: str = ""


def held_path(pid: int, fd: int) -> str:
    """The path of a namespace that a process holds open, for an `OciNamespace`.

    With one slash more than it takes: to runc 1.5.3 every path that begins with "/proc/PID" is a namespace of that
    process, whose ids are not those of a user namespace that it holds. Source: libcontainer/internal/userns,
    GetUserNamespaceMappings().
    """
    return f"/proc//{pid}/fd/{fd}"


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Bundle:
    """What goes into a config.json.

    Attributes:
        oci_version: the newest version that the runtime accepts.
        args, env, cwd: of the first process; it runs as user and group 0.
        root: path of the root file system in the runtime's mount namespace.
        root_readonly: make its uppermost mount read-only.
        mounts: in this order.
        namespaces: made or joined.
        ids: the user map and the group map of a user namespace that is joined, as rows of (first id inside, first id
            outside, count); runc wants to be told.
        capabilities: bounding, effective and permitted set of the first process.
        ineffective: those of them that are not effective while its program is executed; root has them all after that.
        no_new_privileges: for it and all that it starts.
        rlimits: (soft, hard) by name.
        oom_score_adj: for it.
        seccomp: the `linux.seccomp` object; None: none.
        seccomp_bpf: the same filter compiled, for runtimes that take it (crun).
        annotations: more.
        terminal: the first process gets a terminal.
        masked_paths, readonly_paths: see the specification.
    """

    oci_version: str
    args: Sequence[str]
    env: Sequence[str] = ()
    cwd: str = "/"
    root: str
    root_readonly: bool = False
    mounts: Sequence[OciMount] = ()
    namespaces: Sequence[OciNamespace] = ()
    ids: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None
    capabilities: frozenset[str] = frozenset()
    ineffective: frozenset[str] = frozenset()
    no_new_privileges: bool = True
    rlimits: Mapping[str, tuple[int, int]] = attrs.field(factory=dict)
    oom_score_adj: int = 0
    seccomp: Mapping[str, object] | None = None
    seccomp_bpf: bytes = b""
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    terminal: bool = False
    masked_paths: Sequence[str] = MASKED_PATHS
    readonly_paths: Sequence[str] = READONLY_PATHS

    def to_json(self) -> str:
        """The text of config.json."""
        capabilities = sorted(self.capabilities)
        linux: dict[str, object] = {
            "namespaces": [
                {"type": space.kind, "path": space.path} if space.path else {"type": space.kind}
                for space in self.namespaces
            ],
            "maskedPaths": list(self.masked_paths),
            "readonlyPaths": list(self.readonly_paths),
            # A default for whoever manages cgroups himself: no device but the few that the specification names.
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        }
        if self.ids is not None:
            for name, rows in zip(("uidMappings", "gidMappings"), self.ids, strict=True):
                linux[name] = [{"containerID": i, "hostID": first, "size": count} for i, first, count in rows]
        if self.seccomp is not None:
            linux["seccomp"] = self.seccomp
        annotations = dict(self.annotations)
        if self.seccomp_bpf:
            annotations["run.oci.seccomp_bpf_data"] = base64.b64encode(self.seccomp_bpf).decode()
        config: dict[str, object] = {
            "ociVersion": self.oci_version,
            "process": {
                "terminal": self.terminal,
                "user": {"uid": 0, "gid": 0},
                "args": list(self.args),
                "env": list(self.env),
                "cwd": self.cwd,
                "capabilities": {
                    "bounding": capabilities,
                    "effective": sorted(self.capabilities - self.ineffective),
                    "permitted": capabilities,
                },
                "rlimits": [
                    {"type": name, "soft": soft, "hard": hard} for name, (soft, hard) in sorted(self.rlimits.items())
                ],
                "noNewPrivileges": self.no_new_privileges,
                "oomScoreAdj": self.oom_score_adj,
            },
            "root": {"path": self.root, "readonly": self.root_readonly},
            "mounts": [
                {"destination": m.destination, "type": m.type, "source": m.source, "options": list(m.options)}
                for m in self.mounts
            ],
            "linux": linux,
        }
        if annotations:
            config["annotations"] = annotations
        return json.dumps(config, separators=(",", ":"))

    def write(self, directory: str) -> None:
        """Make the bundle directory, readable by nobody else, with its config.json."""
        reached("before bundle.write", directory)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(
            os.path.join(directory, "config.json"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(self.to_json())
        reached("after bundle.write", directory)
