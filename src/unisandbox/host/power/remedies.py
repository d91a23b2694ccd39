"""What gives this process what it is without, in words: flags of container engines, settings of units, or root.

A flag is named only for what is missing. Source: Docker's and podman's manuals of `run`, the fields of a pod's
securityContext; systemd.exec(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from unisandbox.host.power import standing

Engine = Literal["docker", "podman", "kubernetes", ""]
What = Literal["seccomp", "apparmor", "selinux", "masked", "cgroups", "mapping", "sys_admin", "all"]
"""What a container can be without."""


class Obstacle(NamedTuple):
    """What keeps this process from something, and what takes that out of the way."""

    reason: str
    remedy: str


class Confined(NamedTuple):
    """Something that is kept from this process by what is around it: what, and how that is seen."""

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

USER_NAMESPACES: Final = "sysctl -w user.max_user_namespaces=15000"
NEWER_KERNEL: Final = "Use a newer kernel."


def engine() -> Engine:
    """Which engine has made the container around us, as far as it can be seen; "" for none."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    return "docker" if os.path.exists("/.dockerenv") else ""


def service() -> str:
    """The service of systemd's that this process is in, as far as it can be seen; "" for none."""
    if not os.path.isdir("/run/systemd/system"):
        return ""
    parts = standing.read("/proc/self/cgroup").replace("\n", "/").split("/")
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


def remedy_within(whats: Iterable[What]) -> str:
    """The same for the middle of a sentence."""
    return within(remedy(whats))


def within(text: str) -> str:
    """A remedy for the middle of a sentence."""
    return text[:1].lower() + text[1:]


def of_all(confined: Sequence[Confined]) -> Obstacle | None:
    """All of it in one; None for nothing."""
    if not confined:
        return None
    return Obstacle("; ".join(one.reason for one in confined), remedy(one.what for one in confined))


def who() -> str:
    """What this process is, for the reason of a refusal."""
    return f"this process is {standing.lacking() or 'root'}"


def as_root() -> str:
    """How this process gets what it is without, for the remedy of a refusal."""
    if standing.is_inside():
        return "run as root of the host"
    return "run as root" if os.geteuid() else remedy_within(["all"])


def _flags(whats: Iterable[What], one: Engine) -> str:
    between = ", " if one == "kubernetes" else " "
    return between.join(dict.fromkeys(_FLAGS[what][one] for what in whats))
