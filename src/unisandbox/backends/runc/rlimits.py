"""The kernel's limits of a process (getrlimit(2)): what it gets where no spec speaks of them, and where one does."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Final

from unisandbox.api import Resources

Rlimits = Mapping[str, tuple[int, int]]
"""Soft and hard limits, by the kernel's names."""

_STACK: Final = 8 << 20


def plain_limits(keeper_pid: int) -> Rlimits:
    """What a process gets of the limits that no spec speaks of: not what this process happens to run under.

    Soft limits as high as the keeper's hard ones, which nobody inside could raise; the stack as the kernel has
    it, since an unlimited one changes where memory is mapped. Source: getrlimit(2), _STK_LIM of the kernel.

    RLIMIT_CORE is what stands for none: where cores go to a program (core_pattern "|..."), the kernel starts that, as
    root of the host, for a limit of 0 too, and only for 1 it does not. Source: do_coredump() in fs/coredump.c.
    """
    limits: dict[str, tuple[int, int]] = {}
    for name in ("AS", "CPU", "DATA", "FSIZE", "MEMLOCK", "MSGQUEUE", "NPROC", "RSS", "SIGPENDING"):
        hard = resource.prlimit(keeper_pid, getattr(resource, f"RLIMIT_{name}"))[1]
        limits[f"RLIMIT_{name}"] = (hard, hard)
    hard = resource.prlimit(keeper_pid, resource.RLIMIT_STACK)[1]
    soft = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
    core = 0 if resource.prlimit(keeper_pid, resource.RLIMIT_CORE)[1] == 0 else 1  # nobody inside may raise it
    return limits | {"RLIMIT_STACK": (soft, hard), "RLIMIT_CORE": (core, core)}


def process_limits(plain: Rlimits, sandbox: Resources, container: Resources) -> Rlimits:
    """What a process of a container gets.

    Args:
        plain: see `plain_limits`.
        sandbox: those of the sandbox.
        container: the container's own; one is below the sandbox's, never above it.
    """
    limits = dict(plain)
    no_core = limits.pop("RLIMIT_CORE")
    for name, values in (
        ("RLIMIT_NOFILE", (sandbox.nofile, container.nofile)),
        ("RLIMIT_CORE", (sandbox.core, container.core)),
    ):
        least = min((value for value in values if value is not None), default=None)
        if least is not None:
            limits[name] = (least, least) if least else no_core
    return limits
