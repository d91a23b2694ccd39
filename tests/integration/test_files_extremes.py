"""Files of a sandbox at their limits: depth, width, holes, names, full disks, and calls that are cut short."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.file_trees import DEEP, MIB, cancelled_at, depth_of, few_descriptors, identity, make_deep, shape

from unisandbox import (
    AlreadyExistsError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    Sandbox,
    SandboxError,
    UnavailableError,
)
from unisandbox.host import removal, syscalls

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory for trees that are too deep for pytest to clean."""
    path = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(path)
    removal.remove_tree(path)


async def test_a_tree_of_any_depth_is_copied_and_removed_with_few_descriptors(sandbox: Sandbox, scratch: Path) -> None:
    make_deep(scratch / "source", DEEP)
    with few_descriptors(90):
        await sandbox.files.upload(scratch / "source", "/tmp/deep")
        await sandbox.files.download("/tmp/deep", scratch / "back")
        await sandbox.files.remove("/tmp/deep", recursive=True)

    assert depth_of(scratch / "back") == DEEP
    assert await sandbox.files.list("/tmp") == []


async def test_a_tree_that_is_moved_while_it_is_copied_is_refused(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its upper levels are closed by then, and ".." leads to another place.
    await sandbox.sh("python3 -c \"import os; os.chdir('/tmp'); [(os.mkdir('d'), os.chdir('d')) for _ in range(100)]\"")
    original = anyio.lowlevel.checkpoint
    turns = 0

    async def checkpoint() -> None:
        nonlocal turns
        turns += 1
        if turns == 2:  # the first is at the start; the second after 64 levels
            await sandbox.sh("mkdir /tmp/e; mv /tmp/d/d/d /tmp/e/d", check=True)
        await original()

    monkeypatch.setattr(anyio.lowlevel, "checkpoint", checkpoint)
    with pytest.raises(FailedPreconditionError, match="moved while it was copied"):
        await sandbox.files.download("/tmp/d", tmp_path / "out")


async def test_a_huge_directory_does_not_stop_the_event_loop(
    engine: Engine, tmp_path: Path, count: Callable[[int], int]
) -> None:
    number = count(30_000)
    async with engine.create(isolation="runc", rootfs="host", resources=Resources(disk="512M")) as sandbox:
        script = f"import os\nos.mkdir('/tmp/d')\nfor n in range({number}): open(f'/tmp/d/{{n}}', 'w').close()"
        await sandbox.run(["python3", "-c", script], check=True)
        longest = 0.0

        async def watch() -> None:
            # What it computes at a stretch; how long that takes is for others on the machine to say, too.
            nonlocal longest
            last = time.thread_time()
            while True:
                await anyio.lowlevel.checkpoint()
                now = time.thread_time()
                longest = max(longest, now - last)
                last = now

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            assert len(await sandbox.files.list("/tmp/d")) == number
            await sandbox.files.download("/tmp/d", tmp_path / "out")
            await sandbox.files.remove("/tmp/d", recursive=True)
            group.cancel_scope.cancel()

        assert len(os.listdir(tmp_path / "out")) == number
        assert longest < 0.5
        with pytest.raises(InvalidArgumentError, match="more than 2 entries"):
            await sandbox.files.list("/", limit=2)


async def test_holes_stay_holes(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh("truncate -s 1T /tmp/big; printf x | dd of=/tmp/big bs=1 seek=5G conv=notrunc", check=True)

    with anyio.fail_after(30):
        await sandbox.files.download("/tmp/big", tmp_path / "big")
        await sandbox.files.upload(tmp_path / "big", "/tmp/again")

    status = (tmp_path / "big").stat()
    assert status.st_size == 1 << 40
    assert status.st_blocks * 512 <= MIB
    with (tmp_path / "big").open("rb") as file:
        file.seek((5 << 30) - 1)
        assert file.read(3) == b"\0x\0"
    assert (await sandbox.files.stat("/tmp/again")).size == 1 << 40


async def test_a_download_is_bounded(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh("mkdir /tmp/t; head -c 1M /dev/zero | tr '\\0' x > /tmp/t/0; "
                     "for n in 1 2 3 4 5 6 7; do ln /tmp/t/0 /tmp/t/$n; done", check=True)  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="limit"):
        await sandbox.files.download("/tmp/t", tmp_path / "out", limit=4 * MIB)

    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 4 * MIB
    await sandbox.files.download("/tmp/t", tmp_path / "out", limit=9 * MIB)
    assert len(os.listdir(tmp_path / "out")) == 8


# Names, kinds and modes


@pytest.mark.parametrize(
    "name", [b"new\nline", b"\xff\xfe\x80", b"x" * 255, b"-rf", b" ", b"\x1b[31m", b"..."], ids=range(7)
)
async def test_every_name_goes_in_and_comes_out(sandbox: Sandbox, tmp_path: Path, name: bytes) -> None:
    text = os.fsdecode(name)
    source = tmp_path / "source"
    (source / text).mkdir(parents=True)
    (source / text / text).write_bytes(b"content")
    (source / text / "link").symlink_to(text)

    await sandbox.files.upload(source, "/tmp/t")
    assert [info.name for info in await sandbox.files.list("/tmp/t")] == [text]
    assert await sandbox.files.read(f"/tmp/t/{text}/{text}") == b"content"
    await sandbox.files.write(f"/tmp/t/{text}/{text}", b"changed")
    await sandbox.files.download("/tmp/t", tmp_path / "back")

    (source / text / text).write_bytes(b"changed")
    assert shape(tmp_path / "back") == shape(source)
    (tmp_path / "gone").mkdir()
    await sandbox.files.remove("/tmp/t", recursive=True)


@pytest.mark.parametrize("path", ["", "/tmp/\0", "/tmp/\ud800", "/" + "x" * 256, "/" + "d/" * 3000], ids=range(5))
async def test_what_is_no_path_is_refused_by_every_call(sandbox: Sandbox, tmp_path: Path, path: str) -> None:
    files = sandbox.files
    (tmp_path / "f").write_bytes(b"")
    await files.write("/tmp/f", b"")
    for attempt in (
        lambda: files.read(path),
        lambda: files.write(path, b""),
        lambda: files.list(path),
        lambda: files.stat(path),
        lambda: files.exists(path),
        lambda: files.mkdir(path),
        lambda: files.remove(path, recursive=True),
        lambda: files.rename(path, "/tmp/x"),
        lambda: files.rename("/tmp/f", path),
        lambda: files.upload(tmp_path / "f", path),
        lambda: files.download(path, tmp_path / "x"),
        lambda: files.upload(path, "/tmp/x"),
    ):
        with pytest.raises(InvalidArgumentError):
            await attempt()


async def test_setuid_bits_stay_in_the_sandbox(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh("mkdir -m 2755 /tmp/t; touch /tmp/t/f; chmod 6755 /tmp/t/f", check=True)
    await sandbox.files.download("/tmp/t", tmp_path / "t")

    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "t" / "f").stat().st_mode) == 0o755


async def test_modes_are_exact_inside_and_under_the_umask_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t").chmod(0o777)
    (tmp_path / "t" / "f").write_bytes(b"")
    (tmp_path / "t" / "f").chmod(0o666)
    (tmp_path / "t" / "closed").mkdir(mode=0o500)
    await sandbox.files.upload(tmp_path / "t", "/tmp/t")
    await sandbox.files.download("/tmp/t", tmp_path / "back")

    seen = await sandbox.sh("stat -c '%a %u' /tmp/t /tmp/t/f /tmp/t/closed")
    assert seen.text.split("\n")[:3] == ["777 0", "666 0", "500 0"]
    mask = int(next(line for line in identity() if line.startswith("Umask")).split()[1], 8)
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "back" / "f").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "back" / "closed").stat().st_mode) == 0o500


async def test_no_fifo_or_device_of_the_host_is_opened(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    os.mkfifo(tmp_path / "t" / "fifo")
    (tmp_path / "t" / "fine").write_bytes(b"")
    with anyio.fail_after(20):
        for path in (tmp_path / "t", tmp_path / "t" / "fifo", Path("/dev/null")):
            with pytest.raises(InvalidArgumentError, match="neither a file"):
                await sandbox.files.upload(path, "/tmp/t")
        # A FIFO at the goal of a download is replaced.
        await sandbox.files.write("/tmp/f", b"content")
        await sandbox.files.download("/tmp/f", tmp_path / "t" / "fifo")
    assert (tmp_path / "t" / "fifo").read_bytes() == b"content"


async def test_files_without_a_size_are_copied(sandbox: Sandbox) -> None:
    await sandbox.files.upload("/proc/self/status", "/tmp/status")
    assert b"Umask" in await sandbox.files.read("/tmp/status")


async def test_what_is_in_the_way_is_said(sandbox: Sandbox, tmp_path: Path) -> None:
    files = sandbox.files
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dir" / "sub").mkdir(parents=True)
    await sandbox.sh("mkdir -p /tmp/d/sub /tmp/e; echo > /tmp/e/sub; ln -s nowhere /tmp/l", check=True)
    with pytest.raises(InvalidArgumentError, match="directory"):
        await files.upload(tmp_path / "file", "/tmp/d")
    with pytest.raises(InvalidArgumentError, match="directory"):
        await files.download("/tmp/e/sub", tmp_path / "dir")
    with pytest.raises(AlreadyExistsError, match="/tmp/e/sub"):
        await files.upload(tmp_path / "dir", "/tmp/e")
    with pytest.raises(InvalidArgumentError, match="Not a directory"):
        await files.download("/tmp/d", tmp_path / "file")
    with pytest.raises(AlreadyExistsError, match="nowhere"):
        await files.mkdir("/tmp/l")
    with pytest.raises(NotFoundError, match="no/file"):
        await files.download("/tmp/e/sub", tmp_path / "no" / "file")
    with pytest.raises(NotFoundError, match="/tmp/missing"):
        await files.rename("/tmp/d", "/tmp/missing/d")
    for mode in (-1, 0o10000):
        with pytest.raises(InvalidArgumentError, match="mode"):
            await files.write("/tmp/f", b"", mode=mode)
    with pytest.raises(InvalidArgumentError, match="limit"):
        await files.read("/tmp/e/sub", limit=-1)
    assert not await files.exists("/tmp/e/sub/below")


# Calls that are cut short


@pytest.mark.parametrize("nameless", [True, False], ids=["tmpfile", "without"])
async def test_a_call_that_is_cancelled_at_any_await_leaves_no_part_of_a_file(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        _without_tmpfile(monkeypatch)
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "t" / "sub" / "large").write_bytes(b"n" * (3 * MIB))
    files = sandbox.files
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: files.write("/tmp/large", b"n" * (3 * MIB)),
        lambda: files.upload(tmp_path / "t", "/tmp/t"),
        lambda: files.download("/tmp/old", tmp_path / "out"),
        lambda: files.read("/tmp/old"),
        lambda: files.list("/tmp"),
        lambda: files.remove("/tmp/t", recursive=True),
    ]
    for call in calls:
        turn, finished = 0, False
        while not finished:
            turn += 1
            await files.write("/tmp/old", b"o" * (3 * MIB))
            (tmp_path / "out").write_bytes(b"old")
            await files.mkdir("/tmp/t")
            with cancelled_at(monkeypatch, turn) as seen:
                await call()
            finished = len(seen) < turn
            left = [info.name for place in ("/tmp", "/tmp/t") if await files.exists(place)
                    for info in await files.list(place)]  # fmt: skip
            assert set(left) <= {"old", "t", "sub", "large"}
            if "large" in left:
                assert await files.read("/tmp/large") == b"n" * (3 * MIB)
            if await files.exists("/tmp/t/sub/large"):
                assert await files.read("/tmp/t/sub/large") == b"n" * (3 * MIB)
            assert (tmp_path / "out").read_bytes() in {b"old", b"o" * (3 * MIB)}
            assert set(os.listdir(tmp_path)) == {"t", "out"}
        assert turn > 1


@pytest.mark.parametrize("nameless", [True, False], ids=["tmpfile", "without"])
async def test_a_full_disk_on_either_side_leaves_the_old_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        _without_tmpfile(monkeypatch)
    (tmp_path / "large").write_bytes(b"n" * (3 * MIB))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)  # noqa: ASYNC221
    try:
        async with engine.create(isolation="runc", rootfs="host", resources=Resources(disk="2M")) as sandbox:
            await sandbox.files.write("/tmp/f", b"old")
            with pytest.raises(FailedPreconditionError, match="disk limit"):
                await sandbox.files.upload(tmp_path / "large", "/tmp/f")
            assert await sandbox.files.read("/tmp/f") == b"old"
            assert [info.name for info in await sandbox.files.list("/tmp")] == ["f"]

            await sandbox.files.write("/tmp/f", b"n" * (MIB + MIB // 2))
            (small / "f").write_bytes(b"old")
            with pytest.raises(FailedPreconditionError, match="on this host: No space left"):
                await sandbox.files.download("/tmp/f", small / "f")
            assert shape(small) == {"f": (0o644, 0, b"old")}
    finally:
        syscalls.umount(str(small))


async def test_too_few_descriptors_are_a_clear_error(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for more in range(1, 6):
        for call in (
            lambda: sandbox.files.upload(tmp_path / "t", "/tmp/t"),
            lambda: sandbox.files.download("/tmp", tmp_path / "out"),
            lambda: sandbox.files.list("/tmp"),
            lambda: sandbox.files.write("/tmp/f", b""),
        ):
            with few_descriptors(more):
                try:
                    await call()
                except UnavailableError:
                    continue
    assert {info.name for info in await sandbox.files.list("/tmp")} <= {"f", "t"}


async def test_files_of_a_sandbox_that_is_gone_are_an_error(engine: Engine) -> None:
    async with engine.create(isolation="runc", rootfs="host") as sandbox:
        pass
    with pytest.raises(SandboxError):
        await sandbox.files.exists("/tmp")


def _without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, FUSE and older overlayfs."""
    original = os.open

    def without(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return original(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without)
