"""The keeper's log of events: bounded, and numbered in a way that outlives it. Standard library only.

What an event is only its publisher and its readers know. A number is never given twice in one state directory, however
the keepers of it end, or the machine fails: a keeper reserves a block of numbers in a file, and waits for the disk,
before it gives the first of them, and the next one begins behind the block. One that ends in order writes the last
number that it has given.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time

from unisandbox.host import small_files
from unisandbox.host.boundary import reached
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.host.keeper.connections import Client, Reply
    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Packet

KEPT = 4096
BLOCK = 100_000
_KEYS = 16384
# On a full disk the next block cannot be reserved: that is tried from the middle of this one on, every so many events.
_TRY_EVERY = 1000
_PAGE_BYTES = 128 * 1024
_PAGE_EVENTS = 4096
_WAIT_LIMIT = 3600.0
# Bytes of a number and what follows it, and of a whole file at most.
_LINE = 21
_LIMIT = 64
# So many events nobody publishes, and JSON has no larger whole numbers. A number above it is damaged.
_LARGEST = 1 << 53


class _Waiter:
    """An `events_after` for which there is nothing yet."""

    __slots__ = ("after", "limit", "reply", "timer")

    def __init__(self, reply: Reply, after: int, limit: int) -> None:
        self.reply = reply
        self.after = after
        self.limit = limit
        self.timer: Timer | None = None


class Events:
    """The log. `dirfd` is the state directory, `name` the file in it.

    Raises:
        OSError: no numbers can be reserved.
    """

    def __init__(self, loop: Loop, dirfd: int, name: str) -> None:
        self._loop = loop
        self._dirfd = dirfd
        self._name = name
        self._last = self._reserved = self._former()
        self._texts: dict[int, str] = {}
        #: Of what is told once, the last so many.
        self._keys: dict[str, None] = {}
        self._waiting: list[_Waiter] = []
        self._reserve()

    # --- requests ---

    def publish(self, packet: Packet, reply: Reply) -> None:
        """Give the event (a JSON object as text) the next number; one whose `key` was published before is dropped.

        So is one that comes too late, since an event with the key `unless` was published.
        """
        message = packet.message
        text = protocol.event(message)
        if "unless" not in message or protocol.text(message, "unless") not in self._keys:
            self.tell(text, protocol.text(message, "key") if "key" in message else "")
        reply({})

    def tell(self, text: str, key: str = "") -> None:
        """The same of an event that was looked at, and is not late."""
        if key in self._keys:
            return
        self._make_room()
        if key:
            self._keys[key] = None
            if len(self._keys) > _KEYS:
                del self._keys[next(iter(self._keys))]
        self._last += 1
        self._texts[self._last] = text
        if len(self._texts) > KEPT:
            del self._texts[next(iter(self._texts))]
        for waiter in [waiter for waiter in self._waiting if waiter.after < self._last]:
            self._end_wait(waiter)

    def events_after(self, packet: Packet, reply: Reply) -> None:
        """A page of the log; if there is nothing yet, wait up to `wait` seconds.

        Who has a number that was never given here learns so at once.
        """
        message = packet.message
        waiter = _Waiter(
            reply, protocol.integer(message, "after", 0, 1 << 62), protocol.integer(message, "limit", 1, 1 << 31)
        )
        wait = protocol.seconds(message, "wait", _WAIT_LIMIT, 0.0)
        if waiter.after != self._last or wait == 0:
            self._answer(waiter)
            return
        waiter.timer = self._loop.later(wait, lambda: self._end_wait(waiter))
        self._waiting.append(waiter)

    def cancel(self, client: Client, request: int) -> None:
        """This request of this client need not wait any longer."""
        for waiter in [waiter for waiter in self._waiting if waiter.reply.is_for(client, request)]:
            self._end_wait(waiter)

    def gone(self, client: Client) -> None:
        """Nobody waits there any more."""
        for waiter in [waiter for waiter in self._waiting if waiter.reply.client is client]:
            self._end_wait(waiter)

    def end(self) -> None:
        """The keeper ends in order: the next one goes on where this one stopped."""
        try:
            if self._last == 0:
                os.unlink(self._name, dir_fd=self._dirfd)
            else:
                self._write(self._last, durable=False)  # if the disk never gets it, the block stays reserved
        except FileNotFoundError:
            pass  # a guard has removed the state directory
        except OSError as error:
            note(f"the last event's number is not written, there will be a gap behind it: {error}")

    # --- answers ---

    def _end_wait(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        if waiter.timer is not None:
            waiter.timer.cancel()
        self._answer(waiter)

    def _answer(self, waiter: _Waiter) -> None:
        first = next(iter(self._texts), self._last + 1)
        begin = max(waiter.after + 1, first)
        page: list[tuple[int, str]] = []
        size = 0
        for number in range(begin, min(self._last, begin + min(waiter.limit, _PAGE_EVENTS) - 1) + 1):
            text = self._texts[number]
            size += len(json.dumps(text)) + 24
            if page and size > _PAGE_BYTES:
                break
            page.append((number, text))
        waiter.reply({"events": page, "first": first, "last": self._last})

    # --- numbers ---

    def _make_room(self) -> None:
        left = self._reserved - self._last
        if left > BLOCK // 2 or (left > 0 and self._last % _TRY_EVERY):
            return
        try:
            self._reserve()
        except OSError as error:
            note(f"cannot reserve numbers for events, {left} are left: {error}")
            if left == 0:
                raise OSError(errno.ENOSPC, f"an event is lost, there is no number for it: {error}") from error

    def _reserve(self) -> None:
        end = self._last + BLOCK
        self._write(end, durable=True)
        self._reserved = end

    def _former(self) -> int:
        """The last number that a former keeper of this directory may have given."""
        try:
            line = small_files.read(self._name, _LIMIT, dir_fd=self._dirfd)[0]
            number = int(line[: _LINE - 1])
            # Version 1 was the number alone.
            if line in {_line(number), b"%020d\n" % number} and number <= _LARGEST:
                return number
        except FileNotFoundError:
            return 0
        except (ValueError, small_files.NotARegularFileError, small_files.TooLargeError):
            pass
        # Damaged. Nobody publishes an event every microsecond: so many cannot have been given.
        note(f"{self._name} is damaged: numbers of events go on behind a gap")
        return int(time.time() * 1e6)

    def _write(self, number: int, *, durable: bool) -> None:
        line = _line(number)
        reached("before numbers.write", self._name)
        temporary = self._name + ".new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._dirfd)  # of a keeper that was killed
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL
            fd = os.open(temporary, flags, 0o600, dir_fd=self._dirfd)
            try:
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, f"no space to write {temporary}")
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            reached("before numbers.rename", self._name)
            os.rename(temporary, self._name, src_dir_fd=self._dirfd, dst_dir_fd=self._dirfd)
            reached("after numbers.rename", self._name)
            if durable:
                os.fsync(self._dirfd)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._dirfd)
            # A full disk has no room for a new file; the old one is as long. Whole or not at all: within one page.
            try:
                fd = small_files.opened(self._name, os.O_WRONLY, dir_fd=self._dirfd)
            except (FileNotFoundError, small_files.NotARegularFileError):
                raise error from None
            try:
                os.pwrite(fd, line, 0)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)


def _line(number: int) -> bytes:
    """What the file says: the number, the version of this form, and how much is missing to 10^20 - 1.

    By the latter is seen that it is whole. A real checksum would cost each keeper the loading of a module.
    """
    return b"%020d 2 %020d\n" % (number, 10**20 - 1 - number)
