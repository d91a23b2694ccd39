"""What a Wasm sandbox cannot have, in either mode, and what its guests have without being asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Final

from unisandbox.api import (
    DEFAULT_CAPABILITIES,
    ContainerSpec,
    InvalidArgumentError,
    Mount,
    ProcessSpec,
    Resources,
    SandboxSpec,
    UnsupportedError,
)
from unisandbox.backends.wasm.programs import PATH
from unisandbox.backends.wasm.trampoline import MOST_DESCRIPTORS
from unisandbox.host import syscalls
from unisandbox.host.power.remedies import Obstacle

_ROOT_USERS: Final = frozenset({"0", "root", "0:0", "root:root"})
"""What a user may be called. WASI preview 1 has none: no guest can ask who it is, nor become another one."""

_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
NOT_EXECUTABLE: Final = 126
"""A shell's exit code for a program that is there and cannot be started."""


def check_spec(spec: SandboxSpec, backend: str, *, is_process: bool = False) -> None:
    """Refuse what cannot be done, before anything is: nothing is accepted and ignored.

    Args:
        spec: of a sandbox.
        backend: its name, for messages.
        is_process: its guests are processes, whose user namespace can be chosen.
    """
    if spec.rootfs.kind != "dir":
        raise UnsupportedError(
            f"rootfs kind {spec.rootfs.kind!r}",
            backend,
            reason="it runs WebAssembly modules, and no programs of this machine",
            hint="Give rootfs= a directory with modules in it, or use isolation='runc'.",
        )
    lacking: Mapping[str, bool] = {
        f"network {spec.network.kind!r}": spec.network.kind != "none",
        "userns='host'": spec.userns != "private" and not is_process,
        "user_ids": spec.user_ids is not None and not is_process,
        "share_pid": spec.share_pid,
        "hostname": spec.hostname is not None,
        "sysctls": bool(spec.sysctls),
        "dns": spec.dns is not None,
        "hosts": bool(spec.hosts),
        f"annotations {sorted(spec.annotations)}": bool(spec.annotations),
        f"user {spec.user!r}": spec.user is not None and spec.user not in _ROOT_USERS,
        "no_new_privileges=False": not spec.security.no_new_privileges,
    }
    for what, asked in lacking.items():
        if asked:
            raise UnsupportedError(what, backend, hint="Leave it out, or use isolation='runc'.")
    more = spec.security.capabilities - DEFAULT_CAPABILITIES
    if more:
        raise UnsupportedError(
            f"capabilities {sorted(more)}", backend, reason="a guest has none", hint="Use isolation='runc'."
        )
    check_resources(spec.resources, backend)


def check_resources(resources: Resources, backend: str) -> None:
    """The same for limits."""
    if resources.swap:
        raise UnsupportedError("resources.swap", backend, hint="Leave it out.")
    if resources.core:
        raise UnsupportedError("resources.core", backend, reason="a guest leaves no core dump", hint="Leave it out.")


def check_mounts(mounts: Sequence[Mount], backend: str) -> None:
    """The same for mounts of guests that are threads of this process: their files have no mapping of ids."""
    if not all(mount.idmap for mount in mounts):
        raise UnsupportedError("a mount with idmap=False", backend, reason="guests have no users", hint="Leave it out.")


def check_copied_mounts(mounts: Sequence[Mount], backend: str, obstacle: Obstacle) -> None:
    """The same where nothing may be mounted: guests can be given directories only."""
    for mount in mounts:
        is_directory = bool(mount.source) and (os.path.isdir(mount.source) or not os.path.exists(mount.source))
        if not is_directory:
            raise UnsupportedError(
                f"a mount of {'a single file' if mount.source else 'a tmpfs'}",
                backend,
                reason=f"nothing may be mounted here ({obstacle.reason})",
                hint=f"Mount a directory, or: {obstacle.remedy}",
            )


def check_own_container(container: ContainerSpec, backend: str) -> None:
    """The same for a container that can have limits of its own below the sandbox's, but for those of its disk."""
    _check_parts(container, backend)
    check_mounts(container.mounts, backend)
    if container.resources is not None:
        if container.resources.disk not in {None, 0}:
            hint = "All containers share that of the sandbox; leave disk= out."
            raise UnsupportedError("a disk limit of one container", backend, hint=hint)
        check_resources(container.resources, backend)


def check_container(container: ContainerSpec, backend: str) -> None:
    """The same for a container that shares all limits with the sandbox."""
    if container.resources is not None:
        raise UnsupportedError(
            "resources of one container",
            backend,
            hint="All guests share the limits of the sandbox; leave resources= out.",
        )
    _check_parts(container, backend)


def _check_parts(container: ContainerSpec, backend: str) -> None:
    if container.rootfs is not None and container.rootfs.kind != "dir":
        raise UnsupportedError(
            f"rootfs kind {container.rootfs.kind!r}",
            backend,
            hint="Give a directory with modules in it, or rootfs=None for the sandbox's own files.",
        )
    _check_user(container.user, backend)
    if container.process is not None:
        check_process(container.process, backend)


def check_process(process: ProcessSpec, backend: str) -> None:
    """The same for a process."""
    if process.terminal is not None:
        raise UnsupportedError("tty", backend, hint="Leave tty= out.")
    _check_user(process.user, backend)


def _check_user(user: str | None, backend: str) -> None:
    if user is not None and user not in _ROOT_USERS:
        raise UnsupportedError(
            f"user {user!r}",
            backend,
            reason="a guest has no user, and none that it could become",
            hint="Leave user= out.",
        )


def check_directory(root: int, cwd: str, argv0: str, label: str) -> None:
    """Raise InvalidArgumentError (126) when a process cannot begin in the directory `cwd` of the root."""
    if cwd == "/":
        return
    try:
        fd = syscalls.openat2(root, cwd, os.O_PATH, resolve=_INSIDE)
    except OSError as error:
        why = os.strerror(error.errno or 0)
    else:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        os.close(fd)
        if is_directory:
            return
        why = "it is no directory"
    raise InvalidArgumentError(
        f"cannot start {argv0!r} in sandbox {label!r}: working directory {cwd!r}: {why}", exit_code=NOT_EXECUTABLE
    )


def files_of(*resources: Resources) -> int:
    """How many files each guest may have open under these limits."""
    return min((MOST_DESCRIPTORS, *(each.nofile for each in resources if each.nofile is not None)))


def environment(spec: SandboxSpec, image: Mapping[str, str]) -> dict[str, str]:
    """What every process of a sandbox has in its environment; an image's own settings before the user's."""
    return {"PATH": PATH, "HOME": "/home", "LANG": "C.UTF-8", **image, **spec.env}
