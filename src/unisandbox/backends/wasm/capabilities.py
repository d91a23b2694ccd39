"""What guests in this process can have."""

from __future__ import annotations

from typing import Final

import attrs

from unisandbox.api import Capabilities

NAME: Final = "wasm"

CAPABILITIES: Final = Capabilities(
    isolation="wasm",
    rootfs=frozenset({"dir"}),
    networks=frozenset({"none"}),
    containers=True,
    exec=True,
    tty=False,
    files=True,
    # A guest has no user at all, and what it asks for is done by this process: there is nothing to map. A sandbox that
    # is asked for with userns="private" has more than that; one without (userns="host") cannot be had.
    userns=False,
    userns_host=False,
    # A guest makes no system call: all that it can name are the functions of WASI that it was given. So what the filter
    # promises holds; there is no call left to let through for seccomp="unconfined" either, which is taken as well.
    seccomp=True,
    shared_pid=False,
    host_mounts=True,
    pause=False,
    update=True,
    cpu_seconds=True,
    processes=False,
    users=False,
    attach=False,
    # A thread can only be ended by its own process, which the keeper is not.
    ttl=False,
    exact_exits=True,
    survives_host_crash=False,
    host_exceptions=("thread tokio-rt-worker",),
    start_seconds=0.002,
)

# Where nothing may be mounted.
COPYING: Final = attrs.evolve(
    CAPABILITIES,
    notes=(
        "Nothing may be mounted by this process, so each sandbox has a copy of its root directory, on the disk, which"
        " counts in Resources.disk.",
        "A single file or a tmpfs cannot be mounted, and no link leads from one mount into another.",
        "What is read-only is so by wasmtime, not by the kernel.",
    ),
)
