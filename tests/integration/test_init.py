"""Init starts processes as asked and tells exactly how they ended; what is asked wrongly is a typed error."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.init_container import (
    Container,
    closing,
    make_request,
    read_until,
    runtime_container,
    status_of,
    text,
    until,
)

from unisandbox.api.errors import (
    InvalidArgumentError,
)
from unisandbox.host.init import ExecFailed, SpawnRequest, binary_path, ended, open_binary, protocol, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.root]

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).resolve().parents[2]


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
            assert b"30 90\r\n" in await read_until(process.master, b"\n")
            assert await status_of(process.life) == 4 << 8
