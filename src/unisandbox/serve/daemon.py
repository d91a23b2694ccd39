"""The server's process: one engine, the controller's socket, a task socket for each pod, and an end in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import anyio
import anyio.abc

from unisandbox.api import FailedPreconditionError, InvalidArgumentError
from unisandbox.backends.runc import RuncBackend
from unisandbox.engine.closing import close
from unisandbox.engine.core import EngineCore
from unisandbox.engine.opening import open_engine
from unisandbox.engine.runtime_directory import runtime_directory
from unisandbox.host.readiness import readable
from unisandbox.serve import systemd
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.controller import Controller
from unisandbox.serve.pods import Pods
from unisandbox.serve.publishing import Publisher
from unisandbox.serve.streaming import Streaming
from unisandbox.serve.tasks import OfPod, Tasks
from unisandbox.serve.telling import Telling
from unisandbox.wire.accepting import accept
from unisandbox.wire.grpc import GrpcServer
from unisandbox.wire.services import Services
from unisandbox.wire.ttrpc import Request, serve_alone

_logger: Final = logging.getLogger("unisandbox.serve")

_BACKLOG: Final = 512
_DRAIN_SECONDS: Final = 20.0
_ADOPT_SECONDS: Final = 5.0
"""How long one pod may hold up the first answer to the others."""

_MOST_DESCRIPTORS: Final = 1 << 20
_LONGEST_PATH: Final = 107
_CREDENTIALS: Final = struct.Struct("=3i")  # pid, uid, gid; source: unix(7), SO_PEERCRED


class _Counted(Services):
    """Knows how many calls are at work that somebody would miss; those that only wait are none."""

    def __init__(self) -> None:
        super().__init__()
        self._busy = 0
        self._idle = anyio.Event()
        self._idle.set()

    async def answer(self, request: Request) -> bytes:
        """Handle a call."""
        if request.method == "Wait":
            return await super().answer(request)
        self._busy += 1
        if self._idle.is_set():
            self._idle = anyio.Event()
        try:
            return await super().answer(request)
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until nobody is at work."""
        await self._idle.wait()


class Server:
    """Serves the pods of one engine.

    Args:
        core: the engine.
        config: where, and which backends.
        group: lives as long as the server.
    """

    def __init__(self, core: EngineCore, config: ServeConfig, group: anyio.abc.TaskGroup) -> None:
        self._group = group
        self._scopes: set[anyio.CancelScope] = set()
        self._adopted = anyio.Event()
        self._controller = _Counted()
        self._tasks = _Counted()
        self._pods = Pods(core, config, os.path.dirname(config.socket), self._listen)
        Controller(self._pods).add_to(self._controller)
        self._publisher = Publisher(config.events)
        self._telling = Telling(self._publisher, group)
        streaming = Streaming(self._pods, group)
        streaming.add_to(self._tasks)
        Tasks(self._pods, self._telling, streaming, group).add_to(self._tasks)
        self._grpc = GrpcServer(self._controller)

    @property
    def pods(self) -> Pods:
        """The pods that it serves."""
        return self._pods

    async def begin(self, listener: socket.socket) -> None:
        """Take over the pods of a former server, then calls.

        Who calls meanwhile waits: he would see a pod of which only a part is known. A pod that cannot be taken over
        whole costs the others nothing.

        Args:
            listener: of the controller's socket; closed at the end.
        """
        pods = self._pods.adopt()
        _logger.info("serving %d pods at %s", len(pods), listener.getsockname())
        self._group.start_soon(self._publisher.run)
        self._group.start_soon(self._accept, listener, "", self._take_grpc, anyio.CancelScope())
        for entry in pods:
            try:
                with anyio.fail_after(_ADOPT_SECONDS):
                    await self._telling.adopt(self._pods.place(entry))
            except Exception as error:
                _logger.error("what happens in pod %s from before is not told: %r", entry.sandbox_id, error)
        self._adopted.set()

    async def drain(self) -> None:
        """Take no new connections, and wait until no call is at work; give up after a while."""
        for scope in tuple(self._scopes):
            scope.cancel()
        with anyio.move_on_after(_DRAIN_SECONDS):
            await self._controller.idle()
            await self._tasks.idle()

    async def end(self) -> None:
        """Close every connection of the controller."""
        await self._grpc.end()

    # --- sockets ---

    def _listen(self, sandbox_id: str, path: str) -> Callable[[], None]:
        listener = listen(path)
        scope = anyio.CancelScope()
        handlers = OfPod(self._tasks, sandbox_id)

        def take(sock: socket.socket) -> None:
            self._group.start_soon(serve_alone, sock, handlers)

        self._group.start_soon(self._accept, listener, path, take, scope)

        def stop() -> None:
            scope.cancel()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

        return stop

    async def _accept(
        self, listener: socket.socket, path: str, take: Callable[[socket.socket], None], scope: anyio.CancelScope
    ) -> None:
        self._scopes.add(scope)

        def checked(sock: socket.socket) -> None:
            if is_trusted(sock):
                take(sock)
            else:
                _logger.warning("a connection to %s was refused: its user is another one", path or "the controller")
                sock.close()

        try:
            with listener, scope:
                await self._adopted.wait()
                await accept(listener, checked)
        finally:
            self._scopes.discard(scope)

    def _take_grpc(self, sock: socket.socket) -> None:
        self._group.start_soon(self._connect_grpc, sock)

    async def _connect_grpc(self, sock: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._grpc.connection, sock)
        except Exception as error:
            sock.close()
            _logger.warning("a connection of the controller cannot be served: %r", error)


def is_trusted(sock: socket.socket) -> bool:
    """Whether the peer is root or this process's own user."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(data)[1] in {0, os.geteuid()}


def listen(path: str) -> socket.socket:
    """Listen on a path in a directory of ours; what a dead server has left there is replaced.

    Raises:
        InvalidArgumentError: the path is too long, or something else is there.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InvalidArgumentError(f"a socket's path has at most {_LONGEST_PATH} bytes, got {path!r}")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InvalidArgumentError(f"{path} exists and is no socket")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Nobody can connect before the listen, and the directory lets nobody else in.
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def prepare_directory(path: str) -> None:
    """Make the directory of the sockets, for nobody but us.

    Raises:
        InvalidArgumentError: it is the directory of all engines, into which roots of user namespaces must come.
        FailedPreconditionError: it exists, and others may enter it or own it.
    """
    if os.path.realpath(path) == os.path.realpath(runtime_directory()):
        raise InvalidArgumentError(
            f"{path} is shared by all engines: the socket needs a directory of its own", hint=f"Use {path}/serve."
        )
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise FailedPreconditionError(
            f"{path} must be a directory of ours that nobody else may enter",
            hint=f"chmod 700 {path}, or give --socket in another directory.",
        )


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the directory of the sockets for the block, whose files a server takes for its own.

    Raises:
        FailedPreconditionError: another server holds it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The directory itself is locked: a file in it could not be removed at the end without a race.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(fd), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:  # or it was, and has removed the directory meanwhile
            raise FailedPreconditionError(
                f"{path} is used by another server", hint="Give --socket in another directory, or end that server."
            )
        yield
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def serving(config: ServeConfig, *, given: socket.socket | None = None) -> AsyncIterator[Server]:
    """Serve for the block; the pods live on after it.

    Args:
        config: how.
        given: a listening socket instead of one at `config.socket`; closed at the end.

    Raises:
        FailedPreconditionError: another server has this root or the directory of the sockets, or that is not safe.
        SandboxError: this host cannot carry an engine.
    """
    directory = os.path.dirname(config.socket)
    prepare_directory(directory)
    backends = {"runc": RuncBackend(config.runtime)} if config.runtime else None
    core = await open_engine(config.root, policy="keep", on_recover="adopt", backends=backends)
    try:
        # After the engine: a server that has just ended on this root is gone now, and maybe its directory.
        prepare_directory(directory)
        with locked(directory):
            listener = listen(config.socket) if given is None else given
            async with anyio.create_task_group() as group:
                server = Server(core, config, group)
                await server.begin(listener)
                group.start_soon(_watch, core)
                try:
                    yield server
                    await server.drain()
                finally:
                    with anyio.CancelScope(shield=True):
                        await server.end()
                    group.cancel_scope.cancel()
                    if given is None:
                        with contextlib.suppress(OSError):  # task sockets of pods that live on are in the directory
                            os.unlink(config.socket)
                            os.rmdir(directory)
    finally:
        with anyio.CancelScope(shield=True):
            await close(core)


async def _watch(core: EngineCore) -> None:
    """End everything when the keeper ends: the next server begins with what is left, this one could only say so.

    Raises:
        UnavailableError: it has ended.
    """
    keeper = core.host.keeper
    try:
        pidfd = os.pidfd_open(keeper.pid)
    except ProcessLookupError:
        core.check_keeper()
        return
    try:
        await readable(pidfd)
    finally:
        os.close(pidfd)
    core.check_keeper()


async def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with serving(config, given=systemd.listener()):
            systemd.notify("READY=1")
            async for _ in signals:
                break
            systemd.notify("STOPPING=1")


def take_descriptors() -> None:
    """Use the file descriptors that we may have: each pod, connection and terminal needs some. Containers get as many.

    Not endlessly many: programs of theirs may go through all that they could have open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(config: ServeConfig) -> None:
    """The whole process."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    take_descriptors()
    anyio.run(run, config, backend="asyncio")
