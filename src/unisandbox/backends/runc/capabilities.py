"""What namespaces and cgroups can do."""

from __future__ import annotations

import functools
from typing import Final

import attrs

from unisandbox.api import Capabilities
from unisandbox.network.pasta import obstacle

CAPABILITIES: Final = Capabilities(
    isolation="namespaces",
    rootfs=frozenset({"host", "dir"}),
    networks=frozenset({"none", "host", "namespace"}),
    containers=True,
    bundles=True,
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


@functools.cache
def roots_capabilities() -> Capabilities:
    """What root can have here."""
    return attrs.evolve(CAPABILITIES, networks=CAPABILITIES.networks | user_network())


def user_network() -> frozenset[str]:
    """The network "user", on a host that has what it takes."""
    return frozenset() if obstacle()[0] else frozenset({"user"})
