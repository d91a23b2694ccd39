"""The client's end of the keeper's socket: requests with answers, without waiting for anybody else's.

Whoever waits for an answer or a push reads the socket for all that wait (`host.turns`); no task, no thread.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import cast

import anyio

from unisandbox.api.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from unisandbox.host.boundary import reached
from unisandbox.host.keeper import protocol, starting
from unisandbox.host.keeper.process import reap
from unisandbox.host.keeper.protocol import Message, Packet
from unisandbox.host.readiness import Descriptor
from unisandbox.host.turns import Turns

# The keeper answers in milliseconds, on a starved machine later: only one that is suspended or stuck says nothing for
# so long (seconds). The second is for one that was found so, until it says something; and for one that was frozen
# together with us, as a container may be: our time was over before it could run again.
_ANSWER_SECONDS = 30.0
_SILENT_SECONDS = 1.0
# Enough to be quick, little enough that one who waits sees his own soon.
_PACKETS_PER_TURN = 64


class Link:
    """One connection of one event loop.

    Args:
        sock: connected.
        state_dir: for messages, and for the keeper's log when it is dead.
        on_push: hears what comes unasked.
    """

    def __init__(self, sock: socket.socket, state_dir: str, on_push: Callable[[Message], None]) -> None:
        #: The keeper's process id, for messages; 0 while it is not known.
        self.pid = 0
        self.closed: bool = False
        #: Why the keeper has turned us away; "" when it has not.
        self.refused: str = ""
        self._sock = sock
        self._descriptor = Descriptor(sock.fileno(), lambda _: sock.close())
        self._state_dir = state_dir
        self._on_push = on_push
        self._process = os.getpid()
        self._buffer = protocol.new_buffer()
        self._turns = Turns()
        self._ids = itertools.count(1)
        self._in_flight = anyio.Semaphore(protocol.IN_FLIGHT_LIMIT, fast_acquire=True)
        self._sending = anyio.Lock(fast_acquire=True)
        #: Messages of `say` that the queue had no room for.
        self._unsent: list[bytes] = []
        self._waited: set[int] = set()
        self._replies: dict[int, Packet] = {}
        self._dead = ""
        #: It did not answer in time, and has said nothing since.
        self._silent = False

    def number(self) -> int:
        """A number for a request."""
        return next(self._ids)

    async def ask(self, op: str, fds: Sequence[int] = (), **fields: object) -> Packet:
        """Ask what is answered at once.

        Raises:
            OSError: the answer is an error; of the class that belongs to its errno.
            DeadlineExceededError: there is none: the keeper is suspended or stuck.
        """
        packet = await self.request(op, fds, fields, late=False)
        error = error_of(packet)
        if error is not None:
            raise error
        return packet

    async def wait(self, op: str, **fields: object) -> Packet:
        """Like `ask`, for what the keeper may answer late; cancelled, it need not wait any longer."""
        number = self.number()
        try:
            packet = await self.request(op, (), fields, number)
        except anyio.get_cancelled_exc_class():
            self.say({"op": "cancel_wait", "request": number})
            raise
        error = error_of(packet)
        if error is not None:
            raise error
        return packet

    async def pages(self, op: str, prefix: str) -> dict[str, object]:
        """All pages of what is kept by name."""
        found: dict[str, object] = {}
        more = True
        after = ""
        while more:
            message = (await self.ask(op, prefix=prefix, after=after)).message
            page = cast("dict[str, object]", message[op])
            found.update(page)
            more = cast("bool", message["more"])
            after = max(page, default="")
        return found

    async def request(
        self, op: str, fds: Sequence[int], fields: Message, number: int = 0, *, late: bool = True
    ) -> Packet:
        """Ask and wait for the answer, which may be an error.

        Args:
            op, fds, fields, number: of the request.
            late: the answer may come late: as long as the keeper answers other requests, it is waited for.

        Raises:
            DeadlineExceededError: the keeper answers nothing.
        """
        async with self._in_flight:
            return await self._answer(op, fds, fields, number or self.number(), late=late)

    async def _answer(self, op: str, fds: Sequence[int], fields: Message, number: int, *, late: bool) -> Packet:
        self._waited.add(number)
        try:
            await self.tell({"op": op, "id": number, **fields}, fds)
            await self._until(lambda: self._answered(number), late=late)
            return self._replies.pop(number)
        finally:
            self._waited.discard(number)
            answer = self._replies.pop(number, None)
            if answer is not None:
                answer.close()

    async def _until(self, ready: Callable[[], bool], *, late: bool) -> None:
        """Wait for what the keeper says, as long as it says anything."""
        patience = self._patience
        while True:
            with anyio.move_on_after(patience):
                await self._turns.until(ready, self._turn)
                return
            if ready():
                return
            if late:
                await self._answer("clients", (), {}, self.number(), late=False)
            elif patience == _SILENT_SECONDS:
                raise self._silence()
            else:
                patience = _SILENT_SECONDS

    @property
    def _patience(self) -> float:
        return _SILENT_SECONDS if self._silent else _ANSWER_SECONDS

    def _silence(self) -> DeadlineExceededError:
        """What to raise when the keeper says nothing."""
        self._silent = True
        pid = self.pid or self._peer()
        name = f"keeper {pid}" if pid else "the keeper"
        return DeadlineExceededError(
            f"{name} of {self._state_dir} has not answered for {_ANSWER_SECONDS:g} s",
            hint=f"See what holds process {pid} up: it may be suspended (kill -CONT {pid})." if pid else "",
        )

    def _peer(self) -> int:
        """The process that listens at the other end, as far as that can be seen. Source: unix(7), SO_PEERCRED."""
        size = struct.calcsize("3i")
        pid = int(struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])
        return 0 if pid == os.getpid() else pid  # of a pair of sockets, whoever made it

    async def tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send; waits only while the keeper's queue is full. Cancelled, nothing was sent.

        Raises:
            DeadlineExceededError: the keeper reads nothing: it is suspended or stuck.
        """
        self.check()
        try:
            data = protocol.encode(message, fds)
        except protocol.MessageTooLargeError as error:
            raise InvalidArgumentError(
                f"request {message['op']!r} to the keeper is {error}", hint="Pass what is large in a file."
            ) from None
        op = cast("str", message["op"])
        reached("before keeper.*", op)
        if not self._sending.locked() and self._try_send(data, fds):
            reached("after keeper.*", op)
            return
        with anyio.move_on_after(self._patience):
            async with self._sending:
                while True:
                    self.check()
                    if self._try_send(data, fds):
                        reached("after keeper.*", op)
                        return
                    # Closed meanwhile: `check` says so.
                    with contextlib.suppress(anyio.ClosedResourceError):
                        await self._descriptor.writable()
        raise self._silence()

    def say(self, message: Message) -> None:
        """Send without an await and without an answer: now, or before what is sent next."""
        if not self.closed and not self._dead:
            op = cast("str", message["op"])
            reached("before keeper.*", op)
            self._unsent.append(protocol.encode(message))
            self._send_unsent()
            reached("after keeper.*", op)

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until what was pushed makes `happened()` true.

        Raises:
            DeadlineExceededError: the keeper is suspended or stuck.
        """

        def ready() -> bool:
            if happened():
                return True
            self.check()
            return False

        await self._until(ready, late=True)

    def look_again(self) -> None:
        """What somebody waits for by `until` may have happened, and not by a push."""
        self._turns.notify()

    def check(self) -> None:
        """Raise what a request would meet now: closed, dead, or in a fork of the process that this belongs to."""
        name = f"keeper {self.pid}" if self.pid else "the keeper"
        if self.closed:
            raise FailedPreconditionError(f"the connection to {name} of {self._state_dir} is closed")
        if self._dead:
            log = starting.log_tail(self._state_dir).strip()
            hint = f"The end of its log ({protocol.LOG_NAME}): {log[-1000:]}" if log else ""
            raise UnavailableError(f"{name} of {self._state_dir} {self._dead}", hint=hint)
        if os.getpid() != self._process:
            raise FailedPreconditionError(f"{name} belongs to process {self._process}, of which this is a fork")

    def close(self) -> None:
        """Close now. Whoever waits gets FailedPreconditionError."""
        if self.closed:
            return
        self.closed = True
        for packet in self._replies.values():
            packet.close()
        self._replies.clear()
        if os.getpid() == self._process:
            # Not only closed: a forked child of ours may hold a copy open, and the keeper is to notice now.
            with contextlib.suppress(OSError):  # it may be gone already
                self._sock.shutdown(socket.SHUT_RDWR)
            self._descriptor.close()
        else:
            self._sock.close()  # whoever waits does so in the other process
        self._turns.notify()

    # --- sending ---

    def _send_unsent(self) -> bool:
        while self._unsent:
            if not self._send(self._unsent[0], ()):
                return False
            del self._unsent[0]
        return True

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        sent = self._send_unsent() and self._send(data, fds)
        self.check()  # sending may have found the keeper dead
        return sent

    def _send(self, data: bytes, fds: Sequence[int]) -> bool:
        """False when the queue is full now."""
        try:
            protocol.send(self._sock, data, fds)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            while self._pump():  # its last words, and its end
                pass
            self._die()
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            raise InvalidArgumentError(
                f"a request of {len(data)} bytes is more than this host's sockets take",
                hint="Raise the sysctl net.core.wmem_default to 212992 or more.",
            ) from None
        return True

    # --- receiving ---

    async def _turn(self) -> None:
        """Read for everybody; see `Turns`."""
        self._send_unsent()
        if self._pump() or self.closed or self._dead:
            return
        # Closed meanwhile: every waiter's `ready` says so.
        with contextlib.suppress(anyio.ClosedResourceError):
            await self._descriptor.readable()
            self._pump()

    def _pump(self) -> int:
        """Take what is there, or the first part of it; how many packets that were."""
        taken = 0
        while taken < _PACKETS_PER_TURN and not self.closed and not self._dead:
            try:
                packet = protocol.receive(self._sock, self._buffer)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # said once, before what can still be read
            except protocol.ProtocolError as error:
                self._die(f"said what cannot be understood ({error})")
                break
            if packet is None:
                self._die()
                break
            taken += 1
            self._silent = False
            self._dispatch(packet)
        return taken

    def _dispatch(self, packet: Packet) -> None:
        number = packet.message.get("id")
        if type(number) is int:
            if number in self._waited:
                self._replies[number] = packet
            else:
                packet.close()  # whoever asked was cancelled
        elif packet.message.get("push") == "failed":
            reap(packet.claim())
            self._die(f"could not begin: {packet.message['error']}")
        elif packet.message.get("push") == "refused":
            self.refused = cast("str", packet.message["error"])
            self._die(f"refuses: {self.refused}")
        else:
            self._on_push(packet.message)

    def _answered(self, number: int) -> bool:
        if number in self._replies:
            return True
        self.check()
        return False

    def _die(self, why: str = "has ended") -> None:
        self._dead = self._dead or why


def error_of(packet: Packet) -> OSError | None:
    """The error that an answer brought, as the class that belongs to its errno."""
    message = packet.message
    if "error" not in message:
        return None
    packet.close()
    return OSError(cast("int", message["errno"]), cast("str", message["error"]))


def checked(name: str) -> str:
    """A name, for requests without an answer: the keeper could tell nobody what is wrong with it."""
    if not 0 < len(name) <= protocol.NAME_LIMIT or "\0" in name:
        raise InvalidArgumentError(f"a name has 1 to {protocol.NAME_LIMIT} characters and no NUL, got {name[:200]!r}")
    return name
