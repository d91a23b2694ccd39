"""What the container of a worker holds beside its sandbox's files: a Python, and the packages that a worker imports.

Everything is below /run/unisandbox, read-only, and the guest sees none of it: it is given the directory GUEST alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from unisandbox.api import Mount, Rootfs, UnavailableError

GUEST: Final = "/run/unisandbox/guest"
"""Where the sandbox's own files are in a worker's container."""

PACKAGES: Final = "/run/unisandbox/lib"
_PYTHON: Final = "/run/unisandbox/python"
_NEEDED: Final = ("unisandbox", "wasmtime")


class Interior(NamedTuple):
    """What a worker's container is made of.

    Attributes:
        rootfs: this machine's programs.
        mounts: Python, where /usr does not hold it, and packages.
        argv: a worker.
        env: all of its environment; the guest's is another one.
    """

    rootfs: Rootfs
    mounts: tuple[Mount, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]

    @classmethod
    def of_this_python(cls) -> Interior:
        """With the Python that runs this.

        Raises:
            UnavailableError: it, or a package, is no file that a sandbox could be shown.
        """
        program = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable or "")
        prefix = os.path.realpath(sys.base_prefix)
        mounts: list[Mount] = []
        env = {"MALLOC_ARENA_MAX": "1"}  # several threads, and little memory: it counts for the sandbox
        if not program.startswith("/usr/"):
            if prefix == "/" or not program.startswith(f"{prefix}/"):
                raise UnavailableError(
                    f"the Python interpreter {program or 'of this process'} is not below its own prefix {prefix}",
                    hint="Use one that is installed with its library in one directory.",
                )
            mounts.append(_mount(prefix, _PYTHON))
            program = _PYTHON + program.removeprefix(prefix)
            # A libpython that is found by its absolute path at home.
            env["LD_LIBRARY_PATH"] = f"{_PYTHON}/lib"
        mounts += [_mount(path, f"{PACKAGES}/{os.path.basename(path)}") for path in _packages()]
        worker = f"{PACKAGES}/unisandbox/backends/wasm/process/worker.py"
        local = program.startswith("/usr/local/")
        return cls(Rootfs.host(local=local), tuple(mounts), (program, "-I", "-S", "-B", worker), env)


def _packages() -> Iterator[str]:
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or not os.path.isfile(origin):
            raise UnavailableError(
                f"the package {name!r} is not in a directory of its own, which a sandbox could be shown",
                hint="Install it with pip, not as a zip file.",
            )
        directory, file = os.path.split(origin)
        yield directory if file == "__init__.py" else origin


def _mount(source: str, target: str) -> Mount:
    # Mapped ids are only needed where a stranger may not read; not every file system can have them.
    readable = os.stat(source).st_mode & 0o004
    return Mount.bind(os.path.realpath(source), target, idmap=not readable)
