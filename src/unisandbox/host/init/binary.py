"""Where init's program is, and how a container gets at it."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import Final

from unisandbox.api.errors import UnavailableError

MACHINES: Final = ("x86_64", "aarch64")

MODE: Final = 0o111
"""Execute only. Whoever may not read a program gets no hold of a process that runs it: would_dump(), fs/exec.c."""


def binary_path(machine: str | None = None) -> str:
    """The path of init for `machine` (as `uname -m` says; None: this one), inside the installed package.

    Raises:
        UnavailableError: there is no init for this machine.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise UnavailableError(f"there is no init for {machine} machines (only for {' and '.join(MACHINES)})")
    return str(Path(__file__).parent / "bin" / f"init-{machine}")


def open_binary(machine: str | None = None) -> int:
    """Init as a file descriptor to be the container's fd 4: start it as `/proc/self/fd/4`. The caller closes it.

    It is an O_PATH descriptor of a sealed memory file of mode 0111 that belongs to the caller: the same in every
    container, nothing on disk, no matter with which mode or on what mount the package was installed, and nobody
    can change it. Root of a user namespace into which the caller's id is not mapped can neither read it nor reach
    into a process that runs it, not even with CAP_SYS_PTRACE.
    """
    with open(binary_path(machine), "rb") as source:
        program = source.read()
    writable = os.memfd_create("unisandbox-init", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if os.write(writable, program) != len(program):
            raise OSError("init did not fit into memory")
        os.fchmod(writable, MODE)
        fcntl.fcntl(
            writable,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
        )
        return os.open(f"/proc/self/fd/{writable}", os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(writable)
