"""What a hostile init answers is read as a stranger's words: each lie is a typed error, and leaks nothing."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Callable

import anyio
import pytest
from tests.init_container import Container, make_request

from unisandbox.api.errors import BackendError, DeadlineExceededError
from unisandbox.host.init import Started, ended, protocol, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.root]


class _Request:
    """What a fake init has got: it owns the fds of one request."""

    def __init__(self, control: socket.socket) -> None:
        _, ancillary, _, _ = control.recvmsg(200, socket.CMSG_SPACE(4 * 16), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        self.life = socket.socket(fileno=fds[0])
        self.go = socket.socket(fileno=fds[1])
        self.others = fds[2:]

    def close(self) -> None:
        self.life.close()
        self.go.close()
        for fd in self.others:
            os.close(fd)


def _say(sock: socket.socket, kind: int, a: int = 0, b: int = 0, fds: tuple[int, ...] = (), extra: bytes = b"") -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([struct.pack("=Iii", kind, a, b) + extra], rights)


_Lie = Callable[[_Request, Container], object]


def _with(kinds: tuple[str, ...], **words: int) -> _Lie:
    """STARTED (or what `kind` says) with fds of these kinds on `life`."""

    def lie(request: _Request, container: Container) -> None:
        with contextlib.ExitStack() as stack:
            fds = []
            for kind in kinds:
                match kind:
                    case "null":
                        fd = os.open("/dev/null", os.O_RDWR)
                    case "own":
                        fd = os.pidfd_open(os.getpid())
                    case "directory":
                        fd = os.open(f"/proc/{container.pid}", os.O_RDONLY)
                    case _:
                        fd = os.pidfd_open(container.pid)
                stack.callback(os.close, fd)
                fds.append(fd)
            _say(request.life, words.get("kind", protocol.STARTED), words.get("a", 1), words.get("b", 0), tuple(fds))

    return lie


def _then(first: _Lie, second: _Lie) -> _Lie:
    def both(request: _Request, container: Container) -> None:
        first(request, container)
        second(request, container)

    return both


def _on_go(kind: int, a: int = 0, b: int = 0, *, device: str | None = None, extra: bytes = b"") -> _Lie:
    def lie(request: _Request, container: Container) -> None:
        if device is None:
            _say(request.go, kind, a, b, (), extra)
            return
        fd = os.open(device, os.O_RDWR | os.O_NOCTTY)
        try:
            _say(request.go, kind, a, b, (fd,), extra)
        finally:
            os.close(fd)

    return lie


_GOOD = _with(("init",))
_LIES: dict[str, tuple[_Lie, type[Exception]]] = {
    "nothing": (lambda request, container: None, BackendError),
    "an empty packet": (lambda request, container: request.life.send(b""), BackendError),
    "garbage": (lambda request, container: request.life.send(b"\xff" * 13), BackendError),
    "a huge packet": (lambda request, container: request.life.send(b"\xff" * 100_000), BackendError),
    "no pidfd": (_with(()), BackendError),
    "two pidfds": (_with(("init", "init")), BackendError),
    "many fds": (_with(("null",) * 200), BackendError),
    "a file for a pidfd": (_with(("null",)), BackendError),
    "a directory of /proc for a pidfd": (_with(("directory",)), BackendError),
    "the host's own pidfd": (_with(("own",), a=os.getpid()), BackendError),
    "another pid than the pidfd's": (_with(("init",), a=77), BackendError),
    "a negative pid": (_with(("init",), a=-1), BackendError),
    "an unknown kind": (_with(("init",), kind=9), BackendError),
    "an end before a start": (_with((), kind=protocol.ENDED, a=0), BackendError),
    "an unknown step": (_with((), kind=protocol.FAILED, a=99, b=1), BackendError),
    "a wrong errno": (_with((), kind=protocol.FAILED, a=1, b=-5), BackendError),
    "a failure with an fd": (_with(("init",), kind=protocol.FAILED, a=1, b=1), BackendError),
    "garbage on go": (_then(_GOOD, lambda request, container: request.go.send(b"?")), BackendError),
    "a start on go": (_then(_GOOD, _on_go(protocol.STARTED, 1)), BackendError),
    "a wrong failure on go": (_then(_GOOD, _on_go(protocol.FAILED, 0, 0)), BackendError),
    "a place that nobody waits for": (_then(_GOOD, _on_go(protocol.PLACED)), BackendError),
    "no terminal": (_GOOD, BackendError),
    "a file for a terminal": (_then(_GOOD, _on_go(protocol.TTY, device="/dev/null")), BackendError),
    "a terminal without one": (_then(_GOOD, _on_go(protocol.TTY)), BackendError),
    "two terminals": (
        _then(_GOOD, _then(_on_go(protocol.TTY, device="/dev/ptmx"), _on_go(protocol.TTY, device="/dev/ptmx"))),
        BackendError,
    ),
}


async def _lied_to(container: Container, lie: _Lie, *, tty: bool, quiet: bool = False) -> Started:
    """Spawn through a fake init that tells `lie` and closes all (or, `quiet`, keeps all open and says no more)."""
    control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDWR)
    requests: list[_Request] = []

    async def fake() -> None:
        await anyio.wait_readable(inside)
        requests.append(_Request(inside))
        lie(requests[0], container)
        if not quiet:
            requests.pop().close()

    started: list[Started] = []
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(fake)
            started.append(
                await spawn(
                    control,
                    make_request("program", tty=(24, 80) if tty else None),
                    None if tty else (null, null, null),
                    before_exec=lambda pid, pidfd: None,
                    timeout=1 if quiet else 10,
                )
            )
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None
    finally:
        for request in requests:
            request.close()
        control.close()
        inside.close()
        os.close(null)
    return started[0]


@pytest.mark.parametrize("name", _LIES)
async def test_every_lie_of_init_is_a_typed_error_and_leaks_nothing(name: str) -> None:
    lie, expected = _LIES[name]
    with Container(args=("init",)) as victim:  # its PID 1 is the process that the lies are about
        assert await victim.status("/bin/true") == 0
        before = sorted(os.listdir("/proc/self/fd"))
        tty = "terminal" in name and "without" not in name
        with pytest.raises(expected) as raised:
            await _lied_to(victim, lie, tty=tty)
        assert str(raised.value)
        assert sorted(os.listdir("/proc/self/fd")) == before


async def test_a_silent_init_meets_the_deadline() -> None:
    with Container() as victim:
        assert await victim.status("/bin/true") == 0
        before = sorted(os.listdir("/proc/self/fd"))
        for lie in (lambda request, container: None, _GOOD):
            with pytest.raises(DeadlineExceededError):
                await _lied_to(victim, lie, tty=False, quiet=True)
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        (protocol.STARTED, 0, 0),
        (9, 0, 0),
        (protocol.ENDED, 0, 1),
        (protocol.ENDED, -1, 0),
        (protocol.ENDED, 0x7F, 0),
        (protocol.ENDED, 0x137F, 0),
        (protocol.ENDED, 0x0109, 0),
        (protocol.ENDED, 1 << 16, 0),
        (protocol.ENDED, 0x80, 0),
        (protocol.ENDED, 65, 0),
    ],
)
async def test_an_end_that_no_process_can_have_is_a_typed_error(kind: int, a: int, b: int) -> None:
    life, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with life, inside:
        _say(inside, kind, a, b, (life.fileno(), life.fileno()))
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(BackendError):
            await ended(life)
        assert sorted(os.listdir("/proc/self/fd")) == before
