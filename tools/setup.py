#!/usr/bin/env python3
"""Set-up of a working copy: host programs by apt, `.venv` with the package and what is pinned in constraints.txt.

    python3 tools/setup.py demo     what `make demo` needs: an OCI runtime, the package, its command line, Wasm
    python3 tools/setup.py dev      all that the tests and the linters need
    python3 tools/setup.py lock     write constraints.txt anew with today's newest versions

UNISANDBOX_VENV names another directory for the environment, of another Python (`make VENV=`).
Run by the Makefile before everything else. Does only what is missing: the second time it takes 50 ms.
Standard library only, and old Pythons can read it far enough to say that they are too old.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("UNISANDBOX_VENV", ".venv")
STAMP = VENV / "unisandbox-setup.json"
LEVELS = ("demo", "dev")
OLDEST = (3, 11)

# Debian package, the lowest level that needs it, and what must be there then: a program (or one of several), a library
# (lib*.so.N) or a file.
HOST = (
    ("crun", "demo", "crun|runc|youki"),
    ("libseccomp2", "demo", "libseccomp.so.2"),
    ("e2fsprogs", "demo", "mkfs.ext4"),
    ("crun", "dev", "crun"),
    ("runc", "dev", "runc"),
    ("uidmap", "dev", "newuidmap"),
    ("bubblewrap", "dev", "bwrap"),
    ("gcc", "dev", "gcc"),
    ("libc6-dev", "dev", "/usr/include/stdio.h"),
    ("gcc-aarch64-linux-gnu", "dev", "aarch64-linux-gnu-gcc"),
    ("qemu-user-static", "dev", "qemu-aarch64-static"),
    ("clang", "dev", "clang"),
    ("lld", "dev", "wasm-ld"),
    ("wasi-libc", "dev", "/usr/include/wasm32-wasi/wasi/api.h"),
    ("libclang-rt-14-dev-wasm32", "dev", "/usr/lib/llvm-14/lib/clang/14.0.6/lib/wasi/libclang_rt.builtins-wasm32.a"),
    ("strace", "dev", "strace"),
    ("iproute2", "dev", "ip"),
    ("procps", "dev", "ps"),
    ("passt", "dev", "pasta"),
    ("fuse-overlayfs", "dev", "fuse-overlayfs"),
    ("uidmap", "dev", "newuidmap"),
)


# What tests build guests for with Rust, where rustup is there; without them these tests are skipped.
RUST_TARGETS = ("wasm32-wasip1", "wasm32-wasip2")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"setup: {text}")


def wanted(level: str, lowest: str) -> bool:
    return LEVELS.index(level) >= LEVELS.index(lowest)


def present(thing: str) -> bool:
    if thing.startswith("/"):
        return os.path.exists(thing)
    if ".so." in thing:
        try:
            ctypes.CDLL(thing)
        except OSError:
            return False
        return True
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return any(shutil.which(program, path=path) for program in thing.split("|"))


def lacking(level: str) -> dict[str, str]:
    """Packages that have to be installed, each with what was not found."""
    return {name: thing for name, lowest, thing in HOST if wanted(level, lowest) and not present(thing)}


def run(argv: list[str], what: str) -> None:
    """Run a step that prints a lot: its output is shown only when it fails."""
    started = time.monotonic()
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PIP_ROOT_USER_ACTION": "ignore"}
    done = subprocess.run(
        argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace")[-6000:])
        stop(f"{what} failed ({' '.join(argv[:6])} ...: exit status {done.returncode}); its output is above")
    say(f"{what}: {time.monotonic() - started:.0f} s")


def host_programs(level: str) -> None:
    """Install what is missing on the host, or say what to install."""
    missing = lacking(level)
    if importlib.util.find_spec("ensurepip") is None and not (VENV / "bin/python").exists():
        missing["python3-venv"] = "Python's venv and ensurepip"
    if not missing:
        return
    names = " ".join(missing)
    if shutil.which("apt-get") is None:
        things = "".join(f"\n  {thing.replace('|', ' or ')} (Debian: {name})" for name, thing in missing.items())
        stop(
            f"missing on this host:{things}\nThere is no apt-get here to install them. Use this system's package "
            f"manager, then run this again."
        )
    if os.geteuid() != 0:
        stop(f"missing on this host, and installing needs root: run `sudo apt-get install {names}`, then this again.")
    say(f"installing host programs: {names}")
    wait = ["-o", "DPkg::Lock::Timeout=300"]
    run(["apt-get", "update", "-q"], "list of Debian packages")
    run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *wait, *missing], "host programs")
    if still := lacking(level):
        stop(f"apt-get succeeded, but these are still not found: {', '.join(still.values())}")


def rust_targets() -> None:
    """Let rustup fetch what is missing; nothing else depends on it."""
    rustup = shutil.which("rustup")
    if rustup is None:
        return
    done = subprocess.run([rustup, "target", "add", *RUST_TARGETS], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"Rust targets for tests cannot be had, these will be skipped: {done.stderr.strip()[-200:]}")


def digest(level: str) -> str:
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [sys.version.encode(), str(ROOT).encode(), level.encode()]  # an editable install knows its own path
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def stamped() -> str:
    try:
        return str(json.loads(STAMP.read_text())["digest"])
    except (OSError, ValueError, KeyError):  # no set-up yet, or one that was interrupted
        return ""


def requirements(level: str) -> list[str]:
    """The package itself, editable, and for `dev` the dependency group (pip knows groups only since 25.1)."""
    if level == "demo":
        return ["-e", ".[cli,wasm]"]
    import tomllib

    group: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    own = [name for name in group if name.startswith("unisandbox[")]
    return [*(word for name in own for word in ("-e", "." + name.removeprefix("unisandbox"))), *(set(group) - set(own))]


def install(python: str, level: str, *options: str) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *options]
    # The build back end goes into .venv too, pinned like the rest: an isolated build would fetch the newest each time.
    run([*pip, "hatchling", "editables"], "build back end")
    say(
        "installing Python packages"
        + (" (with linters and test tools: may take a minute or two)" if level == "dev" else "")
    )
    run([*pip, "--no-build-isolation", *requirements(level)], "Python packages")


def python_packages(level: str) -> None:
    if stamped() in {digest(above) for above in LEVELS if wanted(above, level)} and (VENV / "bin/python").exists():
        return
    if not works(VENV / "bin/python"):
        say(f"making {os.path.relpath(VENV, ROOT)} with Python {sys.version.split()[0]}")
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "virtual environment")
    STAMP.unlink(missing_ok=True)
    install(str(VENV / "bin/python"), level, "-c", "constraints.txt")
    if level == "dev":
        rust_targets()
    STAMP.write_text(json.dumps({"level": level, "digest": digest(level)}) + "\n")


def works(python: Path) -> bool:
    """Whether this interpreter runs and has pip: not so after the system's Python was replaced or the tree moved."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", "import pip"], check=False, stderr=subprocess.DEVNULL).returncode == 0


def lock() -> None:
    """Write constraints.txt with the newest versions that pyproject.toml allows."""
    with tempfile.TemporaryDirectory() as directory:
        run([sys.executable, "-m", "venv", directory], "virtual environment")
        python = f"{directory}/bin/python"
        install(python, "dev")
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    lines = sorted((line for line in frozen.splitlines() if "==" in line and line[0] != "#"), key=str.lower)
    head = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("#")]
    (ROOT / "constraints.txt").write_text("\n".join([*head, *lines]) + "\n")
    say(f"constraints.txt: {len(lines)} packages")


def main() -> None:
    if sys.version_info[:2] < OLDEST:
        stop(
            "Python 3.11 or newer is needed, this is {}.{}; name another one: make PYTHON=python3.12 ...".format(
                *sys.version_info
            )
        )
    if sys.platform != "linux":
        stop("this project needs Linux: it makes namespaces, cgroups and mounts")
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command == "lock":
        lock()
    elif command in LEVELS:
        directory = os.open(ROOT, os.O_RDONLY | os.O_CLOEXEC)  # two `make` at once: the second one waits
        fcntl.flock(directory, fcntl.LOCK_EX)
        host_programs(command)
        python_packages(command)
    else:
        stop(f"usage: {sys.argv[0]} {'|'.join(LEVELS)}|lock")


if __name__ == "__main__":
    main()
