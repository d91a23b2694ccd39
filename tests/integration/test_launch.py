"""The launcher: what it makes of an order, and how it fails."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.keepers import (
    DEADLINE,
    children_of,
    fd_count,
)

from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import launches
from unisandbox.host.keeper.launches import MACHINES, Launch, Launcher, Program, binary_path

pytestmark = [pytest.mark.anyio, pytest.mark.root]

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
ROOT = Path(__file__).resolve().parents[2]


class Emulated(Launcher):
    """The launcher of another machine under qemu-user, which knows no clone3: the program's process is its own."""

    def run(self, order: int, inherited: Sequence[int]) -> int:
        assert QEMU is not None
        actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (order, *inherited)]
        return os.posix_spawn(QEMU, ["qemu", binary_path("aarch64"), str(order)], {}, file_actions=actions)


class Limited(Launcher):
    """The launcher with a limit of three file descriptors."""

    def run(self, order: int, inherited: Sequence[int]) -> int:
        argv = ["sh", "-c", f"ulimit -n 3; exec {binary_path()} {order}"]
        return os.posix_spawn(
            "/bin/sh", argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (order, *inherited)]
        )


@pytest.fixture(params=MACHINES)
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """That of each machine."""
    if request.param == platform.machine():
        made = Launcher()
    elif request.param == "aarch64" and QEMU is not None:
        made = Emulated()
    else:
        pytest.skip(f"no qemu-user for {request.param} here (apt install qemu-user-static)")
    with contextlib.closing(made):
        yield made


class Ended:
    """A launch that is over, its processes reaped."""

    def __init__(self, launch: Launch) -> None:
        poll = select.poll()
        poll.register(launch.ends, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), "the launch does not end"
        assert launch.has_ended()
        (self.pid, self.failure), self.launcher = launch.outcome(), launch.launcher
        self.statuses = {pid: os.waitpid(pid, 0)[1] for pid in {self.launcher, self.pid} - {0}}

    @property
    def status(self) -> int:
        return os.waitstatus_to_exitcode(self.statuses[self.pid])


def launch(program: Program, fds: Sequence[int], launcher: Launcher | None = None) -> Ended:
    """Start a program as a child of this process, and wait for its end."""
    begun = Launch(program)
    begun.prepare()
    with contextlib.ExitStack() as stack:
        stack.callback(begun.close)
        begun.start(launcher or stack.enter_context(contextlib.closing(Launcher())), fds)
        return Ended(begun)


def program(script: str = "exit 0", **options: object) -> Program:
    settings: dict[str, object] = {"env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", "cgroup_procs": []}
    return Program(["/bin/sh", "-c", script], **{**settings, **options})  # type: ignore[arg-type]


def output(script: str, launcher: Launcher | None = None, fds: Sequence[int] = (), **options: object) -> str:
    """What a program writes that ends with 0."""
    reading, writing = os.pipe()
    ended = launch(program(script, **options), [0, writing, 2, *fds], launcher)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    assert (ended.failure, ended.status) == (None, 0), text
    return text


# --- what it makes ---


def test_exits_are_exact_and_nothing_is_left(launcher: Launcher) -> None:
    fds, children = fd_count(os.getpid()), children_of(os.getpid())
    for code in (0, 1, 42, 255):
        assert launch(program(f"exit {code}"), [0, 1, 2], launcher).status == code
    assert launch(program("kill -9 $$"), [0, 1, 2], launcher).status == -signal.SIGKILL
    assert launch(program(cwd="/no/such"), [0, 1, 2], launcher).failure is not None
    assert children_of(os.getpid()) == children
    assert fd_count(os.getpid()) == fds


def test_a_program_is_as_it_should_be(launcher: Launcher) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMIN})
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR2, signal.SIGHUP)]
    try:
        text = output(
            "grep -E '^Sig(Blk|Ign)|^Umask|^PPid' /proc/self/status; pwd; cut -d' ' -f5,6 /proc/$$/stat; echo $$; env",
            launcher,
            cwd="/usr",
            env={"A": "b\udcff c", "EMPTY": "", "PATH": "/bin"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGRTMIN})
        for number, handler in zip((signal.SIGUSR2, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    lines = text.splitlines()
    status = dict(line.split(":\t") for line in lines[:4])
    group_session, pid = lines[5].split(), lines[6]
    assert status["Umask"] == "0022"
    for field in ("SigBlk", "SigIgn"):
        assert int(status[field], 16) & ~(3 << 31) == 0, field  # 32 and 33 are libc's own; nobody can set them
    assert lines[4] == "/usr"
    assert group_session == [pid, pid]
    assert {"A=b\udcff c", "EMPTY="} < set(lines[7:])


def test_its_parent_is_whoever_started_the_launcher(cgroup: str) -> None:
    ended = launch(program(cgroup_procs=[f"{cgroup}/cgroup.procs"]), [0, 1, 2])
    assert (ended.failure, ended.status) == (None, 0)  # that it could be waited for is the proof


@pytest.mark.parametrize("number", [0, 1, 3, 64])
def test_exactly_the_given_fds_are_open_whatever_their_numbers(tmp_path: Path, launcher: Launcher, number: int) -> None:
    os.set_inheritable(leaked := os.open("/dev/zero", os.O_RDONLY), True)
    files = [os.open(tmp_path / f"f{index}", os.O_RDWR | os.O_CREAT, 0o600) for index in range(number)]
    # The other way round: what one number needs lies where another one goes.
    sources = list(reversed(files))
    # By another shell, since one moves its own standard output when it opens a file for a command.
    script = f"sh -c 'ls -l /proc/$PPID/fd > {tmp_path}/seen'; exit 0"
    try:
        ended = launch(program(script), sources, launcher)
    finally:
        for fd in (*files, leaked):
            os.close(fd)
    assert (ended.failure, ended.status) == (None, 0)
    arrows = [line.split()[-3:] for line in (tmp_path / "seen").read_text().splitlines() if " -> " in line]
    wanted = [str(tmp_path / f"f{index}") for index in reversed(range(number))]
    wanted += ["/dev/null"] * (3 - len(wanted))
    assert {int(fd): path for fd, _, path in arrows} == dict(enumerate(wanted))


def test_it_enters_a_mount_namespace(tmp_path: Path) -> None:
    with subprocess.Popen(
        [
            "/usr/bin/unshare",
            "-m",
            "sh",
            "-c",
            f"mount -t tmpfs x {tmp_path} && touch {tmp_path}/inside && echo && cat",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        mounts = os.open(f"/proc/{other.pid}/ns/mnt", os.O_RDONLY)
        try:
            assert output(f"ls {tmp_path}", mounts=mounts).split() == ["inside"]
        finally:
            os.close(mounts)
            other.kill()


def test_it_is_born_in_its_cgroup_and_enters_the_others(cgroup: str) -> None:
    entries = [f"{cgroup}/cgroup.procs"]
    with contextlib.ExitStack() as stack:
        tasks = next((path for path in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory") if os.path.isdir(path)), None)
        if tasks is not None:
            inner = f"{tasks}/{os.path.basename(cgroup)}"
            os.mkdir(inner)
            stack.callback(lambda: ending.remove([inner], DEADLINE))
            entries.insert(0, f"{inner}/tasks")
        text = output("cat /proc/$$/cgroup", cgroup_procs=entries)
    assert sum(os.path.basename(cgroup) in line for line in text.splitlines()) == len(entries), text


def test_where_it_cannot_be_born_there_it_moves_there(cgroup: str, launcher: Launcher) -> None:
    # A v1 directory, whose name of the file is the same: CLONE_INTO_CGROUP says EBADF.
    freezer = "/sys/fs/cgroup/freezer"
    if not os.path.isdir(freezer):
        pytest.skip("no v1 hierarchy here")
    inner = f"{freezer}/{os.path.basename(cgroup)}"
    os.mkdir(inner)
    try:
        reading, writing = os.pipe()
        ended = launch(
            program("cat /proc/$$/cgroup", cgroup_procs=[f"{inner}/cgroup.procs"]), [0, writing, 2], launcher
        )
        os.close(writing)
        with open(reading, encoding="ascii") as file:
            text = file.read()
        assert (ended.failure, ended.status, ended.pid) == (None, 0, ended.launcher)
        assert f"freezer:{inner.removeprefix(freezer)}" in text
    finally:
        assert ending.remove([inner], DEADLINE)


# --- what the kernel takes, and what not ---


_LONGEST = 131_072  # MAX_ARG_STRLEN, with its NUL: include/uapi/linux/binfmts.h, 32 pages of 4 KiB


def test_the_longest_strings_that_the_kernel_takes(launcher: Launcher) -> None:
    word = "x" * (_LONGEST - 1)
    text = output('echo ${#A} $(echo "$0" | wc -c)', launcher, env={"A": word[2:], "PATH": "/usr/bin:/bin"})
    assert text.split()[0] == str(_LONGEST - 3)
    ended = launch(program(env={"A": word[1:]}), [0, 1, 2], launcher)
    assert ended.failure == ("exec", errno.E2BIG, "/bin/sh: Argument list too long")


def test_as_many_strings_as_the_kernel_takes(launcher: Launcher) -> None:
    # A quarter of the stack's limit, 6 MB at most, for strings and pointers: setup_arg_pages, fs/exec.c.
    limit = min(resource.getrlimit(resource.RLIMIT_STACK)[0] & (1 << 40) - 1, 24 << 20) // 4
    number = (limit - 8192) // (100 + 8)
    fits = Program(["/bin/sh", "-c", f"exit $(( $# == {number} ? 7 : 1 ))", "sh", *["y" * 99] * number], {}, "/", [])
    too_many = Program([*fits.argv, *["y" * 99] * 200], {}, "/", [])
    assert launch(fits, [0, 1, 2], launcher).status == 7
    failure = launch(too_many, [0, 1, 2], launcher).failure
    assert failure is not None
    assert failure[:2] == ("exec", errno.E2BIG)


def test_names_that_no_environment_has_are_refused() -> None:
    for name in ("", "A=B"):
        with pytest.raises(OSError, match="cannot be the name of an environment variable"):
            program(env={name: "x"})


# --- how it fails ---


def _cases(place: Path) -> list[tuple[Program, str, int, str]]:
    (place / "text").write_text("#!/no/such\n")
    (place / "garbage").write_bytes(b"\x7fELF garbage")
    (place / "garbage").chmod(0o755)
    null = os.open("/dev/null", os.O_RDONLY)  # closed by the caller: the first of the list
    simple = {"env": {}, "cwd": "/", "cgroup_procs": []}

    def of(argv: str, **options: object) -> Program:
        return Program([argv], **{**simple, **options})  # type: ignore[arg-type]

    return [
        (of("/bin/true", mounts=null), "mounts", errno.EINVAL, "its mount namespace"),
        (of("/bin/true", cgroup_procs=["/no/such/cgroup.procs"]), "cgroup", errno.ENOENT, "/no/such/cgroup.procs"),
        (of("/bin/true", cgroup_procs=["/dev/null", "/dev/full"]), "cgroup", errno.ENOSPC, "/dev/full"),
        (of("/bin/true", cgroup_procs=["/proc/self/tasks", "x"]), "cgroup", errno.ENOENT, "/proc/self/tasks"),
        (of("/bin/true", cwd="/no/such"), "cwd", errno.ENOENT, "/no/such"),
        (of("/bin/true", cwd=str(place / "text")), "cwd", errno.ENOTDIR, str(place / "text")),
        (of("/no/such"), "exec", errno.ENOENT, "/no/such"),
        (of(str(place / "text")), "exec", errno.EACCES, str(place / "text")),
        (of(str(place / "garbage")), "exec", errno.ENOEXEC, str(place / "garbage")),
    ]


def test_each_failure_says_how_far_it_came_with_its_errno(tmp_path: Path, launcher: Launcher) -> None:
    cases = _cases(tmp_path)
    try:
        for asked, stage, number, subject in cases:
            ended = launch(asked, [0, 1, 2], launcher)
            assert ended.failure == (stage, number, f"{subject}: {os.strerror(number)}")
            assert ended.status == 120
    finally:
        os.close(cases[0][0].mounts)


def test_fds_that_cannot_be_placed_are_told() -> None:
    with contextlib.closing(Limited()) as launcher:
        failure = launch(program(), [0, 1, 2], launcher).failure
    assert failure == ("fds", errno.EINVAL, "its file descriptors: Invalid argument")


def test_a_missing_or_damaged_launcher_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(Path(binary_path()).read_bytes()[:40])
    damaged.chmod(0o755)
    other = Path(shutil.copy("/bin/true", tmp_path / "other"))
    for path, number in ((tmp_path / "none", errno.ENOENT), (damaged, errno.ENOEXEC)):
        words = f"cannot run the launcher {path}: {os.strerror(number)}"
        with contextlib.closing(Launcher(str(path))) as launcher, pytest.raises(OSError, match=words) as caught:
            launch(program(), [0, 1, 2], launcher)
        assert caught.value.errno == number
    with contextlib.closing(Launcher(str(other))) as launcher:  # a program, but not this one
        ended = launch(program(), [0, 1, 2], launcher)
    assert (ended.pid, ended.failure) == (0, None)


def test_it_refuses_an_order_that_is_none(launcher: Launcher) -> None:
    for content in (b"", b"x" * 79, b"x" * 200, b"\0" * 200):
        order = os.memfd_create("order")
        os.write(order, content)
        pid = launcher.run(order, [])
        os.close(order)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 64


def test_the_committed_launchers_are_small_and_static() -> None:
    for machine in MACHINES:
        data = Path(binary_path(machine)).read_bytes()
        assert len(data) < 4096
        assert data[:4] == b"\x7fELF"
        assert b"ld-linux" not in data


def test_both_sides_know_the_same_stages() -> None:
    source = (ROOT / "native" / "launch" / "launch.c").read_text()
    stages = source[source.index("enum { STAGE_MOUNTS") :].split("};")[0]
    words = stages.replace("enum {", "").replace("= 1", "").split(",")
    assert [word.strip().removeprefix("STAGE_").lower() for word in words] == list(launches._STAGES.values())
