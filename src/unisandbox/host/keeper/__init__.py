"""The keeper: the one small helper process of an engine, and the client that talks to it.

`server` and what it imports is the process: Python standard library only, light, no knowledge of sandboxes or OCI.
`client` is the caller's side: anyio, no thread and no background task; it stands on `link` (requests and answers),
`process`, `heard`, `programs`, `parting`, `spools`, `eventlog` and `turnstile`. `protocol` is what both know.
May know `host/`; must not know what the programs are that it starts, nor import anything above `host/`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.host.keeper.client import Keeper
    from unisandbox.host.keeper.records import (
        CloseReport,
        EndEvent,
        EndNotice,
        EventPage,
        ExitRecord,
        Guard,
        Hello,
        JobFailed,
        JobResult,
        KeeperElsewhereError,
        KeeperVersionError,
        KeeperWaitsError,
        LockTimeoutError,
        Reclaimed,
        RingData,
        Spawned,
        SpawnFailed,
    )

__all__ = [
    "CloseReport",
    "EndEvent",
    "EndNotice",
    "EventPage",
    "ExitRecord",
    "Guard",
    "Hello",
    "JobFailed",
    "JobResult",
    "Keeper",
    "KeeperElsewhereError",
    "KeeperVersionError",
    "KeeperWaitsError",
    "LockTimeoutError",
    "Reclaimed",
    "RingData",
    "SpawnFailed",
    "Spawned",
]


if not TYPE_CHECKING:  # to them the module would have every name

    def __getattr__(name: str) -> object:
        # Lazy, since the keeper's process comes through this package too and has neither attrs nor anyio.
        if name in __all__:
            from importlib import import_module

            module = "client" if name == "Keeper" else "records"
            found: object = getattr(import_module(f"{__name__}.{module}"), name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
