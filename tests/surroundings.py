"""Containers as Docker, podman and Kubernetes make them, around a host program: bundles by hand, run by crun.

The root is an overlay of this machine's. Nothing outside is changed: what is mounted is so in a mount namespace of the
container's runtime only, and no cgroup is made but where a test is about that one.
Source: Docker's oci/defaults.go, its seccomp profile (profiles/seccomp/default.json) and caps/defaults.go; podman and
containerd have the same but for what is said below.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import unisandbox
from unisandbox.api.names import CAPABILITIES

DEADLINE: Final = 100.0
DEFAULT: Final = [
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
]  # fmt: skip
MASKED: Final = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware")
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# What Docker's filter forbids to who has not CAP_SYS_ADMIN, and what to everybody.
FOR_ADMINS: Final = [
    "bpf", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount",
    "open_tree", "perf_event_open", "quotactl", "setdomainname", "sethostname", "setns", "syslog", "umount2",
    "unshare",
]  # fmt: skip
FOR_NOBODY: Final = ["add_key", "keyctl", "request_key", "pivot_root", "userfaultfd"]
# podman's leaves namespaces and mounts to everybody, for podman in podman.
PODMANS: Final = ["bpf", "fanotify_init", "perf_event_open", "quotactl", "setdomainname", "sethostname", "syslog"]
_NAMESPACES: Final = 0x7E020000
# crun refuses a host with both cgroup versions.
_BEFORE: Final = "[ ! -d /sys/fs/cgroup/memory ] || umount /sys/fs/cgroup/unified 2>/dev/null || true"
# Where v2 is the host's own it stays as it is: options of a further mount are those of all.
_V2: Final = Path("/sys/fs/cgroup/cgroup.controllers")
_V2_BEFORE: Final = f"[ -e {_V2} ] || {{ umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; }}"


def forbidding(names: Sequence[str], *, namespaces: bool = False) -> dict[str, object]:
    """A filter; with `namespaces`, clone makes none either, and there is no clone3, which no filter can look into."""
    rules: list[dict[str, object]] = [{"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    if namespaces:
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38})
        for bit in (1 << number for number in range(32) if _NAMESPACES >> number & 1):
            test = {"index": 0, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"}
            rules.append({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [test]})
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


@attrs.frozen
class Surrounding:
    """A container.

    Attributes:
        capabilities: of its processes, without "CAP_"; None: all that this machine has.
        seccomp: its filter.
        masked: paths that are hidden, as Docker hides them; and `read_only`.
        cgroups: how the file systems of cgroups are mounted: "ro", "rw"; or "v2": one of v2 that may be written, in a
            cgroup of its own, also where the host has v1 besides. On a host with v2 "rw" is the same: without a cgroup
            of its own others would be in it.
        rows: of a user namespace; none: the host's own.
        marks: files by which its engine is known; `env` the same.
    """

    capabilities: Sequence[str] | None = tuple(DEFAULT)
    seccomp: Mapping[str, object] | None = None
    masked: Sequence[str] = MASKED
    read_only: Sequence[str] = READ_ONLY
    cgroups: str = "ro"
    rows: Sequence[tuple[int, int, int]] = ()
    marks: Sequence[str] = ()
    env: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def has_own_cgroup(self) -> bool:
        """Whether it is in a cgroup of its own, of v2."""
        return self.cgroups == "v2" or (self.cgroups == "rw" and _V2.exists())

    def with_(self, **changes: Any) -> Surrounding:
        """The same with changes."""
        return attrs.evolve(self, **changes)


DOCKER: Final = Surrounding(seccomp=forbidding(FOR_ADMINS + FOR_NOBODY, namespaces=True), marks=("/.dockerenv",))
PRIVILEGED: Final = Surrounding(capabilities=None, masked=(), read_only=(), cgroups="rw", marks=("/.dockerenv",))
PODMAN: Final = Surrounding(
    seccomp=forbidding(PODMANS),
    # As of a user without root: he is root there, and has his subordinate ids.
    rows=((0, 0, 1), (1, 300_000, 65536)),
    marks=("/run/.containerenv",),
)
KUBERNETES: Final = Surrounding(env={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


def run_inside(surrounding: Surrounding, place: Path, code: str, *arguments: str) -> tuple[int, str, str]:
    """Run Python code as the container's PID 1: exit code, what it wrote to stdout and to stderr."""
    crun = shutil.which("crun")
    if crun is None:
        pytest.skip("crun is not here")
    name = f"unisandbox-inside-{os.getpid()}"
    bundle = place / "bundle"
    bundle.mkdir()
    argv = [sys.executable, "-c", code, *arguments]
    (bundle / "config.json").write_text(json.dumps(_config(surrounding, argv, name)))
    marks = " ".join(shlex.quote(f"root{mark}") for mark in surrounding.marks)
    manager = "cgroupfs" if surrounding.has_own_cgroup else "disabled"
    script = f"""
        set -e
        cd {shlex.quote(str(bundle))}
        mkdir layer root state
        mount -t tmpfs none layer
        mkdir layer/upper layer/work
        mount -t overlay -o lowerdir=/,upperdir=layer/upper,workdir=layer/work none root
        mkdir -p root/run
        rm -f root/.dockerenv root/run/.containerenv
        {f"touch {marks}" if marks else ""}
        {_V2_BEFORE if surrounding.has_own_cgroup else _BEFORE}
        exec {shlex.quote(crun)} --root state --cgroup-manager {manager} run {name}
    """
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _config(surrounding: Surrounding, argv: Sequence[str], name: str) -> dict[str, object]:
    wanted = surrounding.capabilities
    names = _available() if wanted is None else [f"CAP_{name}" for name in wanted]
    kinds = ["mount", "pid", "ipc", "uts", "network", "cgroup", *(["user"] if surrounding.rows else [])]
    rows = [{"containerID": inside, "hostID": outside, "size": count} for inside, outside, count in surrounding.rows]
    linux: dict[str, object] = {
        "namespaces": [{"type": kind} for kind in kinds],
        "maskedPaths": list(surrounding.masked),
        "readonlyPaths": list(surrounding.read_only),
        **({"seccomp": surrounding.seccomp} if surrounding.seccomp else {}),
        **({"cgroupsPath": f"/{name}"} if surrounding.has_own_cgroup else {}),
        **({"uidMappings": rows, "gidMappings": rows} if rows else {}),
    }
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "PYTHONDONTWRITEBYTECODE=1"]
            + [f"{name}={value}" for name, value in surrounding.env.items()],
            "cwd": "/",
            "noNewPrivileges": False,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names),
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 8192, "hard": 8192}],
        },
        "root": {"path": "root", "readonly": False},
        "hostname": "inside",
        "mounts": [*_mounts(surrounding), *_other_file_systems()],
        "linux": linux,
    }


def _mounts(surrounding: Surrounding) -> list[dict[str, object]]:
    safe = ["nosuid", "noexec", "nodev"]
    writable = "ro" if surrounding.cgroups == "ro" else "rw"
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": safe},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*safe, "mode=1777"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*safe, writable]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*safe, writable]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
    ]


def _other_file_systems() -> list[dict[str, object]]:
    """What of Python and of this library is not on the file system of the root."""
    top = os.stat("/").st_dev
    paths = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(unisandbox.__path__[0]))}
    return [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
        for path in sorted(paths)
        if os.stat(path).st_dev != top
    ]


def _available() -> list[str]:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd"))
    mask = int(line.split()[1], 16)
    return [name for number, name in enumerate(CAPABILITIES) if mask >> number & 1]
