"""Events of one keeper: one order for all of its clients, with numbers that are never given again."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from tests.keepers import DEADLINE, client_of, keeper_at, publish, wait_ended

from unisandbox.host.keeper import EndEvent, EndNotice, EventPage

pytestmark = [pytest.mark.anyio, pytest.mark.root]


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


async def test_who_asks_for_what_follows_a_number_that_was_never_given_waits_for_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await publish(keeper, {}, {})
        with anyio.fail_after(DEADLINE):
            assert await keeper.events.after(3, wait=10 * DEADLINE) == EventPage([], 1, 2)


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
