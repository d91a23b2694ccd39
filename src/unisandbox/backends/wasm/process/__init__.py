"""Wasm guests in processes: the same instance as in process, inside a sandbox of namespaces.

Every guest is a process of its own (`worker`) in a container of an inner sandbox, which the backend "runc" makes: its
root file system is the guest's, and the containers in it hold this machine's Python, the packages that a worker needs
and nothing else. `entry` is what the engine finds; `sandboxer` and `task` say what the inner ones shall do, `guest` and
`report` what a guest is and how it ended, `pool` and `workers` start workers, `interior` is what their containers hold,
`images` what they run, `notes` what outlives the caller. May know: the rest of this package, host/, api/. Must not
know: the engine, another backend (its sandboxer is lent by the engine).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.backends.wasm.process.entry import WasmProcessBackend, backend

__all__ = ["WasmProcessBackend", "backend"]


def __getattr__(name: str) -> object:
    # A worker is a module of this package, and needs nothing of the backend.
    if name in __all__:
        from unisandbox.backends.wasm.process import entry

        return getattr(entry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
