"""containerd's own ttrpc and messages, in Go, as the other end: we serve it, and it serves us."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest
from tests.interop.peers import calls_of, serving

from unisandbox.api.errors import DeadlineExceededError, FailedPreconditionError, GrpcStatus, NotFoundError
from unisandbox.api.proto.containerd.runc.v1 import Options
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Mount
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.google.protobuf import Any, Empty
from unisandbox.api.proto.methods import StreamingV1, TaskV3
from unisandbox.api.rpc import Method
from unisandbox.wire import codec, remote
from unisandbox.wire.services import Call, Services, Stream
from unisandbox.wire.status import StatusError
from unisandbox.wire.ttrpc import Client, Shape

# The first run compiles Go's standard library too.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

SOURCE = Path(__file__).parent / "peer"
V2 = "containerd.task.v2.Task"
CONCAT = Method("interop.Streams", "Concat", Any, Any, client_streams=True)
COUNT = Method("interop.Streams", "Count", Any, Any, server_streams=True)
MIB = 1 << 20


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program at the other end, built once for a run; Go keeps what it has compiled."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.skip("needs Go, which is not installed")
    target = tmp_path_factory.mktemp("peer") / "peer"
    # Telemetry would leave a process behind, and the tests may run from an archive.
    env = {**os.environ, "GOTELEMETRY": "off", "GOFLAGS": "-mod=readonly -buildvcs=false -trimpath"}
    got = subprocess.run([go, "list", "-deps", "."], cwd=SOURCE, env=env, capture_output=True, text=True, check=False)
    if got.returncode != 0:
        pytest.skip(f"needs Go's modules, which cannot be fetched here: {got.stderr.strip()[-200:]}")
    built = subprocess.run(
        [go, "build", "-o", target], cwd=SOURCE, env=env, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return target


class Tasks:
    """The methods that the peer calls."""

    def __init__(self) -> None:
        self.killed = anyio.Event()

    def services(self) -> Services:
        services = Services()
        services.add(TaskV3.STATE.under(V2), self.state)
        services.add(TaskV3.DELETE.under(V2), self.delete)
        services.add(TaskV3.RESUME.under(V2), self.resume)
        services.add(TaskV3.STATS.under(V2), self.stats)
        services.add(TaskV3.WAIT.under(V2), self.wait)
        services.add(TaskV3.KILL.under(V2), self.kill)
        services.add_stream(StreamingV1.STREAM, self.echo, namespaced=False)
        services.add_stream(CONCAT, self.concat, namespaced=False)
        services.add_stream(COUNT, self.count, namespaced=False)
        return services

    async def state(self, request: v3.StateRequest, call: Call) -> v3.StateResponse:
        ended = datetime.fromtimestamp(1700000000.25, UTC)
        return v3.StateResponse(id=request.id, pid=42, bundle=call.namespace, status=TaskStatus.PAUSED, exited_at=ended)

    async def delete(self, request: v3.DeleteRequest, call: Call) -> v3.DeleteResponse:
        raise NotFoundError(f"no container {request.id!r}")

    async def resume(self, request: v3.ResumeRequest, call: Call) -> Empty:
        raise KeyError(request.id)

    async def stats(self, request: v3.StatsRequest, call: Call) -> v3.StatsResponse:
        size = 4 * MIB if request.id == "too big" else 4 * MIB - 1000
        return v3.StatsResponse(stats=Any(value=bytes(size)))

    async def wait(self, request: v3.WaitRequest, call: Call) -> v3.WaitResponse:
        await self.killed.wait()
        return v3.WaitResponse(exit_status=137)

    async def kill(self, request: v3.KillRequest, call: Call) -> Empty:
        self.killed.set()
        return Empty()

    async def echo(self, stream: Stream[Any, Any], call: Call) -> None:
        while (message := await stream.receive()) is not None:
            if message.type_url == "fail":
                raise FailedPreconditionError(message.value.decode())
            await stream.send(message)

    async def concat(self, stream: Stream[Any, Any], call: Call) -> None:
        parts = []
        while (message := await stream.receive()) is not None:
            parts.append(message.value)
        await stream.send(Any(value=b"".join(parts)))

    async def count(self, stream: Stream[Any, Any], call: Call) -> None:
        upto = await stream.receive()
        assert upto is not None
        for byte in upto.value:
            await stream.send(Any(value=bytes([byte])))


async def test_a_client_in_go_is_served(peer: Path, tmp_path: Path, anyio_backend: str) -> None:
    lines = await calls_of(peer, tmp_path / "socket", Tasks().services())
    said = {line["call"]: line for line in map(json.loads, lines.splitlines())}
    codes = {call: line["code"] for call, line in said.items() if line["code"]}
    assert codes == {
        "not found": GrpcStatus.NOT_FOUND,
        "no namespace": GrpcStatus.FAILED_PRECONDITION,
        "unimplemented": GrpcStatus.UNIMPLEMENTED,
        "invalid": GrpcStatus.INVALID_ARGUMENT,
        "internal": GrpcStatus.INTERNAL,
        "too big reply": GrpcStatus.RESOURCE_EXHAUSTED,
        "deadline": GrpcStatus.DEADLINE_EXCEEDED,
        "echo fails": GrpcStatus.FAILED_PRECONDITION,
    }
    assert said["not found"]["message"] == "no container 'web'"
    assert said["internal"]["message"] == "internal error: KeyError: 'web'"
    assert said["echo fails"]["message"] == "as asked"
    results = {call: line["result"] for call, line in said.items() if line["result"] and call not in codes}
    assert results == {
        "state": {"id": "web", "pid": 42, "bundle": "k8s.io", "status": "PAUSED", "exited": "2023-11-14T22:13:20.25Z"},
        "big reply": {"bytes": 4 * MIB - 1000},
        "waits": {"codes": [137] * 50},
        "echo": sum(range(200)),
        "concat": "one two three",
        "count": "abc",
    }


@pytest.fixture
def served(peer: Path, tmp_path: Path) -> Iterator[str]:
    """A server in Go: the path of its socket."""
    with serving(peer, tmp_path / "socket"):
        yield str(tmp_path / "socket")


async def test_calls_to_a_server_in_go(served: str) -> None:
    async with await Client.connect(served) as client:
        with anyio.fail_after(60):
            state = await remote.call(client, TaskV3.STATE.under(V2), v3.StateRequest(id="web"), namespace="k8s.io")
            assert (state.id, state.bundle, state.pid, state.terminal) == ("web", "k8s.io", 4242, True)
            assert state.status == TaskStatus.RUNNING
            assert state.exited_at is not None
            assert state.exited_at.timestamp() == 1700000000.25
            options = Any(type_url="containerd.runc.v1.Options", value=codec.encode(Options(root="/x")))
            request = v3.CreateTaskRequest(id="web", bundle="/run/web", options=options)
            request.rootfs = [Mount(type="overlay", source="overlay", options=["a", "b"])]
            assert (await remote.call(client, TaskV3.CREATE.under(V2), request)).pid == 7
            with pytest.raises(NotFoundError, match='no container "web"'):
                await remote.call(client, TaskV3.DELETE.under(V2), v3.DeleteRequest(id="web"))
            with pytest.raises(StatusError) as caught:
                await remote.call(client, TaskV3.STATE, v3.StateRequest(id="web"))
            assert caught.value.status.code == GrpcStatus.UNIMPLEMENTED
            large = v3.ExecProcessRequest(id="web", spec=Any(value=bytes(3 * MIB)))
            await remote.call(client, TaskV3.EXEC.under(V2), large)


async def test_late_answers_of_a_server_in_go_are_harmless(served: str) -> None:
    async with await Client.connect(served) as client:
        with anyio.fail_after(60):
            for _ in range(3):
                with pytest.raises(DeadlineExceededError):
                    await remote.call(
                        client, TaskV3.CHECKPOINT.under(V2), v3.CheckpointTaskRequest(id="web"), timeout=0.05
                    )
            for _ in range(20):  # longer than the answers are late
                assert (await remote.call(client, TaskV3.STATE.under(V2), v3.StateRequest(id="web"))).pid == 4242
                await anyio.sleep(0.02)


async def test_many_calls_at_once_to_a_server_in_go(served: str) -> None:
    codes: list[int] = []
    async with await Client.connect(served) as client, anyio.create_task_group() as group:

        async def wait() -> None:
            codes.append((await remote.call(client, TaskV3.WAIT.under(V2), v3.WaitRequest(id="web"))).exit_status)

        for _ in range(50):
            group.start_soon(wait)
        with anyio.fail_after(60):
            assert (await remote.call(client, TaskV3.STATE.under(V2), v3.StateRequest(id="web"))).pid == 4242
            assert not codes
            await remote.call(client, TaskV3.KILL.under(V2), v3.KillRequest(id="web"))
    assert codes == [137] * 50


async def test_streams_of_a_server_in_go(served: str) -> None:
    both = Shape(client_streams=True, server_streams=True)
    async with await Client.connect(served) as client:
        with anyio.fail_after(60):
            async with client.stream(StreamingV1.STREAM.service, "Stream", shape=both) as stream:
                for size in (0, 1, 70_000):
                    message = codec.encode(Any(type_url="x", value=bytes(size)))
                    await stream.send(message)
                    assert await stream.receive() == message
                await stream.close()
                assert await stream.receive() is None
            async with client.stream(StreamingV1.STREAM.service, "Stream", shape=both) as stream:
                await stream.send(codec.encode(Any(type_url="fail", value=b"as asked")))
                with pytest.raises(FailedPreconditionError, match="as asked"):
                    await stream.receive()
            async with client.stream(CONCAT.service, "Concat", shape=Shape(client_streams=True)) as stream:
                for part in (b"one ", b"", b"two"):
                    await stream.send(codec.encode(Any(value=part)))
                await stream.close()
                assert codec.decode(Any, await stream.receive() or b"").value == b"one two"
            counted = codec.encode(Any(value=b"abc"))
            async with client.stream(COUNT.service, "Count", counted, shape=Shape(server_streams=True)) as stream:
                got = [codec.decode(Any, await stream.receive() or b"").value for _ in range(3)]
                assert got == [b"a", b"b", b"c"]
                assert await stream.receive() is None
