"""Compiles one module, as a process of its own: it cannot be interrupted, so somebody must be able to kill it.

The keeper starts it (`python -I compiler.py REQUEST`). Descriptors: 0 the module, 1 where the artefact is written, 2
where it says why there is none. REQUEST is a JSON object: `paths` (where Python finds this package and wasmtime),
`settings` (of `config.configuration`), `cpu_seconds` and `bytes` (limits of the processor time of all its threads
together, and of the artefact), and `memory` (bytes of address space; 0: a cgroup bounds its memory).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

INVALID = 3
"""The exit code that says: the module is not valid, and descriptor 2 says why."""

_COMPONENT = b"\0asm\x0d\x00\x01\x00"
"""How a component begins. Source: component-model/design/mvp/Binary.md: version 13, layer 1."""


def main(request: dict[str, Any]) -> int:
    """Compile; the exit code."""
    limits = {
        resource.RLIMIT_CPU: int(request["cpu_seconds"]),
        resource.RLIMIT_FSIZE: int(request["bytes"]),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if request["memory"]:
        limits[resource.RLIMIT_AS] = int(request["memory"])
    for kind, limit in limits.items():
        # At both limits of processor time at once it is SIGKILL, which says nothing. Source: setrlimit(2).
        resource.setrlimit(kind, (limit, limit + 1 if kind == resource.RLIMIT_CPU else limit))
    sys.path[:0] = request["paths"]  # the caller's: this very package, whatever else is installed
    import wasmtime
    from wasmtime.component import Component

    from unisandbox.backends.wasm.config import configuration

    with open(0, "rb", closefd=False) as file:
        data = file.read()
    try:
        if not data.startswith(b"\0asm"):
            data = bytes(wasmtime.wat2wasm(data))
        config = configuration(**request["settings"])
        config.parallel_compilation = True  # its threads end with this process; the artefact is the same
        engine = wasmtime.Engine(config)
        is_component = data.startswith(_COMPONENT)
        artefact = (Component(engine, data) if is_component else wasmtime.Module(engine, data)).serialize()
    except (wasmtime.WasmtimeError, UnicodeDecodeError) as error:
        os.write(2, str(error).encode(errors="replace")[:4096])
        return INVALID
    with open(1, "wb", closefd=False) as output:
        output.write(artefact)
    return 0


if __name__ == "__main__":
    # wasmtime's own threads and its Engine end with the process.
    os._exit(main(json.loads(sys.argv[1])))
