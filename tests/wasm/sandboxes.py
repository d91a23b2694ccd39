"""Roots and engines for the tests of Wasm sandboxes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from unisandbox import Engine
from unisandbox.backends.wasm import WasmBackend

NAMES = (
    *("abort", "args", "cat", "do", "eat", "echo", "env", "exit", "fds", "files", "fill", "fit", "ln", "ls", "mkdir"),
    *("mv", "out", "pwd", "random", "read", "rm", "sleep", "spin", "stat", "store", "swap", "true", "whole", "write"),
)

EXIT_7 = '(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))' + (
    ' (memory (export "memory") 1) (func (export "_start") i32.const 7 call $exit))'
)

# Opens a file and closes it, very often; then opens it until it is refused, and ends with how often that went.
OPENS = """
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "tmp/x")
  (func $one (result i32)
    (call $open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 1) (i64.const 66)
      (i64.const 66) (i32.const 0) (i32.const 512)))
  (func (export "_start") (local $n i32)
    (loop $reuse
      (if (call $one) (then (call $exit (i32.const 1))))
      (drop (call $close (i32.load (i32.const 512))))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br_if $reuse (i32.lt_u (local.get $n) (i32.const 1000))))
    (local.set $n (i32.const 0))
    (loop $more
      (if (i32.eqz (call $one))
        (then (local.set $n (i32.add (local.get $n) (i32.const 1))) (br $more))))
    (call $exit (local.get $n))))
"""
ITS_OWN = 4
"""Descriptors that a guest begins with: three streams and its root."""


def tool() -> bytes:
    """The conformance tests' module of many small programs."""
    return files("unisandbox.conformance").joinpath("guest/tool.wasm").read_bytes()


def make_root(directory: Path) -> Path:
    """A root directory with the small programs in /bin, and `seven.wat`, which ends with 7."""
    binaries = directory / "bin"
    binaries.mkdir(parents=True)
    (binaries / "tool.wasm").write_bytes(tool())
    for name in NAMES:
        os.link(binaries / "tool.wasm", binaries / f"{name}.wasm")
    (directory / "seven.wat").write_text(EXIT_7)
    (directory / "etc").mkdir()
    (directory / "etc" / "motd").write_text("hello from below\n")
    return directory


@asynccontextmanager
async def engine(cache: Path, **settings: object) -> AsyncIterator[Engine]:
    """An engine whose Wasm backend keeps its modules in `cache`."""
    backend = WasmBackend(cache=cache, **settings)  # type: ignore[arg-type]
    async with Engine.open(backends={"wasm": backend}) as opened:
        yield opened


def tree_of(directory: Path) -> dict[str, object]:
    """Everything below a directory: what must not change."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def pids_of(program: str) -> set[str]:
    """The processes of this run that have it in their command line; of this machine, where the run has no cgroup."""
    ours = f"/unisandbox-tests-{os.getpid()}"
    if ours not in Path("/proc/self/cgroup").read_text():
        ours = ""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line, cgroups = Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/cgroup").read_text()
            if program.encode() in line and ours in cgroups:
                found.add(pid)
    return found
