"""The promises of `unisandbox.host.turns`."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import anyio
import pytest

from unisandbox.host.turns import Turns

pytestmark = pytest.mark.anyio


class Channel:
    """Numbers arrive over a socket, one byte each; whoever waits reads."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.turns = Turns()
        self.seen: set[int] = set()
        self.reading = 0
        self.dead = False

    async def turn(self) -> None:
        assert self.reading == 0, "two readers at once"
        self.reading += 1
        try:
            await anyio.wait_readable(self.near)
        finally:
            self.reading -= 1
        got = self.near.recv(1)
        if not got:
            self.dead = True
            raise EOFError("the far end is gone")
        self.seen.add(got[0])

    def ready(self, number: int) -> bool:
        if number in self.seen:
            return True
        if self.dead:
            raise EOFError("dead")
        return False

    async def wait(self, number: int) -> int:
        await self.turns.until(lambda: self.ready(number), self.turn)
        return number

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    channel = Channel()
    yield channel
    assert channel.turns.waiting == 0
    channel.close()


async def test_every_waiter_gets_its_own_though_only_one_reads(channel: Channel) -> None:
    got: list[int] = []

    async def want(number: int) -> None:
        got.append(await channel.wait(number))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(want, number)
            await anyio.wait_all_tasks_blocked()
            assert channel.turns.waiting == 20
            for number in reversed(range(20)):
                channel.far.send(bytes([number]))
                while number not in got:
                    await anyio.lowlevel.checkpoint()
    assert got == list(reversed(range(20)))


async def test_a_cancelled_reader_hands_on_to_another(channel: Channel) -> None:
    scopes: dict[int, anyio.CancelScope] = {}
    got: list[int] = []

    async def want(number: int) -> None:
        with anyio.CancelScope() as scope:
            scopes[number] = scope
            got.append(await channel.wait(number))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(want, number)
                await anyio.wait_all_tasks_blocked()
            scopes[0].cancel()
            scopes[1].cancel()
            await anyio.wait_all_tasks_blocked()
            assert channel.reading == 1
            channel.far.send(bytes([2]))
            channel.far.send(bytes([3]))
    assert got == [2, 3]


async def test_reader_and_heir_cancelled_at_once_leave_a_reader(channel: Channel) -> None:
    scopes: dict[int, anyio.CancelScope] = {}
    got: list[int] = []

    async def want(number: int) -> None:
        with anyio.CancelScope() as scope:
            scopes[number] = scope
            got.append(await channel.wait(number))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(want, number)
                await anyio.wait_all_tasks_blocked()
            scopes[0].cancel()
            while channel.turns.waiting == 3:
                await anyio.lowlevel.checkpoint()
            scopes[1].cancel()
            await anyio.wait_all_tasks_blocked()
            assert channel.reading == 1
            channel.far.send(bytes([2]))
    assert got == [2]


async def test_an_exception_of_a_turn_reaches_the_reader_and_the_others_see_the_dead_state(channel: Channel) -> None:
    messages: list[str] = []

    async def want(number: int) -> None:
        with pytest.raises(EOFError) as caught:
            await channel.wait(number)
        messages.append(str(caught.value))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(want, number)
            await anyio.wait_all_tasks_blocked()
            channel.far.shutdown(socket.SHUT_WR)
    assert sorted(messages) == ["dead"] * 4 + ["the far end is gone"]


async def test_notify_ends_the_wait_of_sleepers_and_of_the_reader(channel: Channel) -> None:
    got: list[int] = []

    async def want(number: int) -> None:
        got.append(await channel.wait(number))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in (7, 8, 9):
                group.start_soon(want, number)
                await anyio.wait_all_tasks_blocked()
            channel.seen |= {7, 9}
            channel.turns.notify()
            await anyio.wait_all_tasks_blocked()
            assert sorted(got) == [7, 9]
            assert channel.reading == 1
            channel.far.send(bytes([8]))


async def test_what_is_ready_returns_at_once(channel: Channel) -> None:
    channel.seen.add(1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await channel.wait(1) == 1
