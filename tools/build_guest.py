#!/usr/bin/env python3
"""Build native/guest, the programs of the conformance tests, into the package, or with --check compare with it.

The bytes depend on the compiler and on the C library: Debian 12's clang, lld, wasi-libc and libclang-rt-14-dev-wasm32.
"""

from __future__ import annotations

import sys

from committed import ROOT, Compiler, MissingError, asked_to_check, build, say, settle

SOURCE = ROOT / "native" / "guest" / "tool.c"
TARGET = ROOT / "src" / "unisandbox" / "conformance" / "guest" / "tool.wasm"

# The names of functions stay: a trap's backtrace is worth nothing without them.
FLAGS = [
    *("--target=wasm32-wasi", "-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror"),
    "-Wl,--strip-debug",
]
CLANG = Compiler("clang-14", "14.0.6", "-dumpversion", "clang lld wasi-libc libclang-rt-14-dev-wasm32")


def main() -> int:
    check = asked_to_check(__doc__ or "")
    try:
        module = build(CLANG, FLAGS, SOURCE)
    except MissingError as error:
        say(str(error))
        return 2
    return settle({TARGET: module}, check=check, mode=0o644)


if __name__ == "__main__":
    sys.exit(main())
