"""Root inside a container gets no hold of init, and a hostile init gets no hold of the host.

The attacker is root of the container's user namespace with CAP_SYS_PTRACE and CAP_SYS_ADMIN on top, which no sandbox
of ours gives. The same attacks succeed where init's program may be read: so these tests can fail.
"""

from __future__ import annotations

import array
import ast
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.init_container import ATTACKER, Container, closing, make_request, status_of, text, until

from unisandbox.api.errors import BackendError, DeadlineExceededError, UnavailableError
from unisandbox.host.init import ExecFailed, Started, binary_path, ended, protocol, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.root]

# What an attacker tries on the process argv[1]; prints the names of what worked.
_REACH = r"""
import ctypes, os, sys
victim = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
worked = []
def attempt(name, call):
    try:
        if call() != -1:
            worked.append(name)
    except OSError:
        pass
def memory(flags):
    fd = os.open(f"/proc/{victim}/mem", flags)
    return len(os.pread(fd, 4, 0x400000))
class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
def vm_read():
    buffer = ctypes.create_string_buffer(4)
    ours, theirs = IoVec(ctypes.addressof(buffer), 4), IoVec(0x400000, 4)
    return libc.process_vm_readv(victim, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
attempt("memory", lambda: memory(os.O_RDONLY))
attempt("memory for writing", lambda: memory(os.O_RDWR))
attempt("process_vm_readv", vm_read)
for name in ("maps", "environ", "auxv", "syscall", "io", "personality", "pagemap"):
    attempt(name, lambda: len(open(f"/proc/{victim}/{name}", "rb").read(8)))
for name in ("exe", "root", "cwd", "fd/3", "ns/mnt", "ns/user"):
    attempt(name, lambda: len(os.readlink(f"/proc/{victim}/{name}")))
attempt("the list of fds", lambda: len(os.listdir(f"/proc/{victim}/fd")))
attempt("open its socket", lambda: os.open(f"/proc/{victim}/root/etc/passwd", os.O_RDONLY))
pidfd = os.pidfd_open(victim)
for fd in range(8):
    attempt(f"pidfd_getfd {fd}", lambda: libc.syscall(438, pidfd, fd, 0))
attempt("oom_score_adj", lambda: open(f"/proc/{victim}/oom_score_adj", "w").write("1000"))
attempt("setns", lambda: libc.setns(pidfd, 0x20000))
attempt("kcmp", lambda: libc.syscall(312, victim, os.getpid(), 2, 0, 0))
if libc.ptrace(0x4206, victim, 0, 0) == 0:
    worked.append("ptrace")
    libc.ptrace(17, victim, 0, 0)
print(worked)
"""

_SIGNALS = r"""
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
for number in range(1, 65):
    for _ in range(20):
        libc.kill(1, number)
        libc.sigqueue(1, number, 0)
print("sent")
"""


@pytest.fixture
def container() -> Iterator[Container]:
    with Container() as made:
        yield made


async def _attack(container: Container, victim: int, **options: object) -> set[str]:
    told = await container.output("python3", "-c", _REACH, str(victim), capabilities=ATTACKER, **options)
    worked = ast.literal_eval(told.decode())
    assert isinstance(worked, list)
    return set(worked)


# ---- from inside ----


async def test_root_inside_reaches_neither_memory_nor_socket_of_init(container: Container) -> None:
    assert await _attack(container, 1, no_new_privs=False) == set()
    assert await container.status("/bin/true") == 0


def _open_readable() -> int:
    """Init's program as `open_binary` gives it, but with the mode that programs usually have."""
    program = os.memfd_create("readable")
    try:
        with open(binary_path(), "rb") as source:
            os.write(program, source.read())
        os.fchmod(program, 0o555)
        return os.open(f"/proc/self/fd/{program}", os.O_PATH)
    finally:
        os.close(program)


async def test_the_same_root_reaches_them_where_the_program_can_be_read() -> None:
    readable = _open_readable()
    try:
        with Container(program=readable) as container:
            worked = await _attack(container, 1, no_new_privs=False)
    finally:
        os.close(readable)
    assert {"memory", "maps", "exe", "the list of fds", "pidfd_getfd 3", "ptrace"} <= worked


async def test_a_process_is_out_of_reach_between_its_start_and_its_exec(container: Container) -> None:
    worked: list[set[str]] = []

    async def attack(fd: int, pid: int, pidfd: int) -> None:
        waiting = max(container.processes())
        inside = int(text(f"/proc/{waiting}/status").split("NSpid:")[1].split("\n")[0].split()[-1])
        worked.append(await _attack(container, inside, no_new_privs=False))

    null = os.open("/dev/null", os.O_RDWR)
    try:
        process = await spawn(
            container.control,
            make_request("true"),
            (null, null, null),
            before_exec=lambda pid, pidfd: None,
            hold_life=attack,
            timeout=20,
        )
        async with closing(process):
            assert await status_of(process.life) == 0
    finally:
        os.close(null)
    assert worked == [set()]


async def test_signals_from_inside_neither_end_nor_stop_nor_fill_init(container: Container) -> None:
    assert await container.output("python3", "-c", _SIGNALS, capabilities=ATTACKER) == b"sent\n"

    def status() -> dict[str, str]:
        lines = text(f"/proc/{container.pid}/status").splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    await until(lambda: status()["State"].startswith("S"))
    fields = status()
    assert int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16) in (0, 1 << (signal.SIGCHLD - 1))
    assert fields["SigQ"].split("/")[0] == "0", "nothing is queued for it"
    assert await container.status("sh", "-c", "exit 3") == 3 << 8


async def test_a_process_killed_from_inside_before_exec_is_told_exactly(container: Container) -> None:
    script = (
        "import os\n"
        "for name in filter(str.isdigit, os.listdir('/proc')):\n"
        "    if int(name) not in (1, os.getpid()):\n"
        "        os.kill(int(name), 9)\n"
    )

    async def kill(fd: int, pid: int, pidfd: int) -> None:
        assert await container.status("python3", "-c", script) == 0

    null = os.open("/dev/null", os.O_RDWR)
    try:
        process = await spawn(
            container.control,
            make_request("true"),
            (null, null, null),
            before_exec=lambda pid, pidfd: None,
            hold_life=kill,
            timeout=20,
        )
        async with closing(process):
            assert await status_of(process.life) == signal.SIGKILL
    finally:
        os.close(null)


async def test_limits_lowered_from_inside_harm_that_container_alone_and_are_typed(container: Container) -> None:
    # Root inside has init's user id, so the kernel lets it lower init's limits.
    lower = "import resource as r, sys; r.prlimit(1, r.RLIMIT_NOFILE, tuple(map(int, sys.argv[1:])))"
    assert await container.status("python3", "-c", lower, "0", "8192") == 0
    assert await container.status("/bin/true") == 0, "a soft limit is raised again"
    assert await container.status("python3", "-c", lower, "6", "6") == 0
    with pytest.raises(BackendError, match="refused"):
        await container.start("/bin/true")
    await until(lambda: container.processes() == {container.pid: "S"})


async def test_init_whose_limits_allow_nothing_ends_with_its_container_and_does_not_spin(container: Container) -> None:
    async with closing(await container.start("sleep", "60")) as sleeper:
        lower = "import resource as r; r.prlimit(1, r.RLIMIT_NOFILE, (0, 0))"
        assert await container.status("python3", "-c", lower) == 0
        with anyio.fail_after(10):
            assert await status_of(sleeper.life) is None, "its end was never told, and is not made up"
    assert container.finish() == 0
    with pytest.raises(UnavailableError):
        await container.start("/bin/true")


@pytest.mark.parametrize("device", ["fifo", "zero", "nothing"])
async def test_a_terminal_device_put_there_by_an_attacker_is_a_typed_error(container: Container, device: str) -> None:
    scripts = {
        "fifo": "mkfifo /tmp/ptmx && mount --bind /tmp/ptmx /dev/ptmx",
        "zero": "mount --bind /dev/zero /dev/ptmx",
        "nothing": "umount /dev/ptmx && mount -t tmpfs none /dev",
    }
    assert await container.status("sh", "-c", scripts[device], capabilities=ATTACKER) == 0
    with pytest.raises(ExecFailed) as failed:
        await container.start("cat", tty=(24, 80), timeout=5)
    assert failed.value.step == "tty"
    await until(lambda: list(container.processes()) == [container.pid])


async def test_a_fork_bomb_of_orphans_does_not_keep_the_host_waiting(container: Container) -> None:
    bomb = await container.start("sh", "-c", "while :; do (true &) ; (true &) ; done")
    async with closing(bomb):
        for _ in range(20):
            assert await container.status("/bin/true", timeout=5) == 0
        signal.pidfd_send_signal(bomb.pidfd, signal.SIGKILL)
        assert await status_of(bomb.life) == signal.SIGKILL
    await until(lambda: list(container.processes()) == [container.pid])


# ---- hostile requests ----

_HEADER = protocol.REQUEST.pack(
    protocol.MAGIC, protocol.VERSION, protocol.FLAG_NO_NEW_PRIVS, 12, 0, 0, 1, 0, 0, 0, 0o022, 0, 0, 0, 0
)
_FIELDS = [
    (0, 4),
    (4, 2),
    (6, 2),
    *((at, 4) for at in range(8, 40, 4)),
    (40, 2),
    (42, 2),
    (44, 4),
    (48, 4),
    (52, 4),
    (56, 8),
]
"""Offset and size of every field of a request."""


@st.composite
def _packets(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """Random bytes, or a good request with some of its fields changed; and fds of random kinds, right or wrong."""
    packet = bytearray(_HEADER)
    if draw(st.booleans()):
        packet = bytearray(draw(st.binary(max_size=200)))
    else:
        for offset, size in draw(st.lists(st.sampled_from(_FIELDS), max_size=4)):
            extreme = st.sampled_from([0, 1, 2, 16, 65536, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
            value = draw(st.one_of(extreme, st.integers(0, 2 ** (8 * size) - 1))) % 2 ** (8 * size)
            packet[offset : offset + size] = value.to_bytes(size, "little")
        if draw(st.integers(0, 3)) == 0:
            packet = packet[: draw(st.integers(0, len(packet)))] + draw(st.binary(max_size=2))
    right = st.sampled_from([["socket", "go", "spec", "null", "null", "null"], ["socket", "go", "spec"]])
    kinds = st.lists(st.sampled_from(["socket", "go", "spec", "null", "directory", "pipe"]), max_size=12)
    return bytes(packet), draw(st.one_of(right, kinds))


def _send_raw(container: Container, packet: bytes, kinds: list[str], spec: bytes) -> None:
    """Send it with fresh fds, say go to whatever starts, and close all on our side."""
    with contextlib.ExitStack() as stack:
        ours: list[socket.socket] = []

        def make(kind: str) -> int:
            if kind in ("socket", "go"):
                one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.callback(one.close)
                stack.callback(other.close)
                ours.append(one)
                if kind == "go":
                    one.send(b"g")
                return other.fileno()
            if kind == "pipe":
                pair = os.pipe()
                stack.callback(os.close, pair[0])
                stack.callback(os.close, pair[1])
                return pair[0]
            fd = (
                os.memfd_create("spec")
                if kind == "spec"
                else os.open({"null": "/dev/null", "directory": "/"}[kind], os.O_RDONLY)
            )
            stack.callback(os.close, fd)
            if kind == "spec":
                os.write(fd, spec)
            return fd

        fds = array.array("i", [make(kind) for kind in kinds])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        for _ in range(1000):
            try:
                container.control.sendmsg([packet], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()  # its queue is full: let it read
            else:
                return
        raise AssertionError("init reads no more")


def test_no_packet_ends_or_hangs_init_or_leaks_into_it(count: Callable[[int], int]) -> None:
    with Container() as container:

        @settings(max_examples=count(3000), deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(_packets(), st.one_of(st.just(b"/\0/bin/true\0"), st.binary(max_size=40)))
        def hostile(sent: tuple[bytes, list[str]], spec: bytes) -> None:
            _send_raw(container, *sent, spec)

        hostile()
        for size in (0, 1, 65, 200_000):
            _send_raw(container, b"x" * size, ["null"] * (253 if size == 1 else 3), b"")

        async def alive() -> None:
            assert await container.status("sh", "-c", "exit 9", timeout=10) == 9 << 8
            await until(lambda: list(container.processes()) == [container.pid])
            await until(lambda: len(os.listdir(f"/proc/{container.pid}/fd")) == 5)

        anyio.run(alive)


# ---- hostile answers ----


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
