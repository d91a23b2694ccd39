"""What may be set for the server, in one TOML file; every key is checked, and none is ignored."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Any, Final

import attrs

from unisandbox.api import InvalidArgumentError
from unisandbox.api.by_fields import by_fields
from unisandbox.api.names import check_isolation

DEFAULT_ROOT: Final = "/run/unisandbox-serve"
"""In memory: pods do not outlive the machine, and what is written down of them need not wait for a disk."""

DEFAULT_SOCKET: Final = "/run/unisandbox/serve/sandboxer.sock"
ANNOTATION: Final = "io.unisandbox.isolation"
"""The annotation of a pod that names its backend."""

_LARGEST: Final = 1 << 20


@attrs.frozen
@by_fields
class ServeConfig:
    """How to serve.

    Attributes:
        root: the engine's state directory.
        socket: of the controller; task sockets lie beside it.
        events: containerd's socket for events, its own with ".ttrpc" at the end; empty: nobody is told.
        isolation: the backend of pods that nothing else is said of.
        runtime: the OCI runtime of the backend "runc": "crun", "runc", "youki" or an absolute path; empty: the first of
            them that is installed.
        handlers: backends by the name of the runtime handler (Kubernetes' RuntimeClass handler).
        sandboxers: backends by the name under which the engine knows this sandboxer.
        annotation: pods may name their backend by the annotation `io.unisandbox.isolation`: one of these. Closed by
            default: who may make pods could otherwise choose the weaker isolation.
        privileged: pods may be privileged: root with all capabilities and devices of the host, which is no isolation.
    """

    root: str = DEFAULT_ROOT
    socket: str = DEFAULT_SOCKET
    events: str = ""
    isolation: str = "runc"
    runtime: str = ""
    handlers: Mapping[str, str] = attrs.field(factory=dict)
    sandboxers: Mapping[str, str] = attrs.field(factory=dict)
    annotation: tuple[str, ...] = ()
    privileged: bool = False

    def __attrs_post_init__(self) -> None:
        for name in ("root", "socket", *(["events"] if self.events else [])):
            path = getattr(self, name)
            if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
                raise InvalidArgumentError(f"{name} must be an absolute path, got {path!r}")
        if not isinstance(self.runtime, str) or ("/" in self.runtime and not os.path.isabs(self.runtime)):
            raise InvalidArgumentError(f"runtime must be a name or an absolute path, got {self.runtime!r}")
        for backend in (self.isolation, *self.handlers.values(), *self.sandboxers.values(), *self.annotation):
            check_isolation(backend)

    def backend(self, handler: str, sandboxer: str, annotations: Mapping[str, str]) -> str:
        """Which backend a pod gets: by its annotation, its runtime handler, its sandboxer's name, or the default.

        Raises:
            InvalidArgumentError: its annotation names one that pods may not choose.
        """
        wanted = annotations.get(ANNOTATION)
        if wanted is not None:
            if wanted not in self.annotation:
                raise InvalidArgumentError(
                    f"annotation {ANNOTATION}: pods may not choose {wanted!r}",
                    hint=f"Allowed by the configuration: {', '.join(self.annotation) or 'none'}.",
                )
            return wanted
        return self.handlers.get(handler) or self.sandboxers.get(sandboxer) or self.isolation


def read(path: str) -> ServeConfig:
    """The configuration in a file.

    Raises:
        InvalidArgumentError: the file cannot be read, or says something that means nothing; says what.
    """
    try:
        with open(path, "rb") as file:
            given = tomllib.loads(file.read(_LARGEST).decode())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot use the configuration {path}: {error}") from error
    return ServeConfig(**_checked(given, path))


def _checked(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    kinds: dict[str, type] = {"handlers": dict, "sandboxers": dict, "annotation": list, "privileged": bool}
    for key, value in given.items():
        if key not in {field.name for field in attrs.fields(ServeConfig)}:
            raise InvalidArgumentError(f"{path}: {key!r} is not known")
        if not isinstance(value, kinds.get(key, str)):
            raise InvalidArgumentError(f"{path}: {key!r} must be of type {kinds.get(key, str).__name__}, got {value!r}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
