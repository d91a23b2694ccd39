"""The launcher: what it makes of an order, how it fails, and who dies in the middle of it."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - a test may block its own event loop

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
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    cgroup_of_tests,
    children_of,
    fd_count,
    keeper_at,
    sh,
    sh_exit,
    until,
    wait_ended,
)

import unisandbox
from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import Keeper, Spawned, SpawnFailed, launches
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


@pytest.fixture
def cgroup() -> Iterator[str]:
    with cgroup_of_tests() as path:
        yield path


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


# --- who dies in the middle ---


class Held:
    """A launch by a keeper that stops in its middle: it has been born, and opens a FIFO that nobody reads yet."""

    def __init__(self, keeper: Keeper, place: Path, cgroup: str) -> None:
        self.keeper = keeper
        self.fifo = place / "fifo"
        self.mark = place / "mark"
        self.entries = [f"{cgroup}/cgroup.procs", str(self.fifo)]
        os.mkfifo(self.fifo)
        self.answer: Spawned | SpawnFailed | None = None

    async def spawn(self) -> None:
        try:
            self.answer = await sh(self.keeper, f"echo > {self.mark}; exit 9", "held", cgroup_procs=self.entries)
        except SpawnFailed as error:
            self.answer = error

    async def processes(self) -> tuple[int, int]:
        """The launcher, and the process that it has made."""
        while True:
            found = children_of(self.keeper.pid)
            inside = [int(pid) for pid in Path(self.entries[0]).read_text().split()]
            if len(inside) == 1 and len(found) == 2:
                return next(pid for pid in found if pid not in inside), inside[0]
            await anyio.sleep(0.002)


async def test_a_launcher_killed_after_the_birth_changes_nothing(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        reader = -1
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                launcher, pid = await held.processes()
                os.kill(launcher, signal.SIGKILL)
                until(lambda: launcher not in children_of(keeper.pid), "it is reaped")
                assert held.answer is None
                reader = os.open(held.fifo, os.O_RDONLY | os.O_NONBLOCK)
        os.close(reader)
        assert isinstance(held.answer, Spawned)
        assert held.answer.pid == pid
        assert os.waitstatus_to_exitcode((await keeper.wait_exit(pid, held.answer.start_time)).status) == 9
        assert children_of(keeper.pid) == []


async def test_a_program_killed_before_its_exec_has_an_exact_exit(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                os.kill(pid, signal.SIGKILL)
        assert isinstance(held.answer, Spawned)
        record = await keeper.wait_exit(pid, held.answer.start_time)
        assert (held.answer.pid, os.waitstatus_to_exitcode(record.status)) == (pid, -signal.SIGKILL)
        until(lambda: children_of(keeper.pid) == [], "nothing is left")
        assert not held.mark.exists()
        exits, _ = await keeper.exits_after(0)
        assert [record.pid for record in exits] == [pid]


async def test_both_killed_is_told_as_an_exit_of_the_program(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                launcher, pid = await held.processes()
                os.kill(launcher, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
        assert isinstance(held.answer, Spawned)
        record = await keeper.wait_exit(pid, held.answer.start_time)
        assert os.waitstatus_to_exitcode(record.status) == -signal.SIGKILL


async def test_a_launch_that_hangs_holds_up_no_other_and_can_be_cancelled(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                for code in range(5):
                    record = await sh_exit(keeper, f"exit {code}", f"other{code}")
                    assert os.waitstatus_to_exitcode(record.status) == code
                group.cancel_scope.cancel()
        until(lambda: children_of(keeper.pid) == [], "it is killed")
        assert not os.path.exists(f"/proc/{pid}")
        await keeper.held()
        assert fd_count(keeper.pid) == fds


async def test_a_program_does_not_run_when_the_keeper_was_killed_meanwhile(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                os.kill(keeper.pid, signal.SIGKILL)
                wait_ended(keeper.pid)
                reader = os.open(held.fifo, os.O_RDONLY | os.O_NONBLOCK)
                wait_ended(pid)
                os.close(reader)
                group.cancel_scope.cancel()
        assert not held.mark.exists()


# Kills what is on its way between the keeper and a program: a launcher, or what it has made before its exec. Their name
# is the number of the launcher's memory file.
_KILLER = """
import os, random, signal, sys, time
path = f"/proc/{sys.argv[1]}/task/{sys.argv[1]}/children"
while True:
    for pid in open(path).read().split():
        try:
            if open(f"/proc/{pid}/comm").read().strip().isdigit() and random.random() < 0.3:
                os.kill(int(pid), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass
"""


async def test_launchers_killed_at_any_moment_leave_no_spawn_without_an_answer(
    tmp_path: Path, cgroup: str, count: Callable[[int], int]
) -> None:
    number = count(2000)
    outcomes: dict[str, int] = {}
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)

        async def one(key: int) -> None:
            try:
                record = await sh_exit(keeper, "exit 9", f"k{key}", cgroup_procs=[f"{cgroup}/cgroup.procs"])
            except SpawnFailed as error:
                what = "never born" if (error.stage, error.errno) == ("fork", errno.ECHILD) else str(error)
            else:
                code = os.waitstatus_to_exitcode(record.status)
                assert code in {9, -signal.SIGKILL}
                what = "ran" if code == 9 else "killed before it ran"
            outcomes[what] = outcomes.get(what, 0) + 1

        with subprocess.Popen([sys.executable, "-S", "-c", _KILLER, str(keeper.pid)]) as killer:
            try:
                for first in range(0, number, 20):
                    async with anyio.create_task_group() as group:
                        for key in range(first, first + 20):
                            group.start_soon(one, key)
            finally:
                killer.kill()
        until(lambda: children_of(keeper.pid) == [], "nothing is left")
        await keeper.held()
        assert fd_count(keeper.pid) == fds
        exits, _ = await keeper.exits_after(0)
    assert set(outcomes) <= {"never born", "killed before it ran", "ran"}
    assert sum(outcomes.values()) == number
    assert outcomes["ran"]
    assert len({record.seq for record in exits}) == len(exits)


async def test_quick_exits_are_never_somebody_elses(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        got: dict[int, int] = {}

        async def one(code: int) -> None:
            record = await sh_exit(keeper, f"exit {code}", f"k{code}", cgroup_procs=[f"{cgroup}/cgroup.procs"])
            got[code] = os.waitstatus_to_exitcode(record.status)

        async with anyio.create_task_group() as group:
            for code in range(120):
                group.start_soon(one, code)
        assert got == {code: code for code in range(120)}
        exits, _ = await keeper.exits_after(0)
        assert len(exits) == 120
        until(lambda: children_of(keeper.pid) == [], "no launcher is left")


_HOST = """
import anyio, sys, unisandbox
from unisandbox.host.keeper import Keeper, SpawnFailed
async def main():
    keeper = await Keeper.start(sys.argv[1] + "/state", workdir=sys.argv[1] + "/work")
    for key in "ab":
        try:
            await keeper.spawn(key, ["/bin/true"], env={})
        except SpawnFailed as error:
            print(error.stage, error.errno, error.strerror)
    await keeper.close()
anyio.run(main)
"""


@pytest.mark.parametrize("kind", ["missing", "damaged", "another"])
async def test_a_keeper_without_its_launcher_says_so_and_lives_on(tmp_path: Path, kind: str) -> None:
    source = Path(next(iter(unisandbox.__path__)))
    copy = shutil.copytree(source, tmp_path / "src" / "unisandbox", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / Path(binary_path()).relative_to(source)
    damage: dict[str, Callable[[], object]] = {
        "missing": path.unlink,
        "damaged": lambda: path.write_bytes(b"\x7fELF"),
        "another": lambda: shutil.copy("/bin/true", path),
    }
    damage[kind]()
    code = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n{_HOST}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = {
        "missing": f"{errno.ENOENT} cannot start a program: cannot run the launcher {path}: No such file or directory",
        "damaged": f"{errno.ENOEXEC} cannot start a program: cannot run the launcher {path}: Exec format error",
        "another": f"{errno.ECHILD} cannot start a program: the launcher {path} ended before it could start a program",
    }
    assert done.stdout.splitlines() == [f"fork {words[kind]}"] * 2


async def test_programs_start_when_the_package_is_gone(tmp_path: Path) -> None:
    source = Path(next(iter(unisandbox.__path__)))
    copy = shutil.copytree(source, tmp_path / "src" / "unisandbox", ignore=shutil.ignore_patterns("__pycache__"))
    gone = f"import shutil; shutil.rmtree({str(copy / 'host' / 'keeper' / 'bin')!r})"
    body = _HOST.replace('    for key in "ab":', f"    {gone}\n    for key in 'ab':")
    code = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n{body}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_both_sides_know_the_same_stages() -> None:
    source = (ROOT / "native" / "launch" / "launch.c").read_text()
    stages = source[source.index("enum { STAGE_MOUNTS") :].split("};")[0]
    words = stages.replace("enum {", "").replace("= 1", "").split(",")
    assert [word.strip().removeprefix("STAGE_").lower() for word in words] == list(launches._STAGES.values())
