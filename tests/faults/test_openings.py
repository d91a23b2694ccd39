"""Openings of a state directory: two at once, one that fails or is cancelled, records or a place that have changed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import anyio
import pytest
from tests.keepers import keeper_of, until, wait_ended

from unisandbox import (
    BackendError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Resources,
    UnavailableError,
)
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine import durable, leftovers, recovery, sharing, state_files
from unisandbox.host import boundary

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")


def test_two_that_begin_with_a_directory_at_once_agree_on_its_id(tmp_path: Path) -> None:
    ids: list[str] = []

    def overtaken(name: str, _: str) -> None:
        if name == "before state.engine_id":
            boundary.watch(None)
            ids.append(state_files.engine_id_of(str(tmp_path)))

    boundary.watch(overtaken)
    try:
        ids.append(state_files.engine_id_of(str(tmp_path)))
    finally:
        boundary.watch(None)
    assert ids == [state_files.known_id(str(tmp_path))] * 2


def test_two_that_find_a_damaged_id_at_once_agree_on_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine-id").write_text("damaged")
    known_id, looks = state_files.known_id, threading.local()
    both = threading.Barrier(2)

    def slow(path: str) -> str:
        known = known_id(path)
        looks.count = getattr(looks, "count", 0) + 1
        if looks.count == 2:  # each is about to replace it, unless one waits for the other
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(1)
        return known

    monkeypatch.setattr(state_files, "known_id", slow)
    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(state_files.engine_id_of, [str(tmp_path)] * 2))
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
    assert "test_openings.py" in caplog.text, "where it was raised"
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
        with pytest.raises(BackendError, match="no space"):
            await Engine.open(tmp_path)
    os.kill(pid, 0)
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
        os.kill(pid, 0)


async def test_an_opening_that_is_cancelled_at_its_last_step_leaves_what_was_kept_as_it_was(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as kept:
        process = await (await kept.create(name="w", resources=SMALL)).exec(["sleep", "60"])
        keeper = keeper_of(kept)

    def cut(name: str, of: str) -> None:
        if of == "set_policy":
            boundary.watch(None)
            os.kill(keeper, signal.SIGSTOP)  # it hears what is asked when we have given up
            until(lambda: " T " in Path(f"/proc/{keeper}/stat").read_text(), "it is stopped")
            scope.cancel()

    with anyio.CancelScope() as scope:
        boundary.watch(cut)
        await Engine.open(tmp_path, policy="stop")
    os.kill(keeper, signal.SIGCONT)
    assert scope.cancelled_caught
    async with Engine.attach(tmp_path) as engine:  # it has heard of our end when it answers
        assert engine._core.policy == "keep"
        os.kill(process.pid, 0)
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]


async def test_what_was_kept_outlives_the_moving_of_its_directory(tmp_path: Path) -> None:
    before = Inventory.take()
    state, moved = tmp_path / "state", tmp_path / "moved"
    engine = await Engine.open(state, policy="keep")
    sandbox = await engine.create(name="w", resources=SMALL)
    process = await sandbox.exec(["sleep", "1000"])
    attached = await Engine.attach(state)
    seen = await attached.get("w")
    state.rename(moved)
    calls = (
        *(lambda: engine.create(resources=SMALL), lambda: engine.create(name="x", resources=SMALL)),
        *(lambda: engine.create(operation_id="op", resources=SMALL), engine.list, attached.list, seen.status),
        *(sandbox.status, seen.remove),
    )
    for call in calls:
        with pytest.raises(UnavailableError, match="moved or removed"):
            await call()
    assert not state.exists()
    async with Engine.open(state) as other:  # another engine in its place
        for call in calls:
            with pytest.raises(UnavailableError, match="moved or removed"):
                await call()
        assert await other.list() == []
    await attached.close()
    await engine.close()
    os.kill(process.pid, 0)
    async with Engine.open(moved) as again:
        assert [found.action for found in again.recovery.sandboxes] == ["adopted"]
        assert not {"operations", "damaged"} & set(os.listdir(state))
    assert settle(before) == []


async def test_a_keeper_with_sandboxes_does_not_go_because_their_records_are_not_there(tmp_path: Path) -> None:
    engine = await Engine.open(tmp_path, policy="keep")
    process = await (await engine.create(name="w", resources=SMALL)).exec(["sleep", "1000"])
    attached = await Engine.attach(tmp_path)
    records = tmp_path / "sandboxes"
    records.rename(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="sandboxes"):
        await engine.list()
    with pytest.raises(UnavailableError, match="sandboxes"):
        await engine.create(resources=SMALL)
    assert not records.exists(), "nothing is in the way of those that are somewhere else"
    await engine.close()
    assert await attached.list() == [], "it has never seen any"
    await attached.close()
    os.kill(process.pid, 0)
    (tmp_path / "elsewhere").rename(records)
    async with Engine.open(tmp_path) as again:
        assert [found.action for found in again.recovery.sandboxes] == ["adopted"]


@pytest.mark.parametrize("policy", ["stop", "keep"])
async def test_an_engine_whose_directory_is_gone_ends_and_leaves_nothing(
    tmp_path: Path, policy: Literal["stop", "keep"]
) -> None:
    before = Inventory.take()
    engine = await Engine.open(tmp_path / "state", policy=policy)
    await (await engine.create(resources=SMALL)).exec(["sleep", "1000"])
    keeper = keeper_of(engine)
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(UnavailableError, match="moved or removed"):
        await engine.list()
    await engine.close()
    wait_ended(keeper)
    assert not (tmp_path / "state").exists()
    assert settle(before) == []


@pytest.mark.parametrize("owned", [True, False])
async def test_a_keeper_without_its_lock_file_has_one_owner(tmp_path: Path, owned: bool) -> None:
    engine = await Engine.open(tmp_path, policy="keep")
    sandbox = await engine.create(name="w", resources=SMALL)
    process = await sandbox.exec(["sleep", "1000"])
    if not owned:
        await engine.close()
    (tmp_path / "lock").unlink()
    if not owned:
        engine = await Engine.open(tmp_path, policy="keep")
        sandbox = await engine.get("w")
    with pytest.raises(FailedPreconditionError, match="in use by a keeper that answers"):
        await Engine.open(tmp_path)
    assert [left for left in leftovers.find() if left.engine_id == engine.id] == []
    assert (await sandbox.run(["true"])).exit_code == 0
    os.kill(process.pid, 0)
    await engine.close()
    async with Engine.open(tmp_path) as again:
        assert [found.action for found in again.recovery.sandboxes] == ["adopted"]


async def test_a_damaged_record_is_told_to_who_attaches_and_freed_when_asked(tmp_path: Path) -> None:
    before = Inventory.take()
    engine = await Engine.open(tmp_path, policy="keep")
    bad = await engine.create(name="bad", resources=SMALL)
    process = await bad.exec(["sleep", "1000"])
    good = await engine.create(name="good", resources=SMALL)
    await good.run(["true"])
    path = tmp_path / f"sandboxes/{bad.id}.json"
    path.write_bytes(path.read_bytes() + b"x")
    async with Engine.attach(tmp_path) as seen:
        assert [(found.path, found.kept_as) for found in seen.recovery.damaged] == [(str(path), str(path))]
        assert [status.name for status in await seen.list()] == ["good"]
    os.kill(process.pid, 0)
    [left] = [left for left in leftovers.find() if left.engine_id == engine.id]
    assert (left.kind, left.what, left.removable) == ("record", str(path), False)
    report = await leftovers.free_unrecorded(str(tmp_path))
    wait_ended(process.pid)
    assert [found.action for found in report.sandboxes] == ["removed"]
    [kept] = report.damaged
    assert Path(kept.kept_as).parent == tmp_path / "damaged"
    assert [left for left in leftovers.find() if left.engine_id == engine.id] == []
    assert (await good.run(["true"])).exit_code == 0
    await good.remove()
    keeper = keeper_of(engine)
    await engine.close()
    wait_ended(keeper)
    assert settle(before) == []


@pytest.mark.parametrize("later", ["version", "field"])
async def test_what_a_later_version_has_written_is_left_to_it_while_its_keeper_lives(
    tmp_path: Path, later: str
) -> None:
    """Also where what is beside it is freed; the next owner keeps the record aside, and frees what it described."""
    before = Inventory.take()
    engine = await Engine.open(tmp_path, policy="keep")
    of_later, torn = [await engine.create(name=name, resources=SMALL) for name in ("later", "torn")]
    process, other = [await sandbox.exec(["sleep", "1000"]) for sandbox in (of_later, torn)]
    path, damaged = [tmp_path / f"sandboxes/{sandbox.id}.json" for sandbox in (of_later, torn)]
    record = json.loads(path.read_bytes())
    version = record["version"] + (later == "version")
    body = record["record"] | ({"new": 1} if later == "field" else {})
    path.write_bytes(durable.sealed(version, "record", json.dumps(body, sort_keys=True, separators=(",", ":"))))
    damaged.write_bytes(damaged.read_bytes()[:-9])

    def found() -> list[tuple[str, str]]:
        return sorted((left.kind, left.what) for left in leftovers.find() if left.engine_id == engine.id)

    assert found() == [("later", str(path)), ("record", str(damaged))]
    report = await leftovers.free_unrecorded(str(tmp_path))
    assert sorted((bad.path, bad.later) for bad in report.damaged) == sorted([(str(path), True), (str(damaged), False)])
    assert len(report.sandboxes) == 1
    wait_ended(other.pid)
    assert found() == [("later", str(path))]
    os.kill(process.pid, 0)
    assert path.exists()
    keeper = keeper_of(engine)
    await engine.close()
    async with Engine.open(tmp_path) as owner:
        wait_ended(process.pid)
        [kept] = owner.recovery.damaged
        assert Path(kept.kept_as).parent == tmp_path / "damaged"
    wait_ended(keeper)
    assert settle(before) == []


async def test_what_no_record_of_a_living_engine_speaks_of_is_found_and_freed(tmp_path: Path) -> None:
    engine = await Engine.open(tmp_path, policy="keep")
    process = await (await engine.create(resources=SMALL)).exec(["sleep", "1000"])
    await engine.close()
    [record] = (tmp_path / "sandboxes").iterdir()
    record.unlink()
    found = [left for left in leftovers.find() if left.engine_id == engine.id]
    assert {left.kind for left in found} >= {"stray"}
    assert (await leftovers.free_unrecorded(str(tmp_path))).sandboxes
    wait_ended(process.pid)
    assert not [left for left in leftovers.find() if left.engine_id == engine.id and left.kind == "stray"]


async def test_what_is_being_made_is_no_leftover(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        found: list[leftovers.Leftover] = []

        def look(name: str, of: str) -> None:
            if name.startswith("after ") and engine.id:
                found.extend(left for left in leftovers.find() if left.engine_id == engine.id)

        boundary.watch(look)
        try:
            sandbox = await engine.create(resources=SMALL)
            await sandbox.remove()
        finally:
            boundary.watch(None)
        assert found == []


async def test_a_directory_with_other_peoples_things_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("lock", "events", "engine-id", "letter"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgumentError, match=r"is no engine's, and holds 'letter'\. Give a directory of its own"):
        await Engine.open(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["engine-id", "events", "letter", "lock"]
    assert {(tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {"mine"}


def test_the_root_directory_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    for path in ("/", str(tmp_path / "link")):
        with pytest.raises(InvalidArgumentError, match=r"it is the root directory\. Give a directory of its own"):
            state_files.check_own(path)  # and nothing more: an engine that opened would leave its files there


async def test_an_engines_directory_stays_one_whatever_else_is_put_there(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    async with Engine.open(tmp_path / "."):
        (tmp_path / "letter").touch()
    shutil.copytree(tmp_path, tmp_path / "copy")
    for path in (tmp_path, tmp_path / "copy"):
        async with Engine.open(path) as engine:
            assert engine.id
