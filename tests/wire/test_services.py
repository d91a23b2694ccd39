"""The promises of the table of services, by ttrpc and by gRPC alike: only valid calls reach a handler."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
import pytest
from grpclib.client import Channel
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError

from unisandbox.api.errors import (
    BackendError,
    DeadlineExceededError,
    FailedPreconditionError,
    GrpcStatus,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api.proto.containerd.services.sandbox.v1 import (
    ControllerStatusRequest,
    ControllerStatusResponse,
    ControllerStopRequest,
    ControllerStopResponse,
    ControllerWaitRequest,
    ControllerWaitResponse,
)
from unisandbox.api.proto.google.protobuf import Any
from unisandbox.api.proto.methods import ControllerV1, StreamingV1
from unisandbox.api.rpc import Method
from unisandbox.wire import codec, remote
from unisandbox.wire.accepting import accept
from unisandbox.wire.grpc import Bytes, GrpcServer
from unisandbox.wire.services import Call, Services, Stream
from unisandbox.wire.status import Status, StatusError, error_of, status_of
from unisandbox.wire.ttrpc import Client, Metadata, Request, serve_connection

pytestmark = pytest.mark.anyio

STATUS = ControllerV1.STATUS
NAMESPACE: Metadata = {"containerd-namespace": ("k8s.io",)}
COUNT = Method("s", "Count", Any, Any, server_streams=True)


@pytest.fixture
def anyio_backend() -> str:
    """grpclib knows asyncio only."""
    return "asyncio"


class Controller:
    """A few methods, and who called them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.fail: Exception | None = None
        self.cancelled = anyio.Event()

    def services(self) -> Services:
        services = Services()
        services.add(STATUS, self.status)
        services.add(ControllerV1.STOP, self.stop)
        services.add(ControllerV1.WAIT, self.wait)
        services.add_stream(StreamingV1.STREAM, self.echo, namespaced=False)
        services.add_stream(COUNT, self.count)
        return services

    async def status(self, request: ControllerStatusRequest, call: Call) -> ControllerStatusResponse:
        self.calls.append(call)
        if self.fail is not None:
            raise self.fail
        return ControllerStatusResponse(sandbox_id=request.sandbox_id, state="SANDBOX_READY", info={"a": "b"})

    async def stop(self, request: ControllerStopRequest, call: Call) -> ControllerStopResponse:
        self.calls.append(call)
        return ControllerStopResponse.parse(b"\xfa\x3f\x80\x80\x80\x08" + bytes(16 << 20))  # too long for anybody

    async def wait(self, request: ControllerWaitRequest, call: Call) -> ControllerWaitResponse:
        self.calls.append(call)
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()
        return ControllerWaitResponse()

    async def echo(self, stream: Stream[Any, Any], call: Call) -> None:
        while (message := await stream.receive()) is not None:
            await stream.send(message)

    async def count(self, stream: Stream[Any, Any], call: Call) -> None:
        assert await stream.receive() is not None
        for byte in b"abc":
            await stream.send(Any(value=bytes([byte])))


AnyMethod = Method[object, object] | Method[ControllerStatusRequest, ControllerStatusResponse]
Caller = Callable[..., Awaitable[bytes]]
"""Method, bytes of the request, metadata, timeout; raises the error that the status means."""
Connect = Callable[[Controller, Path], AbstractAsyncContextManager[Caller]]


@asynccontextmanager
async def by_ttrpc(controller: Controller, tmp_path: Path) -> AsyncIterator[Caller]:
    ours, theirs = socket.socketpair()
    async with anyio.create_task_group() as group:
        group.start_soon(serve_connection, theirs, controller.services())
        async with Client(ours) as client:

            async def call(
                method: AnyMethod, payload: bytes, metadata: Metadata = NAMESPACE, timeout: float | None = None
            ) -> bytes:
                return await client.call(method.service, method.name, payload, metadata=metadata, timeout=timeout)

            yield call


@asynccontextmanager
async def grpc_channel(controller: Controller, tmp_path: Path) -> AsyncIterator[Channel]:
    path = str(tmp_path / "grpc")
    server = GrpcServer(controller.services())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # No task group: grpclib's client cancels its own task at a timeout, which one would take for its own end.
        loop = asyncio.get_running_loop()

        def take(sock: socket.socket) -> None:
            loop.create_task(loop.connect_accepted_socket(server.connection, sock))  # noqa: RUF006 (it ends at once)

        accepting = loop.create_task(accept(listener, take))
        channel = Channel(path=path, codec=Bytes())
        try:
            yield channel
        finally:
            channel.close()
            await server.end()
            accepting.cancel()
            await asyncio.wait([accepting])


@asynccontextmanager
async def by_grpc(controller: Controller, tmp_path: Path) -> AsyncIterator[Caller]:
    async with grpc_channel(controller, tmp_path) as channel:

        async def call(
            method: AnyMethod, payload: bytes, metadata: Metadata = NAMESPACE, timeout: float | None = None
        ) -> bytes:
            pairs = [(key, value) for key, values in metadata.items() for value in values]
            try:
                async with channel.request(
                    f"/{method}", Cardinality.UNARY_UNARY, bytes, bytes, metadata=pairs, timeout=timeout
                ) as stream:
                    await stream.send_message(payload, end=True)
                    reply = await stream.recv_message()
                    assert reply is not None
                    return reply
            except GRPCError as error:
                raise error_of(Status(error.status.value, error.message or "")) from error

        yield call


EITHER = pytest.mark.parametrize("connect", [by_ttrpc, by_grpc])
ASKED = codec.encode(ControllerStatusRequest(sandbox_id="pod"))


@EITHER
async def test_a_handler_gets_the_message_and_the_namespace(connect: Connect, tmp_path: Path) -> None:
    controller = Controller()
    async with connect(controller, tmp_path) as call:
        metadata = {"containerd-namespace": ("k8s.io",), "other": ("x", "y")}
        answer = codec.decode(ControllerStatusResponse, await call(STATUS, ASKED, metadata))
    assert (answer.sandbox_id, answer.state, answer.info) == ("pod", "SANDBOX_READY", {"a": "b"})
    assert [(got.namespace, got.metadata["other"]) for got in controller.calls] == [("k8s.io", ("x", "y"))]


@EITHER
@pytest.mark.parametrize(
    "bad", [ASKED[:-1], ASKED + b"\x80", b"\x0a\x02\xff\xff", b"\x08\x01", b"\x0b"], ids=lambda bad: bad.hex()
)
async def test_what_is_no_message_reaches_no_handler(
    connect: Connect, bad: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller()
    async with connect(controller, tmp_path) as call:
        with pytest.raises(InvalidArgumentError, match="no valid ControllerStatusRequest"):
            await call(STATUS, bad)
        await call(STATUS, ASKED)
    assert len(controller.calls) == 1
    assert not caplog.records


@EITHER
async def test_without_a_valid_namespace_no_handler_is_reached(connect: Connect, tmp_path: Path) -> None:
    controller = Controller()
    async with connect(controller, tmp_path) as call:
        with pytest.raises(FailedPreconditionError, match="namespace is required"):
            await call(STATUS, ASKED, {})
        for bad in ("../etc", "a/b", "x" * 77):
            with pytest.raises(InvalidArgumentError, match="containerd namespace"):
                await call(STATUS, ASKED, {"containerd-namespace": (bad,)})
    assert not controller.calls


@EITHER
@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (NotFoundError("no sandbox 'pod'", hint="Look."), NotFoundError),
        (UnavailableError("down"), UnavailableError),
        (BackendError("broke", log="last words"), BackendError),
        (UnsupportedError("pause", "runc"), StatusError),
        (StatusError(Status(GrpcStatus.RESOURCE_EXHAUSTED, "full")), StatusError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
async def test_errors_on_purpose_are_told_as_they_are_and_not_logged(
    connect: Connect, raised: SandboxError, seen: type[SandboxError], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller()
    controller.fail = raised
    async with connect(controller, tmp_path) as call:
        with pytest.raises(seen) as caught:
            await call(STATUS, ASKED)
    assert str(caught.value) == str(raised)
    assert not caplog.records


@EITHER
async def test_a_bug_is_internal_and_one_line_in_the_log(
    connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller()
    controller.fail = KeyError("a line\nand another")
    async with connect(controller, tmp_path) as call:
        with pytest.raises(BackendError, match="internal error: KeyError"):
            await call(STATUS, ASKED)
    (record,) = caplog.records
    text = record.getMessage()
    assert (record.name, record.levelname, record.exc_info) == ("unisandbox.wire", "ERROR", None)
    assert f"{STATUS} failed" in text
    assert f"{__file__}:" in text
    assert "\n" not in text


@EITHER
async def test_an_error_of_a_task_of_the_handlers_is_told_as_itself(
    connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller()
    async with connect(controller, tmp_path) as call:
        controller.fail = ExceptionGroup("tasks", [ExceptionGroup("inner", [NotFoundError("no sandbox 'pod'")])])
        with pytest.raises(NotFoundError, match="no sandbox 'pod'"):
            await call(STATUS, ASKED)
        assert not caplog.records
        controller.fail = ExceptionGroup("tasks", [KeyError("one"), NotFoundError("two")])
        with pytest.raises(BackendError, match="internal error: ExceptionGroup: tasks"):
            await call(STATUS, ASKED)
    assert len(caplog.records) == 1


@EITHER
async def test_an_error_of_any_length_can_be_told(connect: Connect, tmp_path: Path) -> None:
    controller = Controller()
    controller.fail = NotFoundError("漢" * (2 << 20))
    async with connect(controller, tmp_path) as call:
        with pytest.raises(NotFoundError, match="漢" * 1000):
            await call(STATUS, ASKED)


@EITHER
async def test_a_reply_that_is_too_long_is_an_error_and_others_go_on(connect: Connect, tmp_path: Path) -> None:
    async with connect(Controller(), tmp_path) as call:
        with pytest.raises(StatusError, match="exceed maximum message size"):
            await call(ControllerV1.STOP, codec.encode(ControllerStopRequest(sandbox_id="pod")))
        await call(STATUS, ASKED)


@EITHER
async def test_a_method_that_was_not_added_is_unimplemented(connect: Connect, tmp_path: Path) -> None:
    async with connect(Controller(), tmp_path) as call:
        for method in (ControllerV1.METRICS, STATUS.under("other.Service")):
            with pytest.raises(StatusError) as caught:
                await call(method, b"")
            assert caught.value.status.code == GrpcStatus.UNIMPLEMENTED


@EITHER
async def test_a_handler_is_cancelled_when_its_caller_waits_no_more(connect: Connect, tmp_path: Path) -> None:
    controller = Controller()
    async with connect(controller, tmp_path) as call:
        with pytest.raises((DeadlineExceededError, TimeoutError)), anyio.fail_after(20):
            await call(ControllerV1.WAIT, b"", timeout=0.1)
        with anyio.fail_after(20):
            await controller.cancelled.wait()


async def test_as_many_calls_wait_on_one_grpc_connection_as_there_are_pods(tmp_path: Path) -> None:
    controller = Controller()
    async with by_grpc(controller, tmp_path) as call, anyio.create_task_group() as group:

        async def wait() -> None:
            await call(ControllerV1.WAIT, b"")

        with anyio.fail_after(60):
            await call(STATUS, ASKED)  # so the caller has read how many it may make
            for _ in range(300):
                group.start_soon(wait)
            while len(controller.calls) < 301:
                await anyio.lowlevel.checkpoint()
            assert await call(STATUS, ASKED)
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", GrpcStatus.INVALID_ARGUMENT),
        (b"\x00\x00", GrpcStatus.INVALID_ARGUMENT),
        (b"\x00\x00\x00\x00\x09abc", GrpcStatus.INVALID_ARGUMENT),
        (b"\x01\x00\x00\x00\x03abc", GrpcStatus.UNIMPLEMENTED),
        (b"\x00\xff\xff\xff\xffabc", GrpcStatus.RESOURCE_EXHAUSTED),
    ],
)
async def test_grpc_bytes_that_are_no_message_are_refused_without_a_traceback(
    raw: bytes, code: GrpcStatus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller()
    async with grpc_channel(controller, tmp_path) as channel:

        async def send() -> None:
            path, metadata = f"/{STATUS}", [("containerd-namespace", "x")]
            async with channel.request(path, Cardinality.UNARY_UNARY, bytes, bytes, metadata=metadata) as stream:
                await stream.send_request()
                await stream._stream.send_data(raw, end_stream=True)
                stream._end_done = True
                await stream.recv_message()

        with pytest.raises(GRPCError) as caught:
            await send()
    assert caught.value.status.value == code
    assert not controller.calls
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_streams_by_grpc(tmp_path: Path) -> None:
    async with grpc_channel(Controller(), tmp_path) as channel:
        async with channel.request(f"/{StreamingV1.STREAM}", Cardinality.STREAM_STREAM, bytes, bytes) as stream:
            for size in (0, 1, 100_000):
                message = codec.encode(Any(type_url="x", value=bytes(size)))
                await stream.send_message(message)
                assert await stream.recv_message() == message
            await stream.end()
            assert await stream.recv_message() is None
        async with channel.request(
            f"/{COUNT}", Cardinality.UNARY_STREAM, bytes, bytes, metadata=[("containerd-namespace", "x")]
        ) as stream:
            await stream.send_message(b"", end=True)
            assert [codec.decode(Any, message).value async for message in stream] == [b"a", b"b", b"c"]


GOOGLES_CLIENT = """
import json, sys, grpc
channel = grpc.insecure_channel("unix:" + sys.argv[1])
def call(method, data, **options):
    try:
        path = "/containerd.services.sandbox.v1.Controller/" + method
        return channel.unary_unary(path)(data, timeout=30, **options).hex()
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
namespace = {"metadata": [("containerd-namespace", "k8s.io")]}
pod = bytes([10, 3]) + b"pod"
print(json.dumps([call("Status", pod, **namespace), call("Status", pod[:-1], **namespace), call("Status", pod),
                  call("Metrics", pod, **namespace)]))
"""


async def test_googles_own_grpc_client_is_served(tmp_path: Path) -> None:
    async with grpc_channel(Controller(), tmp_path):
        done = await anyio.run_process([sys.executable, "-c", GOOGLES_CLIENT, str(tmp_path / "grpc")])
    good, cut, nameless, unknown = json.loads(done.stdout)
    assert codec.decode(ControllerStatusResponse, bytes.fromhex(good)).sandbox_id == "pod"
    assert cut[0] == "INVALID_ARGUMENT"
    assert nameless[0] == "FAILED_PRECONDITION"
    assert unknown[0] == "UNIMPLEMENTED"


async def test_an_answer_that_is_no_message_is_the_servers_fault() -> None:
    class Liar(Services):
        async def answer(self, request: Request) -> bytes:
            return b"\x0a\x09x"

    liar = Liar()
    liar.add(STATUS, Controller().status)
    ours, theirs = socket.socketpair()
    async with anyio.create_task_group() as group:
        group.start_soon(serve_connection, theirs, liar)
        async with Client(ours) as client:
            with pytest.raises(BackendError, match=r"the answer of .*/Status is damaged"):
                await remote.call(client, STATUS, ControllerStatusRequest())


def test_a_method_has_one_handler_of_its_own_shape() -> None:
    services = Controller().services()
    with pytest.raises(ValueError, match="has a handler already"):
        services.add(STATUS, Controller().status)
    with pytest.raises(ValueError, match="has another shape"):
        services.add_stream(STATUS.under("other"), Controller().echo)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [NotFoundError, InvalidArgumentError, FailedPreconditionError, UnavailableError, BackendError]
)
def test_an_error_comes_back_from_its_status_as_itself(kind: type[SandboxError]) -> None:
    error = error_of(status_of(kind("why"), "x"))
    assert type(error) is kind
    assert str(error) == "why"


def test_a_status_that_no_class_means_is_kept() -> None:
    for code in (1, 2, 8, 10, 12, 16, 99, -1):
        error = error_of(Status(code, "why"))
        assert isinstance(error, StatusError)
        assert (error.status.code, status_of(error, "x")) == (code, Status(code, "why"))
