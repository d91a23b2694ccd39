"""Files of a state directory that are damaged, lost or something else: told in words, and nothing is left or stuck."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import anyio
import pytest
from tests.keepers import wait_ended
from tests.programs import program

from unisandbox import Engine, FailedPreconditionError, InvalidArgumentError, Resources, SandboxError
from unisandbox.host.cgroups import Cgroups

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")

# In a cgroup of its own, and so its engine's are there, too.
ASIDE = """
for path in sys.argv[2:]:
    os.mkdir(path)
    for name in ("cpuset.cpus", "cpuset.mems"):
        if os.path.exists(f"{path}/{name}"):
            with open(f"{path}/../{name}") as source, open(f"{path}/{name}", "w") as file:
                file.write(source.read())
    with open(f"{path}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
async def main():
    engine = await Engine.open(sys.argv[1], policy="keep")
    sandbox = await engine.create(name="w", resources=Resources(memory="64M"))
    await sandbox.exec(["sleep", "1000"])
    tell(keeper=engine._core.host.keeper.pid)
    signal.pause()
anyio.run(main)
"""


def spoil(path: Path, how: str) -> None:
    """Put something else in the place of a file or directory."""
    content = path.read_bytes() if path.is_file() else b""
    clear(path)
    if how == "directory":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/etc/hostname")
    elif how == "deep":
        path.write_text("[" * 100_000)
    elif how == "flip":
        path.write_bytes(bytes([content[3] ^ 1]).join((content[:3], content[4:])))
    elif how == "garbage":
        path.write_bytes(b"\xff\xfe garbage")
    else:
        assert how == "missing"


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def uses(directory: Path) -> None:
    with anyio.fail_after(20):
        async with (
            Engine.open(directory) as engine,
            engine.create(resources=SMALL, operation_id=os.urandom(4).hex()) as sandbox,
        ):
            assert (await sandbox.run(["true"])).exit_code == 0


@pytest.mark.parametrize("name", ["cgroups", "engine-id", "events", "keeper.log", "lock", "operations", "sandboxes"])
@pytest.mark.parametrize("how", ["directory", "fifo", "link", "deep"])
async def test_whatever_is_in_the_place_of_a_file_is_told_in_words_and_stops_nobody_later(
    tmp_path: Path, name: str, how: str
) -> None:
    await uses(tmp_path)
    spoil(tmp_path / name, how)
    said = ""
    try:
        await uses(tmp_path)
    except SandboxError as error:
        said = str(error)
    assert not said or name in said
    clear(tmp_path / name)
    await uses(tmp_path)


@pytest.mark.parametrize("name", ["cgroups", "engine-id"])
@pytest.mark.parametrize("how", ["fifo", "deep", "garbage", "missing", "flip"])
async def test_what_is_kept_is_used_and_taken_over_whatever_its_directory_says(
    tmp_path: Path, name: str, how: str
) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        process = await (await engine.create(name="w", resources=SMALL)).exec(["sleep", "1000"])
    spoil(tmp_path / name, how)
    with anyio.fail_after(20):
        async with Engine.attach(tmp_path) as other:
            assert (await (await other.get("w")).run(["true"])).exit_code == 0
            assert other.id == engine.id
        if name == "engine-id":
            spoil(tmp_path / name, how)
        async with Engine.open(tmp_path) as owner:
            assert [found.action for found in owner.recovery.sandboxes] == ["adopted"]
            assert owner.id == engine.id
            sandbox = await owner.get("w")
            assert [found.pid for found in await sandbox.processes()] == [process.pid]
            async with owner.create(resources=SMALL) as another:
                assert (await another.run(["true"])).exit_code == 0


@pytest.mark.parametrize("how", ["missing", "changed", "elsewhere"])
async def test_what_a_crash_has_left_is_found_when_nobody_knows_where_its_cgroups_are(tmp_path: Path, how: str) -> None:
    aside = [f"{place.mount.directory}/test-aside" for place in Cgroups.detect("x").places]
    file = tmp_path / "cgroups"
    try:
        with program(ASIDE, str(tmp_path), *aside) as host:
            keeper = host.heard()["keeper"]
            host.kill()
        os.kill(keeper, signal.SIGKILL)
        wait_ended(keeper)
        if how == "missing":
            file.unlink()
        elif how == "changed":
            file.write_bytes(file.read_bytes().replace(b"aside", b"beside"))
        else:  # as a former version has noted it, without a checksum
            parents = json.loads(file.read_bytes())["parents"]
            file.write_text(json.dumps({key: path.replace("aside", "beside") for key, path in parents.items()}))
        assert any(os.listdir(path) for path in aside)
        async with Engine.open(tmp_path) as engine:
            assert [found.action for found in engine.recovery.sandboxes] == ["removed"]
            assert [path for path in aside if any(name.startswith("unisandbox-") for name in os.listdir(path))] == []
    finally:
        for path in aside:
            os.rmdir(path)


async def test_where_the_cgroups_are_is_written_only_when_it_has_changed(tmp_path: Path) -> None:
    await uses(tmp_path)
    before = (tmp_path / "cgroups").stat()
    await uses(tmp_path)
    after = (tmp_path / "cgroups").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("name", ["lock"])
@pytest.mark.parametrize("how", ["directory", "fifo", "link"])
async def test_an_engine_closes_whatever_is_in_the_place_of_its_lock(tmp_path: Path, name: str, how: str) -> None:
    with anyio.fail_after(20):
        async with Engine.open(tmp_path) as engine:
            await engine.create(resources=SMALL)
            spoil(tmp_path / name, how)
    clear(tmp_path / name)
    await uses(tmp_path)


async def test_a_reader_of_events_asks_for_numbers_that_there_can_be(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        for wrong in (-1, 1 << 62, True, "1"):
            with pytest.raises(InvalidArgumentError, match="number of an event"):
                engine.events(after=wrong)  # type: ignore[arg-type]
        # However far ahead it is, it is no reason for a close to fail.
        reader = engine.events(after=(1 << 62) - 1)
    assert [event async for event in reader] == []


async def test_an_operation_is_another_one_when_its_stdin_is_another(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, engine.create(resources=SMALL) as sandbox:
        first = await sandbox.exec(["cat"], operation_id="o")
        with pytest.raises(FailedPreconditionError, match="with other arguments"):
            await sandbox.exec(["cat"], stdin="pipe", operation_id="o")
        assert (await sandbox.exec(["cat"], operation_id="o")).id == first.id


async def test_a_new_state_directory_is_on_the_disk_with_all_that_was_made_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    async with Engine.open(tmp_path / "a" / "state"):
        assert {str(tmp_path), str(tmp_path / "a")} <= {*synced}
