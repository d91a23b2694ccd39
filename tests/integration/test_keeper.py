"""The promises of the keeper: what it starts, holds, undoes, and how it ends."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC230, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import errno
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    cgroup_of_tests,
    children_of,
    fd_count,
    files_of,
    keeper_at,
    sh,
    sh_exit,
    sh_output,
    until,
    wait_ended,
)

from unisandbox.api.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.host.keeper import ExitRecord, Guard, JobFailed, Keeper, SpawnFailed
from unisandbox.host.removal import remove_tree

pytestmark = [pytest.mark.anyio, pytest.mark.root]


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


# --- the process ---


async def test_the_keeper_is_a_clean_process_of_its_own(tmp_path: Path) -> None:
    leaked = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        async with keeper_at(tmp_path) as keeper:
            status = status_of(keeper.pid)
            links = files_of(keeper.pid)
            environment = Path(f"/proc/{keeper.pid}/environ").read_bytes()

            assert keeper.hello.pid == keeper.pid
            assert keeper.hello.owner
            assert keeper.hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            assert status["Name"] == "unisandbox-keep"
            assert int(status["PPid"]) != os.getpid()
            assert status["Umask"] == "0077"
            assert int(status["SigBlk"], 16) == 0
            assert os.readlink(f"/proc/{keeper.pid}/cwd") == "/"
            assert os.getsid(keeper.pid) != os.getsid(0)
            assert "/dev/zero" not in links
            assert b"PATH=" not in environment
            assert keeper.hello.private_mounts
            assert os.readlink(f"/proc/{keeper.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
            assert not [link for link in links if not link.startswith(("/", "socket:", "pipe:", "anon_inode:", "mnt:"))]
    finally:
        os.close(leaked)


async def test_mounts_are_private_and_hidden_paths_are_empty(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "secret").write_text("x")
    before = Path("/proc/self/mountinfo").read_text()
    async with keeper_at(tmp_path, hide=[str(hidden)]) as keeper:
        root = f"/proc/{keeper.pid}/root"
        seen = os.listdir(f"{root}{hidden}")
        with pytest.raises(OSError, match="Read-only"):
            Path(f"{root}{hidden}/new").write_text("x")
        Path(f"{root}{tmp_path}/work/inside").write_text("x")

        assert seen == []
        assert os.stat(f"{root}{tmp_path}/work").st_mode & 0o7777 == 0o711
        assert os.listdir(tmp_path / "work") == []
        assert Path("/proc/self/mountinfo").read_text() == before


async def test_a_state_directory_with_a_very_long_path_works(tmp_path: Path) -> None:
    place = tmp_path / ("a" * 100) / ("b" * 100)
    place.mkdir(parents=True)
    async with keeper_at(place):
        other = await Keeper.attach(f"{place}/state")
        assert (await sh_exit(other, "exit 3")).status == 3 << 8
        other.abandon()


async def test_a_second_start_names_the_owner_and_harms_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        with pytest.raises(FailedPreconditionError, match=f"process {os.getpid()} .*keeper is {keeper.pid}"):
            await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work")
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8


async def test_a_state_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(FailedPreconditionError, match="not ours alone"):
        await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work")


async def test_a_keeper_that_cannot_begin_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"could not begin: .*No such file.*/no/such"):
        await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work", hide=["/no/such"])
    async with keeper_at(tmp_path):
        pass


async def test_attaching_to_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no such directory"):
        await Keeper.attach(f"{tmp_path}/state")
    async with keeper_at(tmp_path) as keeper:
        await keeper.close()
    with pytest.raises(UnavailableError, match="there is none"):
        await Keeper.attach(f"{tmp_path}/state")


async def test_start_close_start_leaves_no_thread_fd_or_child(tmp_path: Path) -> None:
    fds, threads = fd_count(os.getpid()), threading.active_count()
    for _ in range(3):
        async with keeper_at(tmp_path) as keeper:
            await sh_exit(keeper, "exit 1")
            assert threading.active_count() == threads
            report = await keeper.close()
            assert (report.done, report.failures) == (0, 0)
            assert await keeper.close() == report
    assert fd_count(os.getpid()) == fds
    assert sorted(os.listdir(tmp_path / "state")) == ["keeper.log", "lock"]
    assert (tmp_path / "state/keeper.log").read_text() == ""


# --- programs ---


@pytest.mark.parametrize("code", [0, 1, 42, 127, 255])
async def test_exit_codes_are_exact(tmp_path: Path, code: int) -> None:
    async with keeper_at(tmp_path) as keeper:
        record = await sh_exit(keeper, f"exit {code}")
        assert os.waitstatus_to_exitcode(record.status) == code


async def test_every_signal_is_exact(tmp_path: Path) -> None:
    fatal = sorted(
        signal.valid_signals()
        - {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
        - {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    )
    async with keeper_at(tmp_path) as keeper:
        for number in fatal:
            record = await sh_exit(keeper, f"ulimit -c 0; kill -{int(number)} $$; exit 99")
            assert os.waitstatus_to_exitcode(record.status) == -number


async def test_exactly_the_given_fds_are_open_in_the_child(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open(target, "wb") as out:
        async with keeper_at(tmp_path) as keeper:
            null = os.open("/dev/null", os.O_RDONLY)
            held = os.open("/dev/zero", os.O_RDONLY)
            await keeper.hold("zero", held)
            spawned = await keeper.spawn(
                "fds", ["/bin/ls", "-l", "/proc/self/fd"], env={}, fds=[null, out.fileno(), out.fileno(), held]
            )
            record = await keeper.wait_exit(spawned.pid, spawned.start_time)
            for fd in (null, held, spawned.pidfd):
                os.close(fd)
    arrows = dict(line.split(" -> ") for line in target.read_text().splitlines() if " -> " in line)
    opened = {name.split()[-1]: where for name, where in arrows.items()}
    assert record.status == 0
    listing = opened.pop("4")  # ls's own look at the directory
    assert listing.startswith("/proc/")
    assert opened == {"0": "/dev/null", "1": str(target), "2": str(target), "3": "/dev/zero"}


async def test_sources_of_fds_may_lie_where_others_go(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        pipes = [os.pipe() for _ in range(40)]
        writers = [writing for _, writing in pipes]
        script = 'i=0; while [ $i -lt 40 ]; do eval "echo $i >/proc/self/fd/$i"; i=$((i+1)); done'
        await sh_exit(keeper, script, fds=writers)
        for writing in writers:
            os.close(writing)
        got = []
        for reading, _ in pipes:
            with open(reading, "rb") as file:
                got.append(int(file.read()))
        assert got == list(range(40))


async def test_a_program_starts_with_default_signals_and_its_own_environment(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        output = await sh_output(
            keeper, "grep -E '^Sig(Blk|Ign)|^Umask' /proc/self/status; pwd; echo $SECRET-$$; ulimit -n", cwd="/usr"
        )
        env = await keeper.spawn("env", ["/usr/bin/env"], env={"A": "b\udcffc"}, fds=[])
        os.close(env.pidfd)
    lines = output.decode().split()
    assert lines[:5] == ["Umask:", "0022", "SigBlk:", "0" * 16, "SigIgn:"]
    assert int(lines[5], 16) & ~(3 << 31) == 0  # 32 and 33 are libc's own; nobody can set them
    assert lines[6] == "/usr"
    assert int(lines[8]) <= int(subprocess.check_output(["/bin/sh", "-c", "ulimit -n"]))


async def test_a_program_that_cannot_be_started_says_how_far_it_came(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/no/such\n")
    cases = [
        ({"argv": ["/no/such"], "env": {}}, "exec", errno.ENOENT),
        ({"argv": [str(plain)], "env": {}}, "exec", errno.EACCES),
        ({"argv": ["/bin/true"], "env": {}, "cwd": "/no/such"}, "cwd", errno.ENOENT),
        ({"argv": ["/bin/true"], "env": {}, "cgroup_procs": ["/no/such/cgroup.procs"]}, "cgroup", errno.ENOENT),
    ]
    async with keeper_at(tmp_path) as keeper:
        for number, (request, stage, code) in enumerate(cases):
            for _ in range(2):  # the same key: the same answer
                with pytest.raises(SpawnFailed) as caught:
                    await keeper.spawn(f"k{number}", **request)  # type: ignore[arg-type]
                assert (caught.value.stage, caught.value.errno) == (stage, code)
        exits, _ = await keeper.exits_after(0)
        assert exits == []
        with pytest.raises(SpawnFailed, match="argv must begin with a path"):
            await keeper.spawn("relative", ["true"], env={})


@pytest.fixture
def cgroup() -> Iterator[str]:
    with cgroup_of_tests() as path:
        yield path


async def test_a_program_is_in_its_cgroup_before_it_runs(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        output = await sh_output(keeper, "cat /proc/self/cgroup", cgroup_procs=[f"{cgroup}/cgroup.procs"])
    assert os.path.basename(cgroup) in output.decode()


async def test_guards_end_and_remove_cgroups_also_where_the_keeper_does_not_see_them(
    tmp_path: Path, cgroup: str
) -> None:
    hide = [os.path.dirname(cgroup)]
    inside = f"{cgroup}/s1"
    async with keeper_at(tmp_path, hide=hide) as keeper:
        await keeper.guard([Guard("kill", "kill_cgroup", [inside]), Guard("remove", "rmdir_cgroup", [inside])])
        os.mkdir(inside)
        # Not a child of the keeper: only the cgroup leads to it.
        with subprocess.Popen(["/bin/sleep", "1000"]) as stranger:
            Path(f"{inside}/cgroup.procs").write_text(str(stranger.pid))
            report = await keeper.close()
            assert stranger.wait(DEADLINE) == -signal.SIGKILL
    assert report.failures == 0, report
    assert not os.path.exists(inside)


async def test_a_repeated_key_starts_nothing_and_answers_the_same(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        first = await sh(keeper, "read x; echo x >> " + str(tmp_path / "runs"), key="k", fds=[])
        other = await Keeper.attach(f"{tmp_path}/state")
        again = await other.spawn("k", ["/bin/false"], env={})
        assert (again.pid, again.start_time) == (first.pid, first.start_time)
        if again.pidfd >= 0:
            os.close(again.pidfd)
        assert (await other.wait_exit(first.pid, first.start_time)).status == 0
        late = await other.spawn("k", ["/bin/false"], env={})
        assert (late.pid, late.start_time, late.pidfd) == (first.pid, first.start_time, -1)
        other.abandon()
    assert (tmp_path / "runs").read_text() == "x\n"


async def test_orphans_are_reaped_and_their_exits_exact(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        gate, opener = os.pipe()
        script = "(read x; exit 7) <&3 >/dev/null & p=$!; cut -d' ' -f22 /proc/$p/stat; echo $p"
        await sh_exit(keeper, script, fds=[0, writing, 2, gate])
        os.close(writing)
        with open(reading, "rb") as file:
            start_time, pid = map(int, file.read().split())
        os.close(gate)
        os.close(opener)
        record = await keeper.wait_exit(pid, start_time)
        assert os.waitstatus_to_exitcode(record.status) == 7
        assert not os.path.exists(f"/proc/{pid}")


async def test_many_tasks_may_wait_for_one_exit(tmp_path: Path) -> None:
    records: list[ExitRecord] = []

    async def wait(keeper: Keeper, pid: int, start_time: int) -> None:
        records.append(await keeper.wait_exit(pid, start_time))

    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        spawned = await sh(keeper, "read x; exit 5", fds=[reading])
        os.close(reading)
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(wait, keeper, spawned.pid, spawned.start_time)
            await anyio.wait_all_tasks_blocked()
            os.close(writing)
        records.append(await keeper.wait_exit(spawned.pid, spawned.start_time))
    assert len(records) == 11
    assert len(set(records)) == 1


async def test_an_exit_that_cannot_be_known_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        with anyio.fail_after(DEADLINE), pytest.raises(ProcessLookupError):
            await keeper.wait_exit(os.getpid(), 1)


async def test_a_cancelled_spawn_leaves_nothing_running(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        mark = f"86{os.getpid() % 1000:03}"
        finished: list[int] = []

        async def start(key: str) -> None:
            finished.append((await sh(keeper, f"exec sleep {mark}", key)).pid)

        for number in range(20):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(start, f"k{number}")
                    for _ in range(number % 5):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await keeper.exits_after(0)  # an answer: all that was said before has been heard
        for pid in finished:  # quicker than the cancellation: they run, and rightly so
            os.kill(pid, signal.SIGKILL)
        pattern = f"sleep\0{mark}\0".encode()

        def running() -> list[str]:
            found = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if Path(f"/proc/{pid}/cmdline").read_bytes() == pattern:
                        found.append(pid)
                except (FileNotFoundError, ProcessLookupError):
                    pass
            return found

        until(lambda: not running(), "all are dead")


async def test_many_requests_at_once_are_all_answered(tmp_path: Path) -> None:
    codes: dict[int, int] = {}

    async def one(keeper: Keeper, number: int) -> None:
        record = await sh_exit(keeper, f"exit {number % 256}", key=f"k{number}")
        codes[number] = os.waitstatus_to_exitcode(record.status)

    async with keeper_at(tmp_path) as keeper:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(400):
                    group.start_soon(one, keeper, number)
    assert codes == {number: number % 256 for number in range(400)}


# --- holding ---


async def test_what_is_held_outlives_the_client_and_can_be_reached(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        number = await keeper.hold("a/pipe", writing)
        os.close(writing)
        with pytest.raises(FileExistsError):
            await keeper.hold("a/pipe", reading)
        fd = os.open(f"/proc/{keeper.pid}/fd/{number}", os.O_WRONLY)
        os.write(fd, b"1")
        os.close(fd)
        copy = await keeper.take("a/pipe")
        assert not os.get_inheritable(copy)
        os.write(copy, b"2")
        os.close(copy)
        await keeper.hold("b/other", reading)
        assert await keeper.held("a/") == {"a/pipe": number}
        assert sorted(await keeper.held()) == ["a/pipe", "b/other"]
        await keeper.drop(["a/pipe", "no such"])
        with open(reading, "rb") as file:
            assert file.read() == b"12"  # with its end: nobody holds the other side any more
        with pytest.raises(FileNotFoundError):
            await keeper.take("a/pipe")


async def test_thousands_of_names_are_listed_whole(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        null = os.open("/dev/null", os.O_RDONLY)
        names = [f"name-{number:04}" for number in range(2500)]
        for name in names:
            await keeper.hold(name, null)
        os.close(null)
        assert sorted(await keeper.held()) == names
        before = fd_count(keeper.pid)
        await keeper.drop(names)
        assert fd_count(keeper.pid) == before - 2500


async def test_a_ring_keeps_the_last_bytes_only(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        await keeper.spools.ring("out", reading, limit=100_000)
        os.close(reading)
        block = bytes(range(250)) * 400  # 100,000 bytes
        for _ in range(5):
            await anyio.to_thread.run_sync(os.write, writing, block)
        os.write(writing, b"the end")
        os.close(writing)
        offset, data = 0, b""
        while True:
            part = await keeper.spools.ring_read("out", offset, limit=70_000, wait=DEADLINE)
            if part.begin > offset:
                data = b""
            data += part.data
            offset = part.next
            if part.eof:
                break
        assert offset == 500_007
        assert (await keeper.spools.ring_read("out", 0)).begin == 400_007
        whole = await keeper.spools.ring_read("out", 0, limit=1 << 20)
        assert whole.data == (block + b"the end")[-100_000:]
        assert whole.eof
        assert data.endswith(whole.data[-50_000:])
        assert await keeper.held() == {"out": -1}


async def test_a_read_of_a_ring_waits_for_what_comes(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        master, slave = pty.openpty()
        await keeper.spools.ring("tty", master)
        os.close(master)
        assert (await keeper.spools.ring_read("tty", 0, wait=0.01)).data == b""
        got: list[bytes] = []

        async def read() -> None:
            got.append((await keeper.spools.ring_read("tty", 0, wait=DEADLINE)).data)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            os.write(slave, b"hello")
        os.close(slave)  # a terminal says EIO then
        end = await keeper.spools.ring_read("tty", 5, wait=DEADLINE)
        assert got == [b"hello"]
        assert end.eof
        with pytest.raises(FileNotFoundError):
            await keeper.spools.ring_read("no such", 0)


async def test_a_ring_that_holds_nothing_takes_no_room(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        for number in range(5):
            await keeper.spools.ring(f"{number}", reading, limit=200 << 20)
        with open("/etc/passwd", "rb") as file, pytest.raises(PermissionError):
            await keeper.spools.ring("file", file.fileno())
        os.close(reading)
        os.close(writing)


# --- jobs ---


async def test_a_job_runs_in_the_keepers_mounts_and_its_fds_are_held(tmp_path: Path) -> None:
    work = f"{tmp_path}/work"
    async with keeper_at(tmp_path) as keeper:
        os.mkdir(f"/proc/{keeper.pid}/root{work}/rootfs")
        done = await keeper.job(
            [
                {
                    "do": "mounts",
                    "root": f"{work}/rootfs",
                    "ops": [{"op": "tmpfs", "path": "/", "size": 65536, "inodes": 10}],
                },
                {"do": "dirfd", "path": f"{work}/rootfs", "name": "root"},
            ],
            hold={"root": "s1/root"},
        )
        assert list(done.held) == ["s1/root"]
        assert os.readlink(f"/proc/{keeper.pid}/fd/{done.held['s1/root']}") == f"{work}/rootfs"
        mounts = Path(f"/proc/{keeper.pid}/mounts").read_text()
        assert f"{work}/rootfs tmpfs" in mounts
        await keeper.drop(["s1/root"])
        await keeper.job([{"do": "unmount", "path": f"{work}/rootfs", "rmdir": True}])
        exits, _ = await keeper.exits_after(0)
        assert exits == []  # a job is the keeper's own affair


async def test_a_failed_job_names_its_step(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        fds = fd_count(keeper.pid)
        steps: list[dict[str, object]] = [
            {"do": "dirfd", "path": "/usr", "name": "one"},
            {"do": "dirfd", "path": "/no/such", "name": "two"},
        ]
        with pytest.raises(JobFailed) as caught:
            await keeper.job(steps, hold={"one": "one", "two": "two"})
        assert (caught.value.index, caught.value.do, caught.value.errno) == (1, "dirfd", errno.ENOENT)
        with pytest.raises(JobFailed, match="unknown step"):
            await keeper.job([{"do": "no such"}])
        with pytest.raises(JobFailed, match="made no three"):
            await keeper.job(steps[:1], hold={"three": "three"})
        assert await keeper.held() == {}
        until(lambda: fd_count(keeper.pid) == fds, "nothing is left of the jobs but one worker")


async def test_a_job_is_killed_at_its_time(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        fds = fd_count(keeper.pid)
        with pytest.raises(JobFailed) as caught:
            await keeper.job([{"do": "dirfd", "path": "/usr", "name": "one"}], hold={"one": "one"}, timeout=0.0)
        assert caught.value.errno == errno.ETIMEDOUT
        await keeper.job([])
        assert await keeper.held() == {}
        until(lambda: fd_count(keeper.pid) == fds, "the job's fds are closed")


async def test_a_cancelled_job_holds_nothing_and_is_over_before_the_next_begins(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:

        async def job() -> None:
            done = await keeper.job([{"do": "dirfd", "path": "/usr", "name": "one"}], hold={"one": "one"})
            keeper.drop_now(list(done.held))  # it was quicker than the cancelling, which a request would meet

        for number in range(20):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(job)
                    for _ in range(number % 5):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await keeper.job([])
            assert await keeper.held() == {}


async def test_a_killed_job_takes_what_it_started_with_it(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.job([])
        fds = fd_count(keeper.pid)

        def stopped() -> bool:
            """Stop the mkfs that a job waits for: it will not end by itself."""
            for mkfs in (child for job in children_of(keeper.pid) for child in children_of(job)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(mkfs, signal.SIGSTOP)
                    return True
            return False

        async def jobs() -> None:
            image = {"op": "image", "path": "/mnt", "image": str(tmp_path / "image"), "size": 8 << 40, "unlink": True}
            ops = [{"op": "mkdir", "path": "/mnt"}, image]
            while True:
                await keeper.job([{"do": "mount_namespace"}, {"do": "mounts", "root": str(tmp_path), "ops": ops}])

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(jobs)
                with anyio.fail_after(20):
                    while not stopped():
                        await anyio.lowlevel.checkpoint()
                scope.cancel()
        await keeper.job([])
        until(lambda: len(children_of(keeper.pid)) == 1 and fd_count(keeper.pid) == fds, "mkfs has ended")


async def test_many_jobs_run_at_once(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        held: dict[str, int] = {}

        async def one(number: int) -> None:
            step = {"do": "dirfd", "path": "/usr", "name": "x"}
            held.update((await keeper.job([step], hold={"x": f"x{number}"})).held)

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(one, number)
        assert await keeper.held() == dict(sorted(held.items()))
        assert len(set(held.values())) == 50


# --- guards ---


async def test_guards_run_in_reverse_order_of_registration(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("x")
    (tmp_path / "kept").mkdir()
    async with keeper_at(tmp_path) as keeper:
        # rmdir succeeds only if the inner one has gone before: so the order is seen.
        await keeper.guard([Guard("a", "rmdir", [f"{tmp_path}/a"])])
        await keeper.guard([Guard("b", "rmdir", [f"{tmp_path}/a/b"]), Guard("c", "rmdir", [f"{tmp_path}/a/b/c"])])
        await keeper.guard([Guard("file", "unlink", [f"{tmp_path}/a/b/file"])])
        await keeper.guard([Guard("kept", "rmdir", [f"{tmp_path}/kept"])])
        await keeper.guard([Guard("missing", "unlink", [f"{tmp_path}/missing"])])
        await keeper.unguard(["kept", "no such"])
        report = await keeper.close()
    assert (report.done, report.failures) == (5, 0)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "kept").exists()


async def test_guards_are_dropped_with_what_has_their_names(tmp_path: Path) -> None:
    for name in ("s1", "s2", "s3"):
        (tmp_path / name).mkdir()
    async with keeper_at(tmp_path / "keeper") as keeper:
        await keeper.guard([Guard(f"{name}/tree", "rmdir", [f"{tmp_path}/{name}"]) for name in ("s1", "s2", "s3")])
        await keeper.drop(prefix="s1/", guards=True)
        await keeper.drop(["s2/tree"], prefix="s2/", guards=True)
        await keeper.drop(prefix="s3/")
    assert sorted(path.name for path in tmp_path.glob("s?")) == ["s1", "s2"]


async def test_guards_act_in_the_hosts_mount_namespace(tmp_path: Path) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    hidden = tmp_path / "hidden"
    (hidden / "tree").mkdir(parents=True)
    async with keeper_at(tmp_path, hide=[str(hidden)]) as keeper:
        await keeper.guard([Guard("m", "umount", [str(target)]), Guard("t", "remove_tree", [f"{hidden}/tree"])])
        subprocess.run(["mount", "-t", "tmpfs", "none", str(target)], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(target)], check=True)
        report = await keeper.close()
    assert report.failures == 0
    assert str(target) not in Path("/proc/self/mounts").read_text()
    assert not (hidden / "tree").exists()


async def test_a_guard_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    (tmp_path / "empty").mkdir()
    async with keeper_at(tmp_path) as keeper:
        await keeper.guard(
            [Guard("empty", "rmdir", [f"{tmp_path}/empty"]), Guard("full", "rmdir", [f"{tmp_path}/full"])]
        )
        report = await keeper.close()
    assert (report.done, report.failures) == (1, 1)
    assert "not empty" in report.failed["full"]
    assert not (tmp_path / "empty").exists()


async def test_close_without_guards_undoes_nothing_but_ends_every_process(tmp_path: Path) -> None:
    (tmp_path / "stays").mkdir()
    async with keeper_at(tmp_path) as keeper:
        await keeper.guard([Guard("g", "rmdir", [f"{tmp_path}/stays"])])
        spawned = await sh(keeper, "sleep 1000 & sleep 1000")
        await keeper.close(run_guards=False)
        wait_ended(spawned.pid)
    assert (tmp_path / "stays").exists()


@pytest.mark.parametrize("path", ["/", "relative", "/a/../b", "//", "/./", ""])
async def test_a_guard_for_a_dangerous_path_is_refused_at_once(tmp_path: Path, path: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        with pytest.raises(InvalidArgumentError, match="path"):
            await keeper.guard([Guard("g", "remove_tree", [path])])
    with pytest.raises(OSError, match="remove_tree"):
        remove_tree(path)


def test_remove_tree_follows_no_link_and_enters_no_mount(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "sub/mounted").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "sub/file").write_text("x")
    # A bind mount of the same file system: its device number is the same.
    subprocess.run(["mount", "--bind", str(outside), str(tree / "sub/mounted")], check=True)
    try:
        with pytest.raises(OSError, match="mounted"):
            remove_tree(str(tree))
    finally:
        subprocess.run(["umount", str(tree / "sub/mounted")], check=True)
    assert (outside / "precious").exists()
    assert not (tree / "link").is_symlink()
    assert not (tree / "sub/file").exists()
    remove_tree(str(tree))
    remove_tree(str(tree))
    assert not tree.exists()
    (tmp_path / "link").symlink_to(outside)
    remove_tree(str(tmp_path / "link"))
    assert (outside / "precious").exists()
    assert not (tmp_path / "link").is_symlink()


def test_remove_tree_takes_any_depth_with_few_fds(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    for level in range(3000):
        os.mkdir("d" * 200, dir_fd=fd)
        if level % 100 == 0:
            os.symlink("/etc", "link", dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    remove_tree(str(tree))
    assert not tree.exists()


# --- leases ---


async def test_two_keepers_never_lease_the_same_number(tmp_path: Path) -> None:
    ids = tmp_path / "ids-of-host"
    ids.mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with keeper_at(tmp_path / "1") as one, keeper_at(tmp_path / "2") as two:
        first = [await one.lease(str(ids), 10, 6, name=name) for name in ("", "b", "")]
        second = [await two.lease(str(ids), 10, 6, name=name) for name in "abc"]
        assert sorted(first + second) == list(range(10, 16))
        with pytest.raises(BlockingIOError, match="no free number from 10 to 15"):
            await two.lease(str(ids), 10, 6, name="d")
        await one.drop(["b"])
        assert await two.lease(str(ids), 10, 6, name="d") == first[1]
        os.kill(one.pid, signal.SIGKILL)
        wait_ended(one.pid)
        assert sorted([await two.lease(str(ids), 10, 6, name=name) for name in "ef"]) == [first[0], first[2]]
        assert (ids / "ids").stat().st_mode & 0o777 == 0o600
        await two.close()
    assert os.listdir(ids) == []


async def test_leases_stay_apart_while_the_file_comes_and_goes(tmp_path: Path) -> None:
    ids = tmp_path / "ids-of-host"
    ids.mkdir()
    taken: set[int] = set()

    async def churn(place: Path) -> None:
        async with keeper_at(place) as keeper:
            for _ in range(100):
                number = await keeper.lease(str(ids), 0, 4, name="n")
                assert number not in taken
                taken.add(number)
                await anyio.lowlevel.checkpoint()
                taken.discard(number)
                await keeper.drop(["n"])

    async with anyio.create_task_group() as group:
        for name in "abc":
            (tmp_path / name).mkdir()
            group.start_soon(churn, tmp_path / name)
    assert os.listdir(ids) == []


# --- clients ---


async def test_only_the_owner_may_close(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        with pytest.raises(FailedPreconditionError, match="owned by process"):
            await Keeper.attach(f"{tmp_path}/state", own=True)
        other = await Keeper.attach(f"{tmp_path}/state")
        assert not other.hello.owner
        assert other.pid == keeper.pid
        with pytest.raises(FailedPreconditionError, match="does not own"):
            await other.close()
        other.abandon()
        other.abandon()
        with pytest.raises(FailedPreconditionError, match="closed"):
            await other.held()
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8


async def test_a_request_that_is_too_large_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        with pytest.raises(InvalidArgumentError, match="at most 204800"):
            await keeper.spawn("k", ["/bin/true", "x" * 205_000], env={})
        with pytest.raises(InvalidArgumentError, match="at most 64"):
            await keeper.spawn("k", ["/bin/true"], env={}, fds=[0] * 65)
        spawned = await keeper.spawn("k", ["/bin/true", *["x" * 100_000] * 2], env={}, fds=[0] * 64)
        os.close(spawned.pidfd)
        assert (await keeper.wait_exit(spawned.pid, spawned.start_time)).status == 0


async def test_closing_ends_the_waits_of_other_tasks(tmp_path: Path) -> None:
    errors: list[Exception] = []

    async def wait(keeper: Keeper, pid: int, start_time: int) -> None:
        try:
            await keeper.wait_exit(pid, start_time)
        except Exception as error:
            errors.append(error)

    async with keeper_at(tmp_path) as keeper:
        spawned = await sh(keeper, "exec sleep 1000")
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(wait, keeper, spawned.pid, spawned.start_time)
                await anyio.wait_all_tasks_blocked()
                keeper.abandon(wait=DEADLINE)
    assert [type(error) for error in errors] == [FailedPreconditionError] * 3


async def test_exits_stay_findable_for_whoever_comes_late(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        records = [await sh_exit(keeper, f"exit {number}") for number in range(5)]
        late = await Keeper.attach(f"{tmp_path}/state", after=keeper.last_seq)
        assert await late.wait_exit(records[2].pid, records[2].start_time) == records[2]
        assert await late.exits_after(3) == (records[3:], 1)
        late.abandon()


async def test_a_connection_of_another_user_is_refused(tmp_path: Path) -> None:
    async with keeper_at(tmp_path):
        socket_path = tmp_path / "state/keeper.sock"
        assert socket_path.stat().st_mode & 0o777 == 0o600
        (tmp_path / "state").chmod(0o711)
        socket_path.chmod(0o666)
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_mode & 0o011 != 0o011 and directory != Path("/"):
                directory.chmod(directory.stat().st_mode | 0o011)
        before = os.getcwd()
        os.chdir(tmp_path / "state")
        script = (
            "import socket,sys\n"
            "s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\n"
            "s.connect('keeper.sock')\n"
            "s.settimeout(10)\n"
            "try: print(s.recv(100) == b'')\n"
            "except ConnectionResetError: print(True)\n"
        )
        try:
            answer = subprocess.run(
                ["/usr/bin/python3", "-c", script], user=65534, group=65534, capture_output=True, check=False
            )
        finally:
            os.chdir(before)
        assert answer.stdout == b"True\n", answer.stderr


# --- host programs of all kinds ---

_HOST = """
import anyio, ctypes, os, signal, sys
from unisandbox.host.keeper import Keeper
{before}
async def main():
    keeper = await Keeper.start(sys.argv[1] + "/state", workdir=sys.argv[1] + "/work")
    spawned = await keeper.spawn("k", ["/bin/sh", "-c", "exit 9"], env={{}})
    record = await keeper.wait_exit(spawned.pid, spawned.start_time)
    assert os.waitstatus_to_exitcode(record.status) == 9
    {inside}
    await keeper.close()
    {after}
anyio.run(main, backend=sys.argv[2])
{finally_}
"""


def run_host(tmp_path: Path, backend: str, *, prefix: tuple[str, ...] = (), **parts: str) -> None:
    program = _HOST.format(**{"before": "", "inside": "", "after": "", "finally_": "", **parts})
    argv = [*prefix, sys.executable, "-W", "error", "-c", program, str(tmp_path), backend]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_a_host_program_that_is_a_subreaper_is_left_with_no_child(tmp_path: Path, anyio_backend: str) -> None:
    run_host(
        tmp_path,
        anyio_backend,
        before="ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)",
        inside="assert f'PPid:\\t{os.getpid()}\\n' in open(f'/proc/{keeper.pid}/status').read()",
        finally_="try: print(os.waitpid(-1, os.WNOHANG)); sys.exit('a child is left')\nexcept ChildProcessError: pass",
    )


async def test_a_host_program_that_is_pid_1_is_left_with_no_child(tmp_path: Path, anyio_backend: str) -> None:
    run_host(
        tmp_path,
        anyio_backend,
        prefix=("unshare", "--pid", "--fork", "--mount-proc"),
        before="assert os.getpid() == 1",
        inside="assert 'PPid:\\t1\\n' in open(f'/proc/{keeper.pid}/status').read()",
        finally_="try: print(os.waitpid(-1, os.WNOHANG)); sys.exit('a child is left')\nexcept ChildProcessError: pass",
    )


async def test_a_host_program_that_reaps_everything_itself_works(tmp_path: Path, anyio_backend: str) -> None:
    run_host(tmp_path, anyio_backend, before="signal.signal(signal.SIGCHLD, signal.SIG_IGN)")


async def test_a_host_program_without_standard_fds_works(tmp_path: Path, anyio_backend: str) -> None:
    run_host(tmp_path, anyio_backend, before="[os.close(n) for n in (0, 1)]")


async def test_a_keeper_is_opened_and_closed_once_per_event_loop(tmp_path: Path, anyio_backend: str) -> None:
    run_host(tmp_path, anyio_backend, finally_="anyio.run(main, backend=sys.argv[2])")


async def test_a_keeper_may_be_opened_in_one_task_and_closed_in_another(tmp_path: Path) -> None:
    opened: list[Keeper] = []

    async def open_it() -> None:
        opened.append(await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work"))

    async def close_it() -> None:
        await opened[0].close()

    for step in (open_it, close_it):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
    assert not os.path.exists(f"{tmp_path}/state/keeper.sock")


async def test_a_fork_of_the_host_program_cannot_use_its_keeper(tmp_path: Path, anyio_backend: str) -> None:
    run_host(
        tmp_path,
        anyio_backend,
        inside=(
            "pid = os.fork()\n"
            "    if pid == 0:\n"
            "        try: keeper._link.check()\n"
            "        except Exception as error: os._exit(7 if 'of which this is a fork' in str(error) else 8)\n"
            "        os._exit(9)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7"
        ),
    )


async def test_a_start_that_is_cancelled_leaves_no_keeper(tmp_path: Path) -> None:
    for delay in (0.0, 0.001, 0.01, 0.02, 0.03):
        with anyio.move_on_after(delay):
            keeper = await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work")
            await keeper.close()
    async with keeper_at(tmp_path):  # so the lock is free
        pass


async def test_sockets_are_not_inherited(tmp_path: Path) -> None:
    async with keeper_at(tmp_path):
        kinds = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _inheritable(int(fd)))
        assert not [kind for kind in kinds if kind.startswith(("socket:", "anon_inode:[pidfd]"))]


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd) and fd > 2 and socket.socket is not None
    except OSError:
        return False
