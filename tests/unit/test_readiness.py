"""Waiting for descriptors: one that is closed meanwhile takes the wake-up of nobody else."""

from __future__ import annotations

import os

import anyio
import pytest

from unisandbox.host.readiness import Descriptor, readable

pytestmark = pytest.mark.anyio


async def test_who_waits_for_a_closed_one_is_told() -> None:
    reading, writing = os.pipe()
    source = Descriptor(reading)
    told: list[type[BaseException]] = []

    async def wait() -> None:
        try:
            await source.readable()
        except anyio.ClosedResourceError as error:
            told.append(type(error))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        source.close()
        source.close()
    assert told == [anyio.ClosedResourceError]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
    with pytest.raises(anyio.ClosedResourceError):
        await source.readable()
    os.close(writing)


async def test_a_number_that_is_given_out_again_wakes_its_new_waiter() -> None:
    first, first_writing = os.pipe()
    source = Descriptor(first)
    second, second_writing = os.pipe()

    async def wait() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await source.readable()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            source.close()
            # Its copy has the lowest free number. The former waiter has been told, and has not run yet.
            group.start_soon(readable, second)
            await anyio.wait_all_tasks_blocked()
            os.write(second_writing, b"x")
    for fd in (first_writing, second, second_writing):
        os.close(fd)


async def test_a_copy_is_waited_for_so_that_its_owner_may_close_the_original() -> None:
    reading, writing = os.pipe()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(readable, reading)
            group.start_soon(readable, reading)
            await anyio.wait_all_tasks_blocked()
            os.close(reading)
            os.write(writing, b"x")
    os.close(writing)
