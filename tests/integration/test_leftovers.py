"""What crashes have left is found and removed, all of it, and never anything else."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from tests.keepers import children_of, until, wait_ended
from tests.left_behind import kinds, left_of, remove_all
from tests.programs import Program, program

from unisandbox import Engine, FailedPreconditionError, Resources
from unisandbox.api import Rootfs, SandboxSpec, short_name
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine import leftovers
from unisandbox.engine.leftovers import traces, verdicts
from unisandbox.engine.records import RecordStore
from unisandbox.engine.runtime_directory import RUNTIME_DIRECTORY, end_leases
from unisandbox.host import loop, syscalls
from unisandbox.host.cgroups import Cgroups

pytestmark = pytest.mark.root

SMALL = Resources(memory="64M")

HOST = """
async def main():
    async with Engine.open(sys.argv[1] or None) as engine:
        sandbox = await engine.create(resources=Resources(memory="64M"))
        process = await sandbox.exec(["sleep", "1000"])
        host = engine._core.host
        tell(id=engine.id, keeper=host.keeper.pid, state=host.state_dir, sandbox=sandbox.id, process=process.pid)
        await anyio.sleep_forever()
anyio.run(main)
"""


@contextmanager
def host(state: str = "") -> Iterator[tuple[Program, dict[str, Any]]]:
    """A process with an engine and a sandbox in which a program runs; its end is its keeper's end too."""
    with program(HOST, state) as running:
        told = running.heard()
        try:
            yield running, told
        finally:
            running.kill()
            wait_ended(told["keeper"])


def kill_keeper(running: Program, told: dict[str, Any]) -> None:
    """kill -9 of the keeper of a host process that is held up. Its forks, and what ran, end by that."""
    os.kill(running.pid, signal.SIGSTOP)
    os.kill(told["keeper"], signal.SIGKILL)
    wait_ended(told["keeper"])
    wait_ended(told["process"])
    until(lambda: told["id"] not in traces.HostTraces.look(only_engines=True).keepers, "its forks have ended")


def kill_both(running: Program, told: dict[str, Any]) -> None:
    """kill -9 of host process and keeper, at once: neither does anything about the other's end."""
    kill_keeper(running, told)
    running.kill()


def survivor(engine_id: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A process in the cgroup of an engine that outlives everything else."""
    return standing_in(cgroups_of(engine_id))


@contextmanager
def standing_in(cgroups: Iterable[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in these cgroups."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        for cgroup in cgroups:
            Path(f"{cgroup}/cgroup.procs").write_text(str(process.pid))
        yield process
    finally:
        process.kill()
        process.wait()


def fresh_id() -> str:
    return short_name("test", secrets.token_hex(8))


def cgroups_of(engine_id: str) -> set[str]:
    """The directories of an engine of this test run."""
    tree = Cgroups.detect(f"unisandbox-{engine_id}")
    return {f"{place.parent}/{tree.name}" for place in tree.places}


@pytest.fixture
def no_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made just now counts as old."""
    monkeypatch.setattr(verdicts, "_YOUNG", 0.0)


def test_all_that_a_killed_host_and_keeper_leave_is_found_and_removed_and_nothing_else() -> None:
    before = Inventory.take()
    with host() as (_, living):
        beside = Inventory.take()
        with host() as (running, told):
            assert left_of(told["id"]) == []
            kill_both(running, told)
            found = left_of(told["id"])
            assert kinds(found) == ["cgroup", "directory", "link"]
            assert all(leftover.removable and leftover.state_dir == told["state"] for leftover in found)
            assert [set(leftover.paths) for leftover in found if leftover.kind == "cgroup"] == [cgroups_of(told["id"])]
            places = {leftover.what for leftover in found if leftover.kind in {"directory", "link"}}
            work = f"{RUNTIME_DIRECTORY}/{told['id']}"
            assert places == {work, f"{work}.state", told["state"]}
            assert left_of(living["id"]) == []
            remove_all(told["id"])
        assert settle(beside) == []
        os.kill(living["process"], 0)
        assert os.path.isdir(living["state"])
    assert settle(before) == []


def test_what_still_runs_is_ended_alone_or_with_its_cgroup() -> None:
    with host() as (running, told):
        kill_both(running, told)
        with survivor(told["id"]) as one, survivor(told["id"]) as two:
            found = left_of(told["id"])
            assert kinds(found) == ["process", "cgroup", "directory", "link"]
            processes = {leftover.process[0]: leftover for leftover in found if leftover.kind == "process"}
            assert set(processes) == {one.pid, two.pid}
            process = processes[one.pid]
            assert process.what == f"{one.pid} (sleep)"
            # A pid alone is nobody, and who is in no cgroup of ours is not ours.
            leftovers.remove(attrs.evolve(process, process=(one.pid, process.process[1] + 1)))
            leftovers.remove(attrs.evolve(process, process=(os.getpid(), _start_time(os.getpid()))))
            assert one.poll() is None
            leftovers.remove(process)
            assert one.wait(10) == -signal.SIGKILL
            assert two.poll() is None
            for leftover in found:
                if leftover.kind == "cgroup":
                    leftovers.remove(leftover)
            assert two.wait(10) == -signal.SIGKILL
            remove_all(told["id"])


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_directory_with_records_is_left_to_an_engine(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with host(str(state)) as (running, told):
        kill_both(running, told)
        files = sorted(os.listdir(state))
        [found] = left_of(told["id"])
        assert (found.kind, found.what, found.state_dir, found.removable) == ("state", str(state), str(state), False)
        assert "Open an engine on it" in found.why
        with pytest.raises(FailedPreconditionError, match="Open an engine"):
            leftovers.remove(found)

        # What none of its records speaks of is left over all the same.
        engine, stranger = told["id"], "a" * 10
        own = short_name(engine, told["sandbox"])
        for cgroup in cgroups_of(engine):
            os.mkdir(f"{cgroup}/{stranger}")
        (state / f"unisandbox-{engine}-{stranger}.files" / "root").mkdir(parents=True)
        (state / f"unisandbox-{engine}-{own}.img").touch()
        found_of = {leftover.kind: leftover for leftover in left_of(engine)}
        assert sorted(found_of) == ["cgroup", "image", "state"]
        assert set(found_of["cgroup"].paths) == {f"{cgroup}/{stranger}" for cgroup in cgroups_of(engine)}
        assert found_of["image"].what == str(state / f"unisandbox-{engine}-{stranger}.files")
        leftovers.remove(found_of["cgroup"])
        leftovers.remove(found_of["image"])
        assert kinds(left_of(engine)) == ["state"]

        # A damaged record may have spoken of anything.
        (state / "sandboxes" / "x.json").write_text("damage")
        (state / f"unisandbox-{engine}-{stranger}.img").touch()
        assert kinds(left_of(engine)) == ["state"]
        assert sorted(os.listdir(state / "sandboxes")) == sorted(["x.json", f"{told['sandbox']}.json"])

        # Without records it is an empty directory of the user's: that stays, and all else goes.
        for record in (state / "sandboxes").iterdir():
            record.unlink()
        assert kinds(left_of(engine)) == ["cgroup", "image", "directory", "link"]
        remove_all(engine)
        assert sorted(os.listdir(state)) == files


def test_while_the_process_that_opened_it_lives_nothing_is_removed(tmp_path: Path) -> None:
    with host(str(tmp_path)) as (running, told):
        kill_keeper(running, told)
        found = left_of(told["id"])
        assert kinds(found) == ["cgroup", "directory", "link"]
        assert not any(leftover.removable for leftover in found)
        assert all(f"process {running.pid}, which opened the engine, lives" in leftover.why for leftover in found)
        for leftover in found:
            with pytest.raises(FailedPreconditionError, match=str(running.pid)):
                leftovers.remove(leftover)
            # Also for whoever has looked before, or does not care.
            with pytest.raises(FailedPreconditionError, match="Look again"):
                leftovers.remove(attrs.evolve(leftover, removable=True))
        running.kill()
        RecordStore(str(tmp_path / "sandboxes"), durable=True).remove(told["sandbox"])
        remove_all(told["id"])


@pytest.mark.anyio
async def test_what_an_engine_has_taken_again_is_not_removed(tmp_path: Path) -> None:
    with host(str(tmp_path)) as (running, told):
        kill_both(running, told)
        RecordStore(str(tmp_path / "sandboxes"), durable=True).remove(told["sandbox"])
        found = left_of(told["id"])
        async with Engine.open(tmp_path) as engine:
            assert engine.id == told["id"]
            assert left_of(engine.id) == []
            for leftover in found:
                with pytest.raises(FailedPreconditionError, match="has begun to live"):
                    leftovers.remove(leftover)
            async with engine.create(resources=SMALL) as sandbox:
                assert (await sandbox.run(["true"])).exit_code == 0
    assert left_of(told["id"]) == []


@pytest.mark.usefixtures("no_age")
def test_only_our_own_names_are_ours(tmp_path: Path) -> None:
    """Names that are nearly ours, things of other users, and links stay, and are not even listed."""
    runtime = Path(RUNTIME_DIRECTORY)
    engine_id = fresh_id()
    parents = {os.path.dirname(path) for path in cgroups_of(engine_id)}
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    stay: list[Path] = [elsewhere / "kept"]
    clean: list[Callable[[], object]] = []

    def made(path: Path, *, kind: str = "directory", owner: int = 0) -> None:
        if kind == "directory":
            path.mkdir()
            clean.append(path.rmdir)
        elif kind == "file":
            path.touch()
            clean.append(path.unlink)
        else:
            path.symlink_to(elsewhere)
            clean.append(path.unlink)
        os.chown(path, owner, owner, follow_symlinks=False)
        stay.append(path)

    with host() as (running, told):
        try:
            for parent in sorted(parents):
                for name in ("notours", "ABCDEFGHIJ", "a" * 9, "a" * 11, "a" * 9 + "1"):
                    made(Path(parent) / f"unisandbox-{name}")
                made(Path(parent) / f"unisandbox-{engine_id}", owner=12345)
            for name in ("notes", "a" * 9, "state-short", "A" * 10):
                made(runtime / name)
            made(runtime / engine_id, owner=12345)
            made(runtime / f"{engine_id}.state", kind="file")
            made(runtime / ("b" * 10), kind="link")
            made(runtime / "state-0a1b2c3d", kind="link")
            for place in (Path("/var/tmp"), runtime):
                made(place / "unisandbox-x.img", kind="file")
                made(place / f"unisandbox-{engine_id}-{'a' * 10}.img2", kind="file")
                made(place / f"unisandbox-{engine_id}-{'b' * 10}.img", kind="directory")
                made(place / f"unisandbox-{engine_id}-{'e' * 10}.files", kind="file")
                made(place / f"unisandbox-{engine_id}-{'f' * 10}.files", kind="link")
                made(place / f"unisandbox-{engine_id}-{'c' * 10}.img", kind="file", owner=12345)
                made(place / f"unisandbox-{engine_id}-{'d' * 10}.img", kind="link")
            kill_both(running, told)
            listed = {path for found in leftovers.find() for path in (found.what, *found.paths)}
            assert not listed & set(map(str, stay))
            assert left_of(engine_id) == []
            remove_all(told["id"])
            assert [path for path in stay if not os.path.lexists(path)] == []
        finally:
            for undo in reversed(clean):
                undo()


@pytest.mark.anyio
@pytest.mark.usefixtures("no_age")
async def test_a_cgroup_that_only_has_the_name_of_an_engines_is_not_ours(tmp_path: Path) -> None:
    """Many words have ten letters, and may stand behind our own in the name of a service."""
    parent = "/unisandbox-containerd"
    async with Engine.open(tmp_path) as engine:
        places = [place.mount.directory + parent for place in engine._core.host.cgroups.places]
        try:
            # Another engine is below it, or some program stands in it.
            spec = SandboxSpec(resources=SMALL, cgroup_parent=parent, rootfs=Rootfs.host())
            sandbox = await engine.get((await engine._core.create(spec)).sandbox_id)
            await sandbox.exec(["sleep", "1000"])
            assert left_of("containerd") == []
            await sandbox.remove()
            for place in places:
                os.makedirs(place, exist_ok=True)
            with standing_in(places[:1]):
                assert left_of("containerd") == []
            # Nobody is in it, and what is below it may be a sandbox's by its name, too.
            for place in places:
                os.makedirs(f"{place}/experiment")
            found = [leftover for leftover in leftovers.find() if leftover.what in places]
            assert {leftover.what for leftover in found} == set(places)
            assert not any(leftover.removable for leftover in found)
            for leftover in found:
                with pytest.raises(FailedPreconditionError, match="nothing but its name"):
                    leftovers.remove(leftover)
            for place in places:
                os.rmdir(f"{place}/experiment")
        finally:
            for place in places:
                os.rmdir(place)


@pytest.mark.usefixtures("no_age")
def test_a_directory_with_files_that_only_has_an_engines_name_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_RUNTIME_DIR may be anywhere, also where the user has a directory "unisandbox" of his own."""
    own = tmp_path / "unisandbox"
    (own / "benchmarks").mkdir(parents=True)
    (own / "benchmarks" / "file").touch()
    monkeypatch.setattr(traces, "runtime_directory", lambda: str(own))
    assert left_of("benchmarks") == []


def test_without_its_state_directory_an_engine_is_judged_by_its_age_and_from_the_host_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with host(str(state)) as (running, told):
        state.rename(tmp_path / "moved")
        assert left_of(told["id"]) == [], "its keeper lives"
        kill_both(running, told)
        found = left_of(told["id"])
        assert kinds(found) == ["cgroup", "directory", "link"]
        assert not any(leftover.removable for leftover in found)
        assert "look again later" in found[0].why
        monkeypatch.setattr(verdicts, "_YOUNG", 0.0)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(verdicts, "_FIRST_PID_NAMESPACE", 1)
            assert not any(leftover.removable for leftover in left_of(told["id"]))
            assert "look again from the host" in left_of(told["id"])[0].why
        remove_all(told["id"])


@pytest.mark.usefixtures("no_age")
def test_images_loop_devices_and_mounts_are_found_and_removed() -> None:
    engine_id = fresh_id()
    image = f"/var/tmp/unisandbox-{engine_id}-{'a' * 10}.img"
    inner = Path(RUNTIME_DIRECTORY) / engine_id / "rw"
    inner.mkdir(parents=True)
    os.symlink("/nowhere", f"{RUNTIME_DIRECTORY}/{engine_id}.state")
    syscalls.mount("none", str(inner), "tmpfs")
    loop.make_image(image, 4 << 20)
    device, _ = loop.attach(image)
    try:
        found = left_of(engine_id)
        assert [leftover.kind for leftover in found] == ["loop", "mount", "image", "directory", "link"]
        assert found[0].what.endswith(f" on {image}")
        for leftover in found:
            leftovers.remove(leftover)
        assert kinds(left_of(engine_id)) in (["loop"], []), "it is open here still"
    finally:
        os.close(device)
    until(lambda: image not in {path for _, path in loop.attached()}, "the loop device lets go of the image")
    assert left_of(engine_id) == []


# Leases a number, as a keeper does. A fork of it, if wanted, lives until the descriptor that is named second ends.
LEASER = """
from unisandbox.host.keeper.leases import Leases
leases = Leases()
number = leases.lease(sys.argv[1], 0, 10)
if sys.argv[2] and os.fork() == 0:
    os.close(1)
    os.close(2)
    os.read(int(sys.argv[2]), 1)
    os._exit(0)
tell(number=number)
signal.pause()
"""


def test_the_file_of_leased_numbers_is_left_over_when_nobody_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "runtime_directory", lambda: str(tmp_path))
    (tmp_path / "other").touch()
    with program(LEASER, str(tmp_path), "") as leaser:
        leaser.heard()
        assert [leftover for leftover in leftovers.find() if leftover.kind == "file"] == []
        leaser.kill()
    [found] = [leftover for leftover in leftovers.find() if leftover.kind == "file"]
    assert found.what == str(tmp_path / "ids")
    with program(LEASER, str(tmp_path), "") as leaser:
        leaser.heard()
        leftovers.remove(found)
        assert sorted(os.listdir(tmp_path)) == ["ids", "other"], "somebody leases again"
        leaser.kill()
    leftovers.remove(found)
    assert sorted(os.listdir(tmp_path)) == ["other"]


@pytest.mark.anyio
async def test_an_open_engine_says_where_its_state_is_and_a_closed_one_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    async with Engine.open(tmp_path / "link") as engine:
        pointer = f"{RUNTIME_DIRECTORY}/{engine.id}.state"
        assert os.readlink(pointer) == str(tmp_path / "real")
        with pytest.raises(FailedPreconditionError, match="in use by process"):
            await Engine.open(tmp_path / "real")
        assert os.readlink(pointer) == str(tmp_path / "real")
    assert not os.path.lexists(pointer)
    os.makedirs(RUNTIME_DIRECTORY, 0o711, exist_ok=True)
    os.symlink("/wrong", pointer)
    (tmp_path / "real").rename(tmp_path / "moved")
    async with Engine.open(tmp_path / "moved") as again:
        assert again.id == engine.id
        assert os.readlink(pointer) == str(tmp_path / "moved")
    assert not os.path.lexists(pointer)


@pytest.mark.anyio
async def test_an_engine_that_follows_a_crash_at_once_has_its_pointer(tmp_path: Path) -> None:
    """The keeper of the one before ends, and removes its pointer, while the next one is waiting for the lock."""
    with host(str(tmp_path)) as (running, told):
        os.kill(told["keeper"], signal.SIGSTOP)
        running.kill()
        os.kill(told["keeper"], signal.SIGCONT)
        async with Engine.open(tmp_path) as engine:
            assert os.readlink(f"{RUNTIME_DIRECTORY}/{engine.id}.state") == str(tmp_path)


def test_the_numbers_of_a_killed_keeper_are_free_although_a_fork_of_it_lives_for_a_moment(tmp_path: Path) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        with program(LEASER, str(tmp_path), str(reading), pass_fds=[reading]) as leaser:
            number = leaser.heard()["number"]
            [fork] = children_of(leaser.pid)
            leaser.kill()
            assert os.path.exists(f"/proc/{fork}")
            with program(LEASER, str(tmp_path), "") as successor:
                assert successor.heard() == {"number": number}
                successor.kill()
            end_leases(str(tmp_path))
            assert os.listdir(tmp_path) == []
    finally:
        os.close(writing)
        os.close(reading)
    wait_ended(fork)
