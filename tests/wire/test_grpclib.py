"""What gRPC is served with, below grpclib's documented surface; and what strangers may send to it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import anyio
import grpclib
import grpclib.config
import grpclib.protocol
import grpclib.server
import pytest
from grpclib.client import Channel
from grpclib.const import Cardinality
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisandbox.api import Capabilities, SandboxError
from unisandbox.api.proto.containerd.services.sandbox.v1 import ControllerCreateRequest
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.api.rpc import Method
from unisandbox.engine.registry import Registry
from unisandbox.serve import cri
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.pods import Pods
from unisandbox.wire import codec
from unisandbox.wire.grpc import Bytes, GrpcServer
from unisandbox.wire.services import Call, Services
from unisandbox.wire.ttrpc import Request

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # also on a machine with other work

METHODS: list[Method[Any, Any]] = [
    method for table in (ControllerV1, TaskV3) for method in vars(table).values() if isinstance(method, Method)
]
STATUS = f"/{ControllerV1.STATUS}"
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", STATUS),
    (":authority", "x"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("containerd-namespace", "k8s.io"),
]


@pytest.mark.parametrize(
    ("what", "parameters"),
    [
        (grpclib.server.Handler.__init__, "self mapping codec status_details_codec dispatch"),
        (grpclib.server.Handler.accept, "self stream headers release_stream"),
        (grpclib.server.Handler.wait_closed, "self"),
        (grpclib.protocol.H2Protocol.__init__, "self handler config h2_config"),
        (grpclib.protocol.H2Protocol.connection_made, "self transport"),
        (grpclib.protocol.H2Protocol.data_received, "self data"),
        (grpclib.protocol.Connection.__init__, "self connection transport config"),
        (grpclib.protocol.Connection.flush, "self"),
        (grpclib.protocol.Connection.initialize, "self"),
        (grpclib.protocol.EventsProcessor.__init__, "self handler connection"),
        (grpclib.protocol.EventsProcessor.close, "self reason"),
        (grpclib.protocol.EventsProcessor.process, "self event"),
        (grpclib.protocol.Stream.recv_data, "self size"),
        (grpclib.config.Configuration.__for_server__, "self"),
    ],
)
def test_grpclib_is_the_one_that_wire_grpc_was_written_for(what: Callable[..., Any], parameters: str) -> None:
    """Where this fails a new grpclib has come: look at `wire/grpc.py` and at what has become of this in it."""
    now = " ".join(inspect.signature(what).parameters)
    assert now == parameters, f"grpclib {grpclib.__version__} has changed {what.__qualname__}"


async def _served() -> None:
    assert hasattr(grpclib.server.Server([], codec=Bytes()), "__dispatch__"), "see `GrpcServer`"
    made = grpclib.protocol.H2Protocol.connection_made
    source = inspect.getsource(made)
    for word in ("initiate_connection", "increment_flow_control_window", "update_settings", "initialize", "Events"):
        assert word in source, f"grpclib {grpclib.__version__} begins its connections in another way"


def test_grpclib_begins_a_connection_as_wire_grpc_does_in_its_place() -> None:
    """The same as above."""
    asyncio.run(_served())


def services() -> Services:
    """All methods of the controller and of tasks; each answers with an empty reply."""
    made = Services()
    for method in METHODS:

        async def answer(request: Any, call: Call, reply: type[Any] = method.reply) -> Any:
            return reply()

        made.add(method, answer, namespaced=False)
    return made


# --- hostile messages


@STEADY
@given(st.sampled_from(METHODS), st.binary(max_size=400))
def test_no_bytes_of_a_message_end_otherwise_than_with_a_reply_or_a_typed_error(
    method: Method[Any, Any], data: bytes
) -> None:
    with contextlib.suppress(SandboxError):
        reply = asyncio.run(services().answer(Request(method.service, method.name, data)))
        assert codec.decode(method.reply, reply) == method.reply()


WORDS = st.one_of(st.text(max_size=20), st.sampled_from(["web", "../x", "a" * 300, "kubepods.slice", "net.ipv4.x", ""]))
IDS = st.builds(
    cri.IdMapping,
    host_id=st.integers(0, 2**32 - 1),
    container_id=st.sampled_from([0, 0, 0, 1, 2**32 - 1]),
    length=st.integers(0, 2**32 - 1),
)
MODES = st.sampled_from([0, 1, 2, 3, -1, 99])
USERS = st.builds(
    lambda mode, rows: cri.UserNamespace(mode=mode, uids=rows, gids=rows), MODES, st.lists(IDS, max_size=2)
)
NAMESPACES = st.builds(
    cri.NamespaceOption, network=MODES, pid=MODES, ipc=MODES, userns_options=st.one_of(st.none(), USERS)
)
CONFIGS = st.builds(
    cri.PodSandboxConfig,
    hostname=WORDS,
    dns_config=st.one_of(
        st.none(), st.builds(cri.DnsConfig, servers=st.lists(WORDS, max_size=3), searches=st.lists(WORDS, max_size=2))
    ),
    labels=st.dictionaries(WORDS, WORDS, max_size=3),
    annotations=st.dictionaries(WORDS, WORDS, max_size=3),
    linux=st.builds(
        cri.LinuxPodSandboxConfig,
        cgroup_parent=WORDS,
        security_context=st.builds(cri.SecurityContext, namespace_options=NAMESPACES, privileged=st.booleans()),
        sysctls=st.dictionaries(WORDS, WORDS, max_size=2),
    ),
)


class Backends:
    """What an engine says of its backends."""

    def __init__(self) -> None:
        self._registry: Registry = Registry()

    def capabilities(self, name: str) -> Capabilities:
        return self._registry.get(name).capabilities


@STEADY
@given(CONFIGS, st.sampled_from(["", "/var/run/netns/x", "no path", "/a\0b"]), st.data())
def test_a_pod_that_a_stranger_describes_is_a_sandbox_or_a_typed_error(
    config: cri.PodSandboxConfig, netns: str, data: st.DataObject
) -> None:
    value = bytearray(codec.encode(config))
    if value and data.draw(st.booleans()):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    options = AnyMessage(type_url=cri.TYPE_URL, value=bytes(value))
    request = ControllerCreateRequest(sandbox_id="pod", netns_path=netns, options=options)
    pods = Pods(Backends(), ServeConfig(), "/", lambda *_: lambda: None)  # type: ignore[arg-type]  # all that it asks
    with contextlib.suppress(SandboxError):
        pods._spec(request, "k8s.io")


# --- hostile HTTP/2


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Source: RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def traffic(rng: random.Random) -> bytes:
    """The beginning of a connection and a few frames, among them good calls, damaged at random."""
    caller = H2Connection(H2Configuration(client_side=True, header_encoding="ascii"))
    caller.initiate_connection()
    encoder = Encoder()
    headers = [
        encoder.encode(HEADERS),
        encoder.encode([*HEADERS[:2], (":path", "/none"), *HEADERS[3:], ("grpc-timeout", "x"), ("x-bin", "?")]),
        encoder.encode(HEADERS[3:]),
        rng.randbytes(rng.randrange(40)),
    ]
    message = struct.pack(">?I", False, 5) + b"\x0a\x03pod"
    words = [frame(0x1, flags, stream, head) for flags in (0x4, 0x5) for stream in (1, 3, 5) for head in headers]
    words += [frame(0x0, flags, stream, message) for flags in (0, 1) for stream in (1, 3, 5, 99)]
    words += [frame(kind, rng.randrange(256), rng.randrange(8), rng.randbytes(rng.randrange(12))) for kind in range(12)]
    words += [frame(0x3, 0, stream, struct.pack(">I", 8)) for stream in (1, 3)]
    words += [frame(0x8, 0, stream, struct.pack(">I", 2**31 - 1)) for stream in (0, 1, 3)]
    stream = bytearray(caller.data_to_send() + b"".join(rng.choices(words, k=rng.randrange(1, 12))))
    for _ in range(rng.randrange(4)):
        stream[rng.randrange(len(stream))] = rng.randrange(256)
    return bytes(stream)


@pytest.fixture
def anyio_backend() -> str:
    """grpclib knows asyncio only."""
    return "asyncio"


@pytest.mark.anyio
async def test_a_server_survives_hostile_http2(count: Callable[[int], int], caplog: pytest.LogCaptureFixture) -> None:
    """A fuzz target: each connection ends or goes on, nothing is raised to the loop, and others are served."""
    rng = random.Random(8)
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    caplog.set_level(logging.CRITICAL, "grpclib")
    server = GrpcServer(services())
    for _ in range(count(3000)):
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().connect_accepted_socket(server.connection, theirs)
        with ours, anyio.fail_after(30):
            ours.setblocking(False)
            said = traffic(rng)
            cut = rng.randrange(len(said) + 1)
            for piece in (said[:cut], said[cut:]):
                try:
                    ours.send(piece)
                except BrokenPipeError:
                    break
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            ours.shutdown(socket.SHUT_WR)
            while True:  # what it says, up to its end
                await anyio.wait_readable(ours)
                try:
                    if not ours.recv(65536):
                        break
                except ConnectionResetError:
                    break
        assert not raised, raised
    assert not [record for record in caplog.records if "Traceback" in record.getMessage()]
    await _call(server)
    await server.end()
    assert not server._connections


@pytest.mark.anyio
async def test_a_frame_of_a_kind_that_nobody_knows_is_passed_over() -> None:
    server = GrpcServer(services())
    await _call(server, before=frame(0xEE, 0, 0, b"new"))
    await server.end()


async def _call(server: GrpcServer, before: bytes = b"") -> None:
    """A good call, on a connection that begins with frames of ours."""
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().connect_accepted_socket(server.connection, theirs)
    channel = Channel(codec=Bytes())

    async def connect() -> grpclib.protocol.H2Protocol:
        made = await asyncio.get_running_loop().create_connection(channel._protocol_factory, sock=ours)
        made[0].write(before)
        return made[1]

    channel._create_connection = connect  # type: ignore[method-assign]
    with anyio.fail_after(30):
        async with channel.request(STATUS, Cardinality.UNARY_UNARY, bytes, bytes) as stream:
            await stream.send_message(b"\x0a\x03pod", end=True)
            assert await stream.recv_message() == b""
    channel.close()
