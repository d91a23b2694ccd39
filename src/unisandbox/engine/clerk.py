"""Work with files for a user who is not root: done by a process in the keeper's user namespace, the clerk.

What a sandbox's users have made belongs to subordinate ids, over which this process has no power, and it cannot enter
the namespace in which it would have. So the keeper starts a Python there that does it: at the first need, one for each
engine, until the engine is closed here. What it does is in `sandbox.clerking`; here is what asks it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Collection, Mapping
from typing import Final, cast

import anyio

from unisandbox import api
from unisandbox.api import BackendError, SandboxError, UnavailableError
from unisandbox.host import bytecode
from unisandbox.host.keeper import Keeper, protocol
from unisandbox.host.memory import in_memory
from unisandbox.host.readiness import readable, writable

_PROGRAM: Final = """\
import sys
sys.path[:] = sys.argv[1:]
from unisandbox.sandbox.clerking import main
main()
"""


class Clerk:
    """The clerk of one engine, as this process asks it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._control: socket.socket | None = None
        self._starting = anyio.Lock()
        self._buffer = protocol.new_buffer()

    async def call(
        self,
        method: str,
        root: int,
        arguments: Mapping[str, object],
        *,
        capabilities: Collection[str],
        label: str,
        content: bytes | memoryview | None = None,
    ) -> object:
        """Let it do one thing with the files below `root`; cancelled, it stops.

        Args:
            method: of `sandbox.files.Files`.
            root: of the sandbox.
            arguments: as JSON has them.
            capabilities: of the sandbox's root; the clerk has its ids anyhow.
            label: of the sandbox.
            content: bytes that are too many for a message: the argument `data`.

        Returns:
            What the method returns, as JSON has it; bytes as they are.

        Raises:
            SandboxError: as the method.
            BackendError: there is no room for the content on its way.
            UnavailableError: the clerk, or the keeper, has ended.
        """
        control = await self._started()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = -1
        try:
            ours.setblocking(False)
            fds = [theirs.fileno(), root]
            if content is not None:
                try:
                    memory = in_memory(content, "content")
                except OSError as error:
                    raise BackendError(f"sandbox {label!r}: the content finds no room: {error.strerror}") from error
                fds.append(memory)
            request = {
                "do": method,
                "arguments": dict(arguments),
                "capabilities": sorted(capabilities),
                "label": label,
                "umask": _umask(),
            }
            await self._send(control, protocol.encode(request, fds), fds)
            theirs.close()
            return await self._answer(ours, control)
        finally:
            if memory >= 0:
                os.close(memory)
            ours.close()
            theirs.close()

    async def _send(self, control: socket.socket, data: bytes, fds: list[int]) -> None:
        while True:
            try:
                protocol.send(control, data, fds)
            except BlockingIOError:
                await writable(control.fileno())
            except (BrokenPipeError, ConnectionResetError):
                raise self._gone(control) from None
            else:
                return

    async def _answer(self, ours: socket.socket, control: socket.socket) -> object:
        while True:
            await readable(ours.fileno())
            try:
                packet = protocol.receive(ours, self._buffer)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                packet = None
            if packet is None:
                raise self._gone(control)
            with os.fdopen(packet.claim(), "rb") as file:
                content = file.read()
            return _value(packet.message, content)

    def _gone(self, control: socket.socket) -> UnavailableError:
        """Let go of it, so that who asks next has a new one, and say so."""
        if self._control is control:
            self.close()
        return UnavailableError(
            "the process that works with the files of this engine's sandboxes has ended",
            hint="Was it killed, for want of memory perhaps? What was asked may be done or not; ask again.",
        )

    async def _started(self) -> socket.socket:
        async with self._starting:
            if self._control is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    try:
                        ours.setblocking(False)
                        await self._start(theirs)
                    except BaseException:
                        ours.close()
                        raise
                self._control = ours
            return self._control

    async def _start(self, control: socket.socket) -> None:
        python = str(getattr(sys, "_base_executable", "") or sys.executable)
        argv = [python, "-I", "-S", *bytecode.options(), "-c", _PROGRAM, *(path for path in sys.path if path)]
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        try:
            started = await self._keeper.spawn(f"clerk/{os.urandom(8).hex()}", argv, env=env, fds=[control.fileno()])
        except OSError as error:
            raise BackendError(f"the process for the files of sandboxes cannot be started: {error}") from error
        os.close(started.pidfd)

    def close(self) -> None:
        """Let go of it; with this end of its socket it ends. Repeating is harmless."""
        if self._control is not None:
            self._control.close()
            self._control = None


def _value(message: Mapping[str, object], content: bytes) -> object:
    kind = cast("str", message["kind"])
    if kind == "bytes":
        return content
    value = json.loads(content)
    if kind != "error":
        return value
    error = getattr(api, value["error"], BackendError)
    if not issubclass(error, SandboxError):
        error = BackendError
    raise error(value["message"], hint=value["hint"])


def _umask() -> int:
    """This process's, which cannot be asked for without being changed. Source: proc_pid_status(5)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), 0o022)
