"""Names and ids: what may come in, the short names for what the kernel limits, and the kernel's own names."""

from __future__ import annotations

import base64
import functools
import re
from typing import Final

from unisandbox.api.errors import InvalidArgumentError

# Source: include/uapi/linux/capability.h; the index is the number.
CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,75}")


def check_name(name: str, what: str = "name") -> str:
    """Return `name` when it may be part of a path, a cgroup and a log line; raise InvalidArgumentError otherwise."""
    if not isinstance(name, str) or _PATTERN.fullmatch(name) is None:
        raise InvalidArgumentError(
            f"{what} {name!r} is not valid",
            hint="Use 1 to 76 letters, digits, '_', '.' and '-', the first a letter or digit.",
        )
    return name


def check_isolation(name: str) -> str:
    """The same for the name of a backend, which may say that it is two in one: "wasm+process"."""
    for part in name.split("+") if isinstance(name, str) else [name]:
        check_name(part, "isolation")
    return name


def check_id(identity: str) -> str:
    """The same for ids that come from outside (containerd's)."""
    return check_name(identity, "id")


@functools.lru_cache(maxsize=256)  # asked for by every part of a sandbox
def short_name(engine_id: str, identity: str) -> str:
    """10 base32 characters of a hash of engine id + id, for what the kernel limits.

    Network interface names end at 15 characters, unix socket paths at 107, host names at 64.
    """
    import hashlib  # brings OpenSSL, 4 MB, which nobody needs who has no sandbox yet

    digest = hashlib.sha256(f"{engine_id}/{identity}".encode()).digest()
    return base64.b32encode(digest[:8]).decode().lower()[:10]
