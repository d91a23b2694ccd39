"""What client and keeper say to each other: one JSON object per packet of a SOCK_SEQPACKET unix socket.

Standard library only. A request has an `op` and, if it wants an answer, an `id`; the answer carries the same `id`, and
`error` when it failed. `fds` tells how many file descriptors travel with the packet, so that a receiver whose table is
full can tell "some did not arrive" from garbage. A packet without `id` from the keeper is a push (`push`).
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

Message = dict[str, object]

VERSION = 6
# A unix packet is one skb: at most the send buffer, 212,992 bytes by default (net.core.wmem_default), less overhead.
MESSAGE_LIMIT = 200 * 1024
# The kernel takes 253 (SCM_MAX_FD) per packet.
FDS_LIMIT = 64
# Requests of one client that the keeper works on at a time; more wait in the client.
IN_FLIGHT_LIMIT = 256
# Characters of a name, whatever it names: two ids of 76, those of a container and of a process, and words around them.
NAME_LIMIT = 256
# Clients of one keeper. Each costs it one file descriptor, of which it may have but 1024.
CLIENTS_LIMIT = 256
# One note, and one event: what a client may say in one message is more, but many of them are kept.
NOTE_LIMIT = 64 * 1024
EVENT_LIMIT = 16 * 1024
# What may expire does so within so many seconds: ten years.
EXPIRE_LIMIT = 315_360_000

SOCKET_NAME = "keeper.sock"
LOCK_NAME = "lock"
LOG_NAME = "keeper.log"
EVENTS_NAME = "events"

# Those that end processes: run before all others.
KILLS = ("kill_cgroup", "kill_process")
GUARD_KINDS = (*KILLS, "rmdir_cgroup", "remove_tree", "unlink", "rmdir", "umount")

_INT = struct.calcsize("i")
# Numbers, since each operation on Python's enumerations of flags costs more than the system call.
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_TRUNC)
_FDS_TRUNCATED = int(socket.MSG_CTRUNC)


class ProtocolError(Exception):
    """The peer does not speak this protocol; its connection ends."""


class MessageTooLargeError(Exception):
    """A message of ours is over a limit and was not sent."""


class Packet:
    """One packet that came in. Whoever keeps one of the `fds` takes it with `claim`; `close` ends the rest."""

    __slots__ = ("fds", "lost", "message")

    def __init__(self, message: Message, fds: list[int], lost: int) -> None:
        self.message: Message = message
        self.fds: list[int] = fds
        #: How many of the fds did not arrive, because our table of file descriptors is full.
        self.lost: int = lost

    def claim(self, index: int = 0) -> int:
        """The fd at `index`, from now on the caller's to close."""
        try:
            fd = self.fds[index]
        except IndexError:
            raise OSError(errno.EINVAL, f"the request came without file descriptor {index}") from None
        self.fds[index] = -1
        return fd

    def close(self) -> None:
        """Close what nobody claimed."""
        close_all(self.fds)
        self.fds = []


def close_all(fds: Sequence[int]) -> None:
    """Close these fds; negative ones are none."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def encode(message: Message, fds: Sequence[int] = ()) -> bytes:
    """The packet of a message. Raises MessageTooLargeError when it is over a limit."""
    if len(fds) > FDS_LIMIT:
        raise MessageTooLargeError(f"{len(fds)} file descriptors in one message; at most {FDS_LIMIT}")
    if fds:
        message["fds"] = len(fds)
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(data) > MESSAGE_LIMIT:
        raise MessageTooLargeError(f"a message of {len(data)} bytes; at most {MESSAGE_LIMIT}")
    return data


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet whole, or raise BlockingIOError when the peer's queue is full. Never blocks, no SIGPIPE."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        sock.sendmsg([data], ancillary, _SEND)
    except OSError as error:
        if error.errno in {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}:
            # Too many fds in flight, or no memory for the packet now: both pass, as a full queue does.
            raise BlockingIOError(errno.EAGAIN, str(error)) from error
        raise


def new_buffer() -> memoryview:
    """Room for one packet, in pages that cost nothing before they are used."""
    return memoryview(mmap.mmap(-1, MESSAGE_LIMIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def receive(sock: socket.socket, buffer: memoryview) -> Packet | None:
    """The next packet; None at the end of the connection.

    Raises:
        BlockingIOError: nothing there now.
        ProtocolError: truncated or garbage. All fds that came with it are closed.
    """
    length, ancillary, flags, _ = sock.recvmsg_into([buffer], socket.CMSG_SPACE(FDS_LIMIT * _INT), _RECEIVE)
    if length == 0 and not ancillary:  # again: see `stamps.peek`
        length, ancillary, flags, _ = sock.recvmsg_into([buffer], socket.CMSG_SPACE(FDS_LIMIT * _INT), _RECEIVE)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(data) // _INT
            fds.extend(struct.unpack(f"{count}i", data[: count * _INT]))
    try:
        return _packet(buffer, length, flags, fds)
    except BaseException:
        close_all(fds)
        raise


def _packet(buffer: memoryview, length: int, flags: int, fds: list[int]) -> Packet | None:
    if flags & _TRUNCATED:
        raise ProtocolError(f"a message of more than {len(buffer)} bytes")
    if length == 0 and not fds:
        return None
    try:
        # ValueError: not UTF-8, not JSON, an absurd number. RecursionError: nested without end.
        message = json.loads(bytes(buffer[:length]))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if type(message) is not dict:
        raise ProtocolError("not a JSON object")
    if type(message.get("id", 0)) is not int:
        raise ProtocolError("id must be an integer")
    declared = message.pop("fds", 0)
    if type(declared) is not int or not len(fds) <= declared <= FDS_LIMIT:
        raise ProtocolError(f"{len(fds)} file descriptors came, {declared!r} were announced")
    lost = declared - len(fds)
    if flags & _FDS_TRUNCATED and not lost:
        raise ProtocolError("truncated ancillary data")
    if lost and not flags & _FDS_TRUNCATED:
        raise ProtocolError(f"{len(fds)} file descriptors came, {declared} were announced")
    return Packet(message, fds, lost)


# --- reading the fields of a message that a stranger may have written ---


def _wrong(message: Message, name: str, wanted: str) -> OSError:
    shown = repr(message.get(name, "nothing"))
    return OSError(errno.EINVAL, f"{name} must be {wanted}, got {shown[:80]}")


def text(message: Message, name: str) -> str:
    """A string without NUL."""
    value = message.get(name)
    if type(value) is not str or "\0" in value:
        raise _wrong(message, name, "a string without NUL")
    return value


def event(message: Message) -> str:
    """The event of a message: a JSON object as text."""
    value = text(message, "event")
    if len(value) > EVENT_LIMIT:
        raise OSError(errno.EINVAL, f"an event of {len(value)} characters; at most {EVENT_LIMIT}")
    try:
        is_object = type(json.loads(value)) is dict
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise OSError(errno.EINVAL, f"an event must be a JSON object, got {value[:80]!r}")
    return value


def texts(message: Message, name: str) -> list[str]:
    """A list of strings without NUL."""
    value = message.get(name)
    if type(value) is not list or not all(type(item) is str and "\0" not in item for item in value):
        raise _wrong(message, name, "a list of strings without NUL")
    return value


def mapping(message: Message, name: str) -> dict[str, str]:
    """A mapping of strings without NUL to strings without NUL."""
    value = message.get(name)
    if type(value) is not dict or not all(type(item) is str and "\0" not in key + item for key, item in value.items()):
        raise _wrong(message, name, "a mapping of strings without NUL")
    return value


def integer(message: Message, name: str, low: int, high: int, default: int | None = None) -> int:
    """An integer from `low` to `high`."""
    value = message.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise _wrong(message, name, f"an integer from {low} to {high}")
    return value


def integers(message: Message, name: str, low: int, high: int) -> dict[str, int]:
    """A mapping of strings to integers from `low` to `high`."""
    value = message.get(name)
    if type(value) is not dict or not all(type(item) is int and low <= item <= high for item in value.values()):
        raise _wrong(message, name, f"a mapping of names to integers from {low} to {high}")
    return value


def seconds(message: Message, name: str, high: float, default: float | None = None) -> float:
    """A duration from 0 to `high` seconds."""
    value = message.get(name, default)
    if type(value) not in {int, float} or not 0 <= value <= high:  # type: ignore[operator]
        raise _wrong(message, name, f"seconds from 0 to {high:g}")
    return float(value)  # type: ignore[arg-type]


def flag(message: Message, name: str) -> bool:
    """A boolean."""
    value = message.get(name)
    if type(value) is not bool:
        raise _wrong(message, name, "true or false")
    return value


def policy(message: Message) -> str:
    """ "stop" or "keep"."""
    value = message.get("policy")
    if value not in {"stop", "keep"}:
        raise _wrong(message, "policy", '"stop" or "keep"')
    return str(value)


def path(value: str, what: str = "path") -> str:
    """An absolute path that is not "/" and has no "..": what a guard may be told to end."""
    parts = value.split("/")
    if not value.startswith("/") or "\0" in value or ".." in parts or not any(part not in {"", "."} for part in parts):
        raise OSError(errno.EINVAL, f'{what} must be absolute, not "/" and without "..", got {value[:200]!r}')
    return value


def boot_id() -> str:
    """The kernel's id of this boot: pids of another boot mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
