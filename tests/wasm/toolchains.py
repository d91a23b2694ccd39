"""Guests that the tests build with this machine's toolchains; kept between runs, by the version of the toolchain."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def kept(kind: str, version: str) -> Path:
    """The directory for what a toolchain of this version has built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "unisandbox" / f"wasm-{kind}" / version.replace("/", "_").replace(" ", "_")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def said(*argv: str) -> str:
    """What a toolchain answers; skips the test where it is not there, or cannot."""
    program = shutil.which(argv[0])
    if program is None:
        pytest.skip(f"{argv[0]} is not here")
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(argv)}: {done.stderr.strip()[-200:]}")
    return done.stdout.strip()


def go_tests(package: str) -> Path:
    """The tests of a package of Go's own library, as a module for WASI preview 1."""
    module = kept("go", said("go", "env", "GOVERSION")) / f"{package.replace('/', '_')}.wasm"
    if not module.exists():
        part = module.with_name(f"{module.name}.part{os.getpid()}")
        env = {**os.environ, "GOOS": "wasip1", "GOARCH": "wasm", "CGO_ENABLED": "0"}
        built = subprocess.run(
            ["go", "test", "-c", "-o", part, package], env=env, capture_output=True, text=True, check=False
        )
        if built.returncode:
            pytest.skip(f"go cannot build the tests of {package} for wasip1: {built.stderr.strip()[-200:]}")
        part.rename(module)
    return module


def rust_program(source: str, directory: Path, targets: tuple[str, ...]) -> Path:
    """A program from Rust, for the first of these targets that rustc has; the names of one target have changed."""
    said("rustc", "--version")
    (directory / "main.rs").write_text(source)
    for target in targets:
        command = ["rustc", "--target", target, "-O", "-o", "main.wasm", "main.rs"]
        built = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if built.returncode == 0:
            return directory / "main.wasm"
        # E0463 is "can't find crate for `std`"; one that rustc has never heard of is said in words alone.
        missing = "E0463" in built.stderr or "could not find specification for target" in built.stderr
        assert missing, built.stderr
    pytest.skip(f"rustc has no target {targets[0]} here: rustup target add {targets[0]}")
