"""`unisandbox doctor`: what this host is, what can run on it, and what crashes have left on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import click

from unisandbox import __version__
from unisandbox.api import BackendError, Probe, SandboxError
from unisandbox.cli.facts import more_facts, without_home
from unisandbox.cli.state import opened
from unisandbox.engine import leftovers
from unisandbox.engine.choice import probe_all
from unisandbox.engine.leftovers import Leftover
from unisandbox.engine.registry import Registry
from unisandbox.host.cgroups.hierarchy import read_mounts
from unisandbox.host.power import remedies, standing

# What an engine cleans up that is opened on the state directory: records of sandboxes, a keeper without an owner.
_BY_AN_ENGINE: Final = frozenset({"state", "keeper"})
# What a client of one that lives frees.
_BY_A_CLIENT: Final = frozenset({"record", "stray"})
# Settings that keep ordinary users from making user namespaces; root is not touched by them.
_USERNS_SWITCHES: Final = ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns")


@attrs.frozen
class Report:
    """What was found.

    Attributes:
        host: facts by name.
        probes: what every installed backend says.
        leftovers: what crashes have left on this host.
        removed: those that were removed now.
        failures: why others could not be, by what they are.
    """

    host: Mapping[str, str]
    probes: Sequence[Probe]
    leftovers: Sequence[Leftover] = ()
    removed: Sequence[Leftover] = ()
    failures: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def code(self) -> int:
        """0 when something can run here, and all that was to be removed is; else 1."""
        return 0 if any(probe.available for probe in self.probes) and not self.failures else 1

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "host": _shown(self.host),
            "backends": [_shown(attrs.asdict(probe)) for probe in self.probes],
            "leftovers": [_shown(attrs.asdict(leftover)) for leftover in self.leftovers],
            "removed": [_shown(attrs.asdict(leftover)) for leftover in self.removed],
            "failures": _shown(self.failures),
        }

    def lines(self) -> list[str]:
        """For people; styled, which click.echo takes away where there is no terminal."""
        width = max(len(name) for name in self.host)
        lines = [f"{name:{width}}  {value}" for name, value in self.host.items()]
        for probe in self.probes:
            how = "tried" if probe.deep else "not tried, see --deep"
            if probe.available:
                lines += [
                    "",
                    f"{probe.backend}: {click.style('can run here', fg='green')} ({how})",
                    f"  {probe.reason}",
                ]
            else:
                lines += [
                    "",
                    f"{probe.backend}: {click.style('cannot run here', fg='red')}",
                    f"  cause: {probe.reason}",
                ]
            lines += [f"  remedy: {probe.hint}"] if probe.hint else []
            lines += [f"  warning: {warning}" for warning in probe.warnings]
            lines += [f"  {name}: {value}" for name, value in probe.facts.items() if name not in self.host]
        if not self.probes:
            lines += ["", "no backend is installed. Remedy: pip install --force-reinstall unisandbox"]
        return [without_home(line) for line in (*lines, *self._leftover_lines())]

    def _leftover_lines(self) -> list[str]:
        removed = {(leftover.kind, leftover.what) for leftover in self.removed}
        lines = ["", "left over from crashes:"] if self.leftovers else []
        for leftover in self.leftovers:
            what = f"{leftover.kind} {leftover.what}"
            if (leftover.kind, leftover.what) in removed:
                lines.append(f"  {what}: {click.style('removed', fg='green')}")
            elif what in self.failures:
                lines.append(f"  {what}: {click.style('not removed', fg='red')}: {self.failures[what]}")
            else:
                lines.append(f"  {what}: {leftover.why}")
        if any(_is_fixable(leftover) for leftover in self.leftovers) and not self.removed and not self.failures:
            lines.append("  remedy: unisandbox doctor --fix removes what can be removed safely")
        return lines


def _shown(value: object) -> object:
    """A value for JSON with all texts in it as they may be shown."""
    if isinstance(value, str):
        return without_home(value)
    if isinstance(value, Mapping):
        return {without_home(str(name)): _shown(member) for name, member in value.items()}
    if isinstance(value, Sequence):
        return [_shown(member) for member in value]
    return value


async def examine(*, deep: bool, fix: bool = False) -> Report:
    """Look at this host.

    Args:
        deep: every backend runs something for real.
        fix: remove what is left over; nothing that is in use, nor anything of which that is in doubt.
    """
    probes = await probe_all(Registry(), deep=deep)
    found = leftovers.find()
    removed: list[Leftover] = []
    failures: dict[str, str] = {}
    for leftover in found if fix else ():
        if not _is_fixable(leftover):
            continue
        try:
            await _remove(leftover)
            removed.append(leftover)
        except SandboxError as error:
            failures[f"{leftover.kind} {leftover.what}"] = error.message
    return Report(host_facts() | await more_facts(), probes, found, removed, failures)


def _is_fixable(leftover: Leftover) -> bool:
    return leftover.removable or leftover.kind in _BY_AN_ENGINE | _BY_A_CLIENT


async def _remove(leftover: Leftover) -> None:
    if leftover.kind in _BY_A_CLIENT:
        await leftovers.free_unrecorded(leftover.state_dir)
        return
    if leftover.removable or leftover.kind not in _BY_AN_ENGINE:
        leftovers.remove(leftover)
        return
    # As the other commands do: a keeper that runs by now is only attached to (and left, which ends one that nobody
    # needs); what lives under one that has come in between is taken over, and lives on.
    async with opened(leftover.state_dir, create=False) as engine:
        failed = [found for found in engine.recovery.sandboxes if found.action == "failed"] if engine else []
    if failed:
        raise BackendError(f"sandbox {failed[0].name or failed[0].sandbox_id!r}: {failed[0].reason}")


def host_facts() -> dict[str, str]:
    """What matters for sandboxes, and what a bug report needs."""
    uname = os.uname()
    return {
        "unisandbox": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "") if _has_os_release() else "unknown",
        "kernel": f"{uname.release} {uname.machine}",
        "user": _user(),
        "container": remedies.engine() or "none seen",
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
        "cgroups": _cgroup_layout(),
        "user namespaces": _user_namespaces(),
    }


def _user() -> str:
    lacking = standing.lacking()
    return f"id {os.geteuid()}, not root" if os.geteuid() else lacking or "root"


def _has_os_release() -> bool:
    return any(os.path.exists(path) for path in ("/etc/os-release", "/usr/lib/os-release"))


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{total / (1 << 30):.1f} GiB"


def _cgroup_layout() -> str:
    unified = [mount for mount in read_mounts() if mount.unified]
    known = {line.split()[0] for line in _read("/proc/cgroups").splitlines() if not line.startswith("#")}
    old = {name for mount in read_mounts() if not mount.unified for name in mount.controllers} & known
    if unified and old:
        return f"hybrid (v1 controllers: {', '.join(sorted(old))})"
    if unified:
        controllers = _read(f"{unified[0].directory}/cgroup.controllers").split()
        return f"v2 (controllers: {', '.join(sorted(controllers)) or 'none'})"
    return f"v1 (controllers: {', '.join(sorted(old))})" if old else "none is mounted"


def _user_namespaces() -> str:
    limit = _read("/proc/sys/user/max_user_namespaces")
    if not limit:
        return "not in this kernel"
    switches = {name.replace("/", "."): _read(f"/proc/sys/{name}") for name in _USERNS_SWITCHES}
    return ", ".join([f"at most {limit}", *(f"{name}={value}" for name, value in switches.items() if value)])


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # this kernel does not have it
        return ""
