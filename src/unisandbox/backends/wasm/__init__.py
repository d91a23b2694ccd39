"""WebAssembly sandboxes in this very process: guests are threads, their files real mounts, their end is always ours.

`entry` is what the engine finds; `sandboxer` and `task` manage sandboxes and guests (`given`, `containers` and
`settings` are what both modes have of them), `tree` makes their files, `programs` finds modules; `modules`, `store`,
`compiling` and `compiler` make them ready; `domain`, `guest` and what these use run them (wasmtime). May know: host/,
api/. Must not know: the engine, another backend.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.backends.wasm.entry import WasmBackend, backend

__all__ = ["WasmBackend", "backend"]


def __getattr__(name: str) -> object:
    # Processes that only run or compile guests import this package, and need nothing of the backend.
    if name in __all__:
        from unisandbox.backends.wasm import entry

        return getattr(entry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
