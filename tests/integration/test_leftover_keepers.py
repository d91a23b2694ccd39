"""Keepers that nobody needs any more are found, and those that somebody does need stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.keepers import until, wait_ended
from tests.left_behind import kinds, left_of, remove_all

from unisandbox import Engine, Resources
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine import leftovers
from unisandbox.engine.closing import abandon
from unisandbox.engine.leftovers import traces, verdicts
from unisandbox.engine.record import Record
from unisandbox.engine.records import RecordStore
from unisandbox.engine.runtime_directory import RUNTIME_DIRECTORY
from unisandbox.engine.state import StateDirectory
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.keeper import Keeper

pytestmark = pytest.mark.root
SMALL = Resources(memory="64M")


def test_a_directory_without_a_keeper_may_be_one_that_is_about_to_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDirectory.prepare(None)
    unnamed = Path(RUNTIME_DIRECTORY) / "state-0a1b2c3d"
    unnamed.mkdir(mode=0o700)
    try:
        found = left_of(state.engine_id)
        assert kinds(found) == ["directory", "link"]
        assert not any(leftover.removable for leftover in found)
        assert [leftover.removable for leftover in leftovers.find() if leftover.what == str(unnamed)] == [False]
        monkeypatch.setattr(verdicts, "_YOUNG", 0.0)
        remove_all(state.engine_id)
        for leftover in leftovers.find():
            if leftover.what == str(unnamed):
                leftovers.remove(leftover)
        assert not unnamed.exists()
    finally:
        state.discard()
        state.unclaim()


@pytest.mark.anyio
async def test_a_keeper_that_nobody_needs_is_told_with_its_directory(tmp_path: Path) -> None:
    state = StateDirectory.prepare(tmp_path)
    keeper = await Keeper.start(state.path, workdir=state.work_dir, policy="keep")
    await keeper.guard(state.guards(Cgroups.detect(f"unisandbox-{state.engine_id}")))
    pid = keeper.pid
    assert left_of(state.engine_id) == []
    keeper.abandon()
    until(lambda: bool(left_of(state.engine_id)), "the keeper sees that its owner is gone")
    [found] = left_of(state.engine_id)
    assert (found.kind, found.what, found.state_dir, found.removable) == ("keeper", str(pid), str(tmp_path), False)
    store = RecordStore(str(tmp_path / "sandboxes"), durable=True)
    store.write(Record("s1", None, "runc", "ready", 1.0))
    assert left_of(state.engine_id) == [], "it keeps a sandbox"
    store.remove("s1")
    again = await Keeper.attach(state.path, own=True)
    assert left_of(state.engine_id) == []
    await again.close(run_guards=True)
    wait_ended(pid)
    assert left_of(state.engine_id) == []


@pytest.mark.anyio
async def test_a_keeper_whose_directory_is_gone_is_found_and_ends_with_all_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Inventory.take()
    async with Engine.open(tmp_path / "state", policy="keep") as engine:
        process = await (await engine.create(resources=SMALL)).exec(["sleep", "1000"])
        keeper = engine._core.host.keeper
        number = keeper.pid
        (tmp_path / "state").rename(tmp_path / "moved")
        assert left_of(engine.id) == [], "it may come back"
        (tmp_path / "moved").rename(tmp_path / "state")
    os.kill(process.pid, 0)
    assert left_of(engine.id) == []
    attached = await Engine.attach(tmp_path / "state")  # does not go: then it would notice that by itself
    shutil.rmtree(tmp_path / "state")
    assert left_of(engine.id) == [], "somebody uses it"
    monkeypatch.setattr(traces, "_has_clients", lambda _: False)
    async with Engine.open(tmp_path / "state"):
        [found] = left_of(engine.id)
        assert (found.kind, found.what, found.removable) == ("keeper", str(number), True)
        leftovers.remove(found)
        wait_ended(process.pid)
        assert left_of(engine.id) == []
    await attached.close()
    assert settle(before) == []


@pytest.mark.anyio
async def test_the_keeper_of_a_living_owner_is_not_left_over_without_its_directory(tmp_path: Path) -> None:
    before = Inventory.take()
    engine = await Engine.open(tmp_path / "state", policy="keep")
    process = await (await engine.create(resources=SMALL)).exec(["sleep", "1000"])
    shutil.rmtree(tmp_path / "state")
    assert left_of(engine.id) == []
    abandon(engine._core)
    wait_ended(process.pid)  # by itself: nobody can come
    until(lambda: left_of(engine.id) == [], "the keeper has ended")
    assert settle(before) == []
