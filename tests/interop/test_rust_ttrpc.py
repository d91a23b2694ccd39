"""The ttrpc of shims and agents in Rust (the crate `ttrpc`) as the other end: we serve it, and it serves us."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest
from tests.interop.peers import calls_of, serving

from unisandbox.api.errors import DeadlineExceededError, FailedPreconditionError, GrpcStatus, NotFoundError
from unisandbox.wire.status import StatusError
from unisandbox.wire.ttrpc import UNARY, Client, Messages, Request, Shape

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SOURCE = Path(__file__).parent / "peer_rust"
CALLS, STREAMS = "interop.Calls", "interop.Streams"
BOTH = Shape(client_streams=True, server_streams=True)
SHAPES = {"Echo": BOTH, "Concat": Shape(client_streams=True), "Count": Shape(server_streams=True)}
BUILD_SECONDS = 90
"""What compiling all of it may take, once on a machine: cargo keeps what it has compiled."""
TIMED_OUT = 124  # source: timeout(1)
MIB = 1 << 20


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program at the other end, built once for a run."""
    cargo = shutil.which("cargo") or shutil.which("cargo", path=os.path.expanduser("~/.cargo/bin"))
    if cargo is None:
        pytest.skip("needs Rust's cargo, which is not installed")
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "unisandbox" / "interop-rust"
    env = {**os.environ, "CARGO_TARGET_DIR": str(kept)}
    # Another program ends it in time, with the compilers that it has started.
    run = partial(subprocess.run, cwd=SOURCE, env=env, capture_output=True, text=True, check=False)
    got = run(["timeout", str(BUILD_SECONDS), cargo, "fetch", "--locked"])
    if got.returncode != 0:
        pytest.skip(f"needs crates, which cannot be fetched here: {got.stderr.strip()[-200:]}")
    built = run(["timeout", str(BUILD_SECONDS), cargo, "build", "--locked", "--offline"])
    if built.returncode == TIMED_OUT:
        pytest.skip(f"its crates are not compiled within {BUILD_SECONDS} s; the next run goes on with them")
    assert built.returncode == 0, built.stderr
    # Other runs may build it anew meanwhile.
    return Path(shutil.copy(kept / "debug" / "peer", tmp_path_factory.mktemp("peer")))


class Handlers:
    """What the peer calls."""

    def shape(self, service: str, method: str) -> Shape | None:
        if service == STREAMS:
            return SHAPES.get(method)
        return None if method == "none" else UNARY

    async def answer(self, request: Request) -> bytes:
        match request.method:
            case "upper":
                return request.payload.upper()
            case "missing":
                raise NotFoundError("no container 'web'")
            case "metadata":
                return ",".join(request.metadata["key"]).encode()
            case "gate":
                await anyio.sleep_forever()
        raise KeyError("web")

    async def converse(self, request: Request, messages: Messages) -> None:
        parts = []
        while (message := await messages.receive()) is not None:
            if message == b"fail":
                raise FailedPreconditionError("as asked")
            if request.method == "Echo":
                await messages.send(message)
            parts.append(message)
        if request.method == "Concat":
            await messages.send(b"".join(parts))
        if request.method == "Count":
            for byte in parts[0]:
                await messages.send(bytes([byte]))


async def test_a_client_in_rust_is_served(peer: Path, tmp_path: Path) -> None:
    said = await calls_of(peer, tmp_path / "socket", Handlers())
    assert said.decode().splitlines() == [
        "upper: 0 HELLO",
        f"missing: {GrpcStatus.NOT_FOUND:d} no container 'web'",
        f"bug: {GrpcStatus.INTERNAL:d} internal error: KeyError: 'web'",
        f"none: {GrpcStatus.UNIMPLEMENTED:d} no method {CALLS}/none",
        "metadata: 0 1,2",
        f"big: 0 {3 * MIB}",
        "late: in time",
        f"echo: 0 {sum(range(200))}",
        f"fails: {GrpcStatus.FAILED_PRECONDITION:d} as asked",
        "concat: 0 one two three",
        "count: 0 abc",
    ]


@pytest.fixture
def served(peer: Path, tmp_path: Path) -> Iterator[str]:
    """A server in Rust: the path of its socket."""
    with serving(peer, tmp_path / "socket"):
        yield str(tmp_path / "socket")


async def test_calls_to_a_server_in_rust(served: str) -> None:
    async with await Client.connect(served) as client:
        with anyio.fail_after(60):
            assert await client.call(CALLS, "Upper", b"hello") == b"HELLO"
            assert await client.call(CALLS, "Upper", b"x" * 3 * MIB) == b"X" * 3 * MIB
            assert await client.call(CALLS, "Metadata", b"", metadata={"key": ("1", "2")}) == b"1,2"
            with pytest.raises(NotFoundError, match="no such thing"):
                await client.call(CALLS, "Missing", b"")
            with pytest.raises(StatusError) as caught:
                await client.call(CALLS, "None", b"")
            assert caught.value.status.code == GrpcStatus.UNIMPLEMENTED
            with pytest.raises(DeadlineExceededError):
                await client.call(CALLS, "Slow", b"", timeout=0.05)
            await client.call(CALLS, "Slow", b"")
            assert await client.call(CALLS, "Upper", b"late answers are harmless")


async def test_streams_of_a_server_in_rust(served: str) -> None:
    async with await Client.connect(served) as client:
        with anyio.fail_after(60):
            async with client.stream(STREAMS, "Echo", shape=BOTH) as stream:
                for size in (0, 1, 70_000):
                    await stream.send(bytes(size))
                    assert await stream.receive() == bytes(size)
                await stream.close()
                assert await stream.receive() is None
            async with client.stream(STREAMS, "Echo", shape=BOTH) as stream:
                await stream.send(b"fail")
                with pytest.raises(FailedPreconditionError, match="as asked"):
                    await stream.receive()
            async with client.stream(STREAMS, "Concat", shape=SHAPES["Concat"]) as stream:
                for part in (b"one ", b"", b"two"):
                    await stream.send(part)
                await stream.close()
                assert await stream.receive() == b"one two"
            async with client.stream(STREAMS, "Count", b"abc", shape=SHAPES["Count"]) as stream:
                assert [await stream.receive() for _ in range(4)] == [b"a", b"b", b"c", None]
