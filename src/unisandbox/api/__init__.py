"""The contracts: frozen data, Protocols and errors that every room speaks.

May know: attrs, typing-extensions and the standard library.
Must not know: anything else of unisandbox. No input or output happens here.
Names and meanings are containerd's (Sandbox API, Task v2/v3) and OCI's.
"""

from unisandbox.api.capabilities import Capabilities, Probe
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
from unisandbox.api.events import Event, EventKind
from unisandbox.api.exits import Completed, Exit, ExitReason
from unisandbox.api.names import check_id, check_name, short_name
from unisandbox.api.recovery import DamagedRecord, RecoveryAction, RecoveryReport, SandboxRecovered
from unisandbox.api.sandboxer import CreateSandbox, RecoverSandbox, Sandboxer, StartedSandbox
from unisandbox.api.spec import (
    DEFAULT_CAPABILITIES,
    ContainerSpec,
    Dns,
    Mount,
    Network,
    ProcessSpec,
    Resources,
    Rootfs,
    SandboxSpec,
    Security,
    Terminal,
)
from unisandbox.api.status import ContainerStatus, FileInfo, Metrics, SandboxStatus
from unisandbox.api.task import (
    CreateTask,
    ExecTask,
    StartedTask,
    Stdio,
    SupportsCheckpoint,
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
    "SupportsPause",
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
