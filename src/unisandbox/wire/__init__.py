"""What goes over sockets to and from other people's programs: ttrpc, strict messages, one way to serve calls.

`ttrpc/`, `protobuf` and `status` need nothing beyond the base package. `codec`, `services` and `remote` know messages
(betterproto2, generated in `api/proto`), `grpc` serves the same calls by grpclib: these need the extra `serve`.
May know: `host/` and the contracts. Must not know: sandboxes, engines, what a call means, nor which event loop runs.
"""
