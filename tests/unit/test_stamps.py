"""The last packet of who sends and closes is not missed, at whatever moment that is."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from unisandbox.host import stamps
from unisandbox.host.init.spawn import _receive
from unisandbox.host.keeper import protocol


class Between(socket.socket):
    """As the kernel answers when the other end sends and closes between its look for a packet and that for the end.

    Source: __unix_dgram_recvmsg() in net/unix/af_unix.c, "Signal EOF on disconnected non-blocking SEQPACKET socket".
    """

    act: Callable[[], None] | None = None

    def recvmsg(self, *args: Any) -> Any:
        return (b"", [], 0, None) if self._is_between() else super().recvmsg(*args)

    def recvmsg_into(self, *args: Any) -> Any:
        return (0, [], 0, None) if self._is_between() else super().recvmsg_into(*args)

    def _is_between(self) -> bool:
        act, self.act = self.act, None
        if act is None:
            return False
        with pytest.raises(BlockingIOError):
            super().recvmsg(1, 0, socket.MSG_DONTWAIT)
        act()
        return True


@pytest.fixture
def ours() -> Iterator[Between]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def act() -> None:
        other.send(b'{"id": 7}')
        other.close()

    with Between(fileno=one.detach()) as ours:
        ours.act = act
        yield ours
    other.close()


def test_a_packet_that_is_looked_at_is_not_missed(ours: Between) -> None:
    assert stamps.peek(ours, 100)[0] == b'{"id": 7}'


def test_an_answer_of_init_is_not_missed(ours: Between) -> None:
    assert anyio.run(_receive, ours) == (b'{"id": 7}', [])
    assert anyio.run(_receive, ours) == (b"", [])


def test_a_message_of_the_keepers_socket_is_not_missed(ours: Between) -> None:
    packet = protocol.receive(ours, protocol.new_buffer())
    assert packet is not None
    assert packet.message == {"id": 7}
    assert protocol.receive(ours, protocol.new_buffer()) is None


def test_descriptors_that_came_with_nothing_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        before = len(os.listdir("/proc/self/fd"))
        looks: list[Callable[[], object]] = [
            lambda: stamps.peek(ours, 100),
            lambda: protocol.receive(ours, protocol.new_buffer()),
            lambda: list(map(os.close, anyio.run(_receive, ours)[1])),  # its caller's
        ]
        for look in looks:
            for stamped in (False, True):
                if stamped:
                    stamps.stamp(ours)
                socket.send_fds(theirs, [b""], [0, 1, 2])
                with contextlib.suppress(protocol.ProtocolError):
                    look()
                with contextlib.suppress(BlockingIOError):
                    ours.recv(1)
        assert len(os.listdir("/proc/self/fd")) == before
