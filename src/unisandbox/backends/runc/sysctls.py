"""The kernel settings that belong to a namespace of the sandbox, and may be set in it.

Source: Kubernetes' safe and unsafe namespaced sysctls; namespaces(7); Documentation/admin-guide/sysctl/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from unisandbox.api import InvalidArgumentError, Network, UnsupportedError

_IPC: Final = frozenset(
    {
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shm_rmid_forced",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
    }
)
_NET: Final = ("net.ipv4.", "net.ipv6.", "net.core.somaxconn", "net.unix.max_dgram_qlen")


def checked_sysctls(sysctls: Mapping[str, str], network: Network) -> dict[str, str]:
    """The settings by dotted name, all of them on the allow-list.

    Raises:
        InvalidArgumentError: one is not namespaced, so it would change the host.
        UnsupportedError: a setting of the network, while the network is not the sandbox's own.
    """
    checked: dict[str, str] = {}
    for name, value in sysctls.items():
        dotted = name.replace("/", ".")
        if dotted.startswith(_NET):
            if network.kind not in {"none", "user"}:
                raise UnsupportedError(
                    f"sysctl {dotted!r} with network {network.kind!r}",
                    "runc",
                    reason="the network namespace is not the sandbox's own",
                )
        elif dotted not in _IPC and not dotted.startswith("fs.mqueue."):
            raise InvalidArgumentError(
                f"sysctl {dotted!r} does not belong to a namespace: it would change the host",
                hint="Allowed are net.ipv4.*, net.ipv6.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.*.",
            )
        checked[dotted] = value
    return checked
