"""Files from outside: never hung, whole or not at all, with the owners seen inside."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    Sandbox,
)
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.anyio, pytest.mark.needs("files")]

of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")


def content(path: Path) -> bytes:
    """What a file of the host holds."""
    return path.read_bytes()


async def test_what_is_written_is_read_back_here_and_there(sandbox: Sandbox, programs: Programs) -> None:
    data = bytes(range(256)) * 8192
    await sandbox.files.write("/tmp/a", data)
    await sandbox.files.write("/tmp/text", "grüße")

    assert await sandbox.files.read("/tmp/a") == data
    assert (await sandbox.run(programs.shows("/tmp/a"))).stdout == data
    assert (await sandbox.run(programs.shows("/tmp/text"))).text == "grüße"
    await sandbox.run(programs.stores("/tmp/b", "inside"), check=True)
    assert await sandbox.files.read("/tmp/b") == b"inside\n"


async def test_nothing_needs_to_run(sandbox: Sandbox) -> None:
    await sandbox.files.mkdir("/tmp/d/e")
    await sandbox.files.write("/tmp/d/e/f", b"x")
    await sandbox.files.rename("/tmp/d/e/f", "/tmp/g")

    assert await sandbox.files.read("/tmp/g") == b"x"
    assert [info.name for info in await sandbox.files.list("/tmp")] == ["d", "g"]
    await sandbox.files.remove("/tmp/d", recursive=True)
    assert (await sandbox.status()).containers == ()


@of_processes
async def test_owners_and_modes_are_those_of_inside(sandbox: Sandbox, capabilities: Capabilities) -> None:
    uid, gid = (1000, 1001) if capabilities.users else (0, 0)
    await sandbox.files.write("/tmp/made", b"", mode=0o640)
    await sandbox.files.mkdir("/tmp/dir", mode=0o700)
    await sandbox.sh(f"touch /tmp/his; chown {uid}:{gid} /tmp/his; chmod 604 /tmp/his", check=True)
    await sandbox.files.write("/tmp/his", b"new content")

    seen = await sandbox.sh("stat -c '%n %u %g %a' /tmp/made /tmp/dir /tmp/his")
    assert seen.text.splitlines() == ["/tmp/made 0 0 640", "/tmp/dir 0 0 700", f"/tmp/his {uid} {gid} 604"]
    info = await sandbox.files.stat("/tmp/his")
    assert (info.uid, info.gid, info.mode, info.size, info.kind, info.name) == (uid, gid, 0o604, 11, "file", "his")


@of_processes
async def test_listing_says_what_is_there(sandbox: Sandbox) -> None:
    await sandbox.sh("cd /tmp; mkdir d; mkfifo p; ln -s /etc/passwd l; echo 12345 > f; python3 -c 'import socket; "
                     "socket.socket(socket.AF_UNIX).bind(\"/tmp/s\")'", check=True)  # fmt: skip

    found = {info.name: info for info in await sandbox.files.list("/tmp")}

    assert {name: info.kind for name, info in found.items()} == {
        "d": "directory",
        "p": "fifo",
        "l": "symlink",
        "f": "file",
        "s": "socket",
    }
    assert found["l"].target == "/etc/passwd"
    assert found["f"].size == 6
    assert (await sandbox.files.stat("/dev/null" if await sandbox.files.exists("/dev/null") else "/tmp/f")).size in {
        0,
        6,
    }


async def test_a_directory_that_changes_can_be_listed(
    sandbox: Sandbox, programs: Programs, count: Callable[[int], int]
) -> None:
    async with sandbox.exec(programs.churns("/tmp")) as process:
        await process.stdout.receive()
        for _ in range(count(2000)):
            assert all(info.name.startswith("x") for info in await sandbox.files.list("/tmp"))


async def test_a_directory_is_no_file(sandbox: Sandbox) -> None:
    await sandbox.files.mkdir("/tmp/dir")
    with pytest.raises(InvalidArgumentError):
        await sandbox.files.read("/tmp/dir")
    with pytest.raises(InvalidArgumentError):
        await sandbox.files.write("/tmp/dir", b"")


@of_processes
async def test_what_is_no_file_is_refused_and_does_not_hang(sandbox: Sandbox) -> None:
    await sandbox.sh("mkfifo /tmp/fifo; mkdir /tmp/dir", check=True)
    with anyio.fail_after(20):
        for path in ("/tmp/fifo", "/tmp/dir"):
            with pytest.raises(InvalidArgumentError):
                await sandbox.files.read(path)
        # Writing replaces a FIFO; nothing waits for a reader.
        await sandbox.files.write("/tmp/fifo", b"file now")
        assert await sandbox.files.read("/tmp/fifo") == b"file now"
        with pytest.raises(InvalidArgumentError):
            await sandbox.files.write("/tmp/dir", b"")


async def test_missing_things_say_so(sandbox: Sandbox) -> None:
    files = sandbox.files
    for attempt in (
        lambda: files.read("/tmp/no"),
        lambda: files.stat("/tmp/no"),
        lambda: files.list("/tmp/no"),
        lambda: files.remove("/tmp/no"),
        lambda: files.rename("/tmp/no", "/tmp/yes"),
        lambda: files.write("/tmp/no/file", b""),
        lambda: files.download("/tmp/no", "/tmp/unisandbox-conformance-not-made"),
    ):
        with pytest.raises(NotFoundError, match="/tmp/no"):
            await attempt()
    assert not await files.exists("/tmp/no")


@pytest.mark.parametrize("path", ["", "/tmp/a\0b", "/tmp/" + "x" * 256, "/"])
async def test_what_is_no_path_is_refused(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(InvalidArgumentError):
        await sandbox.files.write(path, b"")


async def test_a_slash_at_the_end_means_a_directory(sandbox: Sandbox, tmp_path: Path) -> None:
    files = sandbox.files
    await files.write("/tmp/file", b"kept")
    (tmp_path / "local").write_bytes(b"")
    for attempt in (
        lambda: files.write("/tmp/new/", b""),
        lambda: files.write("/tmp/file/", b""),
        lambda: files.upload(tmp_path / "local", "/tmp/new/"),
        lambda: files.rename("/tmp/file/", "/tmp/new"),
        lambda: files.rename("/tmp/file", "/tmp/new/"),
        lambda: files.remove("/tmp/file/"),
        lambda: files.remove("/tmp/file/", recursive=True),
        lambda: files.read("/tmp/file/"),
    ):
        with pytest.raises(InvalidArgumentError, match="directory"):
            await attempt()
    assert await files.read("/tmp/file") == b"kept"
    assert [info.name for info in await files.list("/tmp/")] == ["file"]
    await files.mkdir("/tmp/d/")
    await files.rename("/tmp/d/", "/tmp/e/")
    await files.upload(tmp_path, "/tmp/e/")
    assert (await files.stat("/tmp/e/")).kind == "directory"
    await files.remove("/tmp/e/", recursive=True)


@pytest.mark.parametrize("name", ["x" * 255, "語" * 85, "-rf", "a b\n\tc", "\\", "ÿ"], ids=range(6))
async def test_every_name_that_the_kernel_takes_can_be_used(sandbox: Sandbox, name: str, tmp_path: Path) -> None:
    await sandbox.files.write(f"/tmp/{name}", b"x")

    assert [info.name for info in await sandbox.files.list("/tmp")] == [name]
    assert await sandbox.files.read(f"/tmp/{name}") == b"x"
    await sandbox.files.download(f"/tmp/{name}", tmp_path / name)
    assert content(tmp_path / name) == b"x"
    await sandbox.files.remove(f"/tmp/{name}")


async def test_a_reader_sees_the_old_or_the_new_and_nothing_between(
    sandbox: Sandbox, programs: Programs, count: Callable[[int], int]
) -> None:
    size = 3 << 20
    await sandbox.files.write("/tmp/f", b"0" * size)
    async with sandbox.exec(programs.finds_whole("/tmp/f", size)) as process:
        assert await process.stdout.receive() == b"go\n"
        for number in range(count(200)):
            await sandbox.files.write("/tmp/f", b"%d" % (number % 10) * size)
        with anyio.move_on_after(0.05) as scope:
            await process.wait()
        assert scope.cancelled_caught, "the reader has seen half a file"
    assert [info.name for info in await sandbox.files.list("/tmp")] == ["f"]


@pytest.mark.needs("limits:memory")
async def test_a_write_that_finds_no_room_leaves_the_old_file(create: Create) -> None:
    async with create(resources=Resources(memory="64M", disk="4M")) as sandbox:
        await sandbox.files.write("/tmp/f", b"old")
        with pytest.raises(FailedPreconditionError, match="disk"):
            await sandbox.files.write("/tmp/f", bytes(8 << 20))

        assert await sandbox.files.read("/tmp/f") == b"old"
        assert [info.name for info in await sandbox.files.list("/tmp")] == ["f"]
        await sandbox.files.write("/tmp/g", bytes(1 << 20))


async def test_a_read_is_bounded(sandbox: Sandbox, programs: Programs) -> None:
    await sandbox.files.write("/tmp/f", bytes(1000))

    assert len(await sandbox.files.read("/tmp/f", limit=1000)) == 1000
    with pytest.raises(InvalidArgumentError):
        await sandbox.files.read("/tmp/f", limit=999)
    # A file that pretends to be small, and one that grows for ever.
    await sandbox.run(programs.pretends("/tmp/big"), check=True)
    with pytest.raises(InvalidArgumentError), anyio.fail_after(20):
        await sandbox.files.read("/tmp/big", limit=1 << 20)


async def test_directories_are_made_moved_and_removed(sandbox: Sandbox) -> None:
    files = sandbox.files
    await files.mkdir("/tmp/a/b/c")
    await files.mkdir("/tmp/a/b/c")
    with pytest.raises(NotFoundError):
        await files.mkdir("/tmp/x/y", parents=False)
    await files.write("/tmp/a/b/c/f", b"1")
    with pytest.raises(FailedPreconditionError):
        await files.remove("/tmp/a")
    await files.rename("/tmp/a", "/tmp/moved")
    assert await files.read("/tmp/moved/b/c/f") == b"1"
    await files.remove("/tmp/moved", recursive=True)
    assert await files.list("/tmp") == []
    await files.write("/tmp/file", b"")
    for path in ("/tmp/file", "/tmp/file/below"):
        with pytest.raises(AlreadyExistsError, match=r"'/tmp/file' exists already and is not a directory"):
            await files.mkdir(path)
    with pytest.raises(InvalidArgumentError, match="/tmp/file/below"):
        await files.mkdir("/tmp/file/below", parents=False)


async def test_a_directory_that_is_missing_on_the_way_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    files = sandbox.files
    (tmp_path / "local").write_bytes(b"")
    await files.write("/tmp/f", b"")
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: files.write("/tmp/x/y", b""),
        lambda: files.mkdir("/tmp/x/y", parents=False),
        lambda: files.rename("/tmp/f", "/tmp/x/y"),
        lambda: files.upload(tmp_path / "local", "/tmp/x/y"),
    ]
    for ask in asks:
        with pytest.raises(NotFoundError, match="'/tmp/x', the directory of '/tmp/x/y', does not exist"):
            await ask()


async def test_a_path_inside_is_absolute(sandbox: Sandbox, tmp_path: Path) -> None:
    """There is no directory that one of another form could begin in: programs have theirs, `files` has none."""
    files = sandbox.files
    (tmp_path / "local").write_bytes(b"")
    await files.mkdir("/tmp/d")
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: files.read("tmp/d/f"),
        lambda: files.write("tmp/d/f", b""),
        lambda: files.list("tmp"),
        lambda: files.list("."),
        lambda: files.stat("tmp/d"),
        lambda: files.exists("tmp/d"),
        lambda: files.mkdir("tmp/d/e"),
        lambda: files.remove("tmp/d"),
        lambda: files.rename("/tmp/d", "tmp/e"),
        lambda: files.rename("tmp/d", "/tmp/e"),
        lambda: files.upload(tmp_path / "local", "tmp/d/f"),
        lambda: files.download("tmp/d", tmp_path / "out"),
    ]
    for ask in asks:
        with pytest.raises(InvalidArgumentError, match="is no absolute path"):
            await ask()
    assert [info.name for info in await files.list("/tmp")] == ["d"]
    assert await files.list("/tmp/d") == []
    assert os.listdir(tmp_path) == ["local"]


async def test_a_tree_deeper_than_any_stack_can_be_removed(sandbox: Sandbox, programs: Programs) -> None:
    # 3,000 levels: more than Python recurses, more than a path may be long.
    await sandbox.run(programs.nests("/tmp", 3000), check=True)

    await sandbox.files.remove("/tmp/d", recursive=True)

    assert await sandbox.files.list("/tmp") == []


async def test_a_tree_goes_in_and_comes_out_the_same(
    sandbox: Sandbox, programs: Programs, capabilities: Capabilities, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "out").write_bytes(programs.program())
    (source / "out").chmod(0o755)
    (source / "sub" / "data").write_bytes(bytes(range(256)) * 10000)
    (source / "link").symlink_to("sub/data")
    (source / "dangling").symlink_to("/nowhere/at/all")

    await sandbox.files.upload(source, "/tmp/tree")
    assert (await sandbox.run(["/tmp/tree/out", "ran\n"])).stdout == b"ran\n"
    if capabilities.processes:
        assert (await sandbox.sh("find /tmp/tree ! -user 0")).stdout == b""
    await sandbox.files.download("/tmp/tree", tmp_path / "back")

    def shape(root: Path) -> dict[str, object]:
        return {
            str(path.relative_to(root)): os.readlink(path)
            if path.is_symlink()
            else (path.stat().st_mode & 0o777, None if path.is_dir() else path.read_bytes())
            for path in root.rglob("*")
        }

    assert shape(tmp_path / "back") == shape(source)


@of_processes
async def test_a_download_of_devices_and_fifos_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh("mkdir /tmp/t; mkfifo /tmp/t/p", check=True)
    with pytest.raises(InvalidArgumentError), anyio.fail_after(20):
        await sandbox.files.download("/tmp/t", tmp_path / "t")


async def test_an_upload_of_what_is_no_file_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgumentError), anyio.fail_after(20):
        await sandbox.files.upload(tmp_path / "fifo", "/tmp/fifo")
    with pytest.raises(NotFoundError):
        await sandbox.files.upload(tmp_path / "missing", "/tmp/missing")
