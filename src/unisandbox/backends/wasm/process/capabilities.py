"""What guests in processes of their own can have."""

from __future__ import annotations

from typing import Final

from unisandbox.api import Capabilities

NAME: Final = "wasm+process"

CAPABILITIES: Final = Capabilities(
    isolation="wasm",
    rootfs=frozenset({"dir"}),
    networks=frozenset({"none"}),
    containers=False,
    bundles=True,
    exec=True,
    files=True,
    userns=True,
    userns_host=True,
    seccomp=True,
    host_mounts=True,
    cgroup_parent=True,
    pause=True,
    update=True,
    cpu_seconds=True,
    processes=False,
    users=False,
    ttl=True,
    survives_host_crash=True,
    start_seconds=0.2,
    notes=(
        "A component (WASI 0.2) tells success or failure only: its exit code is 0 or 1.",
        "The memory limit counts the guests and the processes that they run in, about 15 MB each.",
    ),
)
