"""How a sandbox is connected, and how it finds names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import is_one_of, kernel_text, matches, several
from unisandbox.api.errors import InvalidArgumentError


@attrs.frozen
@by_fields
class Network:
    """How a sandbox is connected.

    Attributes:
        kind: "none" (only a loopback of its own), "user" (what is outside can be reached, by a helper program without
            privileges; nothing reaches in), "host" (the host's own network), "namespace" (a given one).
        path: the network namespace of kind "namespace", e.g. /run/netns/blue.
    """

    kind: Literal["none", "user", "host", "namespace"] = attrs.field(
        default="none", validator=is_one_of("none", "user", "host", "namespace")
    )
    path: str = ""

    def __attrs_post_init__(self) -> None:
        if (self.kind == "namespace") != kernel_text(self.path, "network namespace path").startswith("/"):
            raise InvalidArgumentError(
                f"network of kind {self.kind!r} with path {self.path!r}: only 'namespace' has one, and it is absolute"
            )

    @classmethod
    def none(cls) -> Network:
        """Only a loopback interface of its own."""
        return cls()

    @classmethod
    def user(cls) -> Network:
        """A network of its own from which IPv4 outside can be reached, and no loopback but its own; nothing reaches in.

        The connections are those of a helper program (pasta), which belongs to the sandbox and ends with it.
        """
        return cls(kind="user")

    @classmethod
    def host(cls) -> Network:
        """The host's network: no isolation of the network at all."""
        return cls(kind="host")

    @classmethod
    def namespace(cls, path: str | os.PathLike[str]) -> Network:
        """A network namespace that somebody else made and keeps."""
        return cls(kind="namespace", path=os.fspath(path))

    @classmethod
    def parse(cls, value: Network | str) -> Network:
        """ "none", "user", "host", or the absolute path of a network namespace."""
        if isinstance(value, Network):
            return value
        value = kernel_text(value, "network")
        if value == "none":
            return cls.none()
        if value == "user":
            return cls.user()
        if value == "host":
            return cls.host()
        if value.startswith("/"):
            return cls.namespace(value)
        raise InvalidArgumentError(
            f"network {value!r} is not known", hint="Use 'none', 'user', 'host' or a namespace's path."
        )


def _words(values: Iterable[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else several(values, "a part of resolv.conf")


@attrs.frozen
@by_fields
class Dns:
    """What /etc/resolv.conf says. Source: resolv.conf(5)."""

    servers: tuple[str, ...] = attrs.field(default=(), converter=_words)
    search: tuple[str, ...] = attrs.field(default=(), converter=_words)
    options: tuple[str, ...] = attrs.field(default=(), converter=_words)

    def __attrs_post_init__(self) -> None:
        for word in (*self.servers, *self.search, *self.options):
            if not matches(r"[A-Za-z0-9_.:%-]+", word):
                raise InvalidArgumentError(f"{word!r} cannot stand in resolv.conf")
