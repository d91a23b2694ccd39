"""`files` is no way around the rights that root inside has: a host process that is root must not be his hand."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from unisandbox import Engine, Files, Mount, Sandbox, SandboxError, Security
from unisandbox.host import identity
from unisandbox.sandbox import SandboxOptions

pytestmark = [pytest.mark.anyio, pytest.mark.root]

SECRET: Final = b"of the host's root only"

Attempt = Callable[[Files], Awaitable[object]]


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A directory of the host's root, where others may look but not write, nor read what is in its files."""
    # Not tmp_path, through which no other user may go.
    path = Path(tempfile.mkdtemp(prefix="unisandbox-theirs-"))
    path.chmod(0o755)
    (path / "sub" / "below").mkdir(parents=True)
    for file in (path / "secret", path / "sub" / "secret"):
        file.write_bytes(SECRET)
        file.chmod(0o600)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def as_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`files` with the protection taken away: it acts as this process."""
    for block in ("over", "owning", "bare"):
        monkeypatch.setattr(identity.Identity, block, lambda *_, **__: contextlib.nullcontext())


def shape(root: Path) -> list[tuple[str, int, bytes]]:
    """All that is below a directory of the host."""
    return [
        (str(path.relative_to(root)), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(root.rglob("*"))
    ]


READS: Final[dict[str, Attempt]] = {
    "read": lambda files: files.read("/data/secret"),
    "read through a link": lambda files: files.read("/tmp/secret"),
    "read through a link on the way": lambda files: files.read("/tmp/data/sub/secret"),
}
CHANGES: Final[dict[str, Attempt]] = {
    "make": lambda files: files.write("/tmp/data/new", b""),
    "overwrite": lambda files: files.write("/tmp/data/secret", b""),
    "make a directory": lambda files: files.mkdir("/tmp/data/dir"),
    "rename": lambda files: files.rename("/tmp/data/secret", "/tmp/data/other"),
    "move out": lambda files: files.rename("/tmp/data/sub/secret", "/tmp/data/other"),
    "replace": lambda files: files.rename("/tmp/data/sub", "/tmp/data/sub2"),
    "remove": lambda files: files.remove("/tmp/data/secret"),
    "remove a directory": lambda files: files.remove("/tmp/data/sub/below"),
    "remove a tree": lambda files: files.remove("/tmp/data/sub", recursive=True),
    "remove it by its name": lambda files: files.remove("/data/sub", recursive=True),
    "upload a file": lambda files: files.upload("/etc/hostname", "/tmp/data/hostname"),
    "upload over a file": lambda files: files.upload("/etc/hostname", "/tmp/data/secret"),
}


def mounted(theirs: Path) -> SandboxOptions:
    return {"isolation": "runc", "mounts": (Mount.bind(theirs, "/data", readonly=False, idmap=False),)}


async def link(sandbox: Sandbox) -> None:
    """What the program inside does to have the host process go where it may not."""
    await sandbox.sh("ln -s /data /tmp/data; ln -s /data/secret /tmp/secret", check=True)


async def test_what_root_inside_may_not_read_is_not_read_for_him(engine: Engine, theirs: Path, tmp_path: Path) -> None:
    async with engine.create(**mounted(theirs)) as sandbox:
        await link(sandbox)
        assert (await sandbox.sh("cat /data/secret /tmp/data/sub/secret")).stdout == b""
        for name, attempt in READS.items():
            with pytest.raises(SandboxError, match="Permission denied"):
                pytest.fail(f"{name}: {await attempt(sandbox.files)!r}")
        for path in ("/data/secret", "/tmp/data/sub/secret", "/data", "/tmp/data/"):
            with pytest.raises(SandboxError, match="Permission denied"):
                await sandbox.files.download(path, tmp_path / "out")
        assert SECRET not in [content for _, _, content in shape(tmp_path)]


async def test_what_root_inside_may_not_change_is_not_changed_for_him(engine: Engine, theirs: Path) -> None:
    before = shape(theirs)
    async with engine.create(**mounted(theirs)) as sandbox:
        await link(sandbox)
        assert (await sandbox.sh("touch /data/new; rm -rf /data/secret /data/sub")).stderr != b""
        for name, attempt in CHANGES.items():
            with pytest.raises(SandboxError, match="Permission denied"):
                pytest.fail(f"{name}: {await attempt(sandbox.files)!r}")
            assert shape(theirs) == before, name


@pytest.mark.usefixtures("as_ourselves")
@pytest.mark.parametrize("name", [*READS, *CHANGES])
async def test_with_the_rights_of_this_process_each_of_them_works(engine: Engine, theirs: Path, name: str) -> None:
    before = shape(theirs)
    async with engine.create(**mounted(theirs)) as sandbox:
        await link(sandbox)
        got = await {**READS, **CHANGES}[name](sandbox.files)
    assert got == SECRET if name in READS else shape(theirs) != before


async def test_of_usr_only_what_everybody_may_read_is_read(engine: Engine, tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/usr/share", prefix="unisandbox-secret-") as file:
        file.write(SECRET)
        file.flush()
        async with engine.create(isolation="runc", rootfs="host") as sandbox:
            await sandbox.sh(f"ln -s {file.name} /tmp/l", check=True)
            for path in ("/tmp/l", file.name):
                with pytest.raises(SandboxError, match="Permission denied"):
                    await sandbox.files.read(path)
            with pytest.raises(SandboxError, match="Permission denied"):
                await sandbox.files.download(file.name, tmp_path / "out")
            os.fchmod(file.fileno(), 0o644)
            assert await sandbox.files.read("/tmp/l") == SECRET


# Everything that ids and modes can make of it: a program inside and `files` try the same, on trees that are alike.

# What a directory or file belongs to: user and group, from the sandbox's first id on, or of the host.
OWNERS: Final = ("host", "root", "user", "root with a group of the host")
DIRECTORY_MODES: Final = (0o755, 0o777, 0o1777, 0o700, 0o500, 0o444, 0)
FILE_MODES: Final = (0o644, 0o600, 0o666, 0)

PROGRAM: Final = """
import json, os, shutil
def read(d): open(d + "/f").read()
def show(d): os.listdir(d); os.stat(d + "/f")
def look(d): os.lstat(d + "/f")
def through(d): open(d + "/s/f").read()
def make(d): os.close(os.open(d + "/new", os.O_CREAT | os.O_EXCL))
def subdirectory(d): os.mkdir(d + "/newdir")
def link(d): os.symlink("x", d + "/l")
def replace(d):
    before = os.stat(d + "/f")
    os.close(os.open(d + "/temporary", os.O_CREAT | os.O_EXCL))
    try: os.chown(d + "/temporary", before.st_uid, before.st_gid)
    except OSError: pass
    try: os.rename(d + "/temporary", d + "/f")
    finally:
        if os.path.exists(d + "/temporary"): os.unlink(d + "/temporary")
def rename(d): os.rename(d + "/f", d + "/g")
def move(d): os.rename(d + "/s", d + "/../moved")
def remove(d): os.unlink(d + "/new")
def empty(d): shutil.rmtree(d)
for number in range(COUNT):
    said = []
    for what in (read, show, look, through, make, subdirectory, link, replace, rename, move, remove, empty):
        try: what(f"/program/{number}/d")
        except OSError: said.append(what.__name__ + ": no")
        else: said.append(what.__name__ + ": yes")
    print(json.dumps(said))
"""

DEEDS: Final[dict[str, Callable[[Files, str], Awaitable[object]]]] = {
    "read": lambda files, d: files.read(f"{d}/f"),
    "show": lambda files, d: files.list(d),
    "look": lambda files, d: files.stat(f"{d}/f"),
    "through": lambda files, d: files.read(f"{d}/s/f"),
    "make": lambda files, d: files.write(f"{d}/new", b""),
    "subdirectory": lambda files, d: files.mkdir(f"{d}/newdir", parents=False),
    "link": lambda files, d: files.upload("/proc/self/exe", f"{d}/l"),
    "replace": lambda files, d: files.write(f"{d}/f", b""),
    "rename": lambda files, d: files.rename(f"{d}/f", f"{d}/g"),
    "move": lambda files, d: files.rename(f"{d}/s", f"{d}/../moved"),
    "remove": lambda files, d: files.remove(f"{d}/new"),
    "empty": lambda files, d: files.remove(d, recursive=True),
}
CASES: Final = tuple(itertools.product(OWNERS, DIRECTORY_MODES, OWNERS, FILE_MODES))


def plant(place: Path, first: int) -> None:
    """A tree for each case: a directory `d` with a file `f` and a directory `s`, which has a file too."""
    owners = {"host": (0, 0), "root": (first, first), "user": (first + 1000, first + 1000), OWNERS[3]: (first, 0)}
    for number, (owner, mode, owner_of_file, file_mode) in enumerate(CASES):
        top = place / str(number) / "d"
        (top / "s").mkdir(parents=True)
        for path in (top / "f", top / "s" / "f"):
            path.touch()
            os.chown(path, *owners[owner_of_file])
            path.chmod(file_mode)
        os.chown(top / "s", *owners[owner_of_file])
        (top / "s").chmod(file_mode | file_mode >> 2)
        os.chown(top, *owners[owner])
        top.chmod(mode)
        os.chown(top.parent, first, first)


async def tried(files: Files, number: int) -> list[str]:
    said = []
    for name, deed in DEEDS.items():
        try:
            await deed(files, f"/files/{number}/d")
        except SandboxError:
            said.append(f"{name}: no")
        else:
            said.append(f"{name}: yes")
    return said


async def differences(engine: Engine, theirs: Path, **options: object) -> list[str]:
    """Where `files` may do something else than root inside."""
    for name in ("program", "files"):
        (theirs / name).mkdir()
    mounts = [Mount.bind(theirs / name, f"/{name}", readonly=False, idmap=False) for name in ("program", "files")]
    async with engine.create(isolation="runc", mounts=mounts, **options) as sandbox:  # type: ignore[arg-type]
        (theirs / "program").chmod(0o777)
        await sandbox.sh("touch /program/made", check=True)
        first = (theirs / "program" / "made").stat().st_uid
        for name in ("program", "files"):
            plant(theirs / name, first)
        done = await sandbox.run(["python3", "-c", PROGRAM.replace("COUNT", str(len(CASES)))], check=True, timeout=60)
        inside_said = [json.loads(line) for line in done.text.splitlines()]
        return [
            f"{owner} {mode:o}, in it {owner_of_file} {file_mode:o}: the program {program}, files {files}"
            for number, (owner, mode, owner_of_file, file_mode) in enumerate(CASES)
            for program, files in zip(inside_said[number], await tried(sandbox.files, number), strict=True)
            if program != files
        ]


WITHOUT: Final = Security(capabilities=frozenset({"CAP_SETUID"}))
WHO: Final[dict[str, SandboxOptions]] = {
    "root of its own user namespace": {},
    "root without capabilities over files": {"security": WITHOUT},
    "root of the host": {"userns": "host"},
    "root of the host without capabilities over files": {"userns": "host", "security": WITHOUT},
}


@pytest.mark.parametrize("who", WHO)
async def test_files_may_do_what_root_inside_may_and_nothing_else(engine: Engine, theirs: Path, who: str) -> None:
    assert await differences(engine, theirs, **WHO[who]) == []


@pytest.mark.usefixtures("as_ourselves")
async def test_the_rights_of_this_process_are_others(engine: Engine, theirs: Path) -> None:
    assert len(await differences(engine, theirs)) > len(CASES)
