"""Root inside a container gets no hold of init, and no request, however it is made up, ends it.

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
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.init_container import ATTACKER, Container, closing, make_request, status_of, text, until

from unisandbox.api.errors import BackendError, UnavailableError
from unisandbox.host.init import ExecFailed, binary_path, protocol, spawn

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


async def _held(container: Container, before_exec: Callable[[int, int, int], Awaitable[None]]) -> int | None:
    """How a process ends when this is done between its start and its exec."""
    null = os.open("/dev/null", os.O_RDWR)
    try:
        process = await spawn(
            container.control,
            make_request("true"),
            (null, null, null),
            before_exec=lambda pid, pidfd: None,
            hold_life=before_exec,
            timeout=20,
        )
        async with closing(process):
            return await status_of(process.life)
    finally:
        os.close(null)


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

    assert await _held(container, attack) == 0
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

    assert await _held(container, kill) == signal.SIGKILL


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
        await container.start("cat", tty=(24, 80), timeout=30)
    assert failed.value.step == "tty"
    await until(lambda: list(container.processes()) == [container.pid])


async def test_a_fork_bomb_of_orphans_does_not_keep_the_host_waiting(container: Container) -> None:
    bomb = await container.start("sh", "-c", "while :; do (true &) ; (true &) ; done")
    async with closing(bomb):
        for _ in range(20):
            assert await container.status("/bin/true", timeout=30) == 0
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
