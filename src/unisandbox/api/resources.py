"""How much a sandbox or a container may use."""

from __future__ import annotations

from typing import Final

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import is_at_least, is_at_most, is_positive, is_whole
from unisandbox.api.units import GIB, MIB, parse_size

_DEFAULT_MEMORY: Final = 512 * MIB
_DEFAULT_PIDS: Final = 256
_LARGEST_DEFAULT_DISK: Final = GIB
DEFAULT_NOFILE: Final = 4096
LEAST_DISK: Final = 64 << 10
"""Bytes. What a sandbox itself writes there (/run/etc and a few directories) must fit."""
_MOST_PIDS: Final = 4 << 20  # PID_MAX_LIMIT of the kernel


# One function each, since type checkers take no closures as converters.
def _memory_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "memory")


def _disk_size(value: int | str | None) -> int | None:
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0 if value == 0 else None
    return parse_size(value, "disk")


def _swap_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "swap", least=0)


def _core_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "core", least=0)


@attrs.frozen
@by_fields
class Resources:
    """Limits of a sandbox or of one container in it. None means: not limited. Bytes may be written as "512M", too.

    Attributes:
        memory: bytes of memory. Page cache and files in tmpfs count.
        swap: bytes of swap beyond `memory`, which must be limited then, where the host counts swap; 0 is none.
        cpu: cores; 0.5 is half of one.
        cpu_seconds: seconds of processor time that one process may use, however long that takes; then it is ended with
            reason "cpu".
        pids: processes and threads at one time.
        disk: bytes that the writable layer may hold; 0, the default: half of the memory, at most 1 GiB (`disk_limit`).
            Up to half of the memory it is a tmpfs (charged to `memory`), above that a sparse file system image. It is
            the sandbox's, shared by its containers, and stays as long as the sandbox.
        nofile: open files of a process (RLIMIT_NOFILE). 4096, the default, is fewer where the process that opened the
            engine has a lower hard limit (`ulimit -Hn`), or the sandbox of a container a lower one. "runc" refuses
            any other number above that.
        core: bytes of a core dump (RLIMIT_CORE); with 0, the default, there is none, also where the host gives those to
            a program (/proc/sys/kernel/core_pattern).
    """

    memory: int | None = attrs.field(default=_DEFAULT_MEMORY, converter=_memory_size)
    swap: int | None = attrs.field(default=0, converter=_swap_size)
    cpu: float | None = attrs.field(default=None, validator=is_positive)
    pids: int | None = attrs.field(default=_DEFAULT_PIDS, validator=[is_whole, is_positive, is_at_most(_MOST_PIDS)])
    disk: int | None = attrs.field(default=0, converter=_disk_size, validator=is_at_least(LEAST_DISK))
    nofile: int | None = attrs.field(default=DEFAULT_NOFILE, validator=[is_whole, is_positive])
    core: int | None = attrs.field(default=0, converter=_core_size)
    cpu_seconds: float | None = attrs.field(default=None, validator=is_positive)

    @property
    def disk_limit(self) -> int | None:
        """Bytes that `disk` comes to; None: not limited."""
        if self.disk != 0:
            return self.disk
        if self.memory is None:
            return _LARGEST_DEFAULT_DISK
        return min(max(self.memory // 2, LEAST_DISK), _LARGEST_DEFAULT_DISK)

    @classmethod
    def unlimited(cls) -> Resources:
        """No limit at all: only for what you trust, or for hosts that cannot limit."""
        return cls(memory=None, swap=None, cpu=None, pids=None, disk=None, nofile=None, core=None, cpu_seconds=None)
