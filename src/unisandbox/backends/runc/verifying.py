"""Start tells the truth: what a container is, looked at from the host after the runtime has made it."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from unisandbox.api import BackendError
from unisandbox.backends.runc.pod import Pod, translate_job
from unisandbox.host import namespaces
from unisandbox.host.keeper import JobFailed
from unisandbox.host.services import Host
from unisandbox.oci.features import RuntimeProgram

_FLAGS: Final = {"readonly": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV}


class Verifier:
    """Verifies the containers of one sandbox.

    Args:
        host, pod: whose they are.
        program: the runtime that makes them.
    """

    def __init__(self, host: Host, pod: Pod, program: RuntimeProgram) -> None:
        self._host = host
        self._pod = pod
        self._program = program

    async def verify(self, name: str, pid: int, attributes: Sequence[str]) -> None:
        """It is in the pinned namespaces, in ones of its own, in its cgroup, and its root is mounted as planned.

        Raises:
            BackendError: it is not.
        """
        pod = self._pod
        found = self._namespaces(name, pid)
        ours = _own_namespaces()
        for kind, inode in found.items():
            pinned = pod.inodes.get(kind)
            if pinned is not None and inode != pinned:
                raise BackendError(f"container {name!r}: {kind} namespace {inode} is not the pinned one, {pinned}")
            if pinned is None and inode == ours[kind] and not self._shared_with_host(kind):
                raise BackendError(f"container {name!r} of sandbox {pod.label!r} is in the host's {kind} namespace")
        self._verify_cgroup(name, pid)
        await self.restrict_root(pid, attributes)
        wanted = sum(_FLAGS[attribute] for attribute in attributes)
        try:
            flags = os.statvfs(f"/proc/{pid}/root").f_flag
        except FileNotFoundError:
            raise self._ended(name) from None
        if flags & wanted != wanted:
            raise BackendError(
                f"the root of container {name!r} of sandbox {pod.label!r} is not {', '.join(attributes)}"
            )

    async def restrict_root(self, pid: int, attributes: Sequence[str]) -> None:
        """Give the root directory of a process the attributes that the runtime may have taken from it.

        crun binds a root onto itself, and the new mount has none of them (source: libcrun_set_mounts(), do_mount() in
        src/libcrun/linux.c). In a user namespace of its own it cannot: they are locked; see mount_namespaces(7).
        """
        if self._pod.mapped:
            return
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            op = {"op": "restrict", "path": "/", "recursive": False, "attributes": list(attributes)}
            await self._host.keeper.job(
                [{"do": "enter", "fd": 0}, {"do": "mounts", "root": "/", "ops": [op]}], fds=[fd]
            )
        except JobFailed as error:
            raise translate_job(error, self._pod.label) from error
        finally:
            os.close(fd)

    def verify_filter(self, name: str, pid: int) -> None:
        """A filter that was asked for is there: a runtime that does not know an annotation says nothing."""
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            filtered = "\nSeccomp:\t2\n" in file.read()
        if not filtered and self._pod.spec.security.seccomp == "default":
            raise BackendError(
                f"container {name!r} of sandbox {self._pod.label!r} has no seccomp filter, although one was given to"
                f" {self._program.name} {self._program.version_text}",
                hint="Use a runtime that is built with seccomp.",
            )

    async def verify_bundle(self, name: str, pid: int, joined: Collection[str]) -> None:
        """One of somebody else is in its cgroup, and in those of the sandbox's namespaces that it was to join."""
        self._verify_cgroup(name, pid)
        found = self._namespaces(name, pid) if joined else {}
        for kind in joined:
            if found[kind] != self._pod.inodes[kind]:
                raise BackendError(f"container {name!r}: its {kind} namespace is not that of the sandbox")

    def _verify_cgroup(self, name: str, pid: int) -> None:
        if not self._pod.cgroup.holds(pid):
            raise BackendError(f"container {name!r} of sandbox {self._pod.label!r} is not in its cgroup")

    def _namespaces(self, name: str, pid: int) -> Mapping[str, int]:
        try:
            return namespaces.process_namespaces(pid)
        except ProcessLookupError:
            raise self._ended(name) from None

    def _ended(self, name: str) -> BackendError:
        return BackendError(f"container {name!r} of sandbox {self._pod.label!r} ended before it was started")

    def _shared_with_host(self, kind: str) -> bool:
        spec = self._pod.spec
        return (
            (kind == "user" and spec.userns == "host")
            or (kind == "net" and spec.network.kind == "host")
            or (kind == "cgroup" and self._host.cgroups.namespaces_are_borders)
        )


@functools.cache
def _own_namespaces() -> Mapping[str, int]:
    return namespaces.process_namespaces(os.getpid())
