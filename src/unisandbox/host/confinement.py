"""What a container around this process, or its service, keeps from it, and by which flag or setting it is given.

Everything is looked at without a change to anything, and a flag is named only when what it gives is missing. Standard
library only.

Source: Docker's and podman's manuals of `run`, the fields of a pod's securityContext; systemd.exec(5);
mount_too_revealing() in fs/namespace.c; security_sb_mount() in path_mount(), which is asked before capabilities are.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Final, Literal, NamedTuple

from unisandbox.host import subordinate, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Engine = Literal["docker", "podman", "kubernetes", ""]
What = Literal["seccomp", "apparmor", "selinux", "masked", "cgroups", "mapping", "sys_admin", "all"]
"""What a container can be without."""


class Confined(NamedTuple):
    """Something that is kept from this process: what, and how that is seen."""

    what: What
    reason: str


_NAMES: Final[dict[Engine, str]] = {"docker": "Docker", "podman": "podman", "kubernetes": "Kubernetes"}
_BEGINNING: Final[dict[Engine, str]] = {
    "docker": "docker run ",
    "podman": "podman run ",
    "kubernetes": "in the container's securityContext ",
}
_FLAGS: Final[dict[What, dict[Engine, str]]] = {
    "seccomp": {
        "docker": "--security-opt seccomp=unconfined",
        "podman": "--security-opt seccomp=unconfined",
        "kubernetes": "seccompProfile.type: Unconfined",
    },
    "apparmor": {
        "docker": "--security-opt apparmor=unconfined",
        "podman": "--security-opt apparmor=unconfined",
        "kubernetes": "appArmorProfile.type: Unconfined",
    },
    "selinux": {
        "docker": "--security-opt label=disable",
        "podman": "--security-opt label=disable",
        "kubernetes": "seLinuxOptions.type: spc_t",
    },
    "masked": {
        "docker": "--security-opt systempaths=unconfined",
        "podman": "--security-opt unmask=ALL",
        "kubernetes": "procMount: Unmasked (with hostUsers: false of the pod)",
    },
    "cgroups": {
        "docker": "--privileged",
        "podman": "--privileged",
        "kubernetes": "privileged: true",
    },
    "mapping": {
        "docker": "--cap-add SETUID --cap-add SETGID --cap-add SETFCAP",
        "podman": "--cap-add SETUID --cap-add SETGID --cap-add SETFCAP",
        "kubernetes": "capabilities.add: [SETUID, SETGID, SETFCAP]",
    },
    "sys_admin": {
        "docker": "--cap-add SYS_ADMIN",
        "podman": "--cap-add SYS_ADMIN",
        "kubernetes": "capabilities.add: [SYS_ADMIN]",
    },
}
_FLAGS["all"] = {"docker": "--privileged", "podman": "--privileged", "kubernetes": "privileged: true"}
_NAMESPACES: Final = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
)
_NO_FLAG: Final = 1  # of the low byte, which in clone() is the signal
# What of a unit's settings may keep it away.
_SETTINGS: Final[dict[What, str]] = {
    "seccomp": "SystemCallFilter=, RestrictNamespaces=, RestrictSUIDSGID=, ProtectHostname=",
    "apparmor": "AppArmorProfile=",
    "selinux": "SELinuxContext=",
    "masked": "ProtectKernelTunables=, ProtectKernelLogs=, ProcSubset=",
    "cgroups": "ProtectControlGroups=",
    "mapping": "CapabilityBoundingSet=",
    "sys_admin": "CapabilityBoundingSet=",
    "all": "CapabilityBoundingSet=, PrivateUsers=",
}
# Directories that the kernel keeps empty for others to be mounted there: nothing is hidden by that. Source: users of
# proc_create_mount_point, register_sysctl_mount_point and sysfs_create_mount_point.
_EMPTY: Final = {
    "proc": frozenset({"/fs/nfsd", "/openprom", "/sys/fs/binfmt_misc", "/xen"}),
    "sysfs": frozenset({
        "/firmware/efi/efivars", "/fs/bpf", "/fs/cgroup", "/fs/fuse/connections", "/fs/pstore", "/fs/resctrl",
        "/fs/selinux", "/fs/smackfs", "/kernel/config", "/kernel/debug", "/kernel/security", "/kernel/tracing",
    }),
}  # fmt: skip


def engine() -> Engine:
    """Which engine has made the container around us, as far as it can be seen; "" for none."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    return "docker" if os.path.exists("/.dockerenv") else ""


def service() -> str:
    """The service of systemd's that this process is in, as far as it can be seen; "" for none."""
    parts = _read("/proc/self/cgroup").replace("\n", "/").split("/") if os.path.isdir("/run/systemd/system") else []
    units = [part for part in parts if part.endswith((".service", ".scope"))]
    return units[-1] if units and units[-1].endswith(".service") else ""


def remedy(whats: Iterable[What]) -> str:
    """How this container, or this service, gets what it is without; empty when it is without nothing.

    Where neither is seen, every engine's words are told.
    """
    wanted = list(dict.fromkeys(whats))
    if not wanted:
        return ""
    here = engine()
    if here:
        return f"Start this container with: {_BEGINNING[here]}{_flags(wanted, here)}"
    unit = service()
    if unit:
        settings = ", ".join(dict.fromkeys(_SETTINGS[what] for what in wanted))
        return f"Leave out of the unit {unit} what it has of {settings}"
    told = "; ".join(f"{name}: {_flags(wanted, one)}" for one, name in _NAMES.items())
    return f"If a container is around this process, start it with: {told}"


def lower_first(text: str) -> str:
    """A remedy for the middle of a sentence."""
    return text[:1].lower() + text[1:]


def _flags(whats: Iterable[What], one: Engine) -> str:
    between = ", " if one == "kubernetes" else " "
    return between.join(dict.fromkeys(_FLAGS[what][one] for what in whats))


def of_mapping() -> list[Confined]:
    """What keeps root from mapping ids into a user namespace."""
    missing = subordinate.unmapped_without()
    return [Confined("mapping", f"without {', '.join(missing)} no ids can be mapped")] if missing else []


def of_namespaces() -> list[Confined]:
    """What keeps this process from namespaces of its own, with mounts in them, whatever capabilities it has there."""
    return [*_filtered(), *of_mounts()]


def _filtered() -> list[Confined]:
    # They leave nothing, and anybody may do so: only a filter has an objection.
    harmless: dict[str, Callable[[], object]] = {"unshare": _ask_for_namespaces, "openat2": _open_nothing}
    if subordinate.may_mount():
        harmless["mount"] = lambda: syscalls.mount("none", "", "tmpfs")  # there is no such place
        harmless["pivot_root"] = lambda: syscalls.pivot_root("", "")
    name = _forbidden_of(harmless)
    return [Confined("seccomp", f"a filter of system calls (seccomp) forbids {name}")] if name else []


def _forbidden_of(harmless: Mapping[str, Callable[[], object]]) -> str:
    """The first of these calls that a filter forbids; whoever may make it is refused nothing but wrong arguments."""
    for name, call in harmless.items():
        try:
            call()
        except OSError as error:
            if error.errno in {errno.EPERM, errno.ENOSYS}:
                return name
    return ""


def _ask_for_namespaces() -> None:
    """Unshare none of them, with a flag that does not exist: the kernel says so first, a filter sees only the others.

    Source: check_unshare_flags() in kernel/fork.c; seccomp_restrict_namespaces() of systemd.
    """
    syscalls.unshare(0)
    syscalls.unshare(_NAMESPACES | _NO_FLAG)


def _open_nothing() -> None:
    """A filter cannot look into the arguments of this call; systemd's RestrictSUIDSGID forbids it altogether."""
    os.close(syscalls.openat2(-1, "/", os.O_PATH))


def is_filtered() -> bool:
    """Whether any filter of system calls is over this process, whatever it forbids."""
    return "\nSeccomp:\t2\n" in _read("/proc/self/status")


def forbidden_inside() -> str:
    """The first call that a filter forbids in a user namespace of one's own; "" for none that is seen.

    Enters namespaces: only for a process that ends after it.
    """
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
    except OSError:
        return ""  # it may not be a filter that does not want it
    harmless: dict[str, Callable[[], object]] = {
        "mount": lambda: syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE),
        "pivot_root": lambda: syscalls.pivot_root("", ""),
        "sethostname": lambda: syscalls.sethostname("a"),
        "setns": lambda: syscalls.setns(-1),
        "umount2": lambda: syscalls.umount("", 0),
    }
    return _forbidden_of(harmless)


def of_mounts() -> list[Confined]:
    """What keeps this process from mounts, although it has the capability."""
    label = _read("/proc/self/attr/current").rstrip("\0\n")
    if label in {"", "unconfined", "kernel"}:
        return []
    try:
        # The option is no option, so that nothing is ever mounted.
        syscalls.mount("none", "/", "tmpfs", 0, "unisandbox=nothing")
    except OSError as error:
        if error.errno == errno.EACCES:
            profile = label.partition(" (")[0]
            if ":" in label:
                return [Confined("selinux", f"SELinux forbids mounts ({label})")]
            return [Confined("apparmor", f"AppArmor forbids mounts (profile {profile})")]
    return []


def masked() -> list[Confined]:
    """Whether a user namespace may have no /proc and /sys of its own, since something is hidden in all that we see."""
    table = [line.split(" ") for line in _read("/proc/self/mountinfo").splitlines()]
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys")):
        hidden = _hidden(table, kind)
        if hidden is not None:
            why = f"{hidden} is masked or read-only" if hidden else f"no whole {place} is mounted"
            return [Confined("masked", f"{why}, and so the kernel lets no user namespace mount {place}")]
    return []


def _hidden(table: list[list[str]], kind: str) -> str | None:
    """What is mounted over a part of the mounts of this kind: the kernel wants one that is whole. None: one is."""
    covers = ""
    for fields in table:
        number, root, directory = fields[0], fields[3], fields[4]
        if root != "/" or fields[fields.index("-") + 1] != kind:
            continue
        over = [
            child[4]
            for child in table
            if child[1] == number and child[4][len(directory.rstrip("/")) :] not in _EMPTY[kind]
        ]
        if not over:
            return None
        covers = covers or sorted(over)[0]
    return covers


@functools.cache
def denies_keyrings() -> bool:
    """Whether a filter keeps keyrings from this process, and so from all that it starts. Looked at once."""
    try:
        syscalls.session_keyring()
    except OSError as error:
        return error.errno in {errno.EPERM, errno.ENOSYS}
    return False


@functools.cache
def no_cgroup_is_given() -> bool:
    """Whether the file systems of cgroups are mounted, and all of them read-only. Looked at once."""
    table = [line.split(" ") for line in _read("/proc/self/mountinfo").splitlines()]
    found = [fields[5].split(",") for fields in table if fields[fields.index("-") + 1] in {"cgroup", "cgroup2"}]
    return bool(found) and all("ro" in options for options in found)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
