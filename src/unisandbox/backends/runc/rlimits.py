"""The kernel's limits of a process (getrlimit(2)): what it gets where no spec speaks of them, and where one does."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Final

from unisandbox.api import Resources, UnavailableError

Rlimits = Mapping[str, tuple[int, int]]
"""Soft and hard limits, by the kernel's names."""

_STACK: Final = 8 << 20


def plain_limits(keeper_pid: int) -> Rlimits:
    """What a process gets of the limits that no spec speaks of: not what this process happens to run under.

    Soft limits as high as the keeper's hard ones, which nobody inside could raise; the stack as the kernel has
    it, since an unlimited one changes where memory is mapped. Source: getrlimit(2), _STK_LIM of the kernel.

    RLIMIT_NOFILE is a bound only: of open files a process has what the specs say.

    RLIMIT_CORE is what stands for none: where cores go to a program (core_pattern "|..."), the kernel starts that, as
    root of the host, for a limit of 0 too, and only for 1 it does not. Source: do_coredump() in fs/coredump.c.
    """
    limits: dict[str, tuple[int, int]] = {}
    for name in ("AS", "CPU", "DATA", "FSIZE", "MEMLOCK", "MSGQUEUE", "NOFILE", "NPROC", "RSS", "SIGPENDING"):
        hard = _hard(keeper_pid, name)
        limits[f"RLIMIT_{name}"] = (hard, hard)
    hard = _hard(keeper_pid, "STACK")
    soft = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
    core = 0 if _hard(keeper_pid, "CORE") == 0 else 1  # nobody inside may raise it
    return limits | {"RLIMIT_STACK": (soft, hard), "RLIMIT_CORE": (core, core)}


def _hard(keeper_pid: int, name: str) -> int:
    try:
        return resource.prlimit(keeper_pid, getattr(resource, f"RLIMIT_{name}"))[1]
    except ProcessLookupError:
        raise UnavailableError(f"the keeper (process {keeper_pid}) has ended") from None


def most_files_in(plain: Rlimits) -> int:
    """How many files any process can have open."""
    return plain["RLIMIT_NOFILE"][1]


def process_limits(plain: Rlimits, sandbox: Resources, container: Resources) -> Rlimits:
    """What a process of a container gets.

    Args:
        plain: see `plain_limits`.
        sandbox: those of the sandbox.
        container: the container's own; one is below the sandbox's, never above it.
    """
    limits = dict(plain)
    no_core = limits.pop("RLIMIT_CORE")
    most_files = most_files_in(plain)
    del limits["RLIMIT_NOFILE"]
    for name, values in (
        ("RLIMIT_NOFILE", (sandbox.nofile, container.nofile)),
        ("RLIMIT_CORE", (sandbox.core, container.core)),
    ):
        least = min((value for value in values if value is not None), default=None)
        if least is not None:
            limits[name] = (least, least) if least else no_core
    if "RLIMIT_NOFILE" in limits:  # the default may be more than there can be here; see `Resources`
        limits["RLIMIT_NOFILE"] = min(limits["RLIMIT_NOFILE"], (most_files, most_files))
    return limits
