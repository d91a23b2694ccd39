"""What the keeper starts: programs and jobs, with exact ends."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC230, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    children_of,
    fd_count,
    keeper_at,
    sh,
    sh_exit,
    sh_output,
    until,
)

from unisandbox.host.keeper import ExitRecord, Guard, JobFailed, Keeper, SpawnFailed

pytestmark = [pytest.mark.anyio, pytest.mark.root]


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
