"""Names and ids: what may come in, and the short names for what the kernel limits."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Final

from unisandbox.api.errors import InvalidArgumentError

_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,75}")


def check_name(name: str, what: str = "name") -> str:
    """Return `name` when it may be part of a path, a cgroup and a log line; raise InvalidArgumentError otherwise."""
    if not isinstance(name, str) or _PATTERN.fullmatch(name) is None:
        raise InvalidArgumentError(
            f"{what} {name!r} is not valid",
            hint="Use 1 to 76 letters, digits, '_', '.' and '-', the first a letter or digit.",
        )
    return name


def check_id(identity: str) -> str:
    """The same for ids that come from outside (containerd's)."""
    return check_name(identity, "id")


def short_name(engine_id: str, identity: str) -> str:
    """10 base32 characters of a hash of engine id + id, for what the kernel limits.

    Network interface names end at 15 characters, unix socket paths at 107, host names at 64.
    """
    digest = hashlib.sha256(f"{engine_id}/{identity}".encode()).digest()
    return base64.b32encode(digest[:8]).decode().lower()[:10]
