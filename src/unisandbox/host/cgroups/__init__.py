"""Control groups: v1, hybrid and v2 behind one typed interface.

Lives here: where our cgroups may live, making, limiting, measuring, freezing, ending and removing them.
May know: the kernel, `host.syscalls`, the error tree. Must not know: sandboxes, containers, runtimes.
`ending` is standard library only, since the keeper uses it: so the names below are imported on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from unisandbox.host.cgroups.cgroup import Cgroup
    from unisandbox.host.cgroups.devices import DeviceRule
    from unisandbox.host.cgroups.limits import Limits, Stats
    from unisandbox.host.cgroups.tree import Cgroups, open_existing

__all__ = ["Cgroup", "Cgroups", "DeviceRule", "Limits", "Stats", "open_existing"]

_HOMES = {
    "Cgroup": "cgroup",
    "Cgroups": "tree",
    "open_existing": "tree",
    "DeviceRule": "devices",
    "Limits": "limits",
    "Stats": "limits",
}


if not TYPE_CHECKING:  # to them the module would have every name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
