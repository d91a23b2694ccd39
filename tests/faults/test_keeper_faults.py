"""What the keeper does when its clients, itself or the machine fail. Big counts run in full with --long."""

# ruff: noqa: ASYNC221, ASYNC230, ASYNC240 - a test may block its own event loop
# ruff: noqa: PT012 - where the error comes from a loop, the loop is what raises

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    adopt,
    fd_count,
    host,
    keeper_at,
    private_bytes,
    publish,
    said,
    sh,
    sh_exit,
    until,
    wait_ended,
)

from unisandbox.api.errors import FailedPreconditionError, UnavailableError
from unisandbox.host.keeper import ExitRecord, Guard, Keeper, SpawnFailed, starting

pytestmark = [pytest.mark.anyio, pytest.mark.root]

_RUNNING = """
    for name in ("tree", "tree/sub"):
        await keeper.guard([Guard(name, "rmdir", [f"{place}/{name}"])])
        os.mkdir(f"{place}/{name}")
    script = "sleep 1000 & echo $!; exec sleep 1000"
    await keeper.spawn("k", ["/bin/sh", "-c", script], env={"PATH": "/bin"}, fds=[0, 1, 2])
    await anyio.sleep_forever()
"""


# --- the client dies ---


async def test_after_kill_of_the_owner_the_guards_run_and_nothing_is_left(tmp_path: Path, anyio_backend: str) -> None:
    with host(tmp_path, anyio_backend, "stop", _RUNNING) as (program, keeper):
        orphan = int(said(program))
        program.kill()
        wait_ended(keeper)
        wait_ended(orphan)
    assert not (tmp_path / "tree").exists()
    assert sorted(os.listdir(tmp_path / "state")) == ["keeper.log", "lock"]
    async with keeper_at(tmp_path):  # and the directory is free
        pass


async def test_a_forked_child_that_keeps_the_socket_open_delays_nothing(tmp_path: Path, anyio_backend: str) -> None:
    body = "if (pid := os.fork()) == 0: time.sleep(1000)\n    print(pid, flush=True)" + _RUNNING
    with host(tmp_path, anyio_backend, "stop", body) as (program, keeper):
        child, orphan = int(said(program)), int(said(program))
        try:
            program.kill()
            wait_ended(keeper)
            wait_ended(orphan)
            assert Path(f"/proc/{child}").exists()
            assert not (tmp_path / "tree").exists()
        finally:
            os.kill(child, signal.SIGKILL)
            wait_ended(child)


async def test_the_last_words_of_a_dying_owner_count(tmp_path: Path, anyio_backend: str) -> None:
    # Exits that it never reads are in its socket then: the kernel answers the keeper's next read with ECONNRESET.
    body = """
    for n in range(20):
        await keeper.spawn(f"k{n}", ["/bin/true"], env={})
    os.kill(keeper.pid, signal.SIGSTOP)
    for n in range(100):
        os.mkdir(f"{place}/d{n}")
        await keeper.guard([Guard(f"d{n}", "rmdir", [f"{place}/d{n}"])])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with host(tmp_path, anyio_backend, "stop", body) as (program, keeper):
        program.wait()
        os.kill(keeper, signal.SIGCONT)
        wait_ended(keeper)
    assert sorted(os.listdir(tmp_path)) == ["state", "work"]


async def test_a_closed_connection_is_an_end_of_the_owner_too(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        (tmp_path / "d").mkdir()
        await keeper.guard([Guard("d", "rmdir", [f"{tmp_path}/d"])])
        assert keeper.abandon(wait=DEADLINE)
    assert not (tmp_path / "d").exists()


async def test_a_directory_in_which_numbers_were_leased_goes_with_the_keeper(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        (tmp_path / "d").mkdir()
        await keeper.guard([Guard("d", "rmdir", [f"{tmp_path}/d"])])
        await keeper.lease(f"{tmp_path}/d", 0, 10)
        assert keeper.abandon(wait=DEADLINE)
    assert not (tmp_path / "d").exists()


async def test_sigterm_of_the_keeper_undoes_everything(tmp_path: Path) -> None:
    async with keeper_at(tmp_path, policy="keep") as keeper:
        (tmp_path / "d").mkdir()
        await keeper.guard([Guard("d", "rmdir", [f"{tmp_path}/d"])])
        await keeper.held()
        os.kill(keeper.pid, signal.SIGTERM)
        wait_ended(keeper.pid)
        with pytest.raises(UnavailableError):
            await keeper.held()
    assert not (tmp_path / "d").exists()


async def test_a_keeper_that_ends_says_so_also_when_its_owner_died_as_it_asked_for_that(
    tmp_path: Path, anyio_backend: str
) -> None:
    """Who comes then waits for the end, and is not told that the dead one uses the directory."""
    body = """
    os.kill(keeper.pid, signal.SIGSTOP)
    keeper._link.say({"op": "retire"})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with host(tmp_path, anyio_backend, "keep", body) as (program, keeper):
        program.wait()
        os.kill(keeper, signal.SIGCONT)
        wait_ended(keeper)
    holder = starting.holder_in((tmp_path / "state/lock").read_bytes())
    assert holder.is_ending and holder.keeper == keeper  # noqa: PT018


# --- policy keep: detach and adopt ---


async def test_a_keeper_whose_proc_is_taken_away_still_ends(tmp_path: Path) -> None:
    """The tree in which it was started may be unmounted under it; without /proc it cannot list its children."""
    async with keeper_at(tmp_path) as keeper:
        child = await sh(keeper, "exec sleep 1000", fds=[0, 1, 2])
        subprocess.run(["nsenter", "-t", str(keeper.pid), "-m", "umount", "-l", "/proc"], check=True)
        os.kill(keeper.pid, signal.SIGTERM)
        wait_ended(keeper.pid)
        wait_ended(child.pid)


async def test_exits_while_nobody_was_attached_are_exact(tmp_path: Path, anyio_backend: str) -> None:
    codes = [0, 1, 7, 255]
    body = """
    for code in (0, 1, 7, 255):
        s = await keeper.spawn(f"k{code}", ["/bin/sh", "-c", f"read x; exit {code}"], env={}, fds=[0])
        print(s.pid, s.start_time, flush=True)
    s = await keeper.spawn("kill", ["/bin/sh", "-c", "read x; kill -9 $$"], env={}, fds=[0])
    print(s.pid, s.start_time, flush=True)
    await anyio.sleep_forever()
"""
    with host(tmp_path, anyio_backend, "keep", body) as (program, pid):
        processes = [tuple(map(int, said(program).split())) for _ in range(5)]
        program.kill()
        program.wait()
        assert program.stdin is not None
        program.stdin.close()  # only now they go on
        for number, _ in processes:
            wait_ended(number)
        with pytest.raises(FailedPreconditionError, match="waits for an owner"):
            until(lambda: json.loads((tmp_path / "state/lock").read_text())["owner"] == 0, "the owner is forgotten")
            await Keeper.start(f"{tmp_path}/state", workdir=f"{tmp_path}/work")
        keeper = await Keeper.attach(f"{tmp_path}/state", own=True)
        try:
            assert keeper.pid == pid
            assert keeper.hello.owner
            assert keeper.hello.policy == "keep"
            records = [await keeper.wait_exit(*process) for process in processes]
            assert [os.waitstatus_to_exitcode(record.status) for record in records] == [*codes, -9]
            assert sorted(record.seq for record in records) == [1, 2, 3, 4, 5]
            again = await keeper.spawn("k7", ["/bin/false"], env={})
            assert (again.pid, again.start_time) == processes[2]
        finally:
            await keeper.close()


async def test_the_keeper_waits_for_an_owner_again_and_again(tmp_path: Path) -> None:
    async with keeper_at(tmp_path, policy="keep") as first:
        null = os.open("/dev/null", os.O_RDONLY)
        await first.hold("null", null)
        os.close(null)
        first.abandon()
        for _ in range(5):
            keeper = await adopt(tmp_path)
            assert list(await keeper.held()) == ["null"]
            keeper.abandon()
        keeper = await adopt(tmp_path)
        await keeper.close()


# --- the keeper dies ---


async def test_when_the_keeper_is_killed_every_call_fails_and_none_hangs(tmp_path: Path) -> None:
    errors: list[str] = []

    async def wait(keeper: Keeper, pid: int, start_time: int) -> None:
        try:
            await keeper.wait_exit(pid, start_time)
        except UnavailableError as error:
            errors.append(str(error))

    async with keeper_at(tmp_path) as keeper:
        spawned = await sh(keeper, "exec sleep 1000")
        try:
            with anyio.fail_after(DEADLINE):
                async with anyio.create_task_group() as group:
                    for _ in range(3):
                        group.start_soon(wait, keeper, spawned.pid, spawned.start_time)
                    await anyio.wait_all_tasks_blocked()
                    os.kill(keeper.pid, signal.SIGKILL)
            for call in (keeper.held(), keeper.guard([]), sh(keeper, "true"), keeper.close()):
                with pytest.raises(UnavailableError, match=f"keeper {keeper.pid} .*has ended"):
                    await call
        finally:
            os.kill(spawned.pid, signal.SIGKILL)
            wait_ended(spawned.pid)
    assert [f"keeper {keeper.pid}" in error for error in errors] == [True] * 3
    async with keeper_at(tmp_path):  # the lock went with it
        pass


# --- load ---


async def test_many_spawns_grow_nothing(tmp_path: Path, count: Callable[[int], int]) -> None:
    async def some(keeper: Keeper, name: str, number: int) -> None:
        for index in range(number):
            spawned = await keeper.spawn(f"{name}-{index}", ["/bin/true"], env={})
            os.close(spawned.pidfd)
            record = await keeper.wait_exit(spawned.pid, spawned.start_time)
            assert record.status == 0

    async with keeper_at(tmp_path) as keeper:
        await some(keeper, "warm", 100)
        await keeper.held()
        fds, ours, memory = fd_count(keeper.pid), fd_count(os.getpid()), private_bytes(keeper.pid)
        total = count(10_000)
        async with anyio.create_task_group() as group:
            for task in range(4):
                group.start_soon(some, keeper, f"t{task}", total // 4)
        await keeper.held()
        grown = private_bytes(keeper.pid) - memory

        assert keeper.last_seq == 100 + total // 4 * 4
        assert fd_count(keeper.pid) == fds
        assert fd_count(os.getpid()) == ours
        # It remembers 16384 exits of some 300 bytes, and 4096 keys of some 600.
        limit = 256 * 1024 + min(total, 16384) * 400 + min(total, 4096) * 800
        assert grown < limit, f"{grown} bytes for {total} spawns"


async def test_a_client_that_does_not_read_harms_no_other_and_misses_nothing(
    tmp_path: Path, count: Callable[[int], int]
) -> None:
    number = count(10_000)
    # The inner shell is the child of one that ends at once: an orphan, for the keeper to reap.
    script = f"i=0; while [ $i -lt {number // 10} ]; do ( (exit 3) & ); i=$((i+1)); done; exit 0"
    async with keeper_at(tmp_path) as keeper:
        idle = await Keeper.attach(f"{tmp_path}/state")
        for part in range(10):
            await sh_exit(keeper, script, key=f"k{part}")
        with anyio.fail_after(60):
            while keeper.last_seq < number:
                await keeper.held()
        seen = keeper.last_seq
        assert idle.last_seq == 0
        with anyio.fail_after(DEADLINE):
            while idle.last_seq < seen:
                await idle.held()
        records, first = await idle.exits_after(0)
        assert first == 1
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        idle.abandon()


async def test_a_client_that_missed_more_than_the_keeper_knows_still_learns_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        early = await sh(keeper, "read x; exit 5", fds=[reading])
        os.close(reading)
        # As the keeper would tell a client whose cursor lies before what is left.
        got: list[ExitRecord] = []

        async def wait() -> None:
            got.append(await keeper.wait_exit(early.pid, early.start_time))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            keeper._pushed({"push": "exits", "gap": True, "exits": []})
            os.close(writing)
        assert got[0].status == 5 << 8


async def test_an_exit_that_was_forgotten_before_anybody_waited_for_it_is_asked_for(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        early = await sh(keeper, "exit 5")
        await keeper.wait_exit(early.pid, early.start_time)
        # As if it had been among those that the keeper had forgotten.
        del keeper._exits._exits[early.pid, early.start_time]
        keeper.expect(early.pid, early.start_time)
        keeper._pushed({"push": "exits", "gap": True, "exits": []})
        with anyio.fail_after(DEADLINE):
            assert (await keeper.wait_exit(early.pid, early.start_time)).status == 5 << 8


async def test_a_full_queue_makes_the_client_wait_and_loses_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        (tmp_path / "d").mkdir()
        os.kill(keeper.pid, signal.SIGSTOP)

        async def register() -> None:
            for number in range(2000):
                await keeper.guard([Guard(f"g{number}", "unlink", [f"{tmp_path}/d/{number}"])])

        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(register)
                await anyio.wait_all_tasks_blocked()
                os.kill(keeper.pid, signal.SIGCONT)
        for number in range(2000):
            (tmp_path / f"d/{number}").write_text("")
        report = await keeper.close()
        assert (report.done, report.failures) == (2000, 0)
        assert os.listdir(tmp_path / "d") == []


# --- exhaustion ---


async def test_a_keeper_without_free_fds_says_so_and_recovers(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        null = os.open("/dev/null", os.O_RDONLY)
        reading, writing = os.pipe()
        running = await sh(keeper, "read x; exit 6", fds=[reading])
        os.close(reading)
        limit = fd_count(keeper.pid) + 8
        hard = resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (limit, hard))
        held = 0
        with pytest.raises(OSError, match="no room") as caught:
            while held < 100:
                await keeper.hold(f"n{held}", null)
                held += 1
        assert caught.value.errno == errno.EMFILE
        with pytest.raises(SpawnFailed) as failed:
            await keeper.spawn("k", ["/bin/true"], env={})
        assert failed.value.errno == errno.EMFILE
        with pytest.raises(OSError, match="Too many open files"):
            await keeper.job([])
        with pytest.raises((UnavailableError, OSError)):
            await Keeper.attach(f"{tmp_path}/state")
        os.close(writing)
        assert (await keeper.wait_exit(running.pid, running.start_time)).status == 6 << 8  # exact all the same
        await keeper.drop([f"n{number}" for number in range(held)])
        assert (await sh_exit(keeper, "exit 4")).status == 4 << 8
        resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (hard, hard))
        other = await Keeper.attach(f"{tmp_path}/state")
        other.abandon()
        os.close(null)


async def test_a_client_without_free_fds_gets_an_error_and_its_keeper_goes_on(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        null = os.open("/dev/null", os.O_RDONLY)
        await keeper.hold("null", null)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    used.append(os.dup(null))
            with pytest.raises(OSError, match="no file descriptor left here"):
                await keeper.take("null")
            with pytest.raises(SpawnFailed, match="no file descriptor left here"):
                await keeper.spawn("k", ["/bin/sleep", "1000"], env={})
        finally:
            for fd in [*used, null]:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        copy = await keeper.take("null")
        os.close(copy)
        assert (await sh_exit(keeper, "exit 4")).status == 4 << 8


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    full = place / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(full)], check=True)
    try:
        yield full
    finally:
        subprocess.run(["umount", str(full)], check=True)


async def test_a_full_disk_keeps_no_exit_from_being_exact(tmp_path: Path) -> None:
    with small_disk(tmp_path) as full:
        async with keeper_at(full) as keeper:
            with pytest.raises(OSError, match="No space"), open(full / "filler", "wb") as file:
                file.write(b"x" * (1 << 20))
            records = [await sh_exit(keeper, f"exit {n}") for n in range(100)]
            assert [record.status >> 8 for record in records] == list(range(100))
            report = await keeper.close()
            assert report.failures == 0


async def test_a_keeper_whose_owner_is_gone_ends_also_when_it_cannot_note_that(tmp_path: Path) -> None:
    with small_disk(tmp_path) as full:
        async with keeper_at(full) as keeper:
            os.truncate(full / "state/lock", 0)
            with pytest.raises(OSError, match="No space"), open(full / "filler", "wb") as file:
                file.write(b"x" * (1 << 20))
            pid = keeper.pid
            keeper.abandon()
            wait_ended(pid)


async def test_a_full_disk_repeats_no_number_of_an_event(tmp_path: Path) -> None:
    with small_disk(tmp_path) as full:
        async with keeper_at(full) as keeper:
            with pytest.raises(OSError, match="No space"), open(full / "filler", "wb") as file:
                file.write(b"x" * (1 << 20))
            await publish(keeper, *[{}] * 60_000)
            assert (await keeper.events.after(59_999)).events == [(60_000, {})]
            os.kill(keeper.pid, signal.SIGKILL)
            wait_ended(keeper.pid)
        assert int((full / "state/events").read_text().split()[0]) > 100_000
        assert not (full / "state/events.new").exists()
        os.unlink(full / "filler")
        async with keeper_at(full) as keeper:
            await publish(keeper, {})
            assert (await keeper.events.after(0)).last > 100_000
            await keeper.close()


async def test_what_was_in_the_keepers_file_system_is_never_made_on_the_host(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        assert keeper.hello.private_mounts
        place = keeper.outside(f"{tmp_path}/work/sandbox")
        os.makedirs(f"{place}/before")
        assert await sh_exit(keeper, f"test -d {tmp_path}/work/sandbox/before")
        assert os.listdir(f"{tmp_path}/work") == []
        pid = keeper.pid
        os.kill(pid, signal.SIGKILL)
        wait_ended(pid)
        # Whoever was about to write there does it now: its mounts are gone, and no path may lead to what they covered.
        os.makedirs(f"{place}/after")
        assert os.listdir(f"{tmp_path}/work") == []
        with pytest.raises(UnavailableError):
            keeper.outside(f"{tmp_path}/work/sandbox")
