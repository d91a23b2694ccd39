"""What the keeper holds, undoes and leases."""

# ruff: noqa: ASYNC221, ASYNC230, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import pty
import signal
import subprocess
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    fd_count,
    keeper_at,
    sh,
    wait_ended,
)

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.keeper import Guard
from unisandbox.host.removal import remove_tree

pytestmark = [pytest.mark.anyio, pytest.mark.root]


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
