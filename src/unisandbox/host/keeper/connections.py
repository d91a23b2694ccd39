"""The keeper's clients: taking their requests, and sending never waiting for one. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import select
import socket
import struct

from unisandbox.host import pidfd as pidfds
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisandbox.host.keeper.exits import Exits
    from unisandbox.host.keeper.loop import Loop
    from unisandbox.host.keeper.protocol import Message, Packet

# Replies that wait for a client which does not read, and requests of it that are worked on. Our own client keeps well
# below (protocol.IN_FLIGHT_LIMIT); from another one no request is read until it has read its replies.
_BACKLOG_LIMIT = 2 * protocol.IN_FLIGHT_LIMIT
# A busy client lets others have their turn after so many requests.
_REQUESTS_PER_TURN = 64
_EXITS_PER_MESSAGE = 1000
_EXPIRATIONS_KEPT = 4096
_EXPIRATIONS_PER_MESSAGE = 200
_SO_PEERPIDFD = 77  # Linux 6.5; source: include/uapi/asm-generic/socket.h


class Client:
    """One connection.

    `cursor` is the last exit that it was told: a client that does not read falls behind there, and nowhere else; it is
    told the rest when it reads again. `expirations` is how many of those it was told.
    """

    __slots__ = (
        "alive",
        "cursor",
        "events",
        "expirations",
        "in_flight",
        "number",
        "pid",
        "queue",
        "sock",
        "subscribed",
        "uid",
    )

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock: socket.socket = sock
        #: Among all connections that there ever were: 1, 2, 3 ...
        self.number: int = number
        self.pid: int
        self.uid: int
        self.pid, self.uid = peer(sock)
        self.alive: bool = True
        self.queue: list[tuple[bytes, list[int]]] = []
        self.in_flight: int = 0
        self.cursor: int = 0
        self.expirations: int = 0
        self.subscribed: bool = False
        self.events: int = select.EPOLLIN


class Reply:
    """The way back to whoever asked: used once, perhaps later; leads nowhere if no answer was asked for."""

    __slots__ = ("_connections", "client", "id")

    def __init__(self, connections: Connections, client: Client, request: int | None) -> None:
        self._connections = connections
        self.client: Client = client
        self.id: int | None = request
        client.in_flight += 1

    def __call__(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Answer. `fds` are the keeper's own; they are closed when they are sent, or cannot be."""
        self.client.in_flight -= 1
        if self.id is None:
            protocol.close_all(fds)
            if "error" in message:
                note(f"a request without answer failed: {message['error']}")
            return
        message["id"] = self.id
        self._connections.post(self.client, message, list(fds))

    def is_for(self, client: Client, request: int) -> bool:
        """Whether it answers this request of this client."""
        return self.client is client and self.id == request

    def fail(self, error: OSError, **more: object) -> None:
        """Answer with an error."""
        self({"error": str(error.strerror or error), "errno": error.errno or errno.EIO, **more})


class Connections:
    """All the clients of the keeper.

    Args:
        handle: acts on a request.
        gone: hears of a client's end, after all that it had sent was handled.
    """

    def __init__(
        self,
        loop: Loop,
        exits: Exits,
        handle: Callable[[Client, Packet], None],
        gone: Callable[[Client], None],
    ) -> None:
        self._loop = loop
        self._exits = exits
        self._handle = handle
        self._gone = gone
        self._clients: set[Client] = set()
        self._numbers = itertools.count(1)
        self._listener: socket.socket | None = None
        self._refusing = False
        #: The last prefixes that have expired, and how many there were in all.
        self._expired: list[str] = []
        self._expirations = 0
        self._buffer = protocol.new_buffer()

    def listen(self, listener: socket.socket) -> None:
        """Accept clients of our own user (and root)."""
        listener.setblocking(False)
        self._listener = listener
        self._loop.watch(listener.fileno(), lambda _events: self._accept(listener))

    def refuse(self) -> None:
        """From now on whoever connects is turned away: the keeper ends."""
        self._refusing = True

    def numbers(self) -> list[int]:
        """The numbers of all who are connected."""
        return sorted(client.number for client in self._clients)

    def is_empty(self) -> bool:
        """Whether nobody is connected, those included who wait to be accepted."""
        if self._listener is not None:
            self._accept(self._listener)
        return not self._clients

    def is_alone(self, client: Client) -> bool:
        """Whether nobody else is connected, those included who wait to be accepted; the dead do not count."""
        if self._listener is not None:
            self._accept(self._listener)
        for other in self._clients - {client}:
            poll = select.poll()
            poll.register(other.sock, 0)
            if any(events & select.POLLHUP for _, events in poll.poll(0)):
                self.drain(other)  # its last words, then its end
        return self._clients == {client}

    def add(self, sock: socket.socket) -> Client:
        """Take a connection."""
        sock.setblocking(False)
        client = Client(sock, next(self._numbers))
        self._clients.add(client)
        self._loop.watch(sock.fileno(), lambda events: self._ready(client, events))
        return client

    def post(self, client: Client, message: Message, fds: list[int]) -> None:
        """Send now, or when the client has room. Closes `fds`."""
        try:
            data = protocol.encode(message, fds)
        except protocol.MessageTooLargeError as error:
            protocol.close_all(fds)
            fds = []
            data = protocol.encode(
                {"id": message.get("id"), "error": f"the answer is {error}", "errno": errno.EMSGSIZE}
            )
        client.queue.append((data, fds))
        self._flush(client)

    def tell_exits(self) -> None:
        """There are new ones."""
        for client in list(self._clients):
            self._flush(client)

    def tell_expiration(self, prefix: str) -> None:
        """Tell all clients, also those who come later (if not too many others come between), that this has expired."""
        self._expired.append(prefix)
        self._expirations += 1
        del self._expired[:-_EXPIRATIONS_KEPT]
        for client in list(self._clients):
            self._flush(client)

    def greet(self, client: Client) -> None:
        """From now on tell it what happens; what has expired before even ahead of the answer to its greeting."""
        client.subscribed = True
        with contextlib.suppress(OSError):  # no room, or no peer: sending the answer comes to the same, and acts on it
            self._send_expirations(client)

    def drain(self, client: Client) -> None:
        """Handle everything that this client has sent so far."""
        while client.alive and self._receive(client):
            pass

    def drop(self, client: Client) -> None:
        """End a connection."""
        if not client.alive:
            return
        client.alive = False
        self._clients.discard(client)
        self._loop.unwatch(client.sock.fileno())
        client.sock.close()
        self._forget_queue(client)
        self._gone(client)

    # --- receiving ---

    def _accept(self, listener: socket.socket) -> None:
        def refuse() -> None:
            listener.accept()[0].close()

        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE}:
                    raise
                # It would stay in the queue and wake us for ever.
                self._loop.with_spare(refuse)
                return
            is_ours = self._loop.with_spare(functools.partial(_is_ours, sock))
            if is_ours and not self._refusing and len(self._clients) < protocol.CLIENTS_LIMIT:
                self.add(sock)
                continue
            if is_ours and not self._refusing:
                why = f"keeper {os.getpid()} has {protocol.CLIENTS_LIMIT} clients already, and takes no more"
                with contextlib.suppress(OSError):  # it has left
                    protocol.send(sock, protocol.encode({"push": "refused", "error": why}))
            sock.close()

    def _ready(self, client: Client, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            # The peer is gone; nobody will read, but what it had sent counts.
            self._forget_queue(client)
            client.subscribed = False
            if events & select.EPOLLHUP:
                self.drain(client)
                return
        if events & select.EPOLLOUT:
            self._flush(client)
        if events & select.EPOLLIN:
            for _ in range(_REQUESTS_PER_TURN):
                if not client.alive or _behind(client) or not self._receive(client):
                    break
            if client.alive:
                self._update(client)

    def _receive(self, client: Client) -> bool:
        """Handle one request; False when there is none now, or the connection ended."""
        try:
            packet = protocol.receive(client.sock, self._buffer)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # Said once when the peer went with messages unread. Its own last messages can be read after it.
            return True
        except (protocol.ProtocolError, OSError) as error:
            note(f"connection of process {client.pid} ends: {error}")
            self.drop(client)
            return False
        if packet is None:
            self.drop(client)
            return False
        try:
            self._handle(client, packet)
        finally:
            packet.close()
        return True

    # --- sending ---

    def _flush(self, client: Client) -> None:
        if not client.alive:
            self._forget_queue(client)
            return
        try:
            while client.queue:
                data, fds = client.queue[0]
                protocol.send(client.sock, data, fds)
                del client.queue[0]
                protocol.close_all(fds)
            self._send_expirations(client)
            while client.subscribed and client.cursor < self._exits.last:
                records = self._exits.after(client.cursor, _EXITS_PER_MESSAGE)
                message: Message = {"push": "exits", "exits": records, "gap": records[0][0] > client.cursor + 1}
                protocol.send(client.sock, protocol.encode(message))
                client.cursor = records[-1][0]
        except BlockingIOError:
            pass
        except OSError:
            # The peer is gone: its end arrives as an event of its own, behind what it had sent.
            self._forget_queue(client)
            client.subscribed = False
        self._update(client)

    def _send_expirations(self, client: Client) -> None:
        while client.subscribed and client.expirations < self._expirations:
            count = min(self._expirations - client.expirations, len(self._expired))
            part = self._expired[len(self._expired) - count :][:_EXPIRATIONS_PER_MESSAGE]
            protocol.send(client.sock, protocol.encode({"push": "expired", "prefixes": part}))
            client.expirations = self._expirations - count + len(part)

    def _update(self, client: Client) -> None:
        behind = client.cursor < self._exits.last or client.expirations < self._expirations
        unsent = client.queue or (client.subscribed and behind)
        events = 0 if _behind(client) else select.EPOLLIN
        if unsent:
            events |= select.EPOLLOUT
        if events != client.events:
            client.events = events
            self._loop.change(client.sock.fileno(), events)

    def _forget_queue(self, client: Client) -> None:
        for _, fds in client.queue:
            protocol.close_all(fds)
        client.queue = []


def _behind(client: Client) -> bool:
    return len(client.queue) + client.in_flight >= _BACKLOG_LIMIT


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when the connection was made."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _is_ours(sock: socket.socket) -> bool:
    """Whether root or our own user is at the other end, and no program of a sandbox, whose root may be one of the two.

    Such a program reaches our socket by a bind mount, also by one that is read-only, and would command us. It is in a
    pid namespace below ours, which no process can leave; see NSpid in proc_pid_status(5), which everybody may read.
    Who has gone meanwhile is refused: his number may be another's by now, and his connection with a child of his.
    """
    pid, uid = peer(sock)
    if uid not in {0, os.geteuid()}:
        return False
    pidfd = -1
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                raise
            return False
    try:
        return _depth(str(pid)) == _depth("self") and not (pidfd >= 0 and pidfds.has_ended(pidfd))
    except (FileNotFoundError, ProcessLookupError):
        return False
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _depth(process: str) -> int:
    """In how many pid namespaces, from ours on, a process is."""
    with open(f"/proc/{process}/status", "rb") as file:
        return next((len(line.split()) - 1 for line in file if line.startswith(b"NSpid:")), 1)
