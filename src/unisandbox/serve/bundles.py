"""The config.json of an engine's bundle, as the pod that its container belongs to has it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from typing import Any, Final

from unisandbox.api import InvalidArgumentError, UnsupportedError
from unisandbox.api.task import SANDBOX_NAMESPACES
from unisandbox.serve.cri import NODE
from unisandbox.serve.pods import PodFacts

_LARGEST: Final = 16 << 20


def read_config(bundle: str) -> dict[str, Any]:
    """The config.json in a bundle's directory, whose path comes from the engine and is used as it is.

    Raises:
        InvalidArgumentError: there is none, or it is none.
    """
    if not os.path.isabs(bundle) or os.path.normpath(bundle) != bundle.rstrip("/"):
        raise InvalidArgumentError(f"a bundle's path must be absolute and plain, got {bundle!r:.200}")
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(f"{bundle}/config.json", flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidArgumentError(f"{bundle}/config.json is no regular file")
            config = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"bundle {bundle!r} has no usable config.json: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("linux") or {}, dict):
        raise InvalidArgumentError(f"bundle {bundle!r} has no usable config.json")
    return config


def adapted(config: dict[str, Any], facts: PodFacts) -> str:
    """The text of the config with what the pod has of the host, and its kernel settings.

    The engine names all namespaces of a pod by its process, which the pod does not have: those that it shares with the
    host are left out here, the others are the sandbox's.
    """
    linux = _linux_of(config)
    hosts = {
        "ipc": facts.ipc == NODE,
        "pid": facts.pid == NODE,
        "net": facts.network == NODE,
        "user": facts.user == NODE,
    }
    linux["namespaces"] = [space for space in _spaces(linux) if not hosts.get(_own_kind(space), False)]
    if facts.sysctls:
        linux["sysctl"] = {**(linux.get("sysctl") or {}), **facts.sysctls}
    return json.dumps({**config, "linux": linux}, separators=(",", ":"))


def owner_of(process: object, ids: tuple[int, int]) -> tuple[int, int]:
    """The host's ids of an OCI process object's user and group, in a user namespace.

    Args:
        process: the object.
        ids: the host's first id there, and how many.
    """
    user = process.get("user") if isinstance(process, dict) else None
    own = [(user or {}).get(name, 0) for name in ("uid", "gid")] if isinstance(user or {}, dict) else []
    if len(own) != 2 or any(type(number) is not int or not 0 <= number < ids[1] for number in own):
        raise InvalidArgumentError(f"user {user!r:.80} of a process has no ids in its user namespace")
    return ids[0] + own[0], ids[0] + own[1]


def changed_resources(value: bytes, bundle: str) -> str:
    """The text of an OCI object `linux.resources` without its devices, which must be those of the bundle.

    Engines say all of it again when they change a limit.

    Raises:
        UnsupportedError: its devices are others than when the container was made.
    """
    try:
        resources = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the resources cannot be read: {error}") from error
    if not isinstance(resources, dict):
        raise InvalidArgumentError("the resources are no object")
    devices = resources.pop("devices", None)
    if devices and devices != (_linux_of(read_config(bundle)).get("resources") or {}).get("devices"):
        raise UnsupportedError("a change of resources.devices of a living container", "serve")
    return json.dumps(resources)


def _linux_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("linux") or {}  # `read_config` has looked at it


def _spaces(linux: dict[str, Any]) -> Sequence[dict[str, Any]]:
    spaces = linux.get("namespaces") or []
    if not isinstance(spaces, list) or not all(isinstance(space, dict) for space in spaces):
        raise InvalidArgumentError("linux.namespaces of the config is not as specified")
    return spaces


def _own_kind(space: dict[str, Any]) -> str:
    path = str(space.get("path") or "")
    return path.removeprefix(SANDBOX_NAMESPACES) if path.startswith(SANDBOX_NAMESPACES) else ""
