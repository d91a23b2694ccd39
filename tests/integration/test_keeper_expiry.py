"""What ends by itself at its time, whoever is there then; and leases with a name."""

# ruff: noqa: ASYNC220, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    adopt,
    fd_count,
    host,
    keeper_at,
    said,
    sh,
    sh_exit,
    until,
    wait_ended,
)

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import Guard, Keeper, SpawnFailed

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def told(keeper: Keeper, *prefixes: str) -> None:
    """Wait until the keeper has told that these have expired."""
    with anyio.fail_after(DEADLINE):
        while not keeper.expirations.known >= {*prefixes}:
            await keeper.held()
            await anyio.sleep(0.001)


async def test_an_expiry_ends_a_process_tree_with_no_client_attached(
    tmp_path: Path, cgroup: str, anyio_backend: str
) -> None:
    inside = f"{cgroup}/s1"
    body = f"""
    inside, work = {inside!r}, f"/proc/{{keeper.pid}}/root{{place}}/work/s1"
    null = os.open("/dev/null", os.O_RDONLY)
    for name in ("s1", "s2"):
        await keeper.guard([Guard(f"{{name}}/tree", "remove_tree", [f"{{place}}/{{name}}"])])
        os.mkdir(f"{{place}}/{{name}}")
        await keeper.spools.hold_now({{f"{{name}}/null": null}})
        await keeper.notes.write(f"{{name}}/note", "x")
    await keeper.guard([Guard("s1/work", "remove_tree", [work])])
    await keeper.guard([Guard("s1/cgroup", "rmdir_cgroup", [inside]), Guard("s1/processes", "kill_cgroup", [inside])])
    os.mkdir(inside)
    os.mkdir(work)
    # It holds what keeps its mounts alive, as a sandbox does: only when that is dropped can the directory be removed.
    await keeper.job([{{"do": "mount_namespace"}},
                      {{"do": "mounts", "root": place + "/work/s1", "ops": [
                          {{"op": "mkdir", "path": "/m"}},
                          {{"op": "tmpfs", "path": "/m", "size": 65536, "inodes": 10}}]}},
                      {{"do": "dirfd", "path": place + "/work/s1/m", "name": "m"}}], hold={{"m": "s1/m"}})
    script = "trap '' TERM; (trap '' TERM; sleep 1000) & echo $!; echo $$; exec sleep 1000"
    await keeper.spawn("k", ["/bin/sh", "-c", script], env={{"PATH": "/bin"}}, fds=[0, 1, 2],
                       cgroup_procs=[inside + "/cgroup.procs"])
    await keeper.expirations.set("s1/", 5)
    await keeper.expirations.set("s2/", 1000)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with host(tmp_path, anyio_backend, "keep", body) as (program, pid):
        began = time.monotonic()
        child, parent = int(said(program)), int(said(program))
        program.wait()
        assert (tmp_path / "s1").exists()
        wait_ended(parent)
        wait_ended(child)
        assert time.monotonic() - began > 2
        until(lambda: not (tmp_path / "s1").exists(), "the guards have run")
        keeper = await adopt(tmp_path)
        try:
            await told(keeper, "s1/")
            assert not os.path.exists(inside)
            assert os.listdir(f"/proc/{pid}/root{tmp_path}/work") == []
            assert list(await keeper.held()) == ["s2/null"]
            assert list(await keeper.notes.read()) == ["s2/note"]
            assert (tmp_path / "s2").exists()
            report = await keeper.close()
            assert (report.done, report.failures) == (1, 0)  # those of s1 are forgotten
        finally:
            keeper.abandon()


async def test_every_client_is_told_also_one_that_comes_later(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        other = await Keeper.attach(f"{tmp_path}/state")
        await keeper.expirations.set("a", 0)
        await told(other, "a")
        await told(keeper, "a")
        other.abandon()
        for number in range(500):
            await keeper.expirations.set(f"p{number}", 0)
        await told(keeper, *(f"p{number}" for number in range(500)))
        late = await Keeper.attach(f"{tmp_path}/state")
        assert late.expirations.known == keeper.expirations.known  # at once
        assert len(late.expirations.known) == 501
        late.abandon()
        with pytest.raises(InvalidArgumentError, match="1 to 256"):
            await keeper.expirations.set("", 1)
        with pytest.raises(InvalidArgumentError, match="seconds"):
            await keeper.expirations.set("a", -1)


async def test_an_expiry_may_be_changed_and_taken_back(tmp_path: Path) -> None:
    for name in ("early", "late", "never"):
        (tmp_path / name).mkdir()
    async with keeper_at(tmp_path) as keeper:
        await keeper.guard([Guard(name, "rmdir", [f"{tmp_path}/{name}"]) for name in ("early", "late", "never")])
        await keeper.expirations.set("early", 1000)
        await keeper.expirations.set("late", 1000)
        await keeper.expirations.set("never", 1000)
        await keeper.expirations.set("never", None)
        await keeper.expirations.set("no such", None)
        began = time.monotonic()
        await keeper.expirations.set("late", 0.3)
        await keeper.expirations.set("early", 0.05)
        await told(keeper, "early", "late")
        assert time.monotonic() - began >= 0.3
        assert keeper.expirations.known == {"early", "late"}
        assert [name for name in ("early", "late", "never") if (tmp_path / name).exists()] == ["never"]
        await keeper.unguard(["never"])


async def test_an_expiry_while_a_client_removes_the_same_does_no_harm(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)
        null = os.open("/dev/null", os.O_RDONLY)
        for number in range(20):
            name = f"s{number}/"
            inside = f"{cgroup}/s{number}"
            guards = [Guard(f"{name}c", "rmdir_cgroup", [inside]), Guard(f"{name}k", "kill_cgroup", [inside])]
            await keeper.guard(guards)
            os.mkdir(inside)
            await keeper.spools.hold_now({f"{name}null": null})
            await keeper.expirations.set(name, 0.001 * (number % 5))
            with contextlib.suppress(SpawnFailed):  # its cgroup has gone already
                await sh(keeper, "exec sleep 1000", key=name, cgroup_procs=[f"{inside}/cgroup.procs"])
            await keeper.drop(prefix=name)
            await keeper.unguard([guard.name for guard in guards] if number % 2 else [])
            await told(keeper, name)
            if number % 2:  # we said that we would do it
                ending.kill([inside])
                assert ending.remove([inside], DEADLINE)
            assert not os.path.exists(inside), number
        os.close(null)
        assert await keeper.held() == {}
        until(lambda: fd_count(keeper.pid) == fds, "no fd is left")
        report = await keeper.close()
        assert report.failures == 0


async def test_a_guard_that_fails_is_kept_for_the_end_and_the_number_too(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_text("x")
    ids = tmp_path / "ids-of-host"
    ids.mkdir()
    async with keeper_at(tmp_path) as keeper:
        await keeper.guard([Guard("s/d", "rmdir", [f"{tmp_path}/d"])])
        await keeper.notes.write("s/note", "x")
        number = await keeper.lease(str(ids), 0, 1, name="s/ids")
        await keeper.expirations.set("s/", 0)
        await told(keeper, "s/")
        assert await keeper.notes.read() == {}
        with pytest.raises(BlockingIOError):
            await keeper.lease(str(ids), 0, 1, name="another")
        assert await keeper.lease(str(ids), 0, 1, name="s/ids") == number
        (tmp_path / "d/file").unlink()
        report = await keeper.close()
        assert (report.done, report.failures) == (1, 0)
        assert not (tmp_path / "d").exists()


async def test_an_end_in_the_middle_of_an_expiry_is_an_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(300):
            (tmp_path / f"{name}/{number}").mkdir()
    async with keeper_at(tmp_path) as keeper:
        await keeper.guard([Guard(name, "remove_tree", [f"{tmp_path}/{name}"]) for name in ("a", "b")])
        await keeper.expirations.set("a", 0)
        report = await keeper.close()
        assert (report.done, report.failures) == (2, 0)
    assert sorted(os.listdir(tmp_path)) == ["state", "work"]


async def test_the_keeper_goes_on_while_something_expires(tmp_path: Path, cgroup: str) -> None:
    inside = f"{cgroup}/busy"
    os.mkdir(inside)
    async with keeper_at(tmp_path) as keeper:
        # Its guard cannot do its work, and waits for it.
        await keeper.guard([Guard("busy", "rmdir_cgroup", [inside])])
        with subprocess.Popen(["/bin/sleep", "1000"]) as stranger:
            Path(f"{inside}/cgroup.procs").write_text(str(stranger.pid))
            await keeper.expirations.set("busy", 0)
            (tmp_path / "quick").mkdir()
            await keeper.guard([Guard("quick", "rmdir", [f"{tmp_path}/quick"])])
            await keeper.expirations.set("quick", 0)
            assert (await sh_exit(keeper, "exit 3")).status == 3 << 8
            await told(keeper, "quick")
            assert keeper.expirations.known == {"quick"}  # the other one still waits for the stranger
            os.kill(stranger.pid, signal.SIGKILL)
        await told(keeper, "busy")
        assert not os.path.exists(inside)


async def test_a_named_lease_is_given_back_by_its_name(tmp_path: Path) -> None:
    ids = tmp_path / "ids-of-host"
    ids.mkdir()
    async with keeper_at(tmp_path) as keeper:
        first = await keeper.lease(str(ids), 0, 2, name="a/ids")
        assert await keeper.lease(str(ids), 0, 2, name="a/ids") == first  # asked again after a lost answer
        with pytest.raises(FileExistsError, match="a/ids"):
            await keeper.lease(str(ids), 10, 2, name="a/ids")
        await keeper.lease(str(ids), 0, 2, name="b/ids")
        with pytest.raises(BlockingIOError):
            await keeper.lease(str(ids), 0, 2, name="c/ids")
        await keeper.drop(prefix="a/")
        assert await keeper.lease(str(ids), 0, 2, name="c/ids") == first
        await keeper.drop(["b/ids", "no such"])
        await keeper.lease(str(ids), 0, 2, name="d")
        await keeper.expirations.set("d", 0)
        await told(keeper, "d")
        await keeper.drop(["c/ids"])
        assert os.listdir(ids) == []


async def test_an_expiry_ends_a_process_that_no_cgroup_ends_and_no_other_of_its_number(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        spawned = await keeper.spawn("k", ["/bin/sleep", "1000"], env={})
        other = await keeper.spawn("o", ["/bin/sleep", "1000"], env={})
        try:
            guards = [
                Guard("s1/process", "kill_process", [f"/{spawned.pid}/{spawned.start_time}"]),
                # It has begun at another time: its number was given to somebody else.
                Guard("s1/former", "kill_process", [f"/{other.pid}/{other.start_time - 1}"]),
            ]
            await keeper.guard(guards)
            await keeper.expirations.set("s1/", 0)
            record = await keeper.wait_exit(spawned.pid, spawned.start_time)
            await told(keeper, "s1/")

            assert os.waitstatus_to_exitcode(record.status) == -signal.SIGKILL
            signal.pidfd_send_signal(other.pidfd, 0)
        finally:
            os.close(spawned.pidfd)
            os.close(other.pidfd)
