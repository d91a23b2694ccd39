#!/usr/bin/env python3
"""Build native/init for every machine into the package, or with --check compare with what is committed.

The bytes depend on the compiler: Debian 12's gcc and gcc-aarch64-linux-gnu (12.2.0). Needs nothing but the standard
library and the two compilers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "native" / "init" / "init.c"
TARGET = ROOT / "src" / "unisandbox" / "host" / "init" / "bin"
COMPILER_VERSION = "12.2.0"

FLAGS = [
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion"),
    *("-ffreestanding", "-nostdlib", "-nostartfiles", "-static", "-no-pie", "-fno-pie", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-ident", "-fomit-frame-pointer"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,-z,noseparate-code", "-s"),
]
MACHINES = {
    "x86_64": ("x86_64-linux-gnu-gcc-12", ["-fcf-protection=none", "-march=x86-64"]),
    "aarch64": ("aarch64-linux-gnu-gcc-12", ["-mno-outline-atomics", "-march=armv8-a"]),
}


def build(machine: str) -> bytes:
    compiler, flags = MACHINES[machine]
    version = subprocess.run([compiler, "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()
    if version != COMPILER_VERSION:
        print(f"build_init: {compiler} is {version}, the committed bytes come from {COMPILER_VERSION}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "init"
        # From standard input and with a fixed locale and date: no path and no time gets into the file.
        subprocess.run(
            [compiler, *FLAGS, *flags, "-x", "c", "-", "-o", str(output)],
            input=SOURCE.read_bytes(),
            check=True,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"},
        )
        return output.read_bytes()


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = arguments.parse_args().check
    differing = []
    for machine, (compiler, _) in MACHINES.items():
        try:
            built = build(machine)
        except FileNotFoundError:
            package = "gcc" if machine == "x86_64" else "gcc-aarch64-linux-gnu"
            print(f"build_init: {compiler} is missing; on Debian 12: apt install {package}", file=sys.stderr)
            return 2
        path = TARGET / f"init-{machine}"
        same = path.exists() and path.read_bytes() == built
        if not same and check:
            differing.append(path.relative_to(ROOT))
        elif not same:
            TARGET.mkdir(parents=True, exist_ok=True)
            path.write_bytes(built)
            path.chmod(0o755)
        print(
            f"{path.relative_to(ROOT)}: {len(built)} bytes, {'as committed' if same else 'DIFFERS' if check else 'new'}"
        )
    if differing:
        print("build_init: run tools/build_init.py and commit the result", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
