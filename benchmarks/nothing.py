"""A sandboxer for containerd that answers every call and starts nothing: what is left is containerd, and its client.

python -m benchmarks.nothing SOCKET
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from functools import partial
from typing import Final

import anyio
import anyio.abc
import attrs

from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Platform
from unisandbox.api.proto.containerd.v1.types import Status
from unisandbox.api.proto.google.protobuf import Empty
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.serve.controller import NOT_READY, READY, TASK_VERSION
from unisandbox.serve.moments import moment
from unisandbox.wire.accepting import accept
from unisandbox.wire.grpc import GrpcServer
from unisandbox.wire.services import Call, Services
from unisandbox.wire.ttrpc import serve_alone

_PID: Final = os.getpid()


@attrs.define(eq=False)
class _Ending:
    """Something that has not ended yet, and that somebody may wait for."""

    ended: anyio.Event = attrs.field(factory=anyio.Event)
    status: int = 0
    at: float = 0.0

    def end(self, status: int) -> None:
        self.status, self.at = status, self.at or time.time()
        self.ended.set()


class Nothing:
    """The nine methods of the controller and those of the task service that a pod's life needs.

    Args:
        tasks: address of the one task socket.
    """

    def __init__(self, tasks: str) -> None:
        self._address = f"ttrpc+unix://{tasks}"
        self._pods: dict[str, _Ending] = {}
        self._processes: dict[str, _Ending] = {}

    def controller(self) -> Services:
        """The table of the controller."""
        services = Services()
        for method, handler in {
            ControllerV1.CREATE: self._create,
            ControllerV1.START: self._start,
            ControllerV1.PLATFORM: self._platform,
            ControllerV1.STOP: self._stop,
            ControllerV1.WAIT: self._wait,
            ControllerV1.STATUS: self._status,
            ControllerV1.SHUTDOWN: self._shutdown,
        }.items():
            services.add(method, handler, namespaced=False)  # type: ignore[arg-type]
        return services

    def tasks(self) -> Services:
        """The table of the task service."""
        services = Services()
        for method, handler in {
            TaskV3.CREATE: self._create_task,
            TaskV3.START: self._start_task,
            TaskV3.STATE: self._state,
            TaskV3.KILL: self._kill,
            TaskV3.WAIT: self._wait_task,
            TaskV3.DELETE: self._delete,
            TaskV3.CONNECT: self._connect,
        }.items():
            services.add(method, handler, namespaced=False)  # type: ignore[arg-type]
        return services

    async def _create(self, request: v1.ControllerCreateRequest, _: Call) -> v1.ControllerCreateResponse:
        self._pods[request.sandbox_id] = _Ending()
        return v1.ControllerCreateResponse(sandbox_id=request.sandbox_id)

    async def _start(self, request: v1.ControllerStartRequest, _: Call) -> v1.ControllerStartResponse:
        return v1.ControllerStartResponse(
            sandbox_id=request.sandbox_id, created_at=moment(time.time()), address=self._address, version=TASK_VERSION
        )

    async def _platform(self, _request: v1.ControllerPlatformRequest, _: Call) -> v1.ControllerPlatformResponse:
        return v1.ControllerPlatformResponse(platform=Platform(os="linux", architecture="amd64"))

    async def _stop(self, request: v1.ControllerStopRequest, _: Call) -> v1.ControllerStopResponse:
        if pod := self._pods.get(request.sandbox_id):
            pod.end(0)
        return v1.ControllerStopResponse()

    async def _wait(self, request: v1.ControllerWaitRequest, _: Call) -> v1.ControllerWaitResponse:
        pod = self._pods.setdefault(request.sandbox_id, _Ending())
        await pod.ended.wait()
        return v1.ControllerWaitResponse(exited_at=moment(pod.at))

    async def _status(self, request: v1.ControllerStatusRequest, _: Call) -> v1.ControllerStatusResponse:
        pod = self._pods.get(request.sandbox_id)
        lives = pod is not None and not pod.ended.is_set()
        return v1.ControllerStatusResponse(
            sandbox_id=request.sandbox_id,
            state=READY if lives else NOT_READY,
            created_at=moment(time.time()),
            address=self._address,
            version=TASK_VERSION,
        )

    async def _shutdown(self, request: v1.ControllerShutdownRequest, _: Call) -> v1.ControllerShutdownResponse:
        if pod := self._pods.pop(request.sandbox_id, None):
            pod.end(0)
        return v1.ControllerShutdownResponse()

    async def _create_task(self, request: v3.CreateTaskRequest, _: Call) -> v3.CreateTaskResponse:
        for pipe in filter(None, (request.stdout, request.stderr)):
            with contextlib.suppress(OSError):  # who reads waits until somebody has written, or has gone
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        self._processes[request.id] = _Ending()
        return v3.CreateTaskResponse(pid=_PID)

    async def _start_task(self, request: v3.StartRequest, _: Call) -> v3.StartResponse:
        return v3.StartResponse(pid=_PID)

    async def _state(self, request: v3.StateRequest, _: Call) -> v3.StateResponse:
        process = self._processes[request.id]
        status = Status.STOPPED if process.ended.is_set() else Status.RUNNING
        return v3.StateResponse(id=request.id, pid=_PID, status=status, exit_status=process.status)

    async def _kill(self, request: v3.KillRequest, _: Call) -> Empty:
        self._processes[request.id].end(137)
        return Empty()

    async def _wait_task(self, request: v3.WaitRequest, _: Call) -> v3.WaitResponse:
        process = self._processes[request.id]
        await process.ended.wait()
        return v3.WaitResponse(exit_status=process.status, exited_at=moment(process.at))

    async def _delete(self, request: v3.DeleteRequest, _: Call) -> v3.DeleteResponse:
        process = self._processes.pop(request.id, _Ending())
        return v3.DeleteResponse(pid=_PID, exit_status=process.status, exited_at=moment(process.at or time.time()))

    async def _connect(self, _request: v3.ConnectRequest, _: Call) -> v3.ConnectResponse:
        return v3.ConnectResponse(shim_pid=_PID, task_pid=_PID)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(512)
    return listener


async def serve(path: str) -> None:
    """Serve until cancelled."""
    nothing = Nothing(f"{path}.tasks")
    tasks = nothing.tasks()
    server = GrpcServer(nothing.controller())
    with _listen(f"{path}.tasks") as listener, _listen(path) as controller:
        async with anyio.create_task_group() as group:
            connect = partial(asyncio.get_running_loop().connect_accepted_socket, server.connection)
            group.start_soon(accept, controller, lambda sock: group.start_soon(connect, sock))
            await accept(listener, lambda sock: group.start_soon(serve_alone, sock, tasks))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
