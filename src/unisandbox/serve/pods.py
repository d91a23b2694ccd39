"""Pods as sandboxes of the engine: what they were asked to be, and where their task service listens."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import anyio

from unisandbox.api import (
    AlreadyExistsError,
    Dns,
    FailedPreconditionError,
    InvalidArgumentError,
    Network,
    NotFoundError,
    Resources,
    Rootfs,
    RootMount,
    SandboxError,
    SandboxSpec,
    Security,
    TaskService,
    UnsupportedError,
    check_id,
    short_name,
)
from unisandbox.api.proto.containerd.services.sandbox.v1 import ControllerCreateRequest
from unisandbox.engine.core import EngineCore
from unisandbox.engine.entry import Entry
from unisandbox.serve import cri
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.stdio import HeldStreams
from unisandbox.wire import codec

_logger: Final = logging.getLogger("unisandbox.serve")

LABEL: Final = "io.unisandbox.pod"
"""The label of a pod's sandbox that holds its facts."""

POD_KEY: Final = "unisandbox-pod"
"""The metadata of a task service's call that names its pod: set here for every request, whatever the caller says."""

_METADATA: Final = "metadata"
_MOST_WAITING: Final = 4096
_TASK_SOCKET: Final = re.compile(r"[a-z2-7]{10}\.sock")  # see `short_name`
_RESOLV_CONF: Final = "/etc/resolv.conf"
_LARGEST: Final = 1 << 20


class PodFacts(NamedTuple):
    """What the server knows of a pod beyond its sandbox's spec.

    Attributes:
        namespace: containerd's, of whoever made it.
        pid, ipc, network, user: whose namespaces; see `cri`.
        sysctls: for each of its containers.
    """

    namespace: str
    pid: int = cri.POD
    ipc: int = cri.POD
    network: int = cri.POD
    sysctls: Mapping[str, str] = {}
    user: int = cri.NODE


class _Asked(NamedTuple):
    """A pod that was created and not started: so far nothing of it is on the host."""

    namespace: str
    spec: SandboxSpec
    created_at: float


class Place(NamedTuple):
    """A pod that is at work: its sandbox, its containers and their streams."""

    entry: Entry
    task: TaskService
    streams: HeldStreams


class Pods:
    """The pods of one engine.

    Args:
        core: the engine.
        config: which backend a pod gets.
        directory: of the task sockets.
        listen: makes the task service of a pod listen on a path, and answers how to end that.
    """

    def __init__(
        self, core: EngineCore, config: ServeConfig, directory: str, listen: Callable[[str, str], Callable[[], None]]
    ) -> None:
        self.core: EngineCore = core
        self._config = config
        self._directory = directory
        self._listen = listen
        self._asked: dict[str, _Asked] = {}
        self._listening: dict[str, Callable[[], None]] = {}
        #: Root file systems that an engine (iSulad) has announced by Controller.Update, by pod and container.
        self.announced: dict[str, dict[str, tuple[RootMount, ...]]] = {}
        #: Called with the id of a pod that is gone.
        self.on_removed: list[Callable[[str], None]] = []

    def adopt(self) -> list[Entry]:
        """Listen for the pods of a former server, and remove the sockets of those that are gone; which there are.

        A pod for which that fails can still be ended and removed by the controller.
        """
        pods = [entry for entry in self.core.entries() if LABEL in entry.spec.labels]
        alive = {self.path(entry.sandbox_id) for entry in pods}
        for name in os.listdir(self._directory):
            path = f"{self._directory}/{name}"
            if _TASK_SOCKET.fullmatch(name) and path not in alive:
                with contextlib.suppress(OSError):  # it is not ours then, and no pod is called so
                    os.unlink(path)
        for entry in pods:
            try:
                self._serve(entry.sandbox_id)
            except (SandboxError, OSError) as error:
                _logger.error("the containers of pod %s cannot be reached: %s", entry.sandbox_id, error)
        return pods

    def place(self, entry: Entry) -> Place:
        """Where calls for a started pod go."""
        host = self.core.host
        return Place(entry, entry.task, HeldStreams(host.keeper, host.prefix(entry.sandbox_id)))

    def path(self, sandbox_id: str) -> str:
        """Of the pod's task socket."""
        return f"{self._directory}/{short_name(self.core.host.engine_id, sandbox_id)}.sock"

    def address(self, sandbox_id: str) -> str:
        """The same as containerd dials it."""
        return f"ttrpc+unix://{self.path(sandbox_id)}"

    def _serve(self, sandbox_id: str) -> None:
        if sandbox_id not in self._listening:
            self._listening[sandbox_id] = self._listen(sandbox_id, self.path(sandbox_id))

    # --- their life ---

    async def ask(self, request: ControllerCreateRequest, namespace: str) -> None:
        """Check what a pod shall be, and remember it until it is started."""
        sandbox_id = check_id(request.sandbox_id)
        if sandbox_id in self._asked or await self._known(sandbox_id) is not None:
            raise AlreadyExistsError(f"a pod {sandbox_id!r} exists already")
        if len(self._asked) >= _MOST_WAITING:
            raise FailedPreconditionError(f"{_MOST_WAITING} pods wait to be started already")
        spec = self._spec(request, namespace)
        self._asked[sandbox_id] = _Asked(namespace, spec, time.time())

    async def start(self, sandbox_id: str, namespace: str) -> Entry:
        """Make it; when that fails nothing is left, and it is forgotten."""
        asked = self._asked.get(check_id(sandbox_id))
        if asked is None or asked.namespace != namespace:
            entry = await self.entry(sandbox_id, namespace)
            raise FailedPreconditionError(f"pod {entry.sandbox_id!r} was started before")
        del self._asked[sandbox_id]
        entry = await self.core.create(asked.spec, sandbox_id=sandbox_id)
        try:
            self._serve(sandbox_id)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await entry.remove()
            raise
        return entry

    def asked_at(self, sandbox_id: str, namespace: str) -> float | None:
        """When a pod was created that is not started yet; None when it is no such pod."""
        asked = self._asked.get(sandbox_id)
        return asked.created_at if asked is not None and asked.namespace == namespace else None

    async def entry(self, sandbox_id: str, namespace: str | None) -> Entry:
        """The sandbox of a started pod.

        Args:
            sandbox_id: as the engine calls it.
            namespace: whose it must be; None: the caller has asked at the pod's own address.

        Raises:
            NotFoundError: there is none in this namespace.
        """
        entry = await self._known(check_id(sandbox_id))
        if entry is None or (namespace is not None and facts_of(entry).namespace != namespace):
            raise NotFoundError(f"no pod {sandbox_id!r}")
        return entry

    async def _known(self, sandbox_id: str) -> Entry | None:
        try:
            entry = await self.core.get(sandbox_id)
        except NotFoundError:
            return None
        return entry if entry.sandbox_id == sandbox_id and LABEL in entry.spec.labels else None

    async def remove(self, sandbox_id: str, namespace: str) -> None:
        """End it and free everything."""
        if self.asked_at(sandbox_id, namespace) is not None:
            del self._asked[sandbox_id]
            return
        entry = await self.entry(sandbox_id, namespace)
        await entry.remove()
        self.announced.pop(sandbox_id, None)
        for forget in self.on_removed:
            forget(sandbox_id)
        if close := self._listening.pop(sandbox_id, None):
            close()

    # --- what they shall be ---

    def _spec(self, request: ControllerCreateRequest, namespace: str) -> SandboxSpec:
        config = _config_of(request)
        linux = config.linux or cri.LinuxPodSandboxConfig()
        security = linux.security_context or cri.SecurityContext()
        modes = security.namespace_options or cri.NamespaceOption()
        _check(modes)
        if security.privileged and not self._config.privileged:
            raise UnsupportedError("a privileged pod", "serve", hint="Set privileged = true in its configuration.")
        user_ids = _user_ids_of(modes)
        if user_ids is not None and not request.netns_path:
            raise UnsupportedError("a user namespace of the pod with the host's network", "serve")
        network = Network.namespace(request.netns_path) if request.netns_path else Network.host()
        facts = PodFacts(
            namespace,
            modes.pid,
            modes.ipc,
            cri.POD if request.netns_path else cri.NODE,
            dict(linux.sysctls),
            cri.NODE if user_ids is None else cri.POD,
        )
        _check_sysctls(facts)
        isolation = self._config.backend(
            _handler_of(request), request.sandboxer, {**config.annotations, **request.annotations}
        )
        labels = {**config.labels, LABEL: json.dumps(facts._asdict())}
        if not self._runs_programs(isolation):
            _check_of_guests(security, facts)
            return SandboxSpec(
                isolation=isolation,
                rootfs=Rootfs.dir(self._empty_directory()),
                userns="host" if user_ids is None else "private",
                user_ids=user_ids,
                resources=Resources.unlimited(),
                cgroup_parent=cgroup_path(linux.cgroup_parent),
                labels=labels,
            )
        return SandboxSpec(
            isolation=isolation,
            network=network,
            userns="host" if user_ids is None else "private",
            user_ids=user_ids,
            hostname=config.hostname or os.uname().nodename,
            dns=_dns_of(config),
            resources=Resources.unlimited(),
            security=Security(devices="all" if security.privileged else "usual"),
            share_pid=modes.pid == cri.POD,
            cgroup_parent=cgroup_path(linux.cgroup_parent),
            labels=labels,
        )

    def _runs_programs(self, isolation: str) -> bool:
        """Whether a pod's containers are programs of this machine, and not guests that know of nothing but files.

        Raises:
            UnsupportedError: a backend that runs no bundles of engines.
        """
        if isolation == "auto":  # not known before it is chosen, among those that run programs
            return True
        capabilities = self.core.capabilities(isolation)
        if not capabilities.bundles:
            raise UnsupportedError(
                "bundles",
                isolation,
                reason="it has no containers from what a container engine writes for its pods",
                hint="Let this pod be of isolation 'runc', or of 'wasm+process' for WebAssembly modules.",
            )
        return capabilities.processes

    def _empty_directory(self) -> str:
        """What the sandbox of a pod has for its own files where only its containers have any."""
        path = f"{self.core.host.state_dir}/empty"
        os.makedirs(path, mode=0o755, exist_ok=True)
        return path


def cgroup_path(parent: str) -> str:
    """A cgroup's path, also of a slice that is named as systemd does: it lies below those that its name begins with.

    Source: systemd.slice(5): "a-b.slice" is in "a.slice".
    """
    name = parent.rpartition("/")[2]
    if not name.endswith(".slice") or parent.strip("/") != name:
        return parent.rstrip("/")
    words = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(words[: count + 1])}.slice" for count in range(len(words)))


def facts_of(entry: Entry) -> PodFacts:
    """What the server has noted of a pod."""
    return PodFacts(**json.loads(entry.spec.labels[LABEL]))


def _config_of(request: ControllerCreateRequest) -> cri.PodSandboxConfig:
    options = request.options
    if options is None or options.type_url.rpartition("/")[2] not in {"", cri.TYPE_URL}:
        kind = "nothing" if options is None else repr(options.type_url)
        raise InvalidArgumentError(f"a pod's options must be a {cri.TYPE_URL}, got {kind}")
    return codec.decode(cri.PodSandboxConfig, options.value)


def _check_of_guests(security: cri.SecurityContext, facts: PodFacts) -> None:
    """Refuse what a pod of guests cannot have. Namespaces that it shares mean nothing to them: they see none."""
    hint = "Leave it out, or let this pod be of isolation 'runc'."
    if security.privileged:
        raise UnsupportedError("a privileged pod of WebAssembly modules", "serve", hint=hint)
    if facts.sysctls:
        raise UnsupportedError("sysctls of a pod of WebAssembly modules", "serve", hint=hint)


def _check(modes: cri.NamespaceOption) -> None:
    """Refuse what means nothing."""
    if modes.pid not in {cri.POD, cri.CONTAINER, cri.NODE, cri.TARGET} or modes.ipc not in {cri.POD, cri.NODE}:
        raise InvalidArgumentError(f"namespace modes of the pod are not valid: pid {modes.pid}, ipc {modes.ipc}")


def _user_ids_of(modes: cri.NamespaceOption) -> tuple[int, int] | None:
    """The host's first id and how many, of a pod with a user namespace of its own; None: it has the host's."""
    wanted = modes.userns_options
    if wanted is None or wanted.mode == cri.NODE:
        return None
    if wanted.mode != cri.POD:
        raise InvalidArgumentError(f"the mode of a pod's user namespace is not valid: {wanted.mode}")
    if len(wanted.uids) != 1 or wanted.uids != wanted.gids or wanted.uids[0].container_id:
        raise InvalidArgumentError("a pod's user and group ids are mapped by one and the same row, which begins with 0")
    return wanted.uids[0].host_id, wanted.uids[0].length


def _check_sysctls(facts: PodFacts) -> None:
    for name in facts.sysctls:
        of_network = name.startswith("net.")
        if (of_network and facts.network == cri.NODE) or (not of_network and facts.ipc == cri.NODE):
            raise InvalidArgumentError(f"sysctl {name!r}: the namespace that it belongs to is the host's")
        if not of_network and not name.startswith(("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")):
            raise InvalidArgumentError(f"sysctl {name!r} does not belong to a namespace: it would change the host")


def _handler_of(request: ControllerCreateRequest) -> str:
    """The runtime handler: containerd tells it only within its own metadata, which are JSON."""
    metadata = request.sandbox.extensions.get(_METADATA) if request.sandbox is not None else None
    if metadata is None:
        return ""
    try:
        found: Any = json.loads(metadata.value)["Metadata"]["RuntimeHandler"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def _dns_of(config: cri.PodSandboxConfig) -> Dns | None:
    """The pod's own, or the host's."""
    dns = config.dns_config
    if dns is not None and (dns.servers or dns.searches or dns.options):
        return Dns(servers=tuple(dns.servers), search=tuple(dns.searches), options=tuple(dns.options))
    try:
        with open(_RESOLV_CONF, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file.read(_LARGEST).splitlines()]
    except OSError:
        return None
    servers = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    search = [words[1:] for words in lines if words and words[0] in {"search", "domain"}]
    options = [word for words in lines if words and words[0] == "options" for word in words[1:]]
    return Dns(servers=tuple(servers), search=tuple(search[-1] if search else ()), options=tuple(options))
