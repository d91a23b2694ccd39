#!/usr/bin/env python3
"""Build the programs of native/ for every machine into the package, or with --check compare with what is committed.

The bytes depend on the compiler: Debian 12's gcc and gcc-aarch64-linux-gnu (12.2.0). Needs nothing but the standard
library and the two compilers.
"""

from __future__ import annotations

import itertools
import sys

from committed import ROOT, Compiler, MissingError, asked_to_check, build, say, settle

NATIVE = ROOT / "native"
HOST = ROOT / "src" / "unisandbox" / "host"
PROGRAMS = {"init": HOST / "init" / "bin", "launch": HOST / "keeper" / "bin"}
"""Each is built from `native/NAME/NAME.c`, into this directory."""

FLAGS = [
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion"),
    *("-ffreestanding", "-nostdlib", "-nostartfiles", "-static", "-no-pie", "-fno-pie", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-ident", "-fomit-frame-pointer"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,-z,noseparate-code", "-s"),
    f"-I{NATIVE / 'common'}",
]
MACHINES = {
    "x86_64": (
        Compiler("x86_64-linux-gnu-gcc-12", "12.2.0", "-dumpfullversion", "gcc"),
        ["-fcf-protection=none", "-march=x86-64"],
    ),
    "aarch64": (
        Compiler("aarch64-linux-gnu-gcc-12", "12.2.0", "-dumpfullversion", "gcc-aarch64-linux-gnu"),
        ["-mno-outline-atomics", "-march=armv8-a"],
    ),
}


def main() -> int:
    check = asked_to_check(__doc__ or "")
    try:
        built = {
            PROGRAMS[program] / f"{program}-{machine}": build(
                MACHINES[machine][0], [*FLAGS, *MACHINES[machine][1]], NATIVE / program / f"{program}.c"
            )
            for program, machine in itertools.product(PROGRAMS, MACHINES)
        }
    except MissingError as error:
        say(str(error))
        return 2
    return settle(built, check=check, mode=0o755)


if __name__ == "__main__":
    sys.exit(main())
