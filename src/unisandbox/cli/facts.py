"""More facts of this host for `unisandbox doctor`: what is asked for in an issue report, and no secret."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import resource
from importlib import metadata
from pathlib import Path
from typing import Final

from unisandbox.api import SandboxError
from unisandbox.host import subordinate
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.power import ids, standing
from unisandbox.oci.features import find_runtimes, losses

# What this library stands on, and what its extras bring.
_PACKAGES: Final = ("anyio", "attrs", "trio", "click", "wasmtime", "grpclib", "betterproto2")
# Without one of these much is missing.
_POWER: Final = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_MKNOD", "CAP_SYS_RESOURCE")


async def more_facts() -> dict[str, str]:
    """By name; each is one line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    runtimes = await find_runtimes()
    lost = {f"not with {one.name}": "; ".join(losses(one)) for one in runtimes if losses(one)}
    return {
        "packages": _packages(),
        "runtimes": ", ".join([f"{one.name} {one.version_text} ({one.path})" for one in runtimes]) or "none",
        **lost,
        "cgroups to write": _delegated(),
        "subordinate ids": _subordinate_ids(),
        "restrictions": _restrictions(),
        "first process": _read("/proc/1/comm") or "hidden",
        "open files": f"at most {_limit(soft)}, can be raised to {_limit(hard)}",
    }


def _packages() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _delegated() -> str:
    """The controllers of which this process may make cgroups; else what is in the way."""
    try:
        tree = Cgroups.detect("unisandbox-probe")
    except SandboxError as error:
        return f"none: {error.message}"
    if tree.controllers:
        return ", ".join(sorted(tree.controllers))
    return f"none: {next(iter(tree.missing.values()), 'no hierarchy is here')}"


def _subordinate_ids() -> str:
    if os.geteuid() == 0:
        return "not needed by root"
    if scarcity := ids.scarcity():
        return f"none that can be used: {scarcity.reason}"
    uids, gids = (subordinate.count(rows) - 1 for rows in ids.maps())
    return f"{uids} uids, {gids} gids"


def _restrictions() -> str:
    """What this process may less than another one of the same user."""
    found = ["in a user namespace"] * standing.is_inside()
    found += ["no_new_privs"] * standing.gains_nothing()
    found += ["a filter of system calls (seccomp)"] * standing.is_filtered()
    if label := standing.label():
        found.append(f"AppArmor or SELinux: {label}")
    if os.geteuid() == 0:
        found += [f"without {name}" for name in standing.without(_POWER)]
    return ", ".join(found) or "none"


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:  # this kernel does not have it, or it is not shown
        return ""


def without_home(said: str) -> str:
    """The same with "~" for this user's home directory: its path names him, and is of no use to anybody else."""
    for home in _homes():
        said = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", said)
    return said


@functools.cache
def _homes() -> tuple[str, ...]:
    """All paths of it, the longest first: as the environment and as the system have it, and what they lead to."""
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError):
        homes.add(pwd.getpwuid(os.geteuid()).pw_dir)
    homes |= {os.path.realpath(home) for home in homes}
    return tuple(sorted((home for home in homes if os.path.isabs(home) and home != "/"), key=len, reverse=True))
