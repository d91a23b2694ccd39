"""What a new sandbox or container may not ask for, though a spec can say it: in records of former versions it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisandbox.api.checks import is_address
from unisandbox.api.errors import InvalidArgumentError

if TYPE_CHECKING:
    from unisandbox.api.filesystem import Rootfs
    from unisandbox.api.spec import ContainerSpec, SandboxSpec


def check_new_sandbox(spec: SandboxSpec) -> None:
    """Refuse what would come to nothing.

    Raises:
        InvalidArgumentError: a name server or an address in `hosts` is none, or see `Rootfs`.
    """
    _check_rootfs(spec.rootfs)
    for server in spec.dns.servers if spec.dns else ():
        if not is_address(server):
            raise InvalidArgumentError(
                f"the name server {server!r} is no IP address", hint="Names are looked up there; '192.0.2.1', say."
            )
    for host, address in spec.hosts.items():
        if not is_address(address):
            raise InvalidArgumentError(f"hosts entry {host!r}: {address!r} is no IP address")


def check_new_container(spec: ContainerSpec) -> None:
    """The same for a container.

    Raises:
        InvalidArgumentError: see `Rootfs`.
    """
    if spec.rootfs is not None:
        _check_rootfs(spec.rootfs)


def _check_rootfs(rootfs: Rootfs) -> None:
    if rootfs.kind == "host" and not rootfs.readonly:
        raise InvalidArgumentError("rootfs 'host' is always read-only", hint="Make it by Rootfs.host().")
    if rootfs.kind != "host" and rootfs.local:
        raise InvalidArgumentError(f"rootfs of kind {rootfs.kind!r} with local=True: only 'host' has that")
