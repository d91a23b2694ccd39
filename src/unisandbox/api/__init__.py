"""The contracts: frozen data, Protocols and errors that every room speaks.

May know: attrs, typing-extensions and the standard library.
Must not know: anything else of unisandbox. No input or output happens here.
Names and meanings are containerd's (Sandbox API, Task v2/v3) and OCI's.

All but the errors is imported when it is first used: processes that only run a guest need no more.
"""

from __future__ import annotations

from unisandbox.api.errors import (
    AlreadyExistsError,
    BackendError,
    DeadlineExceededError,
    FailedPreconditionError,
    GrpcStatus,
    InvalidArgumentError,
    NotFoundError,
    ProcessFailedError,
    SandboxError,
    UnavailableError,
    UnsupportedError,
    grpc_status,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.api.capabilities import Capabilities, Probe
    from unisandbox.api.events import Event, EventKind
    from unisandbox.api.exits import Completed, Exit, ExitReason
    from unisandbox.api.filesystem import Mount, Rootfs
    from unisandbox.api.names import check_id, check_name, short_name
    from unisandbox.api.network import Dns, Network
    from unisandbox.api.recovery import DamagedRecord, RecoveryAction, RecoveryReport, SandboxRecovered
    from unisandbox.api.resources import Resources
    from unisandbox.api.sandboxer import (
        CreateSandbox,
        FileBounds,
        RecoverSandbox,
        Sandboxer,
        StartedSandbox,
        SupportsContainerRoots,
        SupportsFileBounds,
        SupportsGrace,
        SupportsPrefetch,
    )
    from unisandbox.api.spec import DEFAULT_CAPABILITIES, ContainerSpec, ProcessSpec, SandboxSpec, Security, Terminal
    from unisandbox.api.status import ContainerStatus, FileInfo, Metrics, SandboxStatus
    from unisandbox.api.task import (
        CreateTask,
        ExecTask,
        RootMount,
        StartedTask,
        Stdio,
        SupportsCheckpoint,
        SupportsOomNotice,
        SupportsPause,
        SupportsUpdate,
        TaskService,
        TaskState,
    )

__all__ = [
    "DEFAULT_CAPABILITIES",
    "AlreadyExistsError",
    "BackendError",
    "Capabilities",
    "Completed",
    "ContainerSpec",
    "ContainerStatus",
    "CreateSandbox",
    "CreateTask",
    "DamagedRecord",
    "DeadlineExceededError",
    "Dns",
    "Event",
    "EventKind",
    "ExecTask",
    "Exit",
    "ExitReason",
    "FailedPreconditionError",
    "FileBounds",
    "FileInfo",
    "GrpcStatus",
    "InvalidArgumentError",
    "Metrics",
    "Mount",
    "Network",
    "NotFoundError",
    "Probe",
    "ProcessFailedError",
    "ProcessSpec",
    "RecoverSandbox",
    "RecoveryAction",
    "RecoveryReport",
    "Resources",
    "RootMount",
    "Rootfs",
    "SandboxError",
    "SandboxRecovered",
    "SandboxSpec",
    "SandboxStatus",
    "Sandboxer",
    "Security",
    "StartedSandbox",
    "StartedTask",
    "Stdio",
    "SupportsCheckpoint",
    "SupportsContainerRoots",
    "SupportsFileBounds",
    "SupportsGrace",
    "SupportsOomNotice",
    "SupportsPause",
    "SupportsPrefetch",
    "SupportsUpdate",
    "TaskService",
    "TaskState",
    "Terminal",
    "UnavailableError",
    "UnsupportedError",
    "check_id",
    "check_name",
    "grpc_status",
    "short_name",
]

_HOME = {
    name: module
    for module, names in {
        "capabilities": "Capabilities Probe",
        "events": "Event EventKind",
        "exits": "Completed Exit ExitReason",
        "filesystem": "Mount Rootfs",
        "names": "check_id check_name short_name",
        "network": "Dns Network",
        "recovery": "DamagedRecord RecoveryAction RecoveryReport SandboxRecovered",
        "resources": "Resources",
        "sandboxer": "CreateSandbox FileBounds RecoverSandbox Sandboxer StartedSandbox SupportsContainerRoots"
        " SupportsFileBounds SupportsGrace"
        " SupportsPrefetch",
        "spec": "DEFAULT_CAPABILITIES ContainerSpec ProcessSpec SandboxSpec Security Terminal",
        "status": "ContainerStatus FileInfo Metrics SandboxStatus",
        "task": "CreateTask ExecTask RootMount StartedTask Stdio SupportsCheckpoint SupportsOomNotice SupportsPause"
        " SupportsUpdate TaskService TaskState",
    }.items()
    for name in names.split()
}


if not TYPE_CHECKING:  # to them the module would have every name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
