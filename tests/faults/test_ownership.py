"""Who may touch what: an engine whose keeper is dead, one that only reports, one whose client is suspended."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import anyio
import pytest
from tests.command_line import run
from tests.keepers import keeper_of, until, wait_ended
from tests.programs import program

from unisandbox import (
    AlreadyExistsError,
    DeadlineExceededError,
    Engine,
    FailedPreconditionError,
    NotFoundError,
    Resources,
    Sandbox,
    UnavailableError,
)
from unisandbox.api import Capabilities, Event, Probe, Rootfs, Sandboxer, SandboxSpec
from unisandbox.backends.runc import RuncBackend, pidns
from unisandbox.cli import doctor
from unisandbox.cli.state import opened
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine import leftovers, sharing
from unisandbox.engine.closing import abandon
from unisandbox.host.keeper import protocol
from unisandbox.host.services import Host
from unisandbox.sandbox import containers

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")

# Removes a sandbox, and is in the middle of that until there is a file.
REMOVER = """
from unisandbox.engine.entry import Entry
free = Entry._free
async def wait_and_free(self):
    tell(begun=True)
    while not os.path.exists(sys.argv[3]):
        await anyio.sleep(0.01)
    await free(self)
Entry._free = wait_and_free
async def main():
    async with Engine.attach(sys.argv[2]) as engine:
        await engine.remove("w")
anyio.run(main, backend=sys.argv[1])
"""

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


def kill_keeper(engine: Engine) -> None:
    pid = keeper_of(engine)
    os.kill(pid, signal.SIGKILL)
    wait_ended(pid)


async def test_an_opening_connects_once_to_the_keeper_that_it_finds(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        await engine.create(name="kept", resources=SMALL)
        assert engine._core.host.keeper.hello.client == 1
    async with Engine.open(tmp_path) as engine:
        assert engine._core.host.keeper.hello.client == 2
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]
        with pytest.raises(FailedPreconditionError, match=f"in use by process {os.getpid()}"):
            await Engine.open(tmp_path)
        assert await engine._core.host.keeper.clients() == {2}, "who was refused has gone"


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


class Mine:
    """A backend that not every process has."""

    name = "mine"
    rank = 0

    @property
    def capabilities(self) -> Capabilities:
        return RuncBackend().capabilities

    async def probe(self, *, deep: bool = False) -> Probe:
        return await RuncBackend().probe(deep=deep)

    async def open(self, host: Host) -> Sandboxer:
        return await RuncBackend().open(host)


async def test_what_cannot_be_had_without_its_backend_says_so_and_keeps_its_name(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep", backends={"mine": Mine()}) as engine:
        sandbox = await engine.create(name="w", isolation="mine", resources=SMALL)
        process = await sandbox.exec(["sleep", "1000"])
        async with Engine.attach(tmp_path) as other:
            await look_in_vain(other, sandbox.id)
    async with Engine.open(tmp_path, policy="keep") as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["failed"]
        await look_in_vain(engine, sandbox.id)
        async with Engine.attach(tmp_path, backends={"mine": Mine()}) as other:
            await (await other.get("w")).remove()
        wait_ended(process.pid)
        async with engine.create(name="w", resources=SMALL):
            pass


async def test_what_its_owner_cannot_use_ends_with_him_and_leaves_no_record(tmp_path: Path) -> None:
    async with (
        Engine.open(tmp_path, policy="stop") as owner,
        Engine.attach(tmp_path, backends={"mine": Mine()}) as other,
    ):
        process = await (await other.create(isolation="mine", resources=SMALL)).exec(["sleep", "1000"])
        await owner.close()
        wait_ended(process.pid)
        assert os.listdir(tmp_path / "sandboxes") == []


async def test_what_is_usable_by_others_only_is_told_to_have_ended_with_its_keeper(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep", backends={"mine": Mine()}) as engine:
        await engine.create(name="w", isolation="mine", resources=SMALL)
        kill_keeper(engine)
    async with Engine.open(tmp_path) as engine:
        [status] = await engine.list()
        assert (status.name, status.state) == ("w", "stopped")
        assert "'mine' is not known" in status.unusable
    async with Engine.open(tmp_path, backends={"mine": Mine()}) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["removed"]


async def test_what_is_usable_by_others_only_is_gone_when_its_ttl_is_over(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        async with Engine.attach(tmp_path, backends={"mine": Mine()}) as other:
            sandbox = await other.create(name="w", isolation="mine", resources=SMALL, ttl=1000.0)
            process = await sandbox.exec(["sleep", "1000"])
        assert [status.state for status in await engine.list()] == ["ready"]
        host = engine._core.host
        await host.keeper.expirations.set(host.prefix(sandbox.id), 0)
        wait_ended(process.pid)
        with anyio.fail_after(20):
            while await engine.list():
                await anyio.sleep(0.01)  # what the keeper has freed it says with an answer
        async with engine.create(name="w", resources=SMALL):
            pass


@pytest.mark.parametrize("how", ["of another version", "broken"])
async def test_commands_list_what_they_cannot_use_and_say_what_to_install(how: str, tmp_path: Path) -> None:
    pytest.importorskip("wasmtime")
    state, packages, empty = tmp_path / "state", tmp_path / "packages", tmp_path / "empty"
    for directory in (packages / "wasmtime-1.0.dist-info", empty):
        directory.mkdir(parents=True)
    if how == "broken":
        (packages / "wasmtime-1.0.dist-info").rmdir()
        (packages / "wasmtime.py").write_text("raise ImportError('a library of it is missing')")
    else:
        (packages / "wasmtime-1.0.dist-info/METADATA").write_text("Name: wasmtime\nVersion: 1.0\n")

    def said(*args: str) -> tuple[int, str, str]:
        done = run(*args, env={"UNISANDBOX_STATE": str(state), "PYTHONPATH": str(packages)})
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    async with Engine.open(state) as engine:
        sandbox = await engine.create(name="w", isolation="wasm+process", rootfs=Rootfs.dir(empty))
        code, out, err = said("ps")
        assert (code, len(out.splitlines())) == (0, 2), err
        assert "ready, unusable here" in out
        assert "unisandbox: sandbox 'w': " in err
        assert "pip install 'unisandbox[wasm" in err
        code, out, err = said("ps", "--json")
        [row] = json.loads(out)["sandboxes"]
        assert (code, row["id"], row["status"], err) == (0, sandbox.id, "unusable", "")
        assert "pip install 'unisandbox[wasm" in row["unusable"]
        for ref in ("w", sandbox.id[:12]):
            code, out, err = said("rm", "-f", ref)
            assert (code, out) == (125, "")
            assert "pip install 'unisandbox[wasm" in err


async def look_in_vain(engine: Engine, sandbox_id: str) -> None:
    for ref in ("w", sandbox_id):
        with pytest.raises(FailedPreconditionError, match="'mine' is not known") as caught:
            await engine.get(ref)
        assert "Installed backends: " in caught.value.hint
    with pytest.raises(FailedPreconditionError, match="'mine' is not known"):
        await engine.remove("w")
    [status] = await engine.list()
    assert (status.id, status.name, status.backend, status.state) == (sandbox_id, "w", "mine", "ready")
    assert "'mine' is not known" in status.unusable
    assert "Installed backends: " in status.unusable
    with pytest.raises(AlreadyExistsError):
        await engine.create(name="w", resources=SMALL)


async def test_a_name_that_another_process_has_freed_under_an_owner_that_reports_is_free(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        await engine.create(name="w", resources=SMALL)
    async with Engine.open(tmp_path, on_recover="report") as engine:
        with pytest.raises(FailedPreconditionError, match="left by a former engine and not taken over"):
            await engine.get("w")
        async with Engine.attach(tmp_path) as other:
            await (await other.get("w")).remove()
        with pytest.raises(NotFoundError):
            await engine.get("w")
        async with engine.create(name="w", resources=SMALL):
            pass


async def test_a_keeper_of_another_version_is_told_by_who_opens_and_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path, policy="keep") as engine:
        process = await (await engine.create(name="w", resources=SMALL)).exec(["sleep", "1000"])
    with monkeypatch.context() as later:
        later.setattr(protocol, "VERSION", 99)
        with pytest.raises(UnavailableError, match="this library version 99"):
            await Engine.open(tmp_path)
        with pytest.raises(UnavailableError, match="this library version 99"):
            await Engine.attach(tmp_path)
        for create in (False, True):
            with pytest.raises(UnavailableError, match="this library version 99"):
                async with opened(str(tmp_path), create=create):
                    pass
    os.kill(process.pid, 0)
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]


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
            with anyio.fail_after(20):
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
    before = Inventory.take()
    engine = await Engine.open(tmp_path, policy="keep")
    sandbox = await engine.create(ttl=0.5, resources=SMALL)
    with contextlib.suppress(NotFoundError, UnavailableError):  # a machine that is starved takes longer
        await sandbox.exec(["sleep", "1000"])
    keeper = keeper_of(engine)
    abandon(engine._core)
    wait_ended(keeper)
    until(lambda: os.listdir(tmp_path / "sandboxes") == [], "the record of what has expired is gone")
    assert settle(before) == []


async def test_what_a_living_client_removes_while_another_engine_opens_is_told_as_removed_and_no_more(
    tmp_path: Path, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, go = tmp_path / "state", tmp_path / "go"
    adopt = sharing.Sharing.adopt

    async def go_and_adopt(self: sharing.Sharing) -> bool:
        go.touch()
        return await adopt(self)

    monkeypatch.setattr(sharing.Sharing, "adopt", go_and_adopt)
    async with Engine.open(state, policy="keep") as first:
        await first.create(name="w", resources=SMALL)
        await first.create(name="other", resources=SMALL)
    with program(REMOVER, anyio_backend, str(state), str(go)) as remover:
        remover.heard()
        async with Engine.open(state) as engine:
            assert engine.recovery is not None
            assert [found.name for found in engine.recovery.sandboxes] == ["other"]
            assert remover.finish()[0] == 0
            await engine.create(name="last", resources=SMALL)
            told = [event.kind async for event in until_started(engine)]
            assert told.count("sandbox.removed") == 1
            assert told.count("sandbox.recovered") == 1


async def until_started(engine: Engine) -> AsyncIterator[Event]:
    """What is told up to the start of the last of three."""
    started = 0
    async for event in engine.events():
        yield event
        started += event.kind == "sandbox.started"
        if started == 3:
            return
