"""What a pod is asked to be: the part of Kubernetes' runtime.v1.PodSandboxConfig that is looked at.

Both engines send it as the options of Controller.Create, in protobuf's own form. Other fields are kept as they came.
Source: k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
"""

# ruff: noqa: RUF009 - that is how fields of messages are written

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import betterproto2

POD: Final = 0
CONTAINER: Final = 1
NODE: Final = 2
TARGET: Final = 3
"""NamespaceMode: shared by the pod's containers, each its own, the host's, that of another container."""

TYPE_URL: Final = "runtime.v1.PodSandboxConfig"

_TEXTS: Final = betterproto2.map_meta(betterproto2.TYPE_STRING, betterproto2.TYPE_STRING)


@dataclass(eq=False, repr=False)
class DnsConfig(betterproto2.Message):
    """What /etc/resolv.conf says."""

    servers: list[str] = betterproto2.field(1, betterproto2.TYPE_STRING, repeated=True)
    searches: list[str] = betterproto2.field(2, betterproto2.TYPE_STRING, repeated=True)
    options: list[str] = betterproto2.field(3, betterproto2.TYPE_STRING, repeated=True)


@dataclass(eq=False, repr=False)
class IdMapping(betterproto2.Message):
    """So many ids, from one of the host's and one of the container's on."""

    host_id: int = betterproto2.field(1, betterproto2.TYPE_UINT32)
    container_id: int = betterproto2.field(2, betterproto2.TYPE_UINT32)
    length: int = betterproto2.field(3, betterproto2.TYPE_UINT32)


@dataclass(eq=False, repr=False)
class UserNamespace(betterproto2.Message):
    """Whether ids are mapped, and how."""

    mode: int = betterproto2.field(1, betterproto2.TYPE_INT32)
    uids: list[IdMapping] = betterproto2.field(2, betterproto2.TYPE_MESSAGE, repeated=True)
    gids: list[IdMapping] = betterproto2.field(3, betterproto2.TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class NamespaceOption(betterproto2.Message):
    """Whose namespaces; see NamespaceMode."""

    network: int = betterproto2.field(1, betterproto2.TYPE_INT32)
    pid: int = betterproto2.field(2, betterproto2.TYPE_INT32)
    ipc: int = betterproto2.field(3, betterproto2.TYPE_INT32)
    userns_options: UserNamespace | None = betterproto2.field(5, betterproto2.TYPE_MESSAGE, optional=True)


@dataclass(eq=False, repr=False)
class SecurityContext(betterproto2.Message):
    """LinuxSandboxSecurityContext."""

    namespace_options: NamespaceOption | None = betterproto2.field(1, betterproto2.TYPE_MESSAGE, optional=True)
    privileged: bool = betterproto2.field(6, betterproto2.TYPE_BOOL)


@dataclass(eq=False, repr=False)
class LinuxPodSandboxConfig(betterproto2.Message):
    """What of it is Linux."""

    cgroup_parent: str = betterproto2.field(1, betterproto2.TYPE_STRING)
    security_context: SecurityContext | None = betterproto2.field(2, betterproto2.TYPE_MESSAGE, optional=True)
    sysctls: dict[str, str] = betterproto2.field(3, betterproto2.TYPE_MAP, map_meta=_TEXTS)


@dataclass(eq=False, repr=False)
class PodSandboxConfig(betterproto2.Message):
    """A pod."""

    hostname: str = betterproto2.field(2, betterproto2.TYPE_STRING)
    dns_config: DnsConfig | None = betterproto2.field(4, betterproto2.TYPE_MESSAGE, optional=True)
    labels: dict[str, str] = betterproto2.field(6, betterproto2.TYPE_MAP, map_meta=_TEXTS)
    annotations: dict[str, str] = betterproto2.field(7, betterproto2.TYPE_MAP, map_meta=_TEXTS)
    linux: LinuxPodSandboxConfig | None = betterproto2.field(8, betterproto2.TYPE_MESSAGE, optional=True)
