"""unisandbox: run and manage sandboxes of every isolation class, in your own process.

The public names are imported when they are first used, so that `import unisandbox` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from unisandbox.api import (
        AlreadyExistsError,
        BackendError,
        Capabilities,
        Completed,
        ContainerStatus,
        DeadlineExceededError,
        Dns,
        Event,
        Exit,
        FailedPreconditionError,
        FileInfo,
        InvalidArgumentError,
        Metrics,
        Mount,
        Network,
        NotFoundError,
        Probe,
        ProcessFailedError,
        Resources,
        Rootfs,
        SandboxError,
        SandboxStatus,
        Security,
        Terminal,
        UnavailableError,
        UnsupportedError,
    )
    from unisandbox.engine.choice import Choice
    from unisandbox.sandbox import Container, Engine, Files, Opening, Output, Process, Sandbox

__version__ = "0.1.0"

_HOME = {
    "Choice": "unisandbox.engine.choice",
    **dict.fromkeys(("Container", "Engine", "Files", "Opening", "Output", "Process", "Sandbox"), "unisandbox.sandbox"),
}

__all__ = [
    "AlreadyExistsError",
    "BackendError",
    "Capabilities",
    "Choice",
    "Completed",
    "Container",
    "ContainerStatus",
    "DeadlineExceededError",
    "Dns",
    "Engine",
    "Event",
    "Exit",
    "FailedPreconditionError",
    "FileInfo",
    "Files",
    "InvalidArgumentError",
    "Metrics",
    "Mount",
    "Network",
    "NotFoundError",
    "Opening",
    "Output",
    "Probe",
    "Process",
    "ProcessFailedError",
    "Resources",
    "Rootfs",
    "Sandbox",
    "SandboxError",
    "SandboxStatus",
    "Security",
    "Terminal",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]


if not TYPE_CHECKING:  # to them the module would have every name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'unisandbox' has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(_HOME.get(name, "unisandbox.api")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
