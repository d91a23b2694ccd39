"""The clerk's process: `Files` of sandboxes, in the keeper's user namespace; see `engine.clerk`, which asks it.

Each request brings a socket for its answer. When that ends, whoever asked does not want it any more.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from typing import Any, cast

import anyio
import attrs

from unisandbox.api import FileInfo, SandboxError, SandboxSpec, Security
from unisandbox.engine.entry import Entry
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.protocol import Packet
from unisandbox.host.memory import in_memory
from unisandbox.host.power import ids
from unisandbox.sandbox.files import Files
from unisandbox.sandbox.reaching import METHODS


class _Standing:
    """What `Files` needs of a sandbox's entry, where only its root is known. It is its own sharing and sandboxer."""

    clerk: None = None
    bounds: None = None

    def __init__(self, root: int, capabilities: list[str], label: str) -> None:
        self._root = root
        self.spec: SandboxSpec = SandboxSpec(security=Security(capabilities=frozenset(capabilities)))
        self.sandbox_id: str = label
        self.label: str = label

    @property
    def sharing(self) -> _Standing:
        return self

    @property
    def sandboxer(self) -> _Standing:
        return self

    async def reach(self) -> None:
        """Whoever asked has."""

    def root_fd(self, _: str) -> int:
        return os.dup(self._root)

    def host_ids(self, _: str) -> tuple[int, int]:
        """Ids here are those inside, but for the ones that no sandbox has."""
        return 0, _ids_below()

    def check_there(self) -> None:
        """Whoever asked does, when it fails."""


@functools.cache
def _ids_below() -> int:
    return ids.ids_below()


def main() -> None:
    """Work until whoever has the other end of the socket, descriptor 0, is gone."""
    with socket.socket(fileno=0) as control:
        control.setblocking(False)
        anyio.run(_serve, control)


async def _serve(control: socket.socket) -> None:
    buffer = protocol.new_buffer()
    async with anyio.create_task_group() as group:
        while True:
            await anyio.wait_readable(control)
            try:
                packet = protocol.receive(control, buffer)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                packet = None
            if packet is None:
                group.cancel_scope.cancel()
                return
            group.start_soon(_handle, packet)


async def _handle(packet: Packet) -> None:
    try:
        with socket.socket(fileno=packet.claim(0)) as reply:
            reply.setblocking(False)
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, reply, group.cancel_scope)
                kind, content = await _done(packet)
                try:
                    memory = in_memory(content, "answer")
                except OSError as error:  # a limit of the host, and no reason to end for all others
                    kind, content = _failed(f"the answer finds no room: {error.strerror}")
                    memory = in_memory(content, "answer")
                try:
                    protocol.send(reply, protocol.encode({"kind": kind}, [memory]), [memory])
                except OSError:
                    pass  # nobody wants it any more
                finally:
                    os.close(memory)
                group.cancel_scope.cancel()
    finally:
        packet.close()


async def _watch(reply: socket.socket, scope: anyio.CancelScope) -> None:
    await anyio.wait_readable(reply)
    scope.cancel()


async def _done(packet: Packet) -> tuple[str, bytes]:
    message = cast("dict[str, Any]", packet.message)
    arguments = message["arguments"]
    if len(packet.fds) > 2:
        with os.fdopen(packet.claim(2), "rb") as file:
            arguments["data"] = file.read()
    os.umask(message["umask"])
    if message["do"] not in METHODS:
        raise ValueError(f"no method {message['do']!r}")
    files = Files(cast("Entry", _Standing(packet.fds[1], message["capabilities"], message["label"])))
    try:
        value = await getattr(files, message["do"])(**arguments)
    except SandboxError as error:
        told = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        return "error", json.dumps(told).encode()
    except Exception as error:
        return _failed(f"{message['do']} failed: {error!r}")
    if isinstance(value, bytes):
        return "bytes", value
    return "json", json.dumps(value, default=_plain).encode()


def _failed(why: str) -> tuple[str, bytes]:
    return "error", json.dumps({"error": "BackendError", "message": why, "hint": ""}).encode()


def _plain(value: object) -> object:
    assert isinstance(value, FileInfo)  # noqa: S101 (nothing else comes from `Files`)
    return attrs.asdict(value)
