"""ttrpc, containerd's small RPC over stream sockets: calls with one message each way, and streams.

`client` and `server` are the two sides of a connection as state machines without input or output; `calling` and
`serving` join them to sockets, on asyncio and trio. `frames` and `envelope` are the bytes, `shapes` what both share.
May know: `wire.protobuf`, `wire.status`, `host/`, the contracts' errors. Must not know: messages, nor what calls mean.
"""

from unisandbox.wire.ttrpc.calling import Client, ClientStream
from unisandbox.wire.ttrpc.envelope import NO_METADATA, Metadata, Request
from unisandbox.wire.ttrpc.serving import Handlers, serve, serve_alone, serve_connection
from unisandbox.wire.ttrpc.shapes import LIMITS, UNARY, Limits, Messages, Shape

__all__ = [
    "LIMITS",
    "NO_METADATA",
    "UNARY",
    "Client",
    "ClientStream",
    "Handlers",
    "Limits",
    "Messages",
    "Metadata",
    "Request",
    "Shape",
    "serve",
    "serve_alone",
    "serve_connection",
]
