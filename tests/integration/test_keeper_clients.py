"""What clients of one keeper share: notes and locks; who they are to each other, and when it may retire."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import anyio
import pytest
from tests.keepers import DEADLINE, adopt, client_of, host, keeper_at, raw_client, said, sh_exit, until, wait_ended

from unisandbox.api.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.host.keeper import Guard, Keeper

pytestmark = [pytest.mark.anyio, pytest.mark.root]


# --- notes ---


async def test_notes_are_replaced_listed_by_prefix_and_dropped(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        null = os.open("/dev/null", os.O_RDONLY)
        await keeper.hold("a/1", null)
        os.close(null)
        await keeper.notes.write("a/1", "old")
        await keeper.notes.write("a/1", 'new \u00fc\ud83d "\n\u20ac')
        await keeper.notes.write("a/2", "")
        await keeper.notes.write("b", "x" * 65536)
        assert await keeper.notes.read("a/") == {"a/1": 'new \u00fc\ud83d "\n\u20ac', "a/2": ""}
        await keeper.held()
        assert await other.notes.read() == await keeper.notes.read()
        await keeper.drop(["a/2"])
        assert sorted(await keeper.notes.read()) == ["a/1", "b"]
        await keeper.drop(prefix="a/")
        assert sorted(await keeper.notes.read()) == ["b"]
        assert await keeper.held() == {}


async def test_large_notes_and_many_are_listed_whole(tmp_path: Path) -> None:
    # The worst that fits into one message: every character is told by six bytes.
    wanted = {f"n{number}": "\u00e9" * 32768 for number in range(3)}
    wanted |= {f"m{number}": "x" * 65536 for number in range(10)}
    wanted |= {f"\u00e9{number:0100}": str(number) for number in range(2000)}
    async with keeper_at(tmp_path) as keeper:
        for name, value in wanted.items():
            await keeper.notes.write(name, value)
        assert await keeper.notes.read() == wanted


async def test_notes_that_are_too_large_are_refused(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        for name, value in (("n", "x" * 65537), ("n", "\u00e9" * 32769), ("n", "a\0b"), ("", "x"), ("x" * 257, "x")):
            with pytest.raises(InvalidArgumentError):
                await keeper.notes.write(name, value)
        await keeper.notes.write("kept", "first")
        for number in range(1100):
            await keeper.notes.write(f"n{number}", "x" * 65536)
        await keeper.notes.write("kept", "s" * 65536)
        notes = await keeper.notes.read("n")
        assert 60 << 20 < sum(map(len, notes.values())) <= 64 << 20
        assert await keeper.notes.read("kept") == {"kept": "first"}
        assert "no room for note 'n1099'" in Path(f"{tmp_path}/state/keeper.log").read_text()
        await keeper.drop(prefix="n")
        await keeper.notes.write("kept", "third")
        assert await keeper.notes.read() == {"kept": "third"}


# --- locks ---


async def test_a_lock_is_had_by_one_at_a_time_in_the_order_of_asking(tmp_path: Path) -> None:
    order: list[tuple[str, int]] = []

    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:

        async def work(client: Keeper, name: str) -> None:
            turn = await client.locks.lock("l")
            order.append((name, turn))
            await anyio.lowlevel.checkpoint()
            client.locks.unlock("l")

        first = await keeper.locks.lock("l")
        assert await other.locks.lock("another") == 1
        async with anyio.create_task_group() as group:
            for name, client in (("a", other), ("b", keeper), ("c", other), ("d", keeper)):
                group.start_soon(work, client, name)
                await anyio.wait_all_tasks_blocked()
                await client.held()  # so the keeper has heard it
            assert order == []
            keeper.locks.unlock("l")
        assert order == [(name, first + 1 + index) for index, name in enumerate("abcd")]
        assert await keeper.locks.lock("l") == first + 5
        keeper.locks.unlock("l")
        with pytest.raises(FailedPreconditionError, match="has not locked it"):
            keeper.locks.unlock("l")


async def test_locks_exclude_each_other_under_load(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as one, client_of(tmp_path) as two:

        async def add(client: Keeper) -> None:
            turn = await client.locks.lock("counter")
            value = int(counter.read_text())
            await client.held()
            assert turn == value + 1
            counter.write_text(str(value + 1))
            client.locks.unlock("counter")

        async with anyio.create_task_group() as group:
            # More than may be under way as requests: who waits for a lock is not in the way of who has it.
            for _ in range(300):
                group.start_soon(add, one)
                group.start_soon(add, two)
        assert counter.read_text() == "600"
        assert await keeper.locks.lock("counter") == 601


async def test_a_cancelled_lock_leaves_no_lock_behind(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        got: list[str] = []

        async def lock(name: str) -> None:
            await keeper.locks.lock(name)
            got.append(name)

        for number in range(40):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(lock, "one")
                    group.start_soon(lock, "two")
                    for _ in range(number % 6):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            for name in got:
                keeper.locks.unlock(name)
            got.clear()
            await keeper.held()
            with anyio.fail_after(DEADLINE):
                await other.locks.lock("one")
                await other.locks.lock("two")
            other.locks.unlock("one")
            other.locks.unlock("two")


async def test_a_client_that_waits_for_too_many_locks_is_told_so(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        for number in range(1024):
            await keeper.locks.lock(f"l{number}")
        with pytest.raises(OSError, match="1024 locks") as caught:
            await keeper.locks.lock("one more")
        assert caught.value.errno == errno.ENOSPC
        keeper.locks.unlock("l0")
        await keeper.locks.lock("one more")


async def test_a_name_that_was_forgotten_never_repeats_a_turn(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        for _ in range(3):
            turn = await keeper.locks.lock("old")
            keeper.locks.unlock("old")
        for number in range(4200):
            await keeper.locks.lock(f"l{number}")
            keeper.locks.unlock(f"l{number}")
        assert await keeper.locks.lock("old") > turn


async def test_the_end_of_a_client_frees_its_locks_and_its_places(tmp_path: Path, anyio_backend: str) -> None:
    body = """
    await keeper.locks.lock("l")
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(keeper.locks.lock, "l")
        group.start_soon(keeper.locks.lock, "ours")
        await anyio.wait_all_tasks_blocked()
        await keeper.held()
        print("locked", flush=True)
    """
    async with keeper_at(tmp_path) as keeper:
        await keeper.locks.lock("ours")
        with host(tmp_path, anyio_backend, "attach", body) as (program, _):
            assert said(program) == "locked"
            async with anyio.create_task_group() as group:
                group.start_soon(keeper.locks.lock, "l")
                await anyio.wait_all_tasks_blocked()
                program.kill()
        keeper.locks.unlock("ours")
        with anyio.fail_after(DEADLINE):
            assert await keeper.locks.lock("ours") in {2, 3}  # the dead one may have had it for a moment


# --- who is there ---


async def test_who_becomes_the_owner_knows_what_a_former_one_has_changed_meanwhile(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        with pytest.raises(FailedPreconditionError, match=f"owned by process {os.getpid()}"):
            await other.own()
        await keeper.set_policy("keep")
        keeper.abandon()
        until(lambda: json.loads((tmp_path / "state/lock").read_text())["owner"] == 0, "the owner is forgotten")
        assert (other.hello.owner, other.hello.policy) == (False, "stop")
        await other.own()
        assert (other.hello.owner, other.hello.owner_pid, other.hello.policy) == (True, os.getpid(), "keep")
        await other.close()


async def test_clients_are_numbered_and_know_the_owner(tmp_path: Path) -> None:
    async with keeper_at(tmp_path, policy="keep") as keeper:
        assert (keeper.hello.client, keeper.hello.owner_pid) == (1, os.getpid())
        async with client_of(tmp_path) as other:
            assert (other.hello.client, other.hello.owner_pid) == (2, os.getpid())
            keeper.abandon()
            until(lambda: json.loads((tmp_path / "state/lock").read_text())["owner"] == 0, "the owner is forgotten")
            async with client_of(tmp_path) as third:
                assert (third.hello.client, third.hello.owner_pid, third.hello.owner) == (3, 0, False)
            owner = await Keeper.attach(f"{tmp_path}/state", own=True)
            assert (owner.hello.owner, owner.hello.owner_pid) == (True, os.getpid())
            with pytest.raises(FailedPreconditionError, match=f"owned by process {os.getpid()}"):
                await Keeper.attach(f"{tmp_path}/state", own=True)
        await owner.close()


async def test_the_owner_may_change_what_happens_at_its_end(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        with pytest.raises(PermissionError):
            await other.set_policy("keep")
        await keeper.set_policy("keep")
        assert keeper.hello.policy == "keep"
        keeper.abandon()
        owner = await adopt(tmp_path)
        assert owner.pid == other.pid
        assert owner.hello.policy == "keep"
        await owner.set_policy("stop")
        owner.abandon()
        wait_ended(other.pid)


async def test_a_keeper_retires_only_when_nobody_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    async with keeper_at(tmp_path, policy="keep") as keeper:
        await keeper.guard([Guard("d", "rmdir", [f"{tmp_path}/d"])])
        async with client_of(tmp_path) as other:
            assert not await other.retire()
            assert not await keeper.retire()
            with raw_client(tmp_path):  # not yet accepted, perhaps
                assert not await keeper.retire()
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8
        assert (tmp_path / "d").exists()
        assert await keeper.retire()
        assert not (tmp_path / "d").exists()
        wait_ended(keeper.pid)
        with pytest.raises(FailedPreconditionError, match="closed"):
            await keeper.held()


async def test_a_keeper_without_owner_is_retired_by_the_last_client(tmp_path: Path, anyio_backend: str) -> None:
    with host(tmp_path, anyio_backend, "keep", "await anyio.sleep_forever()") as (program, pid):
        other = await Keeper.attach(f"{tmp_path}/state")
        assert not await other.retire()
        program.kill()
        program.wait()
        assert await other.retire()  # also if the keeper has not yet seen its owner's end
        wait_ended(pid)
    async with keeper_at(tmp_path):
        pass


async def test_who_comes_while_a_keeper_ends_is_turned_away_and_may_start_the_next(tmp_path: Path) -> None:
    async with keeper_at(tmp_path, policy="keep") as keeper:
        (tmp_path / "large").mkdir()
        pid = keeper.pid
        # A guard that takes its time: it removes a large tree.
        for number in range(500):
            (tmp_path / f"large/{number}").mkdir()
        await keeper.guard([Guard("d", "remove_tree", [f"{tmp_path}/large"])])
        retired: list[bool] = []

        async def retire() -> None:
            retired.append(await keeper.retire())

        async with anyio.create_task_group() as group:
            group.start_soon(retire)
            await anyio.wait_all_tasks_blocked()
            until(lambda: json.loads((tmp_path / "state/lock").read_text())["ending"], "it ends")
            with pytest.raises(UnavailableError):
                await Keeper.attach(f"{tmp_path}/state")
            async with keeper_at(tmp_path) as following:
                assert following.pid != pid
        assert retired == [True]
