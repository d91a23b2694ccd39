"""The promises of ttrpc over sockets, both ends ours, on both event loops."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.wire.ends import BOTH, SHAPES, TO_SERVER, Handlers, answered, connected, raw, until

from unisandbox.api.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    GrpcStatus,
    NotFoundError,
    UnavailableError,
)
from unisandbox.wire.status import StatusError
from unisandbox.wire.ttrpc import (
    UNARY,
    Client,
    Limits,
    Request,
    Shape,
    frames,
    serve,
)
from unisandbox.wire.ttrpc.envelope import Response

pytestmark = pytest.mark.anyio

MIB = 1 << 20


async def test_a_call_is_answered_and_its_metadata_arrives() -> None:
    handlers = Handlers()
    async with connected(handlers) as client:
        assert await client.call("s", "upper", b"hello", metadata={"key": ("1", "2")}) == b"HELLO"
        assert handlers.metadata == {"key": ("1", "2")}
        assert await client.call("s", "upper", b"") == b""
        assert handlers.metadata == {}


async def test_errors_are_those_of_the_tree_or_say_their_status(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as client:
        with pytest.raises(NotFoundError, match=r"no container 'web'\. Make one"):
            await client.call("s", "missing", b"")
        with pytest.raises(StatusError) as caught:
            await client.call("other", "upper", b"")
        assert caught.value.status.code == GrpcStatus.UNIMPLEMENTED
        assert not caplog.records
        with pytest.raises(Exception, match="internal error: KeyError"):
            await client.call("s", "bug", b"abc")
        (record,) = caplog.records
        assert "s/bug failed, which is a bug: KeyError" in record.getMessage()
        assert "\n" not in record.getMessage()
        assert record.exc_info is None
        assert await client.call("s", "upper", b"on") == b"ON"


async def test_a_slow_call_makes_no_other_wait() -> None:
    handlers = Handlers()
    answers: list[bytes] = []
    async with connected(handlers) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            answers.append(await client.call("s", "gate", b""))

        for _ in range(100):
            group.start_soon(wait)
        await until(lambda: handlers.begun == 100)
        assert await client.call("s", "upper", b"x") == b"X"
        assert not answers
        handlers.gate.set()
    assert answers == [b"open"] * 100


async def test_a_timeout_ends_the_call_on_both_sides_and_leaves_the_connection_whole() -> None:
    handlers = Handlers()
    async with connected(handlers) as client:
        for _ in range(3):
            with pytest.raises(DeadlineExceededError):
                await client.call("s", "never", b"", timeout=0.02)
            assert await client.call("s", "upper", b"x", timeout=10) == b"X"
        await until(lambda: handlers.cancelled == 3)


async def test_a_timeout_may_be_longer_than_the_protocol_can_say() -> None:
    async with connected() as client:
        for timeout in (1e12, float("inf")):
            assert await client.call("s", "upper", b"x", timeout=timeout) == b"X"


async def test_the_server_ends_a_call_whose_time_is_over_and_says_so() -> None:
    for nanoseconds in (1, -1, 1_000_000):
        async with raw() as sock:
            request = Request("s", "never", timeout_nano=nanoseconds)
            sock.send(frames.encode(1, frames.REQUEST, 0, request.encode()))
            status = (await answered(sock)).status
            assert status is not None
            assert status.code == GrpcStatus.DEADLINE_EXCEEDED


async def test_a_cancelled_call_leaves_the_others_alone_and_its_late_answer_is_harmless() -> None:
    handlers = Handlers()
    async with connected(handlers) as client:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(client.call, "s", "gate", b"")
            await until(lambda: handlers.begun == 5)
            group.cancel_scope.cancel()
        handlers.gate.set()
        assert await client.call("s", "upper", b"x") == b"X"


async def test_whoever_reads_for_all_may_be_cancelled() -> None:
    handlers = Handlers()
    answers: list[bytes] = []
    async with connected(handlers) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            answers.append(await client.call("s", "gate", b""))

        async with anyio.create_task_group() as reader:
            reader.start_soon(client.call, "s", "gate", b"")  # it comes first, so it reads
            await until(lambda: handlers.begun == 1)
            group.start_soon(wait)
            await until(lambda: handlers.begun == 2)
            reader.cancel_scope.cancel()
        handlers.gate.set()
    assert answers == [b"open"]


async def test_streams_of_every_shape() -> None:
    async with connected() as client:
        async with client.stream("s", "echo", shape=BOTH) as stream:
            for message in (b"a", b"", b"c" * MIB):
                await stream.send(message)
                assert await stream.receive() == message
            await stream.close()
            assert await stream.receive() is None
            with pytest.raises(FailedPreconditionError):
                await stream.send(b"late")
        async with client.stream("s", "concat", shape=SHAPES["concat"]) as stream:
            for message in (b"one ", b"", b"two"):
                await stream.send(message)
            await stream.close()
            assert [await stream.receive(), await stream.receive()] == [b"one two", None]
        async with client.stream("s", "count", b"3", shape=SHAPES["count"]) as stream:
            assert [await stream.receive() for _ in range(4)] == [b"0", b"1", b"2", None]


async def test_a_server_that_owes_one_reply_and_sends_none_is_an_error() -> None:
    async with connected() as client, client.stream("s", "concat", shape=SHAPES["concat"]) as stream:
        await stream.close()
        with pytest.raises(Exception, match="without its reply"):
            await stream.receive()


async def test_much_data_goes_both_ways_at_once_while_calls_are_answered() -> None:
    """More than the kernel's buffers hold: each side has to read while it writes."""
    got = 0
    async with connected() as client, anyio.create_task_group() as group:
        async with client.stream("s", "echo", shape=BOTH) as stream:

            async def send() -> None:
                for _ in range(8):
                    await stream.send(bytes(MIB))
                await stream.close()

            group.start_soon(send)
            while (message := await stream.receive()) is not None:
                got += len(message)
                assert await client.call("s", "upper", b"x") == b"X"
    assert got == 8 * MIB


async def test_one_task_alone_can_write_more_than_the_kernel_takes_to_a_server_that_answers_all_of_it() -> None:
    async with connected() as client, client.stream("s", "echo", shape=BOTH) as stream:
        for _ in range(6):
            await stream.send(bytes(2 * MIB))
        await stream.close()
        got = 0
        while (message := await stream.receive()) is not None:
            got += len(message)
    assert got == 12 * MIB


async def test_what_is_too_long_is_refused_and_the_connection_lives_on() -> None:
    async with connected() as client:
        with pytest.raises(StatusError, match="exceed maximum message size"):
            await client.call("s", "upper", bytes(4 * MIB))
        with pytest.raises(StatusError, match="exceed maximum message size"):
            await client.call("s", "big", b"%d" % (4 * MIB))
        assert len(await client.call("s", "big", b"%d" % (4 * MIB - 100))) == 4 * MIB - 100


async def test_a_request_that_is_too_long_is_answered_as_the_go_implementation_does() -> None:
    async with raw() as sock:
        view = memoryview(frames._HEADER.pack(4 * MIB + 1, 1, frames.REQUEST, 0) + bytes(4 * MIB + 1))
        while view:
            await anyio.wait_writable(sock)
            view = view[sock.send(view) :]
        status = (await answered(sock)).status
        assert status is not None
        assert status.code == GrpcStatus.RESOURCE_EXHAUSTED
        assert status.message == "message length 4194305 exceed maximum message size of 4194304"


async def test_a_handler_that_takes_nothing_costs_its_own_stream_alone() -> None:
    handlers = Handlers()
    async with connected(handlers, Limits(stream=MIB)) as client, client.stream("s", "deaf", shape=BOTH) as stream:

        async def send() -> None:
            while True:
                await stream.send(bytes(MIB // 4))
                assert await client.call("s", "upper", b"x") == b"X"

        with pytest.raises(StatusError, match="nobody has taken"):
            await send()
        await until(lambda: handlers.cancelled == 1)


async def test_many_messages_that_are_there_at_once_hold_up_nobody() -> None:
    most = 10_000
    handlers = Handlers()
    async with connected(handlers) as client, client.stream("s", "late", shape=TO_SERVER) as stream:
        for _ in range(most):
            await stream.send(b"")
        await stream.close()
        assert await client.call("s", "upper", b"all of it has arrived") == b"ALL OF IT HAS ARRIVED"
        assert handlers.taken == 0
        handlers.gate.set()
        longest = before = 0
        while handlers.taken < most:
            await anyio.lowlevel.checkpoint()
            longest, before = max(longest, handlers.taken - before), handlers.taken
        assert longest <= 100, f"{longest} messages were taken while nobody else had a turn"


async def test_many_answers_that_are_there_at_once_hold_up_nobody() -> None:
    most = 10_000
    async with connected() as client, client.stream("s", "count", b"%d" % most, shape=SHAPES["count"]) as stream:
        while not stream._call.over:
            await client.call("s", "upper", b"whoever waits reads for all")
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as group:
            group.start_soon(count_turns)
            while await stream.receive() is not None:
                pass
            group.cancel_scope.cancel()
        assert turns >= most / 100


async def test_the_end_of_the_connection_ends_its_calls_on_both_sides() -> None:
    handlers = Handlers()
    errors: list[str] = []
    async with connected(handlers) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            with pytest.raises(UnavailableError) as caught:
                await client.call("s", "never", b"")
            errors.append(str(caught.value))

        for _ in range(3):
            group.start_soon(wait)
        await until(lambda: handlers.begun == 3)
        client.close()
        client.close()
    assert errors == ["the connection was closed here"] * 3
    assert handlers.cancelled == 3
    with pytest.raises(UnavailableError):
        await client.call("s", "upper", b"")


async def test_a_server_that_goes_away_is_noticed_by_every_call() -> None:
    ours, theirs = socket.socketpair()
    errors = 0
    async with Client(ours) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            nonlocal errors
            with pytest.raises(UnavailableError, match="other end"):
                await client.call("s", "never", b"")
            errors += 1

        for _ in range(3):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        theirs.close()
    assert errors == 3


async def test_an_answer_that_came_before_the_end_is_not_lost() -> None:
    ours, theirs = socket.socketpair()
    theirs.send(frames.encode(1, frames.RESPONSE, 0, Response(b"done").encode()))
    theirs.close()
    async with Client(ours) as client:
        assert await client.call("s", "last", b"") == b"done"


async def test_a_peer_that_reads_nothing_cannot_fill_the_memory() -> None:
    async with raw() as sock:
        bad = frames.encode(2, frames.REQUEST, 0, b"") * 1000
        with anyio.move_on_after(0.5) as scope:
            while True:
                await anyio.wait_writable(sock)
                sock.send(bad)
        assert scope.cancelled_caught  # the server reads no more of this, until what it said is read


async def test_a_socket_that_nobody_listens_on_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cannot connect to .*: No such file"):
        await Client.connect(str(tmp_path / "none"))


async def test_many_clients_come_and_go_at_one_listener(tmp_path: Path, count: Callable[[int], int]) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, anyio.fail_after(60):
        listener.bind(path)
        listener.listen(1)  # so that some find the queue full
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, Handlers())

            async def visit() -> None:
                async with await Client.connect(path) as client:
                    assert await client.call("s", "upper", b"x") == b"X"

            async with anyio.create_task_group() as visits:
                for _ in range(count(500)):
                    visits.start_soon(visit)
            group.cancel_scope.cancel()


async def test_a_server_without_free_descriptors_accepts_again_when_there_are_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Exhausted(socket.socket):
        left = 2

        def accept(self) -> tuple[socket.socket, object]:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    path = str(tmp_path / "socket")
    with Exhausted(socket.AF_UNIX) as listener, anyio.fail_after(30):
        listener.bind(path)
        listener.listen()
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, Handlers())
            async with await Client.connect(path) as client:
                assert await client.call("s", "upper", b"x") == b"X"
            group.cancel_scope.cancel()
    assert len(caplog.records) == 2


async def test_garbage_over_a_socket_ends_no_server(tmp_path: Path, count: Callable[[int], int]) -> None:
    rng = random.Random(8)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, anyio.fail_after(60):
        listener.bind(path)
        listener.listen(1024)  # room for all: `connect` below waits for nobody
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, Handlers())
            for _ in range(count(300)):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    length = rng.choice([0, 5, 10, 5000])
                    header = frames._HEADER.pack(rng.choice([0, 3, 2**22, 2**32 - 1]), rng.randrange(9), 1, 0)
                    sock.sendall(rng.choice([b"", header]) + rng.randbytes(length))
                    await anyio.lowlevel.checkpoint()
            async with await Client.connect(path) as client:
                assert await client.call("s", "upper", b"x") == b"X"
            group.cancel_scope.cancel()


async def test_a_connection_that_cannot_be_served_ends_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Handlers):
        def shape(self, service: str, method: str) -> Shape | None:
            if method == "bad":
                raise RuntimeError("as asked")
            return UNARY

    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, anyio.fail_after(30):
        listener.bind(path)
        listener.listen()
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, Broken())
            async with await Client.connect(path) as one, await Client.connect(path) as two:
                with pytest.raises(UnavailableError):
                    await one.call("s", "bad", b"")
                assert await two.call("s", "upper", b"x") == b"X"
            group.cancel_scope.cancel()
    assert len(caplog.records) == 1
