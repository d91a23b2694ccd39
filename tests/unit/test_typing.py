"""The promises of `TypingStream`, on a terminal without a sandbox."""

from __future__ import annotations

import os
import tty
from collections.abc import Iterator

import pytest

from unisandbox.host.readiness import Descriptor
from unisandbox.sandbox.streams import TypingStream

pytestmark = pytest.mark.anyio


@pytest.fixture
def terminal() -> Iterator[tuple[Descriptor, int]]:
    """Where is typed, and where that is read."""
    master, slave = os.openpty()
    keys = Descriptor(master)
    yield keys, slave
    keys.close()
    os.close(slave)


async def test_who_reads_keys_gets_the_end_of_the_input_as_one_key(terminal: tuple[Descriptor, int]) -> None:
    keys, slave = terminal
    tty.setraw(slave)
    stream = TypingStream(keys)
    await stream.send(b"q")
    await stream.aclose()
    os.write(keys.fileno(), b"!")  # what comes last
    got = b""
    while not got.endswith(b"!"):
        got += os.read(slave, 100)
    assert got == b"q\x04!"


async def test_who_reads_lines_gets_the_beginning_of_one_and_then_the_end(terminal: tuple[Descriptor, int]) -> None:
    keys, slave = terminal
    stream = TypingStream(keys)
    await stream.send(b"abc")
    await stream.aclose()
    assert os.read(slave, 100) == b"abc"
    assert os.read(slave, 100) == b""
