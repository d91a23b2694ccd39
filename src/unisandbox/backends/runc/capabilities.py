"""What namespaces and cgroups can do."""

from __future__ import annotations

from typing import Final

from unisandbox.api import Capabilities

CAPABILITIES: Final = Capabilities(
    isolation="namespaces",
    rootfs=frozenset({"host", "dir"}),
    networks=frozenset({"none", "host", "namespace"}),
    containers=True,
    exec=True,
    tty=True,
    files=True,
    userns=True,
    userns_host=True,
    seccomp=True,
    shared_pid=True,
    host_devices=True,
    cgroup_parent=True,
    host_mounts=True,
    pause=True,
    update=True,
    ttl=True,
    survives_host_crash=True,
    start_seconds=0.015,
)
