"""Files of a hostile sandbox: swapped links, mounts, and directories of others."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.file_trees import MIB, few_descriptors, identity, shape

from unisandbox import (
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Rootfs,
    Sandbox,
    SandboxError,
)
from unisandbox.host import removal, syscalls

pytestmark = [pytest.mark.anyio, pytest.mark.root]

SECRET = b"of the host only"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host that nobody may touch."""
    path = tmp_path / "victim"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_bytes(SECRET)
    (path / "sub" / "file").write_bytes(SECRET)
    return path


# Links that are swapped in


# Exchanges directories with links in one system call (renameat2, RENAME_EXCHANGE), and makes anew what was removed.
SWAP = """
import ctypes, os, sys
exchange = lambda one, other: ctypes.CDLL(None).renameat2(-100, one, -100, other, 2)
victim = sys.argv[1]
os.chdir('/tmp/arena')
os.symlink(victim, 'link'); os.symlink(victim + '/sub', 'sublink')
def quiet(call, *args):
    try: call(*args)
    except OSError: pass
print('go', flush=True)
while True:
    quiet(os.mkdir, 'way'); quiet(os.mkdir, 'way/sub'); quiet(lambda: open('way/file', 'w').close())
    for _ in range(20):
        exchange(b'way/sub', b'sublink'); exchange(b'sublink', b'way/sub')
        exchange(b'way', b'link'); exchange(b'link', b'way')
    if not os.path.islink('link') and os.path.islink('way'): exchange(b'way', b'link')
    if not os.path.islink('sublink') and os.path.islink('way/sub'): exchange(b'way/sub', b'sublink')
    if not os.path.lexists('link'): quiet(os.symlink, victim, 'link')
    if not os.path.lexists('sublink'): quiet(os.symlink, victim + '/sub', 'sublink')
"""


async def test_links_that_are_swapped_in_never_lead_out(
    sandbox: Sandbox, victim: Path, tmp_path: Path, count: Callable[[int], int]
) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_bytes(b"uploaded")
    (tree / "sub" / "file").write_bytes(b"uploaded")
    before = shape(victim)
    files = sandbox.files
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: files.upload(tree, "/tmp/arena/way"),
        lambda: files.upload(tree / "file", "/tmp/arena/way/sub/file"),
        lambda: files.write("/tmp/arena/way/sub/file", b"written", mode=0o666),
        lambda: files.mkdir("/tmp/arena/way/sub/made", mode=0o777),
        lambda: files.download("/tmp/arena/way", tmp_path / "out"),
        lambda: files.rename("/tmp/arena/way/file", "/tmp/arena/way/sub/moved"),
        lambda: files.remove("/tmp/arena/way/sub", recursive=True),
        lambda: files.remove("/tmp/arena/way", recursive=True),
        lambda: files.list("/tmp/arena/way/sub"),
    ]
    ended = [[0, 0] for _ in calls]
    await files.mkdir("/tmp/arena")

    async with sandbox.exec(["python3", "-c", SWAP, str(victim)]) as process:
        assert await process.stdout.receive() == b"go\n"
        for _ in range(count(1000)):
            if (tmp_path / "out").is_symlink():
                (tmp_path / "out").unlink()
            for number, call in enumerate(calls):
                try:
                    await call()
                    ended[number][0] += 1
                except SandboxError:
                    ended[number][1] += 1

    assert shape(victim) == before
    # Both happened, so the swapping met the calls.
    assert all(map(sum, zip(*ended, strict=True))), ended
    assert not [name for name in shape(tmp_path) if ".unisandbox" in name]


async def test_a_download_into_a_tree_full_of_links_replaces_them(
    sandbox: Sandbox, victim: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = shape(victim)
    await sandbox.sh(
        "mkdir -p /tmp/t/sub/deeper; echo 1 > /tmp/t/f; echo 2 > /tmp/t/sub/f; echo 3 > /tmp/t/sub/deeper/f"
    )
    for place in ("sub", "sub/deeper", "f", "sub/f"):
        removal.remove_tree(str(out))
        (out / place).parent.mkdir(parents=True)
        (out / place).symlink_to(victim / "sub" if "f" not in place else victim / "file")

        await sandbox.files.download("/tmp/t", out)

        assert not (out / place).is_symlink()
        assert (out / "sub" / "deeper" / "f").read_bytes() == b"3\n"
        assert shape(victim) == before


async def test_a_link_that_was_downloaded_is_not_followed_by_the_next_download(
    sandbox: Sandbox, victim: Path, tmp_path: Path
) -> None:
    before = shape(victim)
    await sandbox.run(["ln", "-s", str(victim), "/tmp/t"], check=True)
    await sandbox.files.download("/tmp/t", tmp_path / "out")
    await sandbox.sh("rm /tmp/t; mkdir /tmp/t; echo changed > /tmp/t/file", check=True)

    for local in (tmp_path / "out", f"{tmp_path}/out/"):
        with pytest.raises(FailedPreconditionError, match="is a link"):
            await sandbox.files.download("/tmp/t", local)

    assert shape(victim) == before
    await sandbox.files.download("/tmp/t/file", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"changed\n"
    assert shape(victim) == before


async def test_hard_links_do_not_carry_a_write_elsewhere(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh("echo old > /tmp/a; ln /tmp/a /tmp/b", check=True)
    await sandbox.files.write("/tmp/a", b"new")
    assert await sandbox.files.read("/tmp/b") == b"old\n"
    (tmp_path / "mine").write_bytes(b"mine")
    os.link(tmp_path / "mine", tmp_path / "goal")

    await sandbox.files.download("/tmp/a", tmp_path / "goal")

    assert (tmp_path / "goal").read_bytes() == b"new"
    assert (tmp_path / "mine").read_bytes() == b"mine"


# Mounts


@pytest.fixture
async def mounted(engine: Engine, tmp_path: Path) -> AsyncIterator[Sandbox]:
    """A sandbox with a directory and a file of the host mounted into its writable root."""
    (tmp_path / "base").mkdir()
    (tmp_path / "shared" / "below").mkdir(parents=True)
    (tmp_path / "shared" / "below" / "kept").write_bytes(b"kept")
    (tmp_path / "shared.txt").write_bytes(b"shared")
    mounts = [
        Mount.bind(tmp_path / "shared", "/mnt/dir", readonly=False),
        Mount.bind(tmp_path / "shared.txt", "/mnt/file"),
    ]
    async with engine.create(isolation="runc", rootfs=Rootfs.dir(tmp_path / "base"), mounts=mounts) as made:
        yield made


async def test_a_mount_is_neither_removed_nor_replaced(mounted: Sandbox, tmp_path: Path) -> None:
    files = mounted.files
    await files.write("/mnt/other", b"")
    attempts: list[Callable[[], Awaitable[None]]] = [
        lambda: files.remove("/mnt/file"),
        lambda: files.remove("/mnt/dir"),
        lambda: files.remove("/mnt/dir", recursive=True),
        lambda: files.remove("/mnt", recursive=True),
        lambda: files.write("/mnt/file", b"changed"),
        lambda: files.upload(tmp_path / "shared.txt", "/mnt/file"),
        lambda: files.rename("/mnt/file", "/mnt/moved"),
        lambda: files.rename("/mnt/dir", "/mnt/moved"),
    ]
    for attempt in attempts:
        with pytest.raises(FailedPreconditionError, match="/mnt"):
            await attempt()

    assert await files.read("/mnt/file") == b"shared"
    assert await files.read("/mnt/dir/below/kept") == b"kept"
    assert not await files.exists("/mnt/other"), "what can be removed goes"


async def test_a_mount_with_mapped_ids_can_be_written(mounted: Sandbox, tmp_path: Path) -> None:
    before = identity()
    await mounted.files.write("/mnt/dir/file", b"written")
    await mounted.files.write("/mnt/dir/file", b"twice")
    await mounted.files.mkdir("/mnt/dir/a/b", mode=0o777)
    await mounted.files.rename("/mnt/dir/file", "/mnt/dir/a/file")
    await mounted.files.upload(tmp_path / "shared" / "below", "/mnt/dir/a/copy")

    made = tmp_path / "shared" / "a"
    assert (made / "file").read_bytes() == b"twice"
    assert (made / "copy" / "kept").read_bytes() == b"kept"
    assert {path.stat().st_uid for path in made.rglob("*")} == {0}
    assert stat.S_IMODE((made / "b").stat().st_mode) == 0o777
    assert (await mounted.files.stat("/mnt/dir/a/file")).uid == 0
    assert identity() == before


async def test_mount_points_that_are_made_belong_to_the_sandbox(mounted: Sandbox) -> None:
    assert (await mounted.files.stat("/mnt")).uid == 0
    await mounted.files.write("/mnt/beside", b"")


async def test_whatever_becomes_of_a_call_the_thread_is_who_it_was(
    mounted: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = mounted.files
    await files.upload(tmp_path / "shared", "/mnt/copy")
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGUSR1)
    groups = os.getgroups()
    os.setgroups([*groups, 4, 5])
    try:
        before = identity()
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: files.read("/mnt/file"),
            lambda: files.read("/mnt/none"),
            lambda: files.write("/mnt/new", bytes(3 * MIB)),
            lambda: files.write("/usr/new", b""),
            lambda: files.list("/mnt/dir"),
            lambda: files.stat("/mnt/file"),
            lambda: files.mkdir("/mnt/made/below"),
            lambda: files.rename("/mnt/new", "/mnt/newer"),
            lambda: files.upload(tmp_path / "shared", "/mnt/copy"),
            lambda: files.download("/mnt/copy", tmp_path / "copy"),
            lambda: files.remove("/mnt/dir"),
            lambda: files.remove("/mnt/copy", recursive=True),
        ]
        for attempt in attempts:
            with contextlib.suppress(SandboxError):
                await attempt()
            assert identity() == before
        # An exception of a signal handler, say, at any of the system calls that change the thread.
        for name in ("set_thread_groups", "setfsgid", "setfsuid", "capset"):
            with monkeypatch.context() as patch:
                patch.setattr(syscalls, name, once_interrupted(getattr(syscalls, name)))
                for attempt in attempts[:2]:
                    with contextlib.suppress(SandboxError, KeyboardInterrupt):
                        await attempt()
            assert identity() == before, name
    finally:
        os.setgroups(groups)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)


def once_interrupted(call: Callable[..., object]) -> Callable[..., object]:
    """The call, and then KeyboardInterrupt, the first time."""
    done = False

    def interrupted(*args: object, **options: object) -> object:
        nonlocal done
        result = call(*args, **options)
        if not done:
            done = True
            raise KeyboardInterrupt
        return result

    return interrupted


async def test_no_await_is_left_with_another_identity(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, seen = identity(), []
    turn = anyio.lowlevel.checkpoint

    async def checkpoint() -> None:
        seen.append(identity())
        await turn()

    (tmp_path / "tree").mkdir()
    for number in range(1200):
        (tmp_path / "tree" / str(number)).touch()
    monkeypatch.setattr(anyio.lowlevel, "checkpoint", checkpoint)
    await sandbox.files.upload(tmp_path / "tree", "/tmp/tree")
    await sandbox.files.list("/tmp/tree")
    await sandbox.files.download("/tmp/tree", tmp_path / "back")
    await sandbox.files.remove("/tmp/tree", recursive=True)
    await sandbox.files.write("/tmp/f", bytes(3 * MIB))
    await sandbox.files.read("/tmp/f")

    assert len(seen) > 20
    assert all(found == mine for found in seen)


async def test_directories_of_others_inside_are_entered_as_root_inside_would(sandbox: Sandbox, tmp_path: Path) -> None:
    await sandbox.sh(
        "mkdir -p /tmp/u/a/b; echo x > /tmp/u/a/b/f; ln -s ../a/./b/f /tmp/u/a/l; ln -s /tmp/u/a/b /tmp/way; "
        "ln -s loop /tmp/u/loop; ln -s /etc/hostname/.. /tmp/u/out; chmod 600 /tmp/u/a/b/f; "
        "chown -R 1000:1000 /tmp/u; chmod 0 /tmp/u/a/b; chmod 500 /tmp/u/a; chmod 700 /tmp/u",
        check=True,
    )
    files = sandbox.files
    for path in ("/tmp/u/a/b/f", "/tmp/u/a/l", "/tmp/way/f", "/tmp/u/a/../../../../tmp//u/./a/b/f"):
        assert await files.read(path) == b"x\n"
    for path in ("/tmp/u/a/b/f/", "/tmp/u/loop", "/tmp/u/a/b/f/..", "/tmp/u/a/b"):
        with pytest.raises(InvalidArgumentError):
            await files.read(path)
    with pytest.raises(NotFoundError):
        await files.read("/tmp/u/a/none")
    assert (await files.stat("/tmp/u/a/l")).kind == "symlink"
    assert [info.name for info in await files.list("/tmp/way/")] == ["f"]
    await files.write("/tmp/u/a/b/f", b"y")
    assert ((await files.stat("/tmp/u/a/b/f")).uid, await files.read("/tmp/way/f")) == (1000, b"y")
    await files.write("/tmp/u/a/b/g", b"")
    await files.download("/tmp/u", tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b" / "f").read_bytes() == b"y"
    await files.rename("/tmp/u/a/b", "/tmp/moved")
    await files.remove("/tmp/u", recursive=True)
    assert {info.name for info in await files.list("/tmp")} == {"moved", "way"}


async def test_a_walk_through_directories_of_others_is_bounded(sandbox: Sandbox) -> None:
    deep = "/tmp/u" + "/d" * 1000
    await sandbox.sh(f"mkdir -p {deep}; ln -s {deep} /tmp/l; chown 1000:1000 /tmp/u; chmod 700 /tmp/u", check=True)
    with few_descriptors(200), pytest.raises(InvalidArgumentError, match="Too many levels"):
        await sandbox.files.list("/tmp/l")


async def test_a_tree_is_not_copied_into_itself(mounted: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="into itself"):
        await mounted.files.upload(tmp_path / "shared", "/mnt/dir/below/copy")
    with pytest.raises(InvalidArgumentError, match="into itself"):
        await mounted.files.download("/mnt/dir", tmp_path / "shared" / "below" / "again")


async def test_a_rename_across_file_systems_says_so(mounted: Sandbox) -> None:
    await mounted.files.write("/f", b"")
    with pytest.raises(FailedPreconditionError, match="another file system"):
        await mounted.files.rename("/f", "/mnt/dir/f")


# Depth, width, size
