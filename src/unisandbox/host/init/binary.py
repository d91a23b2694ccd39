"""Where init's program is, and how a container gets at it."""

from __future__ import annotations

import os
import platform
from typing import Final

from unisandbox.api.errors import UnavailableError
from unisandbox.host.sealed import sealed_copy

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
    return os.path.join(os.path.dirname(__file__), "bin", f"init-{machine}")


def open_binary(machine: str | None = None) -> int:
    """Init as a file descriptor to be the container's fd 4: start it as `/proc/self/fd/4`. The caller closes it.

    It is an O_PATH descriptor of a sealed memory file of mode 0111 that belongs to the caller: the same in every
    container, nothing on disk, no matter with which mode or on what mount the package was installed, and nobody
    can change it. Root of a user namespace into which the caller's id is not mapped can neither read it nor reach
    into a process that runs it, not even with CAP_SYS_PTRACE.
    """
    memory = sealed_copy(binary_path(machine), "unisandbox-init", MODE)
    try:
        return os.open(f"/proc/self/fd/{memory}", os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(memory)
