"""Both ends of a ttrpc connection for tests: handlers of every shape, clients of them, and bare sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from unisandbox.api.errors import (
    NotFoundError,
)
from unisandbox.wire.ttrpc import (
    LIMITS,
    UNARY,
    Client,
    Limits,
    Messages,
    Request,
    Shape,
    frames,
    serve_connection,
)
from unisandbox.wire.ttrpc.envelope import Response

BOTH = Shape(client_streams=True, server_streams=True)
TO_SERVER = Shape(client_streams=True)
SHAPES = {
    "echo": BOTH,
    "concat": TO_SERVER,
    "count": Shape(server_streams=True),
    "deaf": BOTH,
    "late": TO_SERVER,
}


class Handlers:
    """Methods for the tests, and what became of them."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.metadata: dict[str, tuple[str, ...]] = {}
        self.gate = anyio.Event()
        self.taken = 0

    def shape(self, service: str, method: str) -> Shape | None:
        if service != "s":
            return None
        return SHAPES.get(method, UNARY)

    async def answer(self, request: Request) -> bytes:
        self.begun += 1
        self.metadata = dict(request.metadata)
        match request.method:
            case "upper":
                return request.payload.upper()
            case "big":
                return bytes(int(request.payload))
            case "missing":
                raise NotFoundError("no container 'web'", hint="Make one.")
            case "bug":
                raise KeyError("a line\nand another")
            case "gate":
                await self.gate.wait()
                return b"open"
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled += 1
        return b"never"

    async def converse(self, request: Request, messages: Messages) -> None:
        self.begun += 1
        if request.method == "deaf":
            try:
                await anyio.sleep_forever()
            finally:
                self.cancelled += 1
        if request.method == "late":
            await self.gate.wait()
        got = []
        while (message := await messages.receive()) is not None:
            self.taken += 1
            if request.method == "echo":
                await messages.send(message)
            got.append(message)
        if request.method == "count":
            for number in range(int(got[0])):
                await messages.send(b"%d" % number)
        if request.method == "concat" and got:
            await messages.send(b"".join(got))


@asynccontextmanager
async def connected(handlers: Handlers | None = None, limits: Limits = LIMITS) -> AsyncIterator[Client]:
    ours, theirs = socket.socketpair()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(serve_connection, theirs, handlers or Handlers(), limits)
            async with Client(ours) as client:
                yield client


@asynccontextmanager
async def raw(handlers: Handlers | None = None) -> AsyncIterator[socket.socket]:
    """The server's connection, as bytes."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with anyio.fail_after(30), ours:
        async with anyio.create_task_group() as group:
            group.start_soon(serve_connection, theirs, handlers or Handlers())
            yield ours
            ours.close()


async def answered(sock: socket.socket) -> Response:
    """The first response that comes."""
    reader = frames.FrameReader()
    while True:
        await anyio.wait_readable(sock)
        for frame in reader.feed(sock.recv(65536)):
            assert frame.data is not None
            return Response.decode(frame.data)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.sleep(0.001)
