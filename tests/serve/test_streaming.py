"""Streams without FIFOs: asked for by their ids at the pod's address, with the credit rule of containerd."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import pytest
from betterproto2 import Message
from tests.serve.client import CONTAINER, DEADLINE, POD, Engine, engine_at, shared

from unisandbox.api import InvalidArgumentError, NotFoundError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.services.streaming.v1 import StreamInit
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types.transfer import Data, WindowUpdate
from unisandbox.api.proto.containerd.v1.types import Status
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import ControllerV1, StreamingV1, TaskV3
from unisandbox.serve import streaming
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import serving
from unisandbox.wire import codec
from unisandbox.wire.ttrpc import Client, ClientStream, Shape

pytestmark = [pytest.mark.anyio, pytest.mark.root]

NAMES = ("stdin", "stdout", "stderr")


@attrs.frozen
class Addresses:
    """As containerd names the streams of a process."""

    address: str
    process: str
    names: tuple[str, ...] = NAMES

    def name(self, name: str) -> str:
        return f"{self.process}-{name}" if self.process else name

    def path(self, name: str) -> str:
        return f"{self.address}?streaming_id={self.name(name)}" if name in self.names else ""

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Peer]:
        """The engine's side of a stream, over a connection of its own."""
        shape = Shape(client_streams=True, server_streams=True)
        path = self.address.removeprefix("ttrpc+unix://")
        method = StreamingV1.STREAM
        async with (
            await Client.connect(path) as client,
            client.stream(method.service, method.name, shape=shape) as stream,
        ):
            peer = Peer(stream)
            await peer.send("containerd.services.streaming.v1.StreamInit", StreamInit(id=self.name(name)))
            assert await stream.receive() == b"", "one empty message says that it is there"
            yield peer


@attrs.frozen
class Peer:
    stream: ClientStream

    async def send(self, kind: str, message: Message) -> None:
        await self.stream.send(codec.encode(AnyMessage(type_url=kind, value=codec.encode(message))))

    async def allow(self, count: int) -> None:
        await self.send("containerd.types.transfer.WindowUpdate", WindowUpdate(update=count))

    async def write(self, data: bytes) -> None:
        await self.send("containerd.types.transfer.Data", Data(data=data))

    async def rest(self) -> None:
        with anyio.fail_after(DEADLINE):
            while await self.stream.receive() is not None:
                pass

    async def allowed(self) -> int:
        message = await self.next("WindowUpdate")
        assert message is not None
        return codec.decode(WindowUpdate, message).update

    async def next(self, kind: str) -> bytes | None:
        with anyio.fail_after(DEADLINE):
            got = await self.stream.receive()
        if got is None:
            return None
        message = codec.decode(AnyMessage, got)
        assert message.type_url == f"containerd.types.transfer.{kind}"
        return message.value

    async def read(self, count: int | None = None) -> bytes:
        """So many bytes, or all up to the end."""
        got = b""
        while count is None or len(got) < count:
            message = await self.next("Data")
            if message is None:
                break
            got += codec.decode(Data, message).data
        return got


async def start(engine: Engine, *args: str) -> Addresses:
    """A pod and a container, whose streams are asked for before it is made, as containerd does."""
    started = await engine.run_pod(linux=shared())
    streams = Addresses(started.address, CONTAINER)
    await engine.create(engine.bundle(*args), streams)
    await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
    return streams


async def kill(engine: Engine) -> None:
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, signal=signal.SIGKILL))
    await engine.wait()


async def test_streams_that_are_asked_for_first_get_what_a_process_writes_and_give_it_what_it_reads(
    engine: Engine,
) -> None:
    started = await engine.run_pod(linux=shared())
    streams = Addresses(started.address, CONTAINER)
    async with streams.open("stdin") as stdin, streams.open("stdout") as stdout, streams.open("stderr") as stderr:
        for output in (stdout, stderr):
            await output.allow(65536)
        await engine.create(engine.bundle("sh", "-c", "echo err >&2; cat; exit 3"), streams)
        await engine.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
        assert await stderr.read(4) == b"err\n"
        assert await stdin.allowed() > 0, "the engine sends nothing before that"
        await stdin.write(b"typed\n")
        assert await stdout.read(6) == b"typed\n"
        state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
        assert (state.stdin, state.stdout) == (streams.path("stdin"), streams.path("stdout"))
        await stdin.stream.close()
        await engine.tasks(TaskV3.CLOSE_IO, v3.CloseIoRequest(id=CONTAINER, stdin=True))
        assert await engine.wait() == 3
        assert await stdout.read() == await stderr.read() == b"", "the end is told"
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))


async def test_no_more_is_sent_than_was_allowed_and_the_process_waits(engine: Engine) -> None:
    streams = await start(engine, "sh", "-c", "head -c 1000000 /dev/zero; echo done >&2")
    async with streams.open("stdout") as stdout, streams.open("stderr") as stderr:
        await stderr.allow(65536)
        await stdout.allow(40000)
        assert len(await stdout.read(40000)) == 40000
        with anyio.move_on_after(0.2) as waited:
            await stdout.next("Data")
        assert waited.cancelled_caught
        assert (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).status == Status.RUNNING
        await stdout.allow(960_000)
        assert len(await stdout.read()) == 960_000
        assert await stderr.read() == b"done\n"
    await engine.wait()


async def test_a_lot_goes_both_ways_in_order(engine: Engine) -> None:
    streams = await start(engine, "cat")
    data = b"".join(b"%07d\n" % number for number in range(100_000))
    got = b""
    async with (
        streams.open("stdin") as stdin,
        streams.open("stdout") as stdout,
        anyio.create_task_group() as group,
    ):

        async def write() -> None:
            rest, window = data, 0
            while rest:
                while not window:
                    window += await stdin.allowed()
                piece, rest = rest[: min(window, 32768)], rest[min(window, 32768) :]
                window -= len(piece)
                await stdin.write(piece)
            await stdin.stream.close()
            await engine.tasks(TaskV3.CLOSE_IO, v3.CloseIoRequest(id=CONTAINER, stdin=True))

        group.start_soon(write)
        while len(got) < len(data):
            await stdout.allow(65536)
            got += await stdout.read(min(65536, len(data) - len(got)))
    assert got == data
    assert await engine.wait() == 0


async def test_what_was_sent_before_the_connection_was_closed_arrives(engine: Engine) -> None:
    streams = await start(engine, "sh", "-c", "read go; cat | wc -c")
    async with streams.open("stdout") as stdout:
        await stdout.allow(65536)
        async with streams.open("stdin") as stdin:
            window, sent = 0, 0
            while sent < 160_000:  # more than a pipe holds
                if not window:
                    window += await stdin.allowed()
                piece = min(window, 32000)
                await stdin.write((b"go\n" if not sent else b"") + b"x" * piece)
                window, sent = window - piece, sent + piece
        await engine.tasks(TaskV3.CLOSE_IO, v3.CloseIoRequest(id=CONTAINER, stdin=True))
        assert await stdout.read() == f"{sent}\n".encode()


async def test_who_asks_again_goes_on_where_the_former_was(engine: Engine) -> None:
    streams = await start(engine, "sh", "-c", "while read x; do echo $x; done")
    async with streams.open("stdin") as stdin, streams.open("stdout") as old:
        await old.allow(65536)
        await stdin.write(b"one\n")
        assert await old.read(4) == b"one\n"
        async with streams.open("stdout") as new:
            assert await old.read() == b"", "the former is told that nothing more comes"
            await new.allow(65536)
            await stdin.write(b"two\n")
            assert await new.read(4) == b"two\n"
    # Nobody is there now, and the process lives on.
    async with streams.open("stdin") as stdin, streams.open("stdout") as stdout:
        await stdin.write(b"three\n")
        await stdout.allow(65536)
        assert await stdout.read(6) == b"three\n"
    await kill(engine)


async def test_terminals_and_added_processes_have_streams_too(engine: Engine) -> None:
    await start(engine, "sleep", "1000")
    assert engine.task is not None
    address = (await engine.status()).address
    screen = Addresses(address, "e" * 64, ("stdin", "stdout"))
    async with screen.open("stdin") as stdin, screen.open("stdout") as stdout:
        await stdout.allow(65536)
        await engine.exec("e1", screen, "sh", "-c", "tty; read x; echo got $x; exit 4", terminal=True)
        await stdin.write(b"word\n")
        shown = await stdout.read()
        assert b"/dev/pts/0" in shown
        assert b"got word" in shown
    assert await engine.wait("e1") == 4
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))


async def test_a_process_of_a_former_server_has_its_streams_still(config: ServeConfig, tmp_path: Path) -> None:
    async with serving(config), engine_at(config.socket, tmp_path) as engine:
        streams = await start(engine, "sh", "-c", "while read x; do echo $x; done")
    async with serving(config) as server:
        async with streams.open("stdin") as stdin, streams.open("stdout") as stdout:
            await stdout.allow(65536)
            await stdin.write(b"still\n")
            assert await stdout.read(6) == b"still\n"
        for entry in server.pods.core.entries():
            await entry.remove()


async def test_streams_end_when_their_pod_is_removed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LAST_OUTPUT_SECONDS", 0.2)
    streams = await start(engine, "sh", "-c", "echo unread; exec sleep 1000")
    never = Addresses(streams.address, "e" * 64)
    async with (
        streams.open("stdin") as stdin,
        streams.open("stdout") as stdout,
        streams.open("stderr") as stderr,
        never.open("stdin") as waiting,
        never.open("stdout") as waiting_too,
    ):
        await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
        for peer in (waiting, waiting_too):
            with pytest.raises(NotFoundError, match="was removed"):
                await peer.rest()
        for peer in (stdin, stdout, stderr):
            await peer.rest()


@pytest.mark.parametrize("goes_away", [False, True])
async def test_a_stream_of_empty_messages_holds_up_nobody(engine: Engine, *, goes_away: bool) -> None:
    streams = await start(engine, "sleep", "1000")
    async with streams.open("stdin") as stdin:
        await stdin.write(b"x" * 65536)
        await stdin.write(b"x" * 30000)  # more than the pipe holds: what comes now waits
        for _ in range(30_000):
            await stdin.write(b"")
        stalls: list[float] = []

        async def watch() -> None:
            while True:
                before = time.thread_time()
                await anyio.lowlevel.checkpoint()
                stalls.append(time.thread_time() - before)

        await stdin.stream.close()
        async with anyio.create_task_group() as group:
            group.start_soon(stdin.rest)
            await anyio.wait_all_tasks_blocked()  # so that all of it has arrived
            group.start_soon(watch)
            if goes_away:
                async with streams.open("stdin") as again:  # the former has to say all that came
                    await again.allowed()
            else:
                await kill(engine)  # nobody reads it any more: all is taken
                await stdin.rest()
            group.cancel_scope.cancel()
        assert max(stalls) < 0.3
    if goes_away:
        await kill(engine)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("stdout", "WindowUpdate", WindowUpdate(update=0)),
        ("stdout", "WindowUpdate", WindowUpdate(update=-1)),
        ("stdout", "Data", Data(data=b"x")),
        ("stdin", "Data", Data(data=b"x" * 300_000)),
        ("stdin", "WindowUpdate", WindowUpdate(update=1)),
    ],
)
async def test_who_breaks_the_rules_is_told_and_nobody_else_notices(
    engine: Engine, name: str, kind: str, message: Message
) -> None:
    streams = await start(engine, "sh", "-c", "while read x; do echo $x; done")
    async with streams.open(name) as peer:
        await peer.send(f"containerd.types.transfer.{kind}", message)
        with pytest.raises(InvalidArgumentError):
            await peer.rest()
    async with streams.open("stdin") as stdin, streams.open("stdout") as stdout:
        await stdout.allow(65536)
        await stdin.write(b"fine\n")
        assert await stdout.read(5) == b"fine\n"
    await kill(engine)


async def test_a_stream_without_a_name_is_refused(engine: Engine) -> None:
    streams = await start(engine, "sleep", "1000")
    for name in ("", "x" * 300):
        with pytest.raises(InvalidArgumentError, match="id has 1 to"):
            async with attrs.evolve(streams, process="").open(name):
                pass
    await kill(engine)
