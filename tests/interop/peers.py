"""How the program at the other end is driven, whatever it is written in: `peer call PATH` and `peer serve PATH`."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

from unisandbox.wire.ttrpc import Handlers, serve


async def calls_of(peer: Path, path: Path, handlers: Handlers) -> bytes:
    """What a peer says of its calls to these handlers, which are served at `path`."""
    with socket.socket(socket.AF_UNIX) as listener, anyio.fail_after(60):
        listener.bind(str(path))
        listener.listen()
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, handlers)
            done = await anyio.run_process([str(peer), "call", str(path)], check=False)
            group.cancel_scope.cancel()
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(peer: Path, path: Path) -> Iterator[None]:
    """A peer serves at `path`, and ends when its standard input does."""
    with subprocess.Popen([peer, "serve", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
