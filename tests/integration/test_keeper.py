"""The promises of the keeper: what it is, who may use it, and how it ends."""

# ruff: noqa: ASYNC221, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    fd_count,
    files_of,
    keeper_at,
    sh,
    sh_exit,
)

from unisandbox.api.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.host.keeper import Keeper

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
