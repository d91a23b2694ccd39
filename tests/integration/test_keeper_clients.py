"""What clients of one keeper share: notes, events, locks; who they are to each other, and when it may retire."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from tests.keepers import DEADLINE, adopt, host, keeper_at, publish, raw_client, said, sh_exit, until, wait_ended

from unisandbox.api.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.host.keeper import EndEvent, EndNotice, EventPage, Guard, Keeper

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@asynccontextmanager
async def client_of(place: Path) -> AsyncIterator[Keeper]:
    keeper = await Keeper.attach(f"{place}/state")
    try:
        yield keeper
    finally:
        keeper.abandon()


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


# --- events ---


async def test_every_client_reads_the_same_events_in_order(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        assert await other.events.after(0) == EventPage([], 1, 0)
        await publish(keeper, *({"n": number, "text": "\u00fc\0"} for number in range(3)))
        page = await other.events.after(0)
        assert page.events == [(number + 1, {"n": number, "text": "\u00fc\0"}) for number in range(3)]
        assert (page.first, page.last) == (1, 3)
        assert [number for number, _ in (await other.events.after(1, limit=1)).events] == [2]
        await publish(keeper, {"x": "x" * 16384})
        assert "at most 16384" in Path(f"{tmp_path}/state/keeper.log").read_text()
        assert (await other.events.after(0)).last == 3


async def test_a_reader_waits_for_the_next_event_and_no_longer(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        pages: list[EventPage] = []

        async def read() -> None:
            pages.append(await other.events.after(0, wait=DEADLINE))

        assert (await other.events.after(0, wait=0.01)).events == []
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await publish(keeper, {"type": "x"})
        assert [page.events for page in pages] == [[(1, {"type": "x"})]] * 3


def _notice(name: str, key: str, *, counter: str = "", packets: Sequence[str] = (), late: bool = False) -> EndNotice:
    said = [EndEvent({"n": "always"}, key)]
    if packets:
        said.insert(0, EndEvent({"n": "rare"}, f"{key}-rare", packets))
    return EndNotice(name, f"{name}-noted", said, counter, "kills" if counter else "", late)


async def test_the_keeper_tells_an_end_when_it_comes(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("other 7\nkills 2\n")
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(5)]
        names = [f"life{number}" for number in range(5)]
        await keeper.spools.hold_now(
            {name: pair[0].fileno() for name, pair in zip(names, pairs, strict=True)}, stamp=names
        )

        async def told(count: int) -> list[tuple[object, object, object]]:
            with anyio.fail_after(DEADLINE):
                while len(page := (await other.events.after(0)).events) < count:
                    await anyio.sleep(0.01)
            ends = [event for _, event in page[1:]]
            return [(each["n"], each["end"]["packet"], each["end"]["count"]) for each in ends]  # type: ignore[index]

        for number, (name, packets) in enumerate(zip(names, ["aa", "ab", "aa", "", ""], strict=True)):
            end = _notice(name, name, counter=str(counter if number < 3 else tmp_path / "none"), packets=[packets])
            keeper.events.publish({"n": "begin"}, key="begin", end=end)
        keeper.events.publish({"n": "begin"}, key="begin", end=_notice("not held", "x"))
        keeper.notes.write_now("life2-noted", "yes")
        always, rare = ("always", "aa", 2), ("rare", "aa", 2)
        for number, wanted in enumerate([[rare, always], [always], [always]]):
            before = await told(0)
            pairs[number][1].send(b"\xaa")
            assert await told(1 + len(before) + len(wanted)) == before + wanted
        # It is dropped before the keeper can have looked.
        os.kill(keeper.pid, signal.SIGSTOP)
        pairs[3][1].send(b"\xab")
        keeper.drop_now([names[3]])
        os.kill(keeper.pid, signal.SIGCONT)
        # The counter is gone: whoever knows better has a moment.
        assert (await told(6))[4:] == [("always", "ab", 0)]
        pairs[4][1].close()
        keeper.events.publish({"n": "always", "end": {"packet": "known", "count": 1}}, key=names[4])
        assert (await told(7))[5:] == [("always", "known", 1)]
        await anyio.sleep(0.5)  # twice the keeper's own patience; that nothing comes cannot be waited for
        assert len(await told(0)) == 6
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


async def test_what_begins_is_told_once_however_many_tell_it(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper, client_of(tmp_path) as other:
        one, two = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
        await keeper.spools.hold_now({"one": one[0].fileno(), "two": two[0].fileno()}, stamp=["one", "two"])
        late = {name: _notice(name, name, late=True) for name in ("one", "two", "none")}
        keeper.events.publish({"n": "one"}, end=_notice("one", "one"))
        await keeper.clients()  # it has been heard
        other.events.publish({"n": "late one"}, end=late["one"])
        other.events.publish({"n": "late two"}, end=late["two"])
        other.events.publish({"n": "late none"}, end=late["none"])
        await other.clients()
        keeper.events.publish({"n": "two"}, end=_notice("two", "two"))
        keeper.events.publish({"n": "none"}, end=_notice("none", "none"))
        one[1].close()
        with anyio.fail_after(DEADLINE):
            while len(page := (await keeper.events.after(0)).events) < 4:
                await anyio.sleep(0.01)
        other.events.publish({"n": "after its end"}, end=late["one"])
        assert (await other.events.after(0)).events == page
        assert [event["n"] for _, event in page] == ["one", "late two", "none", "always"]
        for end in (one[0], *two):
            end.close()


async def test_an_end_that_is_about_to_be_told_is_told_before_all_of_its_names_are_forgotten(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        await keeper.spools.hold_now({"s1/life": ours.fileno()}, stamp=["s1/life"])
        end = _notice("s1/life", "s1/life", counter=str(tmp_path / "none"), packets=["aa"])
        keeper.events.publish({"n": "begin"}, key="begin", end=end)
        theirs.send(b"\xab")
        await keeper.drop(prefix="s1/", guards=True)
        await publish(keeper, {"n": "gone"})
        assert [event["n"] for _, event in (await keeper.events.after(0)).events] == ["begin", "always", "gone"]
        ours.close()
        theirs.close()


async def test_waits_that_are_cancelled_are_over_in_the_keeper_too(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        await keeper.spools.ring("ring", reading)
        os.close(reading)
        # More than the keeper lets one client have under way (512): then it would not read this one any more.
        for _ in range(10):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    for _ in range(60):
                        group.start_soon(lambda: keeper.events.after(0, wait=3600))
                        group.start_soon(lambda: keeper.spools.ring_read("ring", 0, wait=3600))
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
        with anyio.fail_after(DEADLINE):
            await publish(keeper, {})
            assert (await keeper.events.after(0)).last == 1
        os.close(writing)


async def test_the_log_is_bounded_and_tells_what_is_missing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        texts = ("x" * 4000 if number % 20 == 0 else "" for number in range(4196))
        await publish(keeper, *({"n": number, "text": text} for number, text in enumerate(texts)))
        seen: list[int] = []
        page = await keeper.events.after(0)
        assert (page.first, page.last) == (101, 4196)
        while page.events:
            seen += [number for number, event in page.events if event["n"] == number - 1]
            page = await keeper.events.after(seen[-1], limit=10_000)
        assert seen == list(range(101, 4197))


async def test_numbers_of_events_are_never_given_again(tmp_path: Path) -> None:
    file = tmp_path / "state/events"
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {}, {})
        await keeper.close()
    assert int(file.read_text().split()[0]) == 2  # it ended in order: the exact number
    async with keeper_at(tmp_path) as keeper:
        assert await keeper.events.after(0) == EventPage([], 3, 2)
        await publish(keeper, {})
        assert (await keeper.events.after(0)).events == [(3, {})]
        assert int(file.read_text().split()[0]) == 100_002
        os.kill(keeper.pid, signal.SIGKILL)
        wait_ended(keeper.pid)
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {})
        assert (await keeper.events.after(0)).events == [(100_003, {})]
        os.kill(keeper.pid, signal.SIGKILL)
        wait_ended(keeper.pid)
    file.write_bytes(b"\0" * 21)
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {})
        assert (await keeper.events.after(0)).last > 200_003
        await keeper.close()


@pytest.mark.parametrize("digit", ["9", "8", "1"])
@pytest.mark.parametrize("place", [0, 8, 14, 19])
async def test_one_wrong_digit_in_the_numbers_of_events_is_seen(tmp_path: Path, digit: str, place: int) -> None:
    file = tmp_path / "state/events"
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {}, {}, {})
        await keeper.close()
    data = bytearray(file.read_bytes())
    data[place : place + 1] = digit.encode()
    file.write_bytes(data)
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {})
        last = (await keeper.events.after(0)).last
        assert 1_000_000 < last < 1 << 53
        assert await keeper.events.after(last) == EventPage([], last, last)
        await keeper.close()


async def test_numbers_that_a_former_version_has_written_go_on(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/events").write_text(f"{7:020d}\n")
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {})
        assert (await keeper.events.after(0)).events == [(8, {})]
        await keeper.close()


@pytest.mark.parametrize("name", ["events", "events.new"])
async def test_a_keeper_waits_for_no_fifo_in_the_place_of_its_numbers(tmp_path: Path, name: str) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "state" / name)
    with anyio.fail_after(20):
        async with keeper_at(tmp_path) as keeper:
            await publish(keeper, {})
            assert (await keeper.events.after(0)).last > 0
            await keeper.close()


async def test_a_block_of_numbers_is_reserved_before_the_last_one_ends(tmp_path: Path) -> None:
    file = tmp_path / "state/events"
    (tmp_path / "state").mkdir(mode=0o700)
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, *[{}] * 49_999)
        assert int(file.read_text().split()[0]) == 100_000
        await publish(keeper, {}, {})
        assert int(file.read_text().split()[0]) == 150_000
        await keeper.close()
    assert int(file.read_text().split()[0]) == 50_001


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
