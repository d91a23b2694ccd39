"""A container engine as the server sees it: the Controller by gRPC, tasks by ttrpc, FIFOs, bundles in its own place."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import anyio
import attrs
from betterproto2 import Message
from grpclib.client import Channel
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError

from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Mount
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import ControllerV1, TaskV3
from unisandbox.api.rpc import Method
from unisandbox.api.task import SANDBOX_NAMESPACES
from unisandbox.serve import cri
from unisandbox.wire import codec, grpc, remote
from unisandbox.wire.status import Status, error_of
from unisandbox.wire.ttrpc import Client

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

POD: Final = "ab" * 32
CONTAINER: Final = "cd" * 32
DEADLINE: Final = 30.0


class HasPaths(Protocol):
    """How a process's streams are called; empty for one that it does not have."""

    def path(self, name: str) -> str: ...


@attrs.define
class Engine:
    """One engine.

    Attributes:
        place: a directory of its own.
        channel: to the controller.
        namespace: what it says; iSulad says none.
        version: of the task service that it speaks.
    """

    place: Path
    channel: Channel
    namespace: str = "k8s.io"
    version: int = 3
    task: Client | None = None

    async def call(self, method: Method[Q, R], request: Q) -> R:
        """Call the controller. Raises the error that the status means."""
        metadata = [("containerd-namespace", self.namespace)] if self.namespace else []
        try:
            async with self.channel.request(
                f"/{method}", Cardinality.UNARY_UNARY, bytes, bytes, metadata=metadata
            ) as stream:
                await stream.send_message(codec.encode(request), end=True)
                reply = await stream.recv_message()
                assert reply is not None
                return codec.decode(method.reply, reply)
        except GRPCError as error:
            raise error_of(Status(error.status.value, error.message or "")) from None

    async def tasks(self, method: Method[Q, R], request: Q) -> R:
        """Call the pod's task service, by a version of its own."""
        assert self.task is not None
        method = method.under(f"containerd.task.v{self.version}.Task")
        return await remote.call(self.task, method, request, namespace=self.namespace)

    async def run_pod(self, sandbox_id: str = POD, **changes: Any) -> v1.ControllerStartResponse:
        """What engines do for a pod, up to the connection to its task service."""
        await self.call(ControllerV1.CREATE, self.pod(sandbox_id, **changes))
        started = await self.call(ControllerV1.START, v1.ControllerStartRequest(sandbox_id=sandbox_id))
        await self.connect(started.address)
        return started

    async def status(self) -> v1.ControllerStatusResponse:
        return await self.call(ControllerV1.STATUS, v1.ControllerStatusRequest(sandbox_id=POD, verbose=True))

    async def connect(self, address: str) -> None:
        if self.task is not None:
            self.task.close()
        self.task = await Client.connect(address.removeprefix("ttrpc+unix://"))

    def pod(self, sandbox_id: str = POD, *, netns: str = "", **config: Any) -> v1.ControllerCreateRequest:
        """A request as containerd makes it, or iSulad, which leaves the type of the options empty."""
        options = cri.PodSandboxConfig(hostname="pod-one", **config)
        kind = cri.TYPE_URL if self.namespace else ""
        return v1.ControllerCreateRequest(
            sandbox_id=sandbox_id,
            netns_path=netns,
            options=AnyMessage(type_url=kind, value=codec.encode(options)),
            sandboxer="uni",
        )

    def fifos(self, name: str, *, stdin: bool = False) -> Fifos:
        """FIFOs, whose ends the engine opens before it says their names."""
        return Fifos.make(self.place / f"io-{name}", stdin=stdin)

    def bundle(
        self,
        *args: str,
        kinds: tuple[str, ...] = ("ipc", "uts"),
        mount_rootfs: bool = True,
        resources: Mapping[str, Any] | None = None,
    ) -> Path:
        """A bundle as containerd writes it for a pod whose process id is 0; its files are this machine's programs."""
        bundle = self.place / "bundle"
        for name in ("proc", "dev", "usr", "tmp", "etc"):
            (bundle / "rootfs" / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64"):
            (bundle / "rootfs" / name).symlink_to(f"usr/{name}")
        config = {
            "ociVersion": "1.3.0",
            "process": process(*args),
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
                {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "rprivate", "ro"]},
            ],
            "linux": {
                "cgroupsPath": f"/k8s.io/{CONTAINER}",
                "resources": dict(resources or {}),
                "namespaces": [
                    {"type": "mount"},
                    *({"type": kind, "path": SANDBOX_NAMESPACES + kind} for kind in kinds),
                    *([] if "pid" in kinds else [{"type": "pid"}]),
                ],
            },
        }
        (bundle / "config.json").write_text(json.dumps(config))
        if mount_rootfs:
            for name in ("upper", "work"):
                (self.place / name).mkdir()
        return bundle

    def layers(self, bundle: Path) -> list[Mount]:
        """What a snapshotter says."""
        options = [f"workdir={self.place}/work", f"upperdir={self.place}/upper", f"lowerdir={bundle}/rootfs"]
        return [Mount(type="overlay", source="overlay", options=["index=off", *options])]

    async def create(self, bundle: Path, fifos: HasPaths, *, terminal: bool = False) -> v3.CreateTaskResponse:
        """Task.Create as containerd calls it."""
        return await self.tasks(
            TaskV3.CREATE,
            v3.CreateTaskRequest(
                id=CONTAINER,
                bundle=str(bundle),
                rootfs=self.layers(bundle),
                terminal=terminal,
                stdin=fifos.path("stdin"),
                stdout=fifos.path("stdout"),
                stderr="" if terminal else fifos.path("stderr"),
            ),
        )

    async def run(self, *args: str, stdin: bool = False, **options: Any) -> Fifos:
        """A container, up to its start."""
        fifos = self.fifos("main", stdin=stdin)
        await self.create(self.bundle(*args, **options), fifos)
        await self.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER))
        return fifos

    async def exec(self, exec_id: str, fifos: HasPaths, *args: str, terminal: bool = False) -> v3.StartResponse:
        """A process more, started."""
        await self.add(exec_id, fifos, *args, terminal=terminal)
        return await self.tasks(TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id=exec_id))

    async def add(self, exec_id: str, fifos: HasPaths, *args: str, terminal: bool = False) -> None:
        """A process more, not started."""
        spec = AnyMessage(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Process",
            value=json.dumps({**process(*args), "terminal": terminal}).encode(),
        )
        await self.tasks(
            TaskV3.EXEC,
            v3.ExecProcessRequest(
                id=CONTAINER,
                exec_id=exec_id,
                terminal=terminal,
                stdin=fifos.path("stdin"),
                stdout=fifos.path("stdout"),
                stderr="" if terminal else fifos.path("stderr"),
                spec=spec,
            ),
        )

    async def wait(self, exec_id: str = "") -> int:
        """Its exit status."""
        return (await self.tasks(TaskV3.WAIT, v3.WaitRequest(id=CONTAINER, exec_id=exec_id))).exit_status


@attrs.frozen
class Fifos:
    """The engine's ends of a process's FIFOs."""

    directory: Path
    ends: Mapping[str, int]

    @classmethod
    def make(cls, directory: Path, *, stdin: bool) -> Fifos:
        directory.mkdir()
        ends: dict[str, int] = {}
        for name in ("stdout", "stderr", *(["stdin"] if stdin else [])):
            os.mkfifo(directory / name)
            # A reader can be opened without a writer, but not the other way round.
            flags = os.O_RDWR if name == "stdin" else os.O_RDONLY
            ends[name] = os.open(directory / name, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(directory, ends)

    def path(self, name: str) -> str:
        return str(self.directory / name) if name in self.ends else ""

    async def read(self, name: str = "stdout", until: bytes = b"") -> bytes:
        """What comes, up to the end or to `until`."""
        got = b""
        with anyio.fail_after(DEADLINE):
            while not until or until not in got:
                await anyio.wait_readable(self.ends[name])
                try:
                    piece = os.read(self.ends[name], 65536)
                except BlockingIOError:
                    continue
                if not piece:
                    break
                got += piece
        return got

    def close(self) -> None:
        for fd in self.ends.values():
            os.close(fd)


def shared(*, pid: int = cri.CONTAINER, **changes: Any) -> cri.LinuxPodSandboxConfig:
    """A pod on the host's network."""
    modes = cri.NamespaceOption(network=cri.NODE, pid=pid)
    return cri.LinuxPodSandboxConfig(security_context=cri.SecurityContext(namespace_options=modes), **changes)


def process(*args: str) -> dict[str, Any]:
    """An OCI process object."""
    return {
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/usr/bin:/bin"],
        "cwd": "/",
        "capabilities": {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    }


@asynccontextmanager
async def engine_at(socket: str, place: Path, *, namespace: str = "k8s.io", version: int = 3) -> AsyncIterator[Engine]:
    """An engine that uses the server whose controller is at `socket`."""
    channel = Channel(path=socket, codec=grpc.Bytes())
    engine = Engine(place, channel, namespace, version)
    try:
        yield engine
    finally:
        if engine.task is not None:
            engine.task.close()
        channel.close()
