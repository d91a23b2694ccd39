"""Init starts processes as asked and tells exactly how they ended; what is asked wrongly is a typed error."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import itertools
import os
import platform
import resource
import shutil
import signal
import socket
import stat
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.init_container import (
    FIRST_ID,
    Container,
    closing,
    make_request,
    runtime_container,
    status_of,
    text,
    until,
)
from tests.keepers import files_of

from unisandbox.api.errors import (
    BackendError,
    DeadlineExceededError,
    InvalidArgumentError,
    UnavailableError,
)
from unisandbox.host import boundary
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.init import ExecFailed, SpawnRequest, binary_path, ended, open_binary, protocol, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.root]

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def container() -> Iterator[Container]:
    with Container() as made:
        yield made


@pytest.fixture(params=["x86_64", "aarch64"])
def on_machine(request: pytest.FixtureRequest) -> Iterator[Container]:
    """Init of each machine, the other one's under qemu-user."""
    if request.param == platform.machine():
        with Container() as made:
            yield made
        return
    if request.param != "aarch64" or QEMU is None:
        pytest.skip(f"no qemu-user for {request.param} here (apt install qemu-user-static)")
    qemu = os.open(QEMU, os.O_PATH | os.O_CLOEXEC)
    try:
        with Container(program=qemu, args=("qemu", binary_path("aarch64"))) as made:
            made.emulated = True
            yield made
    finally:
        os.close(qemu)


# ---- exact ends ----


async def test_every_exit_code_is_exact(on_machine: Container) -> None:
    for code in range(256):
        assert await on_machine.status("sh", "-c", f"exit {code}") == code << 8


async def test_every_signal_that_ends_a_process_is_exact(on_machine: Container) -> None:
    harmless = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    stopping = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    limits = {"RLIMIT_CORE": (0, 0)}
    for number in range(1, 65):
        if number in stopping:
            continue
        if number > 31 and on_machine.emulated:  # qemu-user moves the realtime signals
            break
        status = await on_machine.status("sh", "-c", f"kill -{number} $$; exit 99", rlimits=limits)
        assert status == (99 << 8 if number in harmless else number), f"signal {number}"


async def test_signals_of_the_host_reach_a_process(container: Container) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
        async with closing(await container.start("sleep", "60")) as process:
            signal.pidfd_send_signal(process.pidfd, number)
            assert await status_of(process.life) == number


async def test_abort_ends_with_sigabrt(container: Container) -> None:
    status = await container.status(PYTHON, "-c", "import os; os.abort()", rlimits={"RLIMIT_CORE": (0, 0)})
    assert status == signal.SIGABRT


async def test_a_core_dump_is_told(container: Container) -> None:
    if text("/proc/sys/kernel/core_pattern").startswith(("|", "/")):
        pytest.skip("cores of this host do not go to the current directory")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("cores are forbidden here by a hard limit")
    status = await container.status(
        "sh", "-c", "kill -SEGV $$", cwd="/tmp", rlimits={"RLIMIT_CORE": (1 << 20, 1 << 20)}
    )
    assert status is not None
    assert os.WCOREDUMP(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


async def test_many_children_leave_no_zombie_no_descriptor_and_no_memory(
    container: Container, count: Callable[[int], int]
) -> None:
    async def some(number: int) -> None:
        for _ in range(number):
            assert await container.status("/bin/true") == 0

    def private() -> int:
        lines = text(f"/proc/{container.pid}/smaps_rollup").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    await some(8)
    memory = private()
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(some, count(10_000) // 4)
    await until(lambda: container.processes() == {container.pid: "S"})
    await until(lambda: len(os.listdir(f"/proc/{container.pid}/fd")) == 5)  # it closes `life` after its last word
    assert private() <= memory + 8
    assert memory <= 64, f"init uses {memory} kB"


async def test_orphans_are_reaped(on_machine: Container) -> None:
    # Each inner shell ends at once and leaves a child to PID 1; the children end together.
    script = "for i in $(seq 100); do (read x < /tmp/fifo &) ; done; exit 3"
    assert await on_machine.status("mkfifo", "/tmp/fifo") == 0
    assert await on_machine.status("sh", "-c", script) == 3 << 8
    assert len(on_machine.processes()) == 101
    # The writer stays until the last of them has opened the fifo, which would wait for another one otherwise.
    async with closing(await on_machine.start("sh", "-c", "exec 3<>/tmp/fifo; yes | head -n 100 >&3; exec sleep 60")):
        await until(lambda: len(on_machine.processes()) == 2)


async def test_an_end_can_be_seen_by_every_holder_again_and_again(container: Container) -> None:
    held: list[int] = []

    async def hold(fd: int, pid: int, pidfd: int) -> None:
        held.append(os.dup(fd))

    null = os.open("/dev/null", os.O_RDWR)
    process = await spawn(
        container.control,
        make_request("sh", "-c", "exit 5"),
        (null, null, null),
        before_exec=lambda pid, pidfd: None,
        hold_life=hold,
        timeout=10,
    )
    os.close(null)
    async with closing(process), anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ended, process.life)
    with socket.socket(fileno=held[0]) as life:  # the client is gone, somebody else held a copy
        assert [await status_of(life) for _ in range(3)] == [5 << 8] * 3


async def test_the_end_of_init_is_told_from_an_end_of_a_process(container: Container) -> None:
    async with closing(await container.start("sleep", "60")) as process:
        os.kill(container.pid, signal.SIGKILL)
        with anyio.fail_after(10):
            assert await status_of(process.life) is None


# ---- what the process is ----


async def test_exactly_three_descriptors_are_open_and_all_signals_are_normal(on_machine: Container) -> None:
    async with closing(await on_machine.start("sleep", "60")) as process:
        pid = process.pid
        # It sleeps: the dynamic loader, which has a library open now and then, is through.
        await until(lambda: text(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] == "S")
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        status = dict(line.split(":\t", 1) for line in text(f"/proc/{pid}/status").splitlines() if ":\t" in line)
        for field in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"):
            # Under qemu-user signals 32 and 33 stay as this test process has them: glibc's, and qemu's own.
            assert int(status[field], 16) & ~(3 << 31) == 0, field
        assert status["NoNewPrivs"] == "1"
        assert status["Umask"] == "0022"
        assert status["Groups"].split() == []
        assert status["NSsid"].split()[-1] == status["NSpid"].split()[-1], "it leads a session of its own"
        assert not os.get_inheritable(process.pidfd)
        assert not os.get_inheritable(process.life.fileno())


async def test_every_setting_is_applied(on_machine: Container) -> None:
    options = {
        "uid": 1234,
        "gid": 2345,
        "groups": (5, 3456, 7),
        "umask": 0o027,
        "cwd": "/usr",
        "rlimits": {"RLIMIT_NOFILE": (20, 30), "RLIMIT_CORE": (0, 0), "RLIMIT_FSIZE": (1 << 40, -1)},
        "oom_score_adj": 321,
        "env": {"PATH": "/usr/bin", "WORD": "ä b\n c", "EMPTY": ""},
    }
    script = (
        "import os, resource as r\n"
        "print([os.getresuid(), os.getresgid(), sorted(os.getgroups()), os.umask(0), os.getcwd(),"
        " r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_FSIZE),"
        " int(open('/proc/self/oom_score_adj').read()), {k: os.environ[k] for k in ('WORD', 'EMPTY')}])"
    )
    told = await on_machine.output("python3", "-c", script, **options)
    assert eval(told) == [  # noqa: S307 - our own output
        (1234, 1234, 1234),
        (2345, 2345, 2345),
        [5, 7, 3456],
        0o027,
        "/usr",
        (20, 30),
        (0, 0),
        (1 << 40, -1),
        321,
        {"WORD": "ä b\n c", "EMPTY": ""},
    ]


async def test_without_a_limit_of_open_files_the_first_one_holds(container: Container) -> None:
    assert await container.output("sh", "-c", "ulimit -Sn; ulimit -Hn") == b"1024\n8192\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"uid": 0}, "Prm Eff Bnd"),
        ({"uid": 1000}, "Bnd"),
        ({"uid": 1000, "ambient": True}, "Inh Prm Eff Bnd Amb"),
        ({"uid": 0, "capabilities": ()}, ""),
    ],
)
async def test_capabilities_are_exactly_those_asked_for(
    container: Container, options: dict[str, object], expected: str
) -> None:
    mask = protocol.capability_mask({"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"})
    told = await container.output("grep", "^Cap", "/proc/self/status", **{"capabilities": mask, **options})
    sets = {line[3:6]: int(line.split()[1], 16) for line in told.decode().splitlines()}
    assert {name for name, found in sets.items() if found == mask} == set(expected.split())
    assert {name for name, found in sets.items() if found == 0} == set(sets) - set(expected.split())


async def test_new_privileges_are_refused_only_on_request(container: Container) -> None:
    for asked in (True, False):
        told = await container.output("grep", "NoNewPrivs", "/proc/self/status", no_new_privs=asked)
        assert told.split()[-1] == str(int(asked)).encode()


# ---- failed starts ----


@pytest.mark.parametrize(
    ("argv", "options", "step", "number"),
    [
        (["no-such-program"], {}, "exec", errno.ENOENT),
        (["/no/such/program"], {}, "exec", errno.ENOENT),
        ([""], {}, "exec", errno.ENOENT),
        (["/etc/passwd"], {}, "exec", errno.EACCES),
        (["passwd"], {"env": {"PATH": "/nowhere:/etc:/nowhere"}}, "exec", errno.EACCES),
        (["/usr"], {}, "exec", errno.EACCES),
        (["/etc/passwd/x"], {}, "exec", errno.ENOTDIR),
        (["/tmp/no-program"], {}, "exec", errno.ENOEXEC),
        (["no-program"], {"env": {"PATH": "/tmp"}}, "exec", errno.ENOEXEC),
        (["x" * 5000], {}, "exec", errno.ENOENT),
        (["/bin/true"], {"cwd": "/etc/passwd"}, "cwd", errno.ENOTDIR),
        (["/bin/true"], {"cwd": "/nowhere"}, "cwd", errno.ENOENT),
        (["/bin/true"], {"cwd": "/tmp/closed", "uid": 1000}, "cwd", errno.EACCES),
        (["/bin/true"], {"uid": 65536}, "uid", errno.EINVAL),
        (["/bin/true"], {"gid": 65536}, "gid", errno.EINVAL),
        (["/bin/true"], {"groups": (65536,)}, "groups", errno.EINVAL),
        (["/bin/true"], {"rlimits": {"RLIMIT_NOFILE": (9000, 9000)}}, "rlimits", errno.EPERM),
        (["/bin/true"], {"rlimits": {"RLIMIT_NOFILE": (30, 20)}}, "rlimits", errno.EINVAL),
        (["/bin/true", "x" * 131071], {}, None, 0),
        (["/bin/true", "x" * 131072], {}, "exec", errno.E2BIG),
        (["/bin/true", *["x" * 100_000] * 40], {}, "exec", errno.E2BIG),
        (["/bin/true", *["x" * 100_000] * 100], {}, "exec", errno.E2BIG),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_failed_start_tells_its_step_and_errno(
    container: Container, argv: list[str], options: dict[str, object], step: str | None, number: int
) -> None:
    prepare = "echo text > /tmp/no-program; chmod 755 /tmp/no-program; mkdir -m 700 /tmp/closed"
    assert await container.status("sh", "-c", prepare) == 0
    if step is None:
        assert await container.status(*argv, **options) == 0
        return
    with pytest.raises(ExecFailed) as failed:
        await container.status(*argv, **options)
    assert (failed.value.step, failed.value.errno) == (step, number)
    await until(lambda: list(container.processes()) == [container.pid])


async def test_the_path_is_searched_as_execvp_does(container: Container) -> None:
    assert await container.status("sh", "-c", "mkdir /tmp/a; touch /tmp/a/true; cp /bin/true /tmp/here") == 0
    assert await container.status("true", env={"PATH": "/tmp/a:/etc/passwd:/usr/bin"}) == 0, "EACCES goes on"
    assert await container.status("here", env={"PATH": "/nowhere::/nowhere"}, cwd="/tmp") == 0, "empty is the cwd"
    assert await container.status("true", env={}) == 0, "there is a default"
    assert await container.output("env", env=(b"A=1", b"A=2", b"odd")) == b"A=1\nA=2\nodd\n"


async def test_argv_and_environment_pass_up_to_the_kernels_limits(on_machine: Container) -> None:
    argv = ["x" * 100_000] * 9
    env = {"PATH": "/usr/bin", **{f"V{i}": "y" * 100_000 for i in range(8)}}
    script = (
        "import os, sys; print(sum(map(len, sys.argv[1:])), sum(len(v) for k, v in os.environ.items() if k[0] == 'V'))"
    )
    assert await on_machine.output("python3", "-c", script, *argv, env=env) == b"900000 800000\n"
    many = [str(i) for i in range(20_000)]
    assert (
        await on_machine.output("python3", "-c", "import sys; print(len(sys.argv), sys.argv[-1])", *many)
        == b"20001 19999\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"argv": ()},
        {"argv": "true"},
        {"argv": ("a\0b",)},
        {"argv": ("a",), "env": {"A=B": "c"}},
        {"argv": ("a",), "env": {"": "c"}},
        {"argv": ("a",), "cwd": "/\0"},
        {"argv": ("a",), "uid": -1},
        {"argv": ("a",), "uid": 2**32 - 1},
        {"argv": ("a",), "gid": 2**32 - 1},
        {"argv": ("a",), "groups": (2**32 - 1,)},
        {"argv": ("a",), "groups": (5,), "keep_groups": True},
        {"argv": ("a",), "umask": 0o1000},
        {"argv": ("a",), "capabilities": {"CAP_NONSENSE"}},
        {"argv": ("a",), "rlimits": {"RLIMIT_NONSENSE": (1, 1)}},
        {"argv": ("a",), "rlimits": {"RLIMIT_CPU": (-2, 1)}},
        {"argv": ("a",), "tty": (70000, 1)},
        {"argv": ("a",), "oom_score_adj": 1001},
    ],
    ids=repr,
)
async def test_what_no_kernel_takes_is_refused_before_it_is_sent(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        SpawnRequest(**options)  # type: ignore[arg-type]


# ---- terminals ----


def _resize(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


async def _read_until(master: int, word: bytes) -> bytes:
    read = b""
    with anyio.move_on_after(10):
        while word not in read:
            await anyio.wait_readable(master)
            read += os.read(master, 4096)
    assert word in read
    return read


async def test_a_terminal_has_its_size_and_follows_resizes(on_machine: Container) -> None:
    script = (
        "import os, signal, sys\n"
        "def now(*_):\n"
        "    os.write(1, b'now %d %d\\n' % os.get_terminal_size())\n"
        "    os._exit(4)\n"
        "signal.signal(signal.SIGWINCH, now)\n"
        "print('first', *os.get_terminal_size(), os.ttyname(0), os.isatty(1), os.isatty(2), flush=True)\n"
        "while True: signal.pause()\n"
    )
    process = await on_machine.start("python3", "-c", script, tty=(24, 80))
    async with closing(process):
        assert process.master is not None
        assert not os.get_inheritable(process.master)
        assert b"first 80 24 /dev/pts/0 True True\r\n" in await _read_until(process.master, b"\n")
        _resize(process.master, 50, 132)
        assert b"now 132 50\r\n" in await _read_until(process.master, b"\n")
        assert await status_of(process.life) == 4 << 8


async def test_a_terminal_controls_its_jobs(on_machine: Container) -> None:
    # Not through a shell: dash loses a SIGINT that comes while it forks.
    async with closing(await on_machine.start("cat", tty=(24, 80))) as process:
        assert process.master is not None
        os.write(process.master, b"word\n")
        await _read_until(process.master, b"word\r\nword\r\n")
        os.write(process.master, b"\x03")
        with anyio.fail_after(10):
            assert await status_of(process.life) == signal.SIGINT


async def test_a_job_can_be_stopped_and_continued_on_a_terminal(container: Container) -> None:
    shell = ["bash", "--norc", "--noediting", "-i"]
    async with closing(await container.start(*shell, tty=(24, 80), env={"PATH": "/bin", "PS1": "$ "})) as process:
        assert process.master is not None
        await _read_until(process.master, b"$ ")
        os.write(process.master, b"cat\n")
        await _read_until(process.master, b"cat\r\n")
        os.write(process.master, b"word\n")
        await _read_until(process.master, b"word\r\nword\r\n")
        os.write(process.master, b"\x1a")
        await _read_until(process.master, b"Stopped")
        os.write(process.master, b"fg\n")
        await _read_until(process.master, b"cat\r\n")
        os.write(process.master, b"\x04")
        await _read_until(process.master, b"$ ")
        os.write(process.master, b"exit 6\n")
        with anyio.fail_after(10):
            assert await status_of(process.life) == 6 << 8


async def test_a_terminal_belongs_to_its_user_and_its_end_is_seen(container: Container) -> None:
    script = (
        "import os\n"
        "os.close(os.open('/dev/tty', os.O_RDWR))\n"
        "print('owner', os.stat('/dev/pts/0').st_uid, flush=True)\n"
        "input()\n"
    )
    async with closing(await container.start("python3", "-c", script, tty=(24, 80), uid=1000)) as process:
        assert process.master is not None
        assert b"owner 1000\r\n" in await _read_until(process.master, b"\n")
        for pid in (container.pid, process.pid):
            links = files_of(pid)
            assert not [link for link in links if "ptmx" in link], "the master is the host's alone"
        signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        assert await status_of(process.life) == signal.SIGKILL


# ---- the wait before exec ----


async def test_the_process_waits_for_its_cgroup_before_exec(container: Container) -> None:
    seen: list[tuple[str, int]] = []

    def look(pid: int, pidfd: int) -> None:
        seen.append((os.readlink(f"/proc/{pid}/exe"), os.stat(f"/proc/{pid}").st_uid))
        signal.pidfd_send_signal(pidfd, 0)

    assert await container.status("/bin/true", before_exec=look) == 0
    assert len(seen) == 1
    assert "unisandbox-init" in seen[0][0], "it ran nothing of the user's yet"


@pytest.fixture
def birthplace(container: Container) -> Iterator[int]:
    """A cgroup2 directory in which init may give birth."""
    root = Cgroups.detect(f"init-{os.getpid()}").root()
    try:
        home, place = root.child("home"), root.child("place")
        if place.clone_into is None:
            pytest.skip("this host has no cgroup2 tree")
        home.enter(container.pid)
        for cgroup in (root, home, place):
            cgroup.admit(FIRST_ID)
        directory = os.open(place.clone_into, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield directory
        finally:
            os.close(directory)
    finally:
        root.kill()
        assert root.remove(timeout=5)


async def test_nobody_is_asked_to_move_a_process_that_is_about_to_enter_its_cgroups_itself(
    container: Container, birthplace: int
) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)  # in the place of a v1 `tasks`: full, so that the process has to wait
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    os.set_blocking(writer, True)
    steps: list[str] = []
    began = anyio.Event()

    def watch(name: str, _: str) -> None:
        if name == "after init.started":
            began.set()

    async def start() -> None:
        process = await spawn(
            container.control,
            make_request("/bin/true"),
            (0, 1, 2),
            before_exec=lambda pid, pidfd: steps.append("looked at"),
            timeout=10,
            cgroup=(birthplace, writer),
        )
        async with closing(process):
            end = await ended(process.life)
            assert end is not None
            assert end.status == 0

    boundary.watch(watch)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(start)
            await began.wait()
            await anyio.wait_all_tasks_blocked()
            steps.append("let in")
            while os.read(reader, 4096).rstrip(b"\0") != b"0":
                pass
    finally:
        boundary.watch(None)
        os.close(reader)
        os.close(writer)
    assert steps == ["let in", "looked at"]


async def test_an_error_before_exec_ends_the_process(container: Container) -> None:
    def refuse(pid: int, pidfd: int) -> None:
        raise OSError(errno.EBUSY, "no cgroup today")

    with pytest.raises(OSError, match="no cgroup today"):
        await container.start("touch", "/tmp/never", before_exec=refuse)
    await until(lambda: list(container.processes()) == [container.pid])
    assert "never" not in os.listdir(f"/proc/{container.pid}/root/tmp")


async def test_a_process_killed_before_exec_has_its_exact_end(container: Container) -> None:
    def kill(pid: int, pidfd: int) -> None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    assert await container.status("/bin/true", before_exec=kill) == signal.SIGKILL


async def test_a_start_cancelled_at_any_await_leaves_nothing(container: Container) -> None:
    request, null = make_request("sleep", "60"), os.open("/dev/null", os.O_RDWR)
    descriptors = sorted(os.listdir("/proc/self/fd"))

    async def start(scope: anyio.CancelScope, where: str) -> None:
        async def hold(fd: int, pid: int, pidfd: int) -> None:
            if where == "hold":
                scope.cancel()
            await anyio.lowlevel.checkpoint()

        def before(pid: int, pidfd: int) -> None:
            if where == "before":
                scope.cancel()

        if where == "first":
            scope.cancel()
        process = await spawn(
            container.control, request, (null, null, null), before_exec=before, hold_life=hold, timeout=10
        )
        # The exec was quicker than the first await that could be cancelled: then it has simply started.
        async with closing(process):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    try:
        for where in ("first", "hold", "before"):
            with anyio.CancelScope() as scope:
                await start(scope, where)
            await until(lambda: list(container.processes()) == [container.pid])
            assert sorted(os.listdir("/proc/self/fd")) == descriptors
    finally:
        os.close(null)
    assert await container.status("/bin/true") == 0


async def test_a_stopped_init_meets_the_deadline_and_starts_nothing_later(container: Container) -> None:
    os.kill(container.pid, signal.SIGSTOP)
    failed = 0

    async def start() -> None:
        nonlocal failed
        with pytest.raises(DeadlineExceededError):
            await container.start("touch", "/tmp/never", timeout=0.5)
        failed += 1

    try:
        async with anyio.create_task_group() as group:
            for _ in range(300):  # more than the socket's queue takes: the rest waits for room in it
                group.start_soon(start)
    finally:
        os.kill(container.pid, signal.SIGCONT)
    assert failed == 300
    assert await container.status("/bin/true") == 0
    await until(lambda: list(container.processes()) == [container.pid])
    assert "never" not in os.listdir(f"/proc/{container.pid}/root/tmp")


async def test_a_process_of_another_pid_namespace_than_expected_is_refused(container: Container) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    expected = os.stat(f"/proc/{container.pid}/ns/pid").st_ino

    async def start(pid_namespace: int) -> None:
        process = await spawn(
            container.control,
            make_request("true"),
            (null, null, null),
            before_exec=lambda pid, pidfd: None,
            timeout=10,
            pid_namespace=pid_namespace,
        )
        async with closing(process):
            assert await status_of(process.life) == 0

    try:
        await start(expected)
        with pytest.raises(BackendError, match="namespace"):
            await start(expected + 1)
    finally:
        os.close(null)
    await until(lambda: list(container.processes()) == [container.pid])


async def test_a_host_without_descriptors_gets_a_typed_error_at_every_point(container: Container) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    null = os.open("/dev/null", os.O_RDWR)
    filling = [null]
    while filling[-1] <= highest:  # no gaps below the limit
        filling.append(os.dup(null))
    request = make_request("true")
    failures = 0
    for room in range(1, 24):
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (filling[-1] + room, limit[1]))
        try:
            process = await spawn(
                container.control, request, (null, null, null), before_exec=lambda pid, pidfd: None, timeout=10
            )
            taken.append(process)
        except BackendError:
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for process in taken:
            async with closing(process):
                assert await status_of(process.life) == 0
    for fd in filling:
        os.close(fd)
    assert 0 < failures < 23
    await until(lambda: list(container.processes()) == [container.pid])


async def test_without_init_a_start_is_a_typed_error(container: Container) -> None:
    os.kill(container.pid, signal.SIGKILL)
    container.finish()
    with pytest.raises(UnavailableError, match="init"):
        await container.start("/bin/true")


async def test_init_ending_during_a_start_is_a_typed_error(container: Container) -> None:
    def kill_init(pid: int, pidfd: int) -> None:
        os.kill(container.pid, signal.SIGKILL)

    async with closing(await container.start("sleep", "60", before_exec=kill_init)) as process:
        assert await status_of(process.life) is None


# ---- limits of init itself ----


async def test_more_processes_than_init_can_hold_are_refused_with_a_typed_error() -> None:
    with Container(files=80) as container:
        processes = [await container.start("sleep", "60", rlimits={}) for _ in range(48)]
        with pytest.raises(ExecFailed) as failed:
            await container.start("/bin/true")
        assert (failed.value.step, failed.value.errno) == ("table", errno.EAGAIN)
        signal.pidfd_send_signal(processes[0].pidfd, signal.SIGKILL)
        assert await status_of(processes[0].life) == signal.SIGKILL
        assert await container.status("/bin/true") == 0
        for process in processes:
            async with closing(process):
                pass


def _fill(sock: socket.socket) -> int:
    for filled in itertools.count():
        try:
            sock.send(b"x", socket.MSG_DONTWAIT)
        except BlockingIOError:
            return filled
    raise AssertionError("a socket without an end")


async def test_an_end_that_cannot_be_sent_is_kept_until_it_can(container: Container) -> None:
    life, their_life = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    go, their_go = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with life, their_life, go, their_go:
        request = make_request("/bin/true")
        spec = protocol.encode_spec(request)
        memory, null = os.memfd_create("spec"), os.open("/dev/null", os.O_RDWR)
        os.write(memory, spec)
        fds = array.array("i", [their_life.fileno(), their_go.fileno(), memory, null, null, null])
        container.control.sendmsg(
            [protocol.encode_request(request, len(spec))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        )
        their_go.close()
        with anyio.fail_after(10):
            await anyio.wait_readable(life)
        filled = _fill(their_life)
        go.send(b"g")
        await until(lambda: list(container.processes()) == [container.pid])
        assert await container.status("/bin/true") == 0, "others are not kept waiting"
        assert life.recv(64)[:4] == struct.pack("=I", protocol.STARTED)
        for _ in range(filled):
            assert life.recv(64) == b"x"
        their_life.close()
        with anyio.fail_after(10):
            assert await status_of(life) == 0
        os.close(memory)
        os.close(null)
    await until(lambda: len(os.listdir(f"/proc/{container.pid}/fd")) == 5)


# ---- its own life ----


async def test_the_end_of_all_hosts_ends_everything_inside() -> None:
    for shared in (False, True):
        with Container(shared=shared) as container:
            async with closing(await container.start("sleep", "60")) as process:
                container.control.close()
                with anyio.fail_after(10):
                    await anyio.wait_readable(process.pidfd)
                    assert await status_of(process.life) is None


async def test_a_forked_host_keeps_it_alive_until_its_end(container: Container) -> None:
    copy = container.control.dup()
    container.control.close()
    container.control = copy
    assert await container.status("/bin/true") == 0


async def test_in_a_shared_pid_namespace_it_reaps_the_orphans_of_its_container() -> None:
    with Container(shared=True) as container:
        assert await container.status("/bin/true") == 0
        before = set(container.processes())
        assert await container.status("sh", "-c", "for i in $(seq 20); do (sleep 0.01 &); done") == 0
        await until(lambda: set(container.processes()) == before)


async def test_init_without_its_socket_or_with_other_arguments_ends_at_once() -> None:
    for args in (("init", "sleep"), ("init", "first"), ("init", "second", "/")):
        container = Container(args=args)
        container.control.close()
        assert container.finish() == 64


# ---- what is committed ----


async def test_the_program_is_execute_only_sealed_and_close_on_exec() -> None:
    fd = open_binary()
    try:
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o111
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        with pytest.raises(OSError, match="not permitted"):
            os.truncate(f"/proc/self/fd/{fd}", 0)
    finally:
        os.close(fd)
    assert os.stat(binary_path()).st_size < 8192


async def test_both_sides_know_the_same_steps_and_sizes() -> None:
    source = text(f"{ROOT}/native/init/init.c")
    steps = source[source.index("enum { STEP_TABLE") :].split("};")[0]
    words = steps.replace("enum {", "").replace("= 1", "").replace("\n", "").replace("\t", "").split(",")
    assert tuple(word.strip().removeprefix("STEP_").lower() for word in words) == protocol.STEPS
    assert protocol.REQUEST.size == 64


@pytest.mark.parametrize("runtime", ["crun", "runc"])
async def test_an_oci_runtime_starts_it_from_a_descriptor_and_it_is_protected_there(runtime: str) -> None:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    with runtime_container(runtime) as container:
        assert await container.status("sh", "-c", "exit 7") == 7 << 8
        assert await container.output("ls", "/proc/self/fd") == b"0\n1\n2\n3\n"
        assert b"Permission denied" in await container.output("ls", "/proc/1/fd")
        async with closing(await container.start("sh", "-c", "stty size; exit 4", tty=(30, 90))) as process:
            assert process.master is not None
            assert b"30 90\r\n" in await _read_until(process.master, b"\n")
            assert await status_of(process.life) == 4 << 8
