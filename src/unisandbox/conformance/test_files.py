"""Files from outside: never out of the sandbox, never hung, whole or not at all, with the owners seen inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    Rootfs,
    Sandbox,
    SandboxError,
)
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.anyio, pytest.mark.needs("files")]

of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")

# Of the host, and nothing that a sandbox could have.
SECRET = b"of the host only"


def content(path: Path) -> bytes:
    """What a file of the host holds."""
    return path.read_bytes()


def names(directory: Path) -> list[str]:
    """What is in and below a directory of the host."""
    return sorted(path.name for path in directory.rglob("*"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


class Link(Protocol):
    """Makes a symbolic link in a sandbox, as whoever is inside would, in the place of one that is there."""

    async def __call__(self, target: str, path: str) -> None: ...


@pytest.fixture
def link(sandbox: Sandbox, capabilities: Capabilities, tmp_path_factory: pytest.TempPathFactory) -> Link:
    """By a program inside, or by upload: WASI refuses to make absolute links, which are the worse ones."""
    place = tmp_path_factory.mktemp("links")

    async def by_program(target: str, path: str) -> None:
        await sandbox.run(["ln", "-sfn", target, path], check=True)

    async def by_upload(target: str, path: str) -> None:
        local = place / "link"
        local.unlink(missing_ok=True)
        local.symlink_to(target)
        await sandbox.files.upload(local, path)

    return by_program if capabilities.processes else by_upload


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
async def test_owners_and_modes_are_those_of_inside(sandbox: Sandbox) -> None:
    await sandbox.files.write("/tmp/made", b"", mode=0o640)
    await sandbox.files.mkdir("/tmp/dir", mode=0o700)
    await sandbox.sh("touch /tmp/his; chown 1000:1001 /tmp/his; chmod 604 /tmp/his", check=True)
    await sandbox.files.write("/tmp/his", b"new content")

    seen = await sandbox.sh("stat -c '%n %u %g %a' /tmp/made /tmp/dir /tmp/his")
    assert seen.text.splitlines() == ["/tmp/made 0 0 640", "/tmp/dir 0 0 700", "/tmp/his 1000 1001 604"]
    info = await sandbox.files.stat("/tmp/his")
    assert (info.uid, info.gid, info.mode, info.size, info.kind, info.name) == (1000, 1001, 0o604, 11, "file", "his")


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


async def test_listing_tells_files_directories_and_links_apart(
    sandbox: Sandbox, programs: Programs, link: Link
) -> None:
    await sandbox.files.mkdir("/tmp/d")
    await sandbox.run(programs.stores("/tmp/f", "12345"), check=True)
    await link("/etc/passwd", "/tmp/l")

    found = {info.name: info for info in await sandbox.files.list("/tmp")}

    assert {name: info.kind for name, info in found.items()} == {"d": "directory", "l": "symlink", "f": "file"}
    assert (found["l"].target, found["f"].size) == ("/etc/passwd", 6)


async def test_a_directory_that_changes_can_be_listed(
    sandbox: Sandbox, programs: Programs, count: Callable[[int], int]
) -> None:
    async with sandbox.exec(programs.churns("/tmp")) as process:
        await process.stdout.receive()
        for _ in range(count(2000)):
            assert all(info.name.startswith("x") for info in await sandbox.files.list("/tmp"))


@pytest.mark.parametrize("path", ["/tmp/l", "/tmp/dir/l", "/home/l"])
async def test_no_link_leads_out(sandbox: Sandbox, secret: Path, link: Link, path: str) -> None:
    files = sandbox.files
    await files.mkdir("/tmp/dir")
    for target in (str(secret), "../" * 40 + str(secret)[1:], f"/proc/self/root{secret}", f"/proc/1/root{secret}"):
        await link(target, path)
        with pytest.raises(SandboxError):
            await files.read(path)
        # A link in the last place is replaced, not followed.
        await files.write(path, b"mine")
        assert content(secret) == SECRET
        assert await files.read(path) == b"mine"
        await files.remove(path)


async def test_no_link_on_the_way_leads_out(sandbox: Sandbox, secret: Path, link: Link) -> None:
    files = sandbox.files
    for target in (
        str(secret.parent),
        "../" * 40 + str(secret.parent)[1:],
        f"/proc/1/root{secret.parent}",
        "/proc/1/cwd",
    ):
        await link(target, "/tmp/way")
        for attempt in (
            lambda: files.read("/tmp/way/secret"),
            lambda: files.write("/tmp/way/secret", b"overwritten"),
            lambda: files.remove("/tmp/way/secret"),
            lambda: files.list("/tmp/way"),
            lambda: files.stat("/tmp/way/secret"),
            lambda: files.mkdir("/tmp/way/new", parents=False),
            lambda: files.rename("/tmp/way/secret", "/tmp/stolen"),
            lambda: files.download("/tmp/way/secret", secret.parent / "copy"),
        ):
            with pytest.raises(SandboxError):
                await attempt()
    assert content(secret) == SECRET
    assert names(secret.parent) == ["secret"]


async def test_dots_do_not_lead_out(sandbox: Sandbox, secret: Path) -> None:
    for path in ("../" * 40 + str(secret)[1:], "/tmp/" + "../" * 40 + str(secret)[1:]):
        with pytest.raises(SandboxError):
            await sandbox.files.read(path)


async def test_links_inside_are_followed_inside(sandbox: Sandbox, programs: Programs, link: Link) -> None:
    await sandbox.run(programs.stores("/tmp/t", "here"), check=True)
    await link("/tmp/t", "/tmp/absolute")
    await link("../tmp/t", "/tmp/relative")

    assert await sandbox.files.read("/tmp/absolute") == b"here\n"
    assert await sandbox.files.read("/tmp/relative") == b"here\n"


async def test_no_race_of_a_link_leads_out(
    sandbox: Sandbox, programs: Programs, secret: Path, link: Link, count: Callable[[int], int]
) -> None:
    # The attacker swaps a directory for a link to the host's directory, as quickly as he can.
    await sandbox.files.mkdir("/tmp/good")
    await sandbox.files.write("/tmp/good/secret", b"inside")
    await link(str(secret.parent), "/tmp/bad")
    await link("good", "/tmp/way")
    async with sandbox.exec(programs.swaps("bad", "good", "/tmp/way")) as process:
        await process.stdout.receive()
        for _ in range(count(2000)):
            try:
                assert await sandbox.files.read("/tmp/way/secret") == b"inside"
            except SandboxError:
                continue
    assert content(secret) == SECRET


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
    with pytest.raises((InvalidArgumentError, AlreadyExistsError)):
        await files.mkdir("/tmp/file")
    with pytest.raises((InvalidArgumentError, AlreadyExistsError)):
        await files.mkdir("/tmp/file/below")


async def test_removing_a_link_leaves_what_it_points_to(sandbox: Sandbox, link: Link) -> None:
    for directory in ("/tmp/d", "/tmp/e"):
        await sandbox.files.mkdir(directory)
    await sandbox.files.write("/tmp/d/f", b"x\n")
    for path in ("/tmp/l", "/tmp/e/l"):
        await link("/tmp/d", path)
    await sandbox.files.remove("/tmp/l", recursive=True)
    await sandbox.files.remove("/tmp/e", recursive=True)

    assert await sandbox.files.read("/tmp/d/f") == b"x\n"


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


async def test_a_download_follows_no_link_of_the_sandbox(
    sandbox: Sandbox, programs: Programs, link: Link, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(SECRET)
    out = tmp_path / "out"
    await sandbox.files.mkdir("/tmp/tree")
    await link(str(victim), "/tmp/tree/d")
    await link(str(victim / "file"), "/tmp/tree/f")

    await sandbox.files.download("/tmp/tree", out)
    assert os.readlink(out / "d") == str(victim)
    # Now the link of the first download is where the second one would write through.
    for path in ("/tmp/tree/d", "/tmp/tree/f"):
        await sandbox.files.remove(path)
    await sandbox.files.mkdir("/tmp/tree/d")
    for path in ("/tmp/tree/d/file", "/tmp/tree/f"):
        await sandbox.run(programs.stores(path, "overwritten"), check=True)
    try:
        await sandbox.files.download("/tmp/tree", out)
    except SandboxError:
        pass  # refusing is as good as replacing the link
    else:
        assert not (out / "d").is_symlink()

    assert content(victim / "file") == SECRET
    assert names(victim) == ["file"]


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


@pytest.mark.needs("rootfs:host")
async def test_what_is_read_only_inside_is_so_from_outside(create: Create) -> None:
    async with create(rootfs="host") as sandbox:
        for path in ("/usr/bin/new", "/etc/passwd", "/new"):
            with pytest.raises(FailedPreconditionError):
                await sandbox.files.write(path, b"")
        with pytest.raises(FailedPreconditionError):
            await sandbox.files.remove("/etc/passwd")


@pytest.mark.needs("rootfs:dir")
async def test_a_directory_as_root_is_never_changed(create: Create, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"original")
    (tmp_path / "sub").mkdir()
    for readonly in (False, True):
        async with create(rootfs=Rootfs.dir(tmp_path, readonly=readonly)) as sandbox:
            assert await sandbox.files.read("/data") == b"original"
            assert (await sandbox.files.stat("/data")).uid == 0
            if readonly:
                with pytest.raises(FailedPreconditionError):
                    await sandbox.files.write("/data", b"changed")
                with pytest.raises(FailedPreconditionError):
                    await sandbox.files.remove("/data")
            else:
                await sandbox.files.write("/data", b"changed")
                await sandbox.files.write("/sub/new", b"")
                assert await sandbox.files.read("/data") == b"changed"
                await sandbox.files.remove("/data")
    assert content(tmp_path / "data") == b"original"
    assert names(tmp_path) == ["data", "sub"]
