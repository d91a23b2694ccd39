"""Who may touch what: an engine whose keeper is dead, one that only reports, one whose client is suspended."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import anyio
import pytest
from tests.keepers import until, wait_ended
from tests.programs import program

from unisandbox import DeadlineExceededError, Engine, NotFoundError, Resources, Sandbox, UnavailableError
from unisandbox.api import Rootfs, SandboxSpec
from unisandbox.backends.runc import pidns
from unisandbox.cli import doctor
from unisandbox.engine import leftovers, recovery, sharing, state
from unisandbox.engine.closing import abandon
from unisandbox.host import boundary
from unisandbox.sandbox import containers

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")

# Stops itself when its record of a new sandbox is on the disk, as Ctrl-Z may.
SUSPENDED_MAKER = """
from unisandbox.host import boundary
done = []
def hear(name, of):
    if name == "after file.rename" and "/sandboxes/" in of and not done:
        done.append(1)
        tell(intent=True)
        os.kill(os.getpid(), signal.SIGSTOP)
async def main():
    async with Engine.attach(sys.argv[1]) as engine:
        boundary.watch(hear)
        sandbox = await engine.create(name="x", resources=Resources(memory="64M"))
        tell(code=(await sandbox.run(["echo"])).exit_code)
anyio.run(main)
"""

KEPT = """
async def main():
    engine = await Engine.open(sys.argv[1], policy="keep")
    await engine.create(name="dead", resources=Resources(memory="64M"))
    tell(keeper=engine._core.host.keeper.pid)
    signal.pause()
anyio.run(main)
"""


def keeper_of(engine: Engine) -> int:
    return engine._core.host.keeper.pid


def kill_keeper(engine: Engine) -> None:
    pid = keeper_of(engine)
    os.kill(pid, signal.SIGKILL)
    wait_ended(pid)


async def test_an_owner_without_its_keeper_touches_nothing_of_its_successor(tmp_path: Path) -> None:
    former = await Engine.open(tmp_path)
    old = await former.create(name="a", resources=SMALL)
    client = await Engine.attach(tmp_path)
    seen = await client.get("a")
    await seen.status()
    kill_keeper(former)
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["removed"]
        sandbox = await engine.create(name="b", resources=SMALL)
        process = await sandbox.exec(["cat"], stdin="pipe")
        for call in (
            *(old.remove, old.status, former.list, seen.remove, client.list, lambda: client.remove("b")),
            *(lambda: old.files.read("/etc/hosts"), lambda: seen.files.write("/tmp/a", b""), seen.metrics),
        ):
            with pytest.raises(UnavailableError):
                await call()
        await former.close()
        await client.close()
        assert [status.name for status in await engine.list()] == ["b"]
        await process.stdin.send(b"alive")
        assert await process.stdout.receive() == b"alive"


async def test_an_owner_without_its_keeper_cleans_up_when_nobody_came(tmp_path: Path) -> None:
    engine = await Engine.open(tmp_path)
    sandbox = await engine.create(resources=SMALL)
    async with Engine.attach(tmp_path) as other:
        await other.create(resources=SMALL)
        kill_keeper(engine)
        with pytest.raises(UnavailableError):
            await sandbox.status()
        await sandbox.remove()
    await engine.close()
    assert os.listdir(tmp_path / "sandboxes") == []


@pytest.mark.parametrize("policy", ["stop", "keep"])
async def test_report_leaves_what_lives_and_removes_what_it_made(
    tmp_path: Path, policy: Literal["stop", "keep"]
) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        process = await (await engine.create(name="w", resources=SMALL)).exec(["sleep", "1000"])
    async with Engine.open(tmp_path, policy=policy, on_recover="report") as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["left"]
        await engine.create(name="mine", resources=SMALL)
    assert os.path.exists(f"/proc/{process.pid}")
    async with Engine.open(tmp_path) as engine:
        assert {found.action for found in engine.recovery.sandboxes} == {"adopted"}
        names = {status.name for status in await engine.list()}
        assert names == ({"w"} if policy == "stop" else {"w", "mine"})


async def test_report_leaves_what_a_dead_keeper_had(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        await engine.create(name="w", resources=SMALL)
        kill_keeper(engine)
    async with Engine.open(tmp_path, on_recover="report") as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["left"]
        cgroups = [f"{place.parent}/{engine._core.host.cgroups.name}" for place in engine._core.host.cgroups.places]
        before = [os.listdir(path) for path in cgroups]
    assert [os.listdir(path) for path in cgroups] == before
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["removed"]


@pytest.mark.parametrize("keeper_lives", [True, False])
async def test_what_a_damaged_record_described_is_freed_below_a_cgroup_of_its_own_choice(
    tmp_path: Path, keeper_lives: bool
) -> None:
    parent = f"/unisandbox-test-{os.getpid()}"
    async with Engine.open(tmp_path, policy="keep") as engine:
        await engine._core.create(SandboxSpec(name="bad", resources=SMALL, cgroup_parent=parent, rootfs=Rootfs.host()))
        sandbox = await engine.get("bad")
        process = await sandbox.exec(["sleep", "1000"])
        places = [place.mount.directory + parent for place in engine._core.host.cgroups.places]
        assert all(any(name.startswith("unisandbox-") for name in os.listdir(place)) for place in places)
        if not keeper_lives:
            kill_keeper(engine)
    try:
        (tmp_path / "sandboxes" / f"{sandbox.id}.json").write_text("damage")
        async with Engine.open(tmp_path) as engine:
            assert len(engine.recovery.damaged) == 1
            wait_ended(process.pid)
        assert [list(filter(os.path.isdir, Path(place).iterdir())) for place in places] == [[] for _ in places]
    finally:
        for place in places:
            os.rmdir(place)


async def test_doctor_leaves_what_has_come_since_it_looked(tmp_path: Path) -> None:
    with program(KEPT, str(tmp_path)) as host:
        keeper = host.heard()["keeper"]
        os.kill(keeper, signal.SIGKILL)
        wait_ended(keeper)
        host.kill()
    left: list[leftovers.Leftover] = []

    def is_left() -> bool:
        # Forks of the killed keeper hold its lock until they have ended, too.
        left[:] = [left for left in leftovers.find() if left.state_dir == str(tmp_path) and left.kind == "state"]
        return bool(left)

    until(is_left, "the directory is left over")
    async with Engine.open(tmp_path, policy="keep") as engine:
        process = await (await engine.create(name="fresh", resources=SMALL)).exec(["sleep", "1000"])
    await doctor._remove(left[0])
    assert os.path.exists(f"/proc/{process.pid}")
    async with Engine.open(tmp_path) as engine:
        assert [status.name for status in await engine.list()] == ["fresh"]


@pytest.mark.parametrize("how", ["remove", "kill", "stop"])
async def test_a_patient_stop_keeps_nobody_waiting(tmp_path: Path, how: str) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        process = await sandbox.exec(["sh", "-c", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done"])
        assert await process.stdout.receive() == b"ready\n"
        same = await other.get("w")
        begun = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(sandbox.stop, 60.0)
            assert await process.stdout.receive() == b"asked\n"
            if how == "stop":
                await same.stop(grace=0)
            else:
                await (same.remove if how == "remove" else same.kill)()
        assert time.monotonic() - begun < 10


async def test_a_removal_of_a_container_that_is_held_up_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "CLEANING_SECONDS", 0.3)  # nobody lets go here: ten seconds show no more
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", resources=SMALL)
        container = await sandbox.launch(["sleep", "1000"])
        locks, lock = other._core.host.keeper.locks, f"{engine._core.host.prefix(sandbox.id)}change"
        await locks.lock(lock)
        with pytest.raises(DeadlineExceededError, match="container 'main' of sandbox 'w'"):
            await container.remove()
        locks.unlock(lock)
        await container.remove()
        assert await sandbox.containers.list() == []
        assert (await container.wait()).signal == signal.SIGKILL


async def test_a_suspended_maker_holds_up_nobody_else_and_keeps_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_REMOVE_LOCK_SECONDS", 0.3)  # nobody lets go here: eight seconds show no more
    async with Engine.open(tmp_path) as engine:
        with program(SUSPENDED_MAKER, str(tmp_path)) as maker:
            maker.heard()
            with anyio.fail_after(5):
                await engine.create(name="y", resources=SMALL)
                with pytest.raises(DeadlineExceededError, match=f"process {maker.pid}"):
                    await engine.remove("x")
                await (await engine.create(name="z", resources=SMALL)).run(["true"])
                async with Engine.attach(tmp_path) as other:
                    assert not other.recovery
            os.kill(maker.pid, signal.SIGCONT)
            assert maker.heard() == {"code": 0}
        await engine.remove("x")
        assert {status.name for status in await engine.list()} == {"y", "z"}


async def test_a_sandbox_with_shared_pids_may_vanish_while_somebody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer, others = anyio.Event(), anyio.Event(), list[int]()
    restore = pidns.SharedPids.restore.__func__  # type: ignore[attr-defined]

    async def held_up(cls: object, host: object, pod: object) -> object:
        others.append(os.open("/dev/null", os.O_RDONLY))  # gets the number that was closed last
        restored = await restore(cls, host, pod)
        asked.set()
        await answer.wait()
        return restored

    async def look(sandbox: Sandbox) -> None:
        with contextlib.suppress(NotFoundError):
            await sandbox.status()

    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", resources=SMALL, share_pid=True)
        seen = await other.get("w")
        await seen.status()
        monkeypatch.setattr(pidns.SharedPids, "restore", classmethod(held_up))
        async with anyio.create_task_group() as group:
            group.start_soon(look, seen)
            await asked.wait()
            await sandbox.remove()
            group.start_soon(other.list)
            await anyio.wait_all_tasks_blocked()
            answer.set()
        with pytest.raises(NotFoundError):
            await seen.status()
        for fd in others:
            os.close(fd)  # and nobody else has


async def test_a_name_that_another_process_has_freed_is_free(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        former = await engine.create(name="w", resources=SMALL)
        await other.remove("w")
        again = await engine.create(name="w", resources=SMALL)
        assert again.id != former.id
        with pytest.raises(NotFoundError):
            await former.status()


async def test_a_keeper_that_nobody_needs_ends(tmp_path: Path) -> None:
    engine = await Engine.open(tmp_path, policy="keep")
    await engine.create(ttl=0.5, resources=SMALL)
    keeper = keeper_of(engine)
    abandon(engine._core)
    wait_ended(keeper)
    until(lambda: os.listdir(tmp_path / "sandboxes") == [], "the record of what has expired is gone")


def test_two_that_begin_with_a_directory_at_once_agree_on_its_id(tmp_path: Path) -> None:
    ids: list[str] = []

    def overtaken(name: str, _: str) -> None:
        if name == "before state.engine_id":
            boundary.watch(None)
            ids.append(state._engine_id(str(tmp_path)))

    boundary.watch(overtaken)
    try:
        ids.append(state._engine_id(str(tmp_path)))
    finally:
        boundary.watch(None)
    assert ids == [state.known_id(str(tmp_path))] * 2


def test_two_that_find_a_damaged_id_at_once_agree_on_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine-id").write_text("damaged")
    known_id, looks = state.known_id, threading.local()
    both = threading.Barrier(2)

    def slow(path: str) -> str:
        known = known_id(path)
        looks.count = getattr(looks, "count", 0) + 1
        if looks.count == 2:  # each is about to replace it, unless one waits for the other
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(1)
        return known

    monkeypatch.setattr(state, "known_id", slow)
    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(state._engine_id, [str(tmp_path)] * 2))
    assert ids == [known_id(str(tmp_path))] * 2
    assert os.listdir(tmp_path) == ["engine-id"]


async def test_a_clock_that_is_set_forward_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Engine.open(tmp_path) as engine, Engine.attach(tmp_path) as other:
        sandbox = await engine.create(name="w", ttl=600, resources=SMALL)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        monkeypatch.setattr(sharing, "_EXPIRY_SECONDS", 60.0)  # what a call would wait for the keeper's word
        with anyio.fail_after(30):
            for each in (sandbox, await other.get("w")):
                assert (await each.status()).state == "ready"
                assert (await each.run(["true"])).exit_code == 0
            await sandbox.remove()


async def test_a_recovery_that_fails_in_an_unforeseen_way_says_where_and_keeps_nobody_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Engine.open(tmp_path, policy="keep") as kept:
        bad = await kept.create(name="bad", resources=SMALL)
        await kept.create(name="good", resources=SMALL)
    adopt = sharing.Sharing.adopt

    async def fails(self: sharing.Sharing) -> bool:
        if self._entry.sandbox_id == bad.id:
            raise ZeroDivisionError
        return await adopt(self)

    with monkeypatch.context() as patched:
        patched.setattr(sharing.Sharing, "adopt", fails)
        async with Engine.open(tmp_path, policy="keep") as engine:
            assert {found.name: found.action for found in engine.recovery.sandboxes} == {
                "bad": "failed",
                "good": "adopted",
            }
            assert "ZeroDivisionError" in engine.recovery.sandboxes[0].reason
    assert bad.id in caplog.text
    assert "test_ownership.py" in caplog.text, "where it was raised"
    async with Engine.open(tmp_path) as engine:
        assert {found.action for found in engine.recovery.sandboxes} == {"adopted"}


async def test_an_opening_that_fails_leaves_what_was_kept_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path, policy="keep") as kept:
        process = await (await kept.create(name="w", resources=SMALL)).exec(["sleep", "60"])
        pid = process.pid

    async def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(recovery.Recovery, "run", fails)
        with pytest.raises(OSError, match="no space"):
            await Engine.open(tmp_path)
    os.kill(pid, 0)
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
        os.kill(pid, 0)
