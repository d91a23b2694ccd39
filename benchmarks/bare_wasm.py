"""wasmtime-py alone, given the same work as a Wasm sandbox: a module loaded once, a fresh store for each start.

What it has not: files of its own, limits, an end that comes from outside, and more than one guest at a time. Run as a
program (`python -m benchmarks.bare_wasm MODULE`) it is what a subprocess for each guest would be.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from typing import Final

import wasmtime

_CALLS: Final = """
(import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(memory (export "memory") 1)
(data (i32.const 64) "hello\\n")
(func $hello
  (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 6))
  (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
"""
PROGRAMS: Final = {
    "hello": f'(module {_CALLS} (func (export "_start") (call $hello)))',
    "wait": f"""(module {_CALLS} (func (export "_start") (call $hello)
        (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))))""",
    "spin": f'(module {_CALLS} (func (export "_start") (call $hello) (loop br 0)))',
}
"""`hello` says hello and ends, `wait` then waits for input, `spin` then never ends."""

_RIGHTS: Final = 0o600


class BareWasm:
    """One Engine, and one program, compiled."""

    def __init__(self, text: str) -> None:
        self._engine = wasmtime.Engine()
        self._linker = wasmtime.Linker(self._engine)
        self._linker.define_wasi()
        self._module = wasmtime.Module(self._engine, text)

    def serialized(self) -> bytes:
        """The compiled module."""
        return bytes(self._module.serialize())

    @classmethod
    def loaded(cls, path: str) -> BareWasm:
        """One whose module was compiled before."""
        bare = cls("(module)")
        bare._module = wasmtime.Module.deserialize_file(bare._engine, path)
        return bare

    def run(self, root: str, stdout: str, stdin: str | None = None) -> None:
        """Run it once, to its end.

        Args:
            root: a directory that it sees as "/".
            stdout: a file for its output.
            stdin: one for its input.
        """
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["program"]
        wasi.preopen_dir(root, "/")
        wasi.stdout_file = stdout
        if stdin is not None:
            wasi.stdin_file = stdin
        store = wasmtime.Store(self._engine)
        store.set_wasi(wasi)
        start = self._linker.instantiate(store, self._module).exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)
        start(store)
        store.close()

    def blocked(self, number: int, root: str) -> None:
        """Start so many of it that wait for input until this process ends; returns when each has said hello."""
        reader, writer = os.pipe()
        fifo = os.path.join(root, "input")
        os.mkfifo(fifo, _RIGHTS)
        os.open(fifo, os.O_RDWR)  # stays open: nobody ever writes, and it has no end
        for _ in range(number):
            threading.Thread(target=self.run, args=(root, f"/proc/self/fd/{writer}", fifo), daemon=True).start()
        said = b""
        while len(said) < 6 * number:
            said += os.read(reader, 65536)


def main() -> None:
    """Run a compiled module once, with this process's output."""
    with tempfile.TemporaryDirectory() as root:
        BareWasm.loaded(sys.argv[1]).run(root, "/proc/self/fd/1")


if __name__ == "__main__":
    main()
