"""Cgroup v2: the files of the one hierarchy.

`at` maps a controller to the directory that holds its files; on v2 it is the same for all of them.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from unisandbox.host import syscalls
from unisandbox.host.cgroups import devices, ending, files
from unisandbox.host.cgroups.devices import DeviceRule
from unisandbox.host.cgroups.limits import CPU_PERIOD_US, Limits, Stats

_EVENTS = "memory.events"
OOM_FILE = "memory.events.local"


def set_limits(at: Mapping[str, str], limits: Limits, *, fresh: bool) -> None:
    """Write the limits; of a `fresh` cgroup only those that are given."""
    if "memory" in at and (limits.memory is not None or not fresh):
        _set_memory(at["memory"], limits, fresh=fresh)
    if "memory" in at and (limits.oom_group or not fresh):
        files.write(at["memory"], "memory.oom.group", str(int(limits.oom_group)))
    if "cpu" in at and (limits.cpu is not None or not fresh):
        quota = "max" if limits.cpu is None else str(round(limits.cpu * CPU_PERIOD_US))
        files.write(at["cpu"], "cpu.max", f"{quota} {CPU_PERIOD_US}")
    if "cpu" in at and (limits.cpu_weight is not None or not fresh):
        files.write(at["cpu"], "cpu.weight", str(limits.cpu_weight if limits.cpu_weight is not None else 100))
    if "pids" in at and (limits.pids is not None or not fresh):
        files.write(at["pids"], "pids.max", _text(limits.pids))


def _set_memory(directory: str, limits: Limits, *, fresh: bool) -> None:
    if not fresh and limits.memory is not None:
        _make_room(directory, limits.memory)
    if counts_swap(directory):
        files.write(directory, "memory.swap.max", "max" if limits.memory is None else _text(limits.swap))
    files.write(directory, "memory.max", _text(limits.memory))


def _make_room(directory: str, memory: int) -> None:
    """Refuse a limit below what is in use, as v1 does: v2 itself would kill processes until it fits."""
    used = files.read_int(directory, "memory.current") or 0
    if used <= memory:
        return
    if os.path.exists(f"{directory}/memory.reclaim"):  # Linux 5.19
        try:
            files.write(directory, "memory.reclaim", str(used - memory))
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: less than asked for was reclaimed
                raise
    used = files.read_int(directory, "memory.current") or 0
    if used > memory:
        message = f"cannot write '{memory}' to {directory}/memory.max: {used} bytes are in use"
        raise OSError(errno.EBUSY, message)


def _text(value: int | None) -> str:
    return "max" if value is None else str(value)


def get_limits(at: Mapping[str, str]) -> Limits:
    """The limits as the kernel has them."""
    memory = swap = cpu = weight = pids = group = None
    if "memory" in at:
        memory = files.read_int(at["memory"], "memory.max")
        group = files.read_int(at["memory"], "memory.oom.group")
        swap = files.read_int(at["memory"], "memory.swap.max")
    if "cpu" in at:
        quota, period = files.read(at["cpu"], "cpu.max").split()
        cpu = None if quota == "max" else int(quota) / int(period)
        weight = files.read_int(at["cpu"], "cpu.weight")
        weight = None if weight == 100 else weight
    if "pids" in at:
        pids = files.read_int(at["pids"], "pids.max")
    return Limits(memory=memory, swap=swap, cpu=cpu, cpu_weight=weight, pids=pids, oom_group=bool(group))


def counts_swap(directory: str) -> bool:
    """Whether this host can limit swap."""
    return os.path.exists(f"{directory}/memory.swap.max")


def stats(at: Mapping[str, str]) -> Stats:
    """What the cgroup uses."""
    memory = inactive = peak = limit = swap = pids = pids_limit = kills = None
    total = user = system = periods = throttled = None
    if "memory" in at:
        directory = at["memory"]
        memory = files.read_int(directory, "memory.current")
        inactive = files.read_table(directory, "memory.stat").get("inactive_file")
        peak = files.read_int(directory, "memory.peak")  # Linux 5.19
        limit = files.read_int(directory, "memory.max")
        swap = files.read_int(directory, "memory.swap.current")
        kills = oom_kills(at)
    if "unified" in at:
        total, user, system = cpu_times(at["unified"])
    if "cpu" in at:
        table = files.read_table(at["cpu"], "cpu.stat")
        periods, throttled = table.get("nr_throttled"), table.get("throttled_usec", 0) / 1e6
    if "pids" in at:
        pids = files.read_int(at["pids"], "pids.current")
        pids_limit = files.read_int(at["pids"], "pids.max")
    return Stats(memory, inactive, peak, limit, swap, total, user, system, periods, throttled, pids, pids_limit, kills)


def cpu_times(directory: str) -> tuple[float | None, float | None, float | None]:
    """Total, user and system seconds: there without any controller, also in the unified tree of a hybrid host."""
    table = files.read_table(directory, "cpu.stat")
    if "usage_usec" not in table:
        return None, None, None
    return table["usage_usec"] / 1e6, table["user_usec"] / 1e6, table["system_usec"] / 1e6


def oom_kills(at: Mapping[str, str]) -> int:
    """How many processes of this very cgroup the kernel killed for memory: the local count, at the victim."""
    kills = files.read_table(at["memory"], OOM_FILE).get("oom_kill")
    if kills is None:
        raise OSError(errno.ENOTSUP, f"{at['memory']}/{OOM_FILE} is not there: Linux 5.2 is needed")
    return kills


def oom_kills_below(at: Mapping[str, str]) -> int | None:
    """The same with all that is and was below; None when it is gone."""
    return files.read_table(at["memory"], _EVENTS).get("oom_kill")


def watch_oom(at: Mapping[str, str]) -> int:
    """An inotify that becomes readable when memory.events changes: it counts what is below, too."""
    return syscalls.inotify(f"{at['memory']}/{_EVENTS}", syscalls.IN_MODIFY)


def freeze(at: Mapping[str, str]) -> bool:
    """Let every process of the tree be stopped; whether all are."""
    files.write(at["unified"], "cgroup.freeze", "1")
    # Looked at, not waited for: the kernel holds back the notice of cgroup.events for up to 10 ms (measured 15 ms
    # against 1). Source: CGROUP_FILE_NOTIFY_MIN_INTV, kernel/cgroup/cgroup.c.
    # Each by itself: one that has processes of its own beside cgroups below is said to be frozen when those are, also
    # where the ones below are not (only on a hybrid host). Source: cgroup_update_frozen(), kernel/cgroup/freezer.c.
    return all(_has_stopped(directory) for directory in ending.tree(at["unified"]))


def _has_stopped(directory: str) -> bool:
    events = files.read_optional(directory, "cgroup.events") or ""  # it may be gone
    return "frozen 0" not in events.splitlines()


def thaw(at: Mapping[str, str]) -> None:
    """Let the tree run on."""
    files.write(at["unified"], "cgroup.freeze", "0")


def is_frozen(at: Mapping[str, str]) -> bool:
    """Whether `freeze` was called last; False when it is gone."""
    return files.read_optional(at["unified"], "cgroup.freeze") == "1"


def allow_devices(at: Mapping[str, str], rules: Sequence[DeviceRule]) -> None:
    """Deny all devices but `rules`, by a BPF program."""
    devices.attach(at["devices"], rules)


def prepare_root(directory: str, controllers: Sequence[str]) -> None:
    """Nothing: v2 is hierarchical by nature, and controllers are switched on when a child needs them."""


def enable(directory: str, controllers: Sequence[str]) -> None:
    """Switch controllers on for the children of `directory`; those that are on already cost one read.

    Raises:
        OSError: EBUSY when processes are in `directory` itself (only a root may have both), with the way out.
    """
    on = files.read(directory, "cgroup.subtree_control").split()
    missing = [name for name in controllers if name not in on]
    if not missing:
        return
    try:
        files.write(directory, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        message = f"{error.strerror} (processes are in it; v2 wants them in cgroups below)"
        raise OSError(errno.EBUSY, message) from None
