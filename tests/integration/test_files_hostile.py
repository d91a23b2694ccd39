"""Files of a hostile sandbox: swapped links, mounts, depth, width, holes, names, and calls that are cut short."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox import (
    AlreadyExistsError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Resources,
    Rootfs,
    Sandbox,
    SandboxError,
    UnavailableError,
)
from unisandbox.host import removal, syscalls

pytestmark = [pytest.mark.anyio, pytest.mark.root]

MIB = 1 << 20
SECRET = b"of the host only"
DEEP = 3_300


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    async with Engine.open() as opened:
        yield opened


@pytest.fixture
async def sandbox(engine: Engine) -> AsyncIterator[Sandbox]:
    async with engine.create(isolation="runc", rootfs="host") as made:
        yield made


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host that nobody may touch."""
    path = tmp_path / "victim"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_bytes(SECRET)
    (path / "sub" / "file").write_bytes(SECRET)
    return path


def shape(root: Path) -> dict[str, object]:
    """All that is below a directory, with links as they are."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_uid, path.read_bytes() if path.is_file() else None)
        for path in sorted(root.rglob("*"))
    }


def make_deep(top: Path, depth: int) -> None:
    """A chain of directories with a file at its end; no path is long enough for it."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(os.open("end", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    finally:
        os.close(fd)


def depth_of(top: Path) -> int:
    """How deep the chain is, down to the file at its end."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    depth = 0
    try:
        while os.listdir(fd) == ["d"]:
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
            depth += 1
        assert os.listdir(fd) == ["end"]
    finally:
        os.close(fd)
    return depth


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Allow only so many descriptors above those that are open."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def cancelled_at(monkeypatch: pytest.MonkeyPatch, turn: int) -> Iterator[list[int]]:
    """Cancel the block at its `turn`-th checkpoint; yields a list that counts them."""
    seen: list[int] = []
    original = anyio.lowlevel.checkpoint
    with anyio.CancelScope() as scope, monkeypatch.context() as patch:

        async def checkpoint() -> None:
            seen.append(1)
            if len(seen) == turn:
                scope.cancel()
            await original()

        patch.setattr(anyio.lowlevel, "checkpoint", checkpoint)
        yield seen


def identity() -> list[str]:
    """Who this thread is for the kernel's checks of files, and what goes with a change of that."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    kept = ("Uid", "Gid", "Groups", "Cap", "Umask")
    others = [syscalls.prctl(syscalls.PR_GET_DUMPABLE), syscalls.parent_death_signal()]
    return [line for line in lines if line.startswith(kept)] + [str(number) for number in others]


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
