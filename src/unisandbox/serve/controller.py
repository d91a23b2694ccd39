"""The Sandbox controller, as containerd and iSulad call it.

Source: containerd, api/services/sandbox/v1/sandbox.proto.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from unisandbox import __version__
from unisandbox.api import FailedPreconditionError, InvalidArgumentError, RootMount, UnsupportedError
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.types import Metric, Platform
from unisandbox.api.proto.methods import ControllerV1
from unisandbox.serve.metrics import any_of
from unisandbox.serve.moments import moment
from unisandbox.serve.pods import Pods
from unisandbox.wire.services import Call, Services, namespace_of

READY: Final = "SANDBOX_READY"
NOT_READY: Final = "SANDBOX_NOTREADY"

TASK_VERSION: Final = 3
"""With less containerd starts a shim of its own beside us."""

_ARCHITECTURES: Final[Mapping[str, str]] = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}
"""Go's names, by the kernel's."""

_TASKS: Final = "tasks"
_FIELD: Final = "extensions.tasks"
_MOST_GRACE: Final = 3600


class Controller:
    """The nine methods; add them to a table by `add_to`."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    def add_to(self, services: Services) -> None:
        """Add all methods. iSulad says no namespace, so that none is wanted; one that is said must be valid."""
        services.add(ControllerV1.CREATE, self.create, namespaced=False)
        services.add(ControllerV1.START, self.start, namespaced=False)
        services.add(ControllerV1.PLATFORM, self.platform, namespaced=False)
        services.add(ControllerV1.STOP, self.stop, namespaced=False)
        services.add(ControllerV1.WAIT, self.wait, namespaced=False)
        services.add(ControllerV1.STATUS, self.status, namespaced=False)
        services.add(ControllerV1.SHUTDOWN, self.shutdown, namespaced=False)
        services.add(ControllerV1.METRICS, self.metrics, namespaced=False)
        services.add(ControllerV1.UPDATE, self.update, namespaced=False)

    async def create(self, request: v1.ControllerCreateRequest, call: Call) -> v1.ControllerCreateResponse:
        """Check it; nothing is made before the start."""
        if request.rootfs:
            raise UnsupportedError("a root file system of the pod itself", "serve")
        await self._pods.ask(request, namespace_of(call.metadata))
        return v1.ControllerCreateResponse(sandbox_id=request.sandbox_id)

    async def start(self, request: v1.ControllerStartRequest, call: Call) -> v1.ControllerStartResponse:
        """Make it. The pod has no process: containers are told its namespaces by the task service."""
        entry = await self._pods.start(request.sandbox_id, namespace_of(call.metadata))
        return v1.ControllerStartResponse(
            sandbox_id=entry.sandbox_id,
            created_at=moment(entry.record.created_at),
            address=self._pods.address(entry.sandbox_id),
            version=TASK_VERSION,
        )

    async def platform(self, request: v1.ControllerPlatformRequest, call: Call) -> v1.ControllerPlatformResponse:
        """The host's own. For iSulad it is the sign that we live."""
        namespace = namespace_of(call.metadata)
        if self._pods.asked_at(request.sandbox_id, namespace) is None:
            await self._pods.entry(request.sandbox_id, namespace)
        machine = os.uname().machine
        return v1.ControllerPlatformResponse(
            platform=Platform(os="linux", architecture=_ARCHITECTURES.get(machine, machine))
        )

    async def stop(self, request: v1.ControllerStopRequest, call: Call) -> v1.ControllerStopResponse:
        """End every process in it; repeating is harmless."""
        namespace = namespace_of(call.metadata)
        if self._pods.asked_at(request.sandbox_id, namespace) is None:
            entry = await self._pods.entry(request.sandbox_id, namespace)
            await entry.stop(float(min(request.timeout_secs, _MOST_GRACE)))
        return v1.ControllerStopResponse()

    async def wait(self, request: v1.ControllerWaitRequest, call: Call) -> v1.ControllerWaitResponse:
        """Wait until it has stopped."""
        namespace = namespace_of(call.metadata)
        if self._pods.asked_at(request.sandbox_id, namespace) is not None:
            raise FailedPreconditionError(f"pod {request.sandbox_id!r} has not been started")
        entry = await self._pods.entry(request.sandbox_id, namespace)
        status = await entry.sandboxer.status(entry.sandbox_id)
        ended = status.stopped_at
        if status.state != "stopped":
            ended = (await entry.sandboxer.wait(entry.sandbox_id)).exited_at
        return v1.ControllerWaitResponse(exit_status=0, exited_at=moment(ended or time.time()))

    async def status(self, request: v1.ControllerStatusRequest, call: Call) -> v1.ControllerStatusResponse:
        """What it is now."""
        namespace = namespace_of(call.metadata)
        asked_at = self._pods.asked_at(request.sandbox_id, namespace)
        if asked_at is not None:
            return v1.ControllerStatusResponse(
                sandbox_id=request.sandbox_id, state=NOT_READY, created_at=moment(asked_at)
            )
        entry = await self._pods.entry(request.sandbox_id, namespace)
        # Not `entry.status`, which asks what other processes have done: nobody else changes a server's pods.
        status = await entry.sandboxer.status(entry.sandbox_id)
        return v1.ControllerStatusResponse(
            sandbox_id=entry.sandbox_id,
            state=READY if status.state == "ready" else NOT_READY,
            created_at=moment(entry.record.created_at),
            exited_at=None if status.stopped_at is None else moment(status.stopped_at),
            address=self._pods.address(entry.sandbox_id),
            version=TASK_VERSION,
            info={"unisandbox": _info(entry.backend, status.namespaces)} if request.verbose else {},
        )

    async def shutdown(self, request: v1.ControllerShutdownRequest, call: Call) -> v1.ControllerShutdownResponse:
        """End it and forget it."""
        await self._pods.remove(request.sandbox_id, namespace_of(call.metadata))
        return v1.ControllerShutdownResponse()

    async def metrics(self, request: v1.ControllerMetricsRequest, call: Call) -> v1.ControllerMetricsResponse:
        """What all its containers use together."""
        entry = await self._pods.entry(request.sandbox_id, namespace_of(call.metadata))
        used = await entry.sandboxer.metrics(entry.sandbox_id)
        data = any_of(used, unified=self._pods.core.host.cgroups.version == "v2")
        return v1.ControllerMetricsResponse(
            metrics=Metric(timestamp=moment(time.time()), id=entry.sandbox_id, data=data)
        )

    async def update(self, request: v1.ControllerUpdateRequest, call: Call) -> v1.ControllerUpdateResponse:
        """Take in which containers iSulad is about to make, and their root file systems.

        The list is whole each time: what is not in it any more is forgotten. Nothing else can be changed.
        """
        entry = await self._pods.entry(request.sandbox_id, namespace_of(call.metadata))
        if unknown := sorted(set(request.fields) - {_FIELD}):
            raise UnsupportedError(f"changing {', '.join(unknown)} of a pod", "serve")
        if request.fields:
            tasks = request.sandbox.extensions.get(_TASKS) if request.sandbox is not None else None
            self._pods.announced[entry.sandbox_id] = _announced(b"{}" if tasks is None else tasks.value)
        return v1.ControllerUpdateResponse()


def _info(backend: str, namespaces: Mapping[str, int]) -> str:
    return json.dumps({"version": __version__, "backend": backend, "namespaces": dict(namespaces)})


def _announced(value: bytes) -> dict[str, tuple[RootMount, ...]]:
    """Source: iSulad, sandbox_tasks of isula_libutils: tasks with task_id and rootfs [{type, source, options}]."""
    try:
        tasks: list[dict[str, Any]] = json.loads(value).get("tasks") or []
        found: dict[str, tuple[RootMount, ...]] = {}
        for task in tasks:
            mounts = [
                RootMount(str(mount["type"]), str(mount.get("source", "")), tuple(map(str, mount.get("options") or [])))
                for mount in task.get("rootfs") or []
            ]
            found[str(task["task_id"])] = tuple(mounts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"the tasks of a pod cannot be read: {error!r}") from error
    return found
