"""Files from outside: never out of the sandbox, whatever links lead there, and no more than root inside may."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from unisandbox import FailedPreconditionError, Mount, Rootfs, Sandbox, SandboxError
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


async def test_listing_tells_files_directories_and_links_apart(
    sandbox: Sandbox, programs: Programs, link: Link
) -> None:
    await sandbox.files.mkdir("/tmp/d")
    await sandbox.run(programs.stores("/tmp/f", "12345"), check=True)
    await link("/etc/passwd", "/tmp/l")

    found = {info.name: info for info in await sandbox.files.list("/tmp")}

    assert {name: info.kind for name, info in found.items()} == {"d": "directory", "l": "symlink", "f": "file"}
    assert (found["l"].target, found["f"].size) == ("/etc/passwd", 6)


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


async def test_removing_a_link_leaves_what_it_points_to(sandbox: Sandbox, link: Link) -> None:
    for directory in ("/tmp/d", "/tmp/e"):
        await sandbox.files.mkdir(directory)
    await sandbox.files.write("/tmp/d/f", b"x\n")
    for path in ("/tmp/l", "/tmp/e/l"):
        await link("/tmp/d", path)
    await sandbox.files.remove("/tmp/l", recursive=True)
    await sandbox.files.remove("/tmp/e", recursive=True)

    assert await sandbox.files.read("/tmp/d/f") == b"x\n"


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


@pytest.mark.needs("rootfs:host")
async def test_what_is_read_only_inside_is_so_from_outside(create: Create) -> None:
    async with create(rootfs="host") as sandbox:
        for path in ("/usr/bin/new", "/etc/passwd", "/new"):
            with pytest.raises(FailedPreconditionError):
                await sandbox.files.write(path, b"")
        with pytest.raises(FailedPreconditionError):
            await sandbox.files.remove("/etc/passwd")


async def reads_alike(create: Create, programs: Programs, host: Path, mount: Mount) -> None:
    """What is mounted at /data is read by `files` where a program inside can read it, and nowhere else."""
    (host / "closed").mkdir(mode=0o700)
    for path, mode in ((host / "open", 0o644), (host / "secret", 0o600), (host / "closed" / "f", 0o644)):
        path.write_bytes(SECRET)
        path.chmod(mode)
    async with create(mounts=[mount]) as sandbox:
        for name in ("open", "secret", "closed/f"):
            seen = (await sandbox.run(programs.shows(f"/data/{name}"))).stdout == SECRET
            read = b""
            with contextlib.suppress(FailedPreconditionError):
                read = await sandbox.files.read(f"/data/{name}")
            assert (name, read == SECRET) == (name, seen)


async def changes_alike(create: Create, programs: Programs, host: Path, mount: Mount) -> None:
    """The same for changes."""
    (host / "closed").mkdir(mode=0o755)
    (host / "open").mkdir()
    (host / "open").chmod(0o777)
    async with create(mounts=[mount]) as sandbox:
        for directory in ("open", "closed"):
            stored = (await sandbox.run(programs.stores(f"/data/{directory}/inside", "x"))).exit_code == 0
            with contextlib.suppress(FailedPreconditionError):
                await sandbox.files.write(f"/data/{directory}/outside", b"x")
            assert ("outside" in names(host / directory)) == stored


@pytest.mark.needs("host_mounts")
async def test_files_may_read_what_a_program_may(create: Create, programs: Programs, tmp_path: Path) -> None:
    await reads_alike(create, programs, tmp_path, Mount.bind(tmp_path, "/data"))


@pytest.mark.needs("host_mounts")
async def test_files_may_change_what_a_program_may(create: Create, programs: Programs, tmp_path: Path) -> None:
    await changes_alike(create, programs, tmp_path, Mount.bind(tmp_path, "/data", readonly=False))


@of_processes
@pytest.mark.needs("host_mounts")
async def test_files_may_read_what_root_inside_may(create: Create, programs: Programs, tmp_path: Path) -> None:
    await reads_alike(create, programs, tmp_path, Mount.bind(tmp_path, "/data", idmap=False))


@of_processes
@pytest.mark.needs("host_mounts")
async def test_files_may_change_what_root_inside_may(create: Create, programs: Programs, tmp_path: Path) -> None:
    await changes_alike(create, programs, tmp_path, Mount.bind(tmp_path, "/data", readonly=False, idmap=False))


@pytest.mark.needs("rootfs:dir")
async def test_a_directory_as_root_is_never_changed(create: Create, capabilities: Capabilities, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"original")
    (tmp_path / "sub").mkdir()
    for readonly in (False, True) if capabilities.writable_dirs else (True,):
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
