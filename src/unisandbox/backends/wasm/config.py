"""How wasmtime is configured, and the key under which compiled modules of that configuration are kept."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from typing import Final

import wasmtime

WASM_STACK_BYTES: Final = 1024 * 1024
"""What the frames of a guest may use of its thread's stack; twice wasmtime's own default."""

# Changed together with the meaning of a setting below that has no line in `_SETTINGS`.
_REVISION: Final = 1

# Compiled code bakes these in, or wasmtime compares them when it loads an artefact.
_SETTINGS: Final[dict[str, bool | int | str]] = {
    "cranelift_opt_level": "speed",
    # Shared memories would mean other threads of a guest; WASI preview 1 has pointers of 32 bits.
    "wasm_threads": False,
    "wasm_memory64": False,
    "wasm_reference_types": True,
    "wasm_simd": True,
    "wasm_relaxed_simd": True,
    "wasm_bulk_memory": True,
    "wasm_multi_value": True,
    "wasm_multi_memory": True,
    "wasm_tail_call": True,
}


def configuration(*, trust_signals: bool = False, fuel: bool = False) -> wasmtime.Config:
    """A fresh configuration; an Engine consumes it.

    Args:
        trust_signals: let wasmtime find out-of-bounds accesses by the processor's faults: 1.2-1.4 x faster code, but
            an Engine then installs handlers of SIGSEGV, SIGILL, SIGFPE, SIGBUS in this process, and every memory
            reserves 4 GiB of addresses.
        fuel: count instructions, so that `GuestLimits.fuel` can be given; code runs slower.
    """
    config = wasmtime.Config()
    for name, value in _SETTINGS.items():
        setattr(config, name, value)
    config.epoch_interruption = True
    config.consume_fuel = fuel
    config.signals_based_traps = trust_signals
    config.parallel_compilation = False  # rayon threads would stay in the host process
    config.max_wasm_stack = WASM_STACK_BYTES
    config.memory_init_cow = False  # images of a module's data need mappings of wasmtime's own (see `memory`)
    if not trust_signals:
        config.memory_reservation = 0
        config.memory_guard_size = 0
        config.memory_reservation_for_growth = 0
    return config


@functools.lru_cache(maxsize=8)
def configuration_key(*, trust_signals: bool = False, fuel: bool = False) -> str:
    """All that makes a compiled module usable by an Engine of this configuration on this machine, as 32 hex digits."""
    import importlib.metadata  # heavy, and not needed where guests only run

    facts = {
        "revision": _REVISION,
        "wasmtime": importlib.metadata.version("wasmtime"),
        "settings": _SETTINGS,
        "trust_signals": trust_signals,
        "fuel": fuel,
        "stack": WASM_STACK_BYTES,
        "machine": platform.machine(),
        "processor": _processor_features(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _processor_features() -> str:
    """The features of the first processor (`flags` on x86, `Features` on arm). Source: proc_cpuinfo(5)."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return " ".join(sorted(value.split()))
    return ""
