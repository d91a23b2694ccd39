"""Cgroup v1: the files of its controllers, each in a hierarchy of its own.

`at` maps a controller to the directory that holds its files. On a hybrid host "unified" is the controller-less
cgroup2 tree, which serves for ending, freezing and cpu times.
Source: Documentation/admin-guide/cgroup-v1/*.rst, Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from unisandbox.host.cgroups import ending, files, v2
from unisandbox.host.cgroups.devices import DeviceRule
from unisandbox.host.cgroups.limits import CPU_PERIOD_US, Limits, Stats

OOM_FILE = "memory.oom_control"
_SHARES_PER_WEIGHT = 1024 / 100  # the defaults of v1 and v2 mean the same


def set_limits(at: Mapping[str, str], limits: Limits, *, fresh: bool) -> None:
    """Write the limits; of a `fresh` cgroup only those that are given."""
    if "memory" in at and (limits.memory is not None or not fresh):
        _set_memory(at["memory"], limits)
    if "cpu" in at and (limits.cpu is not None or not fresh):
        _set_quota(at["cpu"], limits.cpu)
    if "cpu" in at and (limits.cpu_weight is not None or not fresh):
        weight = limits.cpu_weight if limits.cpu_weight is not None else 100
        files.write(at["cpu"], "cpu.shares", str(max(2, min(262_144, round(weight * _SHARES_PER_WEIGHT)))))
    if "pids" in at and (limits.pids is not None or not fresh):
        files.write(at["pids"], "pids.max", "max" if limits.pids is None else str(limits.pids))


def _set_memory(directory: str, limits: Limits) -> None:
    memory = "memory.limit_in_bytes", limits.memory
    # memory.memsw counts memory + swap and is there only where swap is accounted for (swapaccount=1).
    both = None if limits.memory is None or limits.swap is None else limits.memory + limits.swap
    writes = [memory]
    if counts_swap(directory):
        # The kernel keeps limit <= memsw at every moment: on the way up memsw goes first, on the way down last.
        now = files.read_int(directory, "memory.memsw.limit_in_bytes")
        memsw = "memory.memsw.limit_in_bytes", both
        raising = now is not None and (both is None or both > now)
        writes = [memsw, memory] if raising else [memory, memsw]
    for name, value in writes:
        try:
            files.write(directory, name, "-1" if value is None else str(value))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            used = files.read_int(directory, "memory.usage_in_bytes")
            raise OSError(errno.EBUSY, f"{error.strerror} ({used} bytes are in use)") from None


def _set_quota(directory: str, cpu: float | None) -> None:
    quota = -1 if cpu is None else round(cpu * CPU_PERIOD_US)
    try:
        if quota > 0 and files.read_int(directory, "cpu.cfs_period_us") != CPU_PERIOD_US:
            files.write(directory, "cpu.cfs_period_us", str(CPU_PERIOD_US))
        files.write(directory, "cpu.cfs_quota_us", str(quota))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        message = f"{error.strerror} (v1 allows no cgroup more cpu than the one above it)"
        raise OSError(errno.EINVAL, message) from None


def get_limits(at: Mapping[str, str]) -> Limits:
    """The limits as the kernel has them."""
    memory = swap = quota = weight = pids = None
    if "memory" in at:
        memory = files.read_int(at["memory"], "memory.limit_in_bytes")
        both = files.read_int(at["memory"], "memory.memsw.limit_in_bytes")
        swap = both - memory if both is not None and memory is not None else None
    if "cpu" in at:
        quota = files.read_int(at["cpu"], "cpu.cfs_quota_us")
        shares = files.read_int(at["cpu"], "cpu.shares")
        weight = None if shares in (None, 1024) else max(1, min(10_000, round(shares / _SHARES_PER_WEIGHT)))
    cpu = None if quota is None else quota / (files.read_int(at["cpu"], "cpu.cfs_period_us") or CPU_PERIOD_US)
    if "pids" in at:
        pids = files.read_int(at["pids"], "pids.max")
    return Limits(memory=memory, swap=swap, cpu=cpu, cpu_weight=weight, pids=pids)


def counts_swap(directory: str) -> bool:
    """Whether this host can limit swap."""
    return os.path.exists(f"{directory}/memory.memsw.limit_in_bytes")


def stats(at: Mapping[str, str]) -> Stats:
    """What the cgroup uses. cpu times come from the unified tree where there is one: it needs no hierarchy more."""
    memory = inactive = peak = limit = swap = pids = pids_limit = kills = None
    total = user = system = periods = throttled = None
    if "memory" in at:
        directory = at["memory"]
        memory = files.read_int(directory, "memory.usage_in_bytes")
        inactive = files.read_table(directory, "memory.stat").get("total_inactive_file")
        peak = files.read_int(directory, "memory.max_usage_in_bytes")
        limit = files.read_int(directory, "memory.limit_in_bytes")
        both = files.read_int(directory, "memory.memsw.usage_in_bytes")
        swap = max(0, both - memory) if both is not None and memory is not None else None
        kills = oom_kills(at)
    if "unified" in at:
        total, user, system = v2.cpu_times(at["unified"])
    elif "cpuacct" in at:
        total = (files.read_int(at["cpuacct"], "cpuacct.usage") or 0) / 1e9
        table = files.read_table(at["cpuacct"], "cpuacct.stat")
        ticks = os.sysconf("SC_CLK_TCK")
        user, system = table.get("user", 0) / ticks, table.get("system", 0) / ticks
    if "cpu" in at:
        table = files.read_table(at["cpu"], "cpu.stat")
        periods, throttled = table.get("nr_throttled"), table.get("throttled_time", 0) / 1e9
    if "pids" in at:
        pids = files.read_int(at["pids"], "pids.current")
        pids_limit = files.read_int(at["pids"], "pids.max")
    return Stats(memory, inactive, peak, limit, swap, total, user, system, periods, throttled, pids, pids_limit, kills)


def oom_kills(at: Mapping[str, str]) -> int:
    """How many processes of this very cgroup the kernel killed for memory. Source: v1 counts where the victim was."""
    kills = files.read_table(at["memory"], OOM_FILE).get("oom_kill")
    if kills is None:
        raise OSError(errno.ENOTSUP, f"{at['memory']}/{OOM_FILE} counts no kills: Linux 4.13 is needed")
    return kills


def watch_oom(at: Mapping[str, str]) -> int:
    """An eventfd that becomes readable when memory runs out in this cgroup, or in one above.

    Source: cgroup-v1/memory.rst, section 10; mem_cgroup_oom_notify(), mm/memcontrol-v1.c, tells all below.
    """
    notice = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(f"{at['memory']}/{OOM_FILE}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            files.write(at["memory"], "cgroup.event_control", f"{notice} {control}")
        finally:
            os.close(control)
    except BaseException:
        os.close(notice)
        raise
    return notice


def freeze(at: Mapping[str, str]) -> bool:
    """Let every process of the tree be stopped; whether all are."""
    if "unified" in at:
        return v2.freeze(at)
    # Written again each time: a process that came in while the others froze is frozen by the next write.
    files.write(at["freezer"], "freezer.state", "FROZEN")
    return files.read(at["freezer"], "freezer.state") == "FROZEN"


def thaw(at: Mapping[str, str]) -> None:
    """Let the tree run on."""
    if "unified" in at:
        v2.thaw(at)
    else:
        files.write(at["freezer"], "freezer.state", "THAWED")


def is_frozen(at: Mapping[str, str]) -> bool:
    """Whether `freeze` was called last; False when it is gone."""
    if "unified" in at:
        return v2.is_frozen(at)
    return files.read_optional(at["freezer"], "freezer.self_freezing") == "1"


def allow_devices(at: Mapping[str, str], rules: Sequence[DeviceRule]) -> None:
    """Deny all devices, then allow `rules`."""
    directory = at["devices"]
    try:
        files.write(directory, "devices.deny", "a")
    except OSError as error:
        if error.errno != errno.EINVAL or not _has_children(directory):
            raise
        raise OSError(errno.EINVAL, f"{error.strerror} (v1 wants it before there are cgroups below)") from None
    for rule in rules:
        files.write(directory, "devices.allow", str(rule))


def _has_children(directory: str) -> bool:
    return next(ending.tree(directory), directory) != directory


def prepare_root(directory: str, controllers: Sequence[str]) -> None:
    """Make what happens below count above (the default, and unchangeable, since Linux 5.11)."""
    if "memory" in controllers and files.read_optional(directory, "memory.use_hierarchy") == "0":
        files.write(directory, "memory.use_hierarchy", "1")
