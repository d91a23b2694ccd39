"""What can be limited in a cgroup, and what can be read from it. Sizes in bytes, times in seconds."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.errors import InvalidArgumentError

CPU_PERIOD_US = 100_000
"""The period of a cpu quota: the kernel's default. Source: Documentation/scheduler/sched-bwc.rst."""
CPU_MIN = 0.01
"""The least cpu limit: the kernel's least quota is 1 ms (per period)."""


def _positive(_: object, attribute: attrs.Attribute[int], value: int | None) -> None:
    if value is not None and value <= 0:
        raise InvalidArgumentError(f"{attribute.name} limit must be > 0, got {value}")


def _not_negative(_: object, attribute: attrs.Attribute[int], value: int | None) -> None:
    if value is not None and value < 0:
        raise InvalidArgumentError(f"{attribute.name} limit must be >= 0, got {value}")


def _cpu(_: object, __: object, value: float | None) -> None:
    if value is not None and not CPU_MIN <= value <= 1_000_000:
        raise InvalidArgumentError(f"cpu limit must be {CPU_MIN} to 1,000,000 cores, got {value}")


def _weight(_: object, __: object, value: int | None) -> None:
    if value is not None and not 1 <= value <= 10_000:
        raise InvalidArgumentError(f"cpu_weight must be 1 to 10000, got {value}")


@attrs.frozen
@by_fields
class Limits:
    """The limits of one cgroup; None is no limit.

    Args:
        memory: bytes of memory, page cache included. The kernel rounds to pages.
        swap: bytes of swap beyond `memory`; without `memory` it means nothing. 0, the default, is none at all; a host
            that does not account for swap refuses any other value.
        cpu: cores, as a quota per 100 ms; 0.5 is 50 ms of every 100.
        cpu_weight: share of the cpu when it is scarce, 1 to 10000; the kernel's default is 100.
        pids: processes and threads.
        oom_group: what the kernel kills one of for memory it kills all of; v1 cannot.
    """

    memory: int | None = attrs.field(default=None, validator=_positive)
    swap: int | None = attrs.field(default=0, validator=_not_negative)
    cpu: float | None = attrs.field(default=None, validator=_cpu)
    cpu_weight: int | None = attrs.field(default=None, validator=_weight)
    pids: int | None = attrs.field(default=None, validator=_positive)
    oom_group: bool = False

    def controllers(self) -> dict[str, str]:
        """What this needs: controller -> the limit that needs it."""
        needed = {}
        if self.memory is not None:
            needed["memory"] = "memory"
        elif self.oom_group:
            needed["memory"] = "oom_group"
        if self.cpu is not None or self.cpu_weight is not None:
            needed["cpu"] = "cpu" if self.cpu is not None else "cpu_weight"
        if self.pids is not None:
            needed["pids"] = "pids"
        return needed


class Stats(NamedTuple):
    """What a cgroup uses and has used, everything below it included. None: the host cannot tell.

    `oom_kills` alone is of the cgroup itself: how many of its own processes the kernel killed for memory.
    """

    memory_bytes: int | None = None
    memory_inactive_file_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    swap_bytes: int | None = None
    cpu_seconds: float | None = None
    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    throttled_periods: int | None = None
    throttled_seconds: float | None = None
    pids: int | None = None
    pids_limit: int | None = None
    oom_kills: int | None = None
