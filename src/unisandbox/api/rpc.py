"""What a remote call is, whoever carries it: names and the types of its messages.

The tables of containerd's calls are generated from its .proto files: `unisandbox.api.proto.methods`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import attrs

Q = TypeVar("Q")
R = TypeVar("R")


@attrs.frozen
class Method(Generic[Q, R]):
    """One method of a service.

    Attributes:
        service: the full name of the service, as "containerd.task.v3.Task".
        name: the method's own name, as "Create".
        request: the type of the message, or messages, that the caller sends.
        reply: the type of the message, or messages, that come back.
        client_streams: the caller sends any number of messages, instead of one.
        server_streams: any number of messages comes back, instead of one.
    """

    service: str
    name: str
    request: type[Q]
    reply: type[R]
    client_streams: bool = False
    server_streams: bool = False

    @property
    def streams(self) -> bool:
        """Whether either side sends any number of messages."""
        return self.client_streams or self.server_streams

    def under(self, service: str) -> Method[Q, R]:
        """The same method of another service, whose messages have the same bytes."""
        return attrs.evolve(self, service=service)

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"
