"""Full disks and odd places for the state: one clear error or it works, and nothing is left behind."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import pytest
from tests.programs import program

from unisandbox import (
    BackendError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Resources,
    SandboxError,
    UnavailableError,
)
from unisandbox.engine.record import spec_of
from unisandbox.host import syscalls
from unisandbox.host.removal import remove_tree

pytestmark = [pytest.mark.anyio, pytest.mark.root]
SMALL = Resources(memory="64M")


@contextmanager
def mounted(kind: str, place: Path, options: str, flags: int = 0) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    syscalls.mount(kind, str(place), kind, flags, options)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Nothing can be written to it by its path, as after an error of the disk."""
    syscalls.mount(str(place), str(place), None, syscalls.MS_BIND)
    try:
        syscalls.mount("none", str(place), None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Leave no byte free."""
    with open(place / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def take_inodes(place: Path) -> None:
    """Leave no inode free."""
    with suppress(OSError):
        for number in range(100_000):
            (place / f"inode{number}").touch()


@pytest.mark.parametrize("exhaust", [fill, take_inodes], ids=["bytes", "inodes"])
async def test_a_full_disk_before_the_engine_opens(tmp_path: Path, exhaust: Callable[[Path], None]) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=256k,nr_inodes=200,mode=0700") as disk:
        exhaust(disk)
        state = disk / "state"
        with pytest.raises(SandboxError, match="No space left"):
            await Engine.open(state)
        for name in os.listdir(disk):
            if name != "state":
                (disk / name).unlink()
        async with Engine.open(state) as engine, engine.create(resources=SMALL) as sandbox:
            assert (await sandbox.run(["true"])).exit_code == 0


async def test_a_disk_with_room_for_some_of_the_files_of_an_engine_is_said_to_be_full(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=1M,nr_inodes=40,mode=0700") as disk:
        said: list[str] = []
        for free in range(40):
            take_inodes(disk)
            for number in range(free):
                (disk / f"inode{number}").unlink(missing_ok=True)
            try:
                async with Engine.open(disk / "state"):
                    break  # that was enough
            except SandboxError as error:
                said.append(error.message)
            finally:
                remove_tree(str(disk / "state"))
        assert len(said) > 3
        assert [words for words in said if "No space left" not in words] == []


@pytest.mark.parametrize("exhaust", [fill, take_inodes], ids=["bytes", "inodes"])
async def test_a_disk_that_fills_up_harms_no_sandbox_that_is_there(
    tmp_path: Path, exhaust: Callable[[Path], None]
) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=512k,nr_inodes=200,mode=0700") as disk:
        async with Engine.open(disk / "state") as engine:
            sandbox = await engine.create(resources=SMALL)
            await sandbox.run(["true"])
            exhaust(disk)
            with pytest.raises(BackendError, match=r"cannot write the record .* No space left.*Free space"):
                await engine.create(resources=SMALL)
            assert [status.id for status in await engine.list()] == [sandbox.id]
            assert (await sandbox.sh("echo x > /tmp/x; cat /tmp/x")).stdout == b"x\n"
            # What is wanted when a disk is full is that things can be ended and removed; and not to be told that
            # something is written down which is not.
            async with sandbox.exec(["sleep", "1000"]) as process:
                with pytest.raises(BackendError, match=r"cannot write the record .* No space left"):
                    await sandbox.stop(grace=0)
                assert (await process.wait()).signal == 9
            await sandbox.remove()
            assert await engine.list() == []
            for name in os.listdir(disk):
                if name != "state":
                    (disk / name).unlink()
            async with engine.create(resources=SMALL) as again:
                assert (await again.run(["true"])).exit_code == 0


@pytest.mark.parametrize("exhaust", ["bytes", "inodes"])
async def test_a_container_in_a_sandbox_whose_programs_have_filled_its_disk(exhaust: str) -> None:
    """It is told what is full; and what does not write there goes on as before."""
    filling = {
        "bytes": "cat /dev/zero > /tmp/filler",
        "inodes": "mkdir /tmp/filler; cd /tmp/filler; i=0; while : > $i; do i=$((i+1)); done",
    }
    async with Engine.open() as engine, engine.create(resources=Resources(memory="64M", disk="1M")) as sandbox:
        await sandbox.sh(filling[exhaust])
        with pytest.raises(FailedPreconditionError, match=r"disk limit is reached\. Remove some .*Resources\(disk=\)"):
            await sandbox.containers.add(rootfs="host", argv=["sh", "-c", "exit 3"])
        shared = await sandbox.containers.add(rootfs=None, argv=["sh", "-c", "exit 4"])
        assert (await shared.wait()).code == 4
        assert (await sandbox.sh("rm -r /tmp/filler")).exit_code == 0
        own = await sandbox.containers.add(rootfs="host", argv=["sh", "-c", "exit 3"])
        assert (await own.wait()).code == 3


async def test_limits_that_cannot_be_written_down_are_not_set(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=512k,mode=0700") as disk:
        async with Engine.open(disk / "state") as engine, engine.create(resources=SMALL) as sandbox:
            before = (await sandbox.metrics()).memory_limit_bytes
            fill(disk)
            with pytest.raises(BackendError, match="No space left"):
                await sandbox.update(Resources(memory="128M"))
            assert (await sandbox.metrics()).memory_limit_bytes == before
            (disk / "filler").unlink()
            await sandbox.update(Resources(memory="128M"))
            assert (await sandbox.metrics()).memory_limit_bytes == 128 << 20
            with pytest.raises(SandboxError):
                await sandbox.update(Resources(memory="256M", disk="1M"))
            assert spec_of(sandbox._entry.record).resources.memory == 128 << 20
            assert (await sandbox.metrics()).memory_limit_bytes == 128 << 20


async def test_an_engine_closes_on_a_full_disk(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=512k,mode=0700") as disk:
        async with Engine.open(disk / "state") as engine:
            sandbox = await engine.create(resources=SMALL)
            await sandbox.run(["true"])
            fill(disk)
        assert not list((disk / "state" / "sandboxes").iterdir())


async def test_a_disk_image_that_finds_no_room(tmp_path: Path) -> None:
    """The image is sparse; making its file system needs some room all the same."""
    with mounted("tmpfs", tmp_path / "disk", "size=1m,mode=0700") as disk:
        async with Engine.open(disk / "state") as engine, engine.create(resources=SMALL) as other:
            fill(disk)
            # What a record needs, and not what mkfs needs.
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - (32 << 10))
            with pytest.raises(BackendError, match=r"No space left"):
                await engine.create(resources=Resources(memory="64M", disk="256M"))
            assert not list((disk / "state").glob("*.img"))
            assert [status.id for status in await engine.list()] == [other.id]
            (disk / "filler").unlink()
            assert (await other.run(["true"])).exit_code == 0


async def test_a_read_only_state_directory(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=256k,mode=0700") as disk:
        syscalls.mount("none", str(disk), None, syscalls.MS_REMOUNT | syscalls.MS_RDONLY, "")
        for place in (disk, disk / "below"):
            with pytest.raises(BackendError, match=r"Read-only file system.*can write"):
                await Engine.open(place)


async def test_a_state_directory_that_became_read_only(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=1m,mode=0700") as disk:
        async with Engine.open(disk):
            pass
        syscalls.mount("none", str(disk), None, syscalls.MS_REMOUNT | syscalls.MS_RDONLY, "")
        with pytest.raises(SandboxError, match="Read-only file system"):
            await Engine.open(disk)


async def test_a_stop_that_the_disk_did_not_take_is_known_to_all(tmp_path: Path) -> None:
    async def states() -> set[str]:
        return {(await each.status()).state for each in (ours, theirs)} | {each.state for each in await other.list()}

    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        ours = await engine.create(name="w", resources=SMALL)
        await ours.run(["true"])
        theirs = await other.get("w")
        assert await states() == {"ready"}
        with read_only(tmp_path):
            with pytest.raises(BackendError, match="Read-only file system"):
                await ours.stop(grace=0)
            assert await states() == {"stopped"}
            assert (await theirs.status()).stopped_at is not None
            for each in (ours, theirs):
                with pytest.raises(FailedPreconditionError, match="is stopped"):
                    await each.run(["true"])
                await each.stop(grace=0)
        await ours.start()
        assert await states() == {"ready"}
        assert (await theirs.run(["true"])).exit_code == 0


@pytest.mark.parametrize("share_pid", [False, True])
@pytest.mark.parametrize("is_written", [True, False], ids=["stop written down", "stop not written down"])
async def test_a_start_that_the_disk_did_not_take_is_none(tmp_path: Path, is_written: bool, share_pid: bool) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        ours = await engine.create(name="w", resources=SMALL, share_pid=share_pid)
        await ours.run(["true"])
        theirs = await other.get("w")
        if is_written:
            await ours.stop(grace=0)
        with read_only(tmp_path):
            if not is_written:
                with pytest.raises(BackendError, match="Read-only file system"):
                    await ours.stop(grace=0)
            for each in (ours, theirs):
                for _ in range(2):
                    with pytest.raises(BackendError, match="Read-only file system"):
                        await each.start()
                assert {(await one.status()).state for one in (ours, theirs)} == {"stopped"}
                assert await ours.processes() == []
                with pytest.raises(FailedPreconditionError, match="is stopped"):
                    await each.run(["true"])
        for each in (ours, theirs):
            await each.start()
            assert {(await one.status()).state for one in (ours, theirs)} == {"ready"}
            assert (await each.run(["true"])).exit_code == 0
            await each.stop(grace=0)
        seen = []
        async for event in engine.events():
            seen += [event.kind] if event.kind in {"sandbox.started", "sandbox.stopped"} else []
            if len(seen) == 6:
                break
        assert seen == ["sandbox.started", "sandbox.stopped"] * 3


async def test_a_removal_whose_record_could_not_go_is_finished_by_the_next_call(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.create(name="w", resources=SMALL)
        with read_only(tmp_path):
            with pytest.raises(BackendError, match="Read-only file system"):
                await sandbox.remove()
            assert await engine.list() == []
        await sandbox.remove()
        async with engine.create(name="w", resources=SMALL):
            pass


async def test_a_state_directory_of_somebody_else(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    try:
        with pytest.raises(FailedPreconditionError, match=r"owner 65534.*chown"):
            await Engine.open(tmp_path)
    finally:
        os.chown(tmp_path, 0, 0)
    tmp_path.chmod(0o777)
    with pytest.raises(FailedPreconditionError, match=r"mode 777.*chmod"):
        await Engine.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_state_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc", "/sys"):
        for opening in (Engine.open, Engine.attach):
            with pytest.raises((InvalidArgumentError, UnavailableError)) as caught:
                await opening(place)
            assert opening == Engine.attach or isinstance(caught.value, InvalidArgumentError)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InvalidArgumentError, match="null"):
        await Engine.open(f"{tmp_path}/a\0b")


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "line\nbreak",
        "büro-日本",
        "\udcff-no-utf-8",
        "quote'\"$(x)",
        "a" * 200 + "/" + "b" * 200,
        "-rf",
        "%s",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("disk", ["8M", "128M"], ids=["memory", "image"])
async def test_any_path_can_hold_the_state(tmp_path: Path, name: str, disk: str) -> None:
    place = tmp_path / name
    async with Engine.open(place) as engine:
        async with engine.create(resources=Resources(memory="64M", disk=disk)) as sandbox:
            assert (await sandbox.sh("echo x > /tmp/x; cat /tmp/x")).stdout == b"x\n"
            with pytest.raises(FailedPreconditionError, match=f"process {os.getpid()}"):
                await Engine.open(place)
    async with Engine.open(place):
        pass


@pytest.mark.parametrize("disk", ["8M", "128M"], ids=["memory", "image"])
async def test_the_state_may_lie_on_overlayfs(tmp_path: Path, disk: str) -> None:
    """As in a container; an overlay as the upper layer of another one is what the kernel refuses."""
    with mounted("tmpfs", tmp_path / "tmpfs", "size=64m,mode=0700") as base:
        for name in ("lower", "upper", "work"):
            (base / name).mkdir()
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        root = base / "lower" / "root"
        (root / "bin").mkdir(parents=True)
        (root / "tmp").mkdir()
        with mounted("overlay", tmp_path / "overlay", options) as overlay:
            resources = Resources(memory="64M", disk=disk)
            async with Engine.open(overlay / "state") as engine:
                async with engine.create(resources=resources) as sandbox:
                    assert (await sandbox.sh("echo x > /tmp/x; cat /tmp/x")).stdout == b"x\n"
                    await sandbox.files.write("/tmp/y", b"y")
                    assert await sandbox.files.read("/tmp/y") == b"y"
            assert not list((overlay / "state").rglob("*.img"))


async def test_a_relative_path_is_meant_from_where_the_engine_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with Engine.open("state") as engine:
        monkeypatch.chdir("/")
        async with engine.create(resources=SMALL) as sandbox:
            assert len(list((tmp_path / "state" / "sandboxes").iterdir())) == 1
            assert (await sandbox.run(["true"])).exit_code == 0
    assert (tmp_path / "state" / "engine-id").exists()
    monkeypatch.chdir(tmp_path)


async def test_a_damaged_engine_id_is_made_anew(tmp_path: Path) -> None:
    for damage in (b"", b"\xff\xfe", b"../../etc", b"A" * 1000):
        (tmp_path / "engine-id").write_bytes(damage)
        async with Engine.open(tmp_path) as engine:
            assert (tmp_path / "engine-id").read_text().split()[0] == engine.id


def test_a_full_run_directory() -> None:
    """/run is where temporary state and mount points are; seen by the program alone, in its own mount namespace."""
    code = """
from unisandbox.host import syscalls
from unisandbox.host.removal import remove_tree
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount("tmpfs", "/run", "tmpfs", 0, "size=64k,mode=0755,nr_inodes=100")
with open("/run/filler", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass

async def main():
    try:
        await Engine.open()
    except SandboxError as error:
        tell(kind=type(error).__name__, text=str(error))
    else:
        tell(kind="none", text="")
    os.unlink("/run/filler")
    tell(left=sorted(os.listdir("/run")))
    async with Engine.open() as engine, engine.create(resources=Resources(memory="64M")) as sandbox:
        tell(code=(await sandbox.run(["true"])).exit_code)
    tell(left=sorted(os.listdir("/run")))
anyio.run(main)
"""
    with program(code) as host:
        told = host.heard()
        assert told["kind"] in {"BackendError", "UnavailableError"}, told
        assert "No space left" in told["text"], told
        assert host.heard() == {"left": []}
        assert host.heard() == {"code": 0}
        # crun makes a directory for itself, whatever it is told.
        assert host.heard() in ({"left": []}, {"left": ["crun"]})
        assert host.finish() == (0, "", "")


async def test_a_store_that_fails_in_the_middle_keeps_the_old_record(tmp_path: Path) -> None:
    """A record is whole or it is the one before, also on a disk that takes half of it."""
    from unisandbox.engine.record import Record
    from unisandbox.engine.records import Records, RecordStore

    await anyio.lowlevel.checkpoint()
    with mounted("tmpfs", tmp_path / "disk", "size=32k,mode=0700") as disk:
        store = RecordStore(str(disk / "sandboxes"), durable=True)
        first = Record("a", None, "runc", "creating", 1.0, spec={"a": "b"})
        store.write(first)
        with pytest.raises(BackendError, match="No space left"):
            store.write(Record("a", None, "runc", "ready", 1.0, spec={"a": "b" * 100_000}))
        assert store.read_all() == Records((first,), ())
        assert os.listdir(disk / "sandboxes") == ["a.json"]
