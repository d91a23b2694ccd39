"""What a sandbox or container uses, as the message that engines expect of this host's version of cgroups."""

from __future__ import annotations

from unisandbox.api import Metrics
from unisandbox.api.proto.google.protobuf import Any
from unisandbox.api.proto.io.containerd.cgroups import v1, v2

_NANO = 1_000_000_000
_MICRO = 1_000_000
_UNLIMITED = (1 << 63) - 4096  # what v1 says of memory without a limit; source: mm/page_counter.c


def any_of(metrics: Metrics, *, unified: bool) -> Any:
    """The message in an Any.

    Args:
        metrics: what is known.
        unified: the host has cgroup v2 alone.
    """
    used, most, limit = metrics.memory_bytes or 0, metrics.memory_peak_bytes or 0, metrics.memory_limit_bytes
    inactive = metrics.memory_inactive_file_bytes or 0
    seconds = metrics.cpu_seconds or 0.0
    if unified:
        made = v2.Metrics(
            pids=v2.PidsStat(current=metrics.pids or 0, limit=metrics.pids_limit or 0),
            cpu=v2.CpuStat(usage_usec=int(seconds * _MICRO)),
            memory=v2.MemoryStat(
                usage=used,
                usage_limit=(1 << 64) - 1 if limit is None else limit,
                max_usage=most,
                inactive_file=inactive,
            ),
            memory_events=v2.MemoryEvents(oom_kill=metrics.oom_kills or 0),
        )
        return Any(type_url="io.containerd.cgroups.v2.Metrics", value=bytes(made))
    old = v1.Metrics(
        pids=v1.PidsStat(current=metrics.pids or 0, limit=metrics.pids_limit or 0),
        cpu=v1.CpuStat(usage=v1.CpuUsage(total=int(seconds * _NANO))),
        memory=v1.MemoryStat(
            total_inactive_file=inactive,
            usage=v1.MemoryEntry(limit=_UNLIMITED if limit is None else limit, usage=used, max=most),
        ),
        memory_oom_control=v1.MemoryOomControl(oom_kill=metrics.oom_kills or 0),
    )
    return Any(type_url="io.containerd.cgroups.v1.Metrics", value=bytes(old))
