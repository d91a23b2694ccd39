"""Bytes that are built from sources here and committed: a build that is the same everywhere, and the comparison."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Compiler(NamedTuple):
    """A program that compiles C.

    Attributes:
        program: its name in PATH.
        version: the version that the committed bytes come from.
        asks_version: the option that makes it print its version.
        packages: what brings it on Debian 12, and the libraries that are linked.
    """

    program: str
    version: str
    asks_version: str
    packages: str


class MissingError(Exception):
    """A program or library that is needed is not here; says what to install."""


def build(compiler: Compiler, flags: Iterable[str], source: Path) -> bytes:
    """Compile and link one file.

    Raises:
        MissingError: the compiler is not there.
    """
    asked = [compiler.program, compiler.asks_version]
    try:
        version = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise MissingError(f"{compiler.program} is missing; on Debian 12: apt install {compiler.packages}") from None
    if version != compiler.version:
        say(f"{compiler.program} is {version}, the committed bytes come from {compiler.version}")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        # From standard input and with a fixed locale and date: no path and no time gets into the file.
        subprocess.run(
            [compiler.program, *flags, "-x", "c", "-", "-o", str(output)],
            input=source.read_bytes(),
            check=True,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"},
        )
        return output.read_bytes()


def asked_to_check(description: str) -> bool:
    """Whether the command line has --check."""
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="compare only, write nothing")
    return bool(arguments.parse_args().check)


def settle(built: Mapping[Path, bytes], *, check: bool, mode: int) -> int:
    """Compare with what is committed, or write it; one line for each file.

    Args:
        built: what each file has to hold.
        check: compare only.
        mode: of the files that are written.

    Returns:
        The exit status: 1 when something differs and was not written.
    """
    differing = False
    for path, content in built.items():
        same = path.exists() and path.read_bytes() == content
        if not same and not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(mode)
        differing |= not same and check
        word = "as committed" if same else "DIFFERS" if check else "new"
        print(f"{path.relative_to(ROOT)}: {len(content)} bytes, {word}")
    if differing:
        say(f"run tools/{Path(sys.argv[0]).name} and commit the result")
    return 1 if differing else 0


def say(text: str) -> None:
    """Tell the person who runs this tool."""
    print(f"{Path(sys.argv[0]).stem}: {text}", file=sys.stderr)
