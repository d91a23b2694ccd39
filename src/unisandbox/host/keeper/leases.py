"""Numbers shared out among all keepers of a host: number n is leased by a lock on byte n of `<directory>/ids`.

The lock is a record lock of POSIX: it belongs to the keeper's process and to none of its forks, so it ends with the
keeper however that dies, also while a fork has not yet closed the file. It ends, too, when the process closes any
descriptor of the file: a keeper has one, and nothing else in it opens the file. Other processes open it to see whether
it is left over, one thread at a time (`engine.runtime_directory`). Source: fcntl_locking(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from unisandbox.host.boundary import reached
from unisandbox.host.keeper import names, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unisandbox.host.keeper.connections import Reply
    from unisandbox.host.keeper.protocol import Packet

NAME = "ids"
NAMES_LIMIT = 65536
# struct flock of every 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padding.
_FLOCK = struct.Struct("@hhqqi4x")
# How often to look again while another keeper that gave back its last number is about to unlink the file, and the
# pause in seconds: the other needs some microseconds for it.
_TRIES = 50
_PAUSE = 0.0002


class Leases:
    """The numbers that this keeper holds."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._held: dict[str, set[int]] = {}
        self._names: dict[str, tuple[str, int]] = {}
        self._next = 0

    def grant(self, packet: Packet, reply: Reply) -> None:
        """Lease a number that no other keeper of this host has."""
        directory = protocol.path(protocol.text(packet.message, "directory"), "directory")
        first = protocol.integer(packet.message, "first", 0, 1 << 40)
        count = protocol.integer(packet.message, "count", 1, 1 << 20)
        if packet.message.get("name", "") == "":
            reply({"number": self.lease(directory, first, count)})
            return
        reply({"number": self.named(names.given(packet.message), directory, first, count)})

    def named(self, name: str, directory: str, first: int, count: int) -> int:
        """Like `lease`, to be given back by name as well; asked again for the same, the answer is the same.

        Raises:
            OSError: EEXIST when the name is that of another lease.
        """
        known = self._names.get(name)
        if known is not None:
            if known[0] == directory and first <= known[1] < first + count:
                return known[1]
            raise OSError(errno.EEXIST, f"{name!r} is the name of number {known[1]} of {known[0]}/{NAME}")
        if len(self._names) >= NAMES_LIMIT:
            raise OSError(errno.ENOSPC, f"more than {NAMES_LIMIT} leases with a name")
        number = self.lease(directory, first, count)
        self._names[name] = (directory, number)
        return number

    def drop(self, wanted: list[str], prefix: str) -> None:
        """Give back those of these names, and those whose names begin with the prefix unless it is empty."""
        for name in names.selected(self._names, wanted, prefix):
            if name in self._names:
                self.release(*self._names[name])

    def lease(self, directory: str, first: int, count: int) -> int:
        """A free number in [first, first + count), now ours.

        Raises:
            OSError: EAGAIN when all are taken; otherwise the directory cannot be used.
        """
        for _ in range(_TRIES):
            fd = self._open(directory)
            held = self._held[directory]
            ending = False
            for step in range(count):
                # From behind the last one on: others' numbers are passed once, and one given back rests for long.
                number = first + (self._next - first + step) % count
                if number in held:
                    continue
                if _try_lock(fd, fcntl.F_WRLCK, number, 1):
                    if not _is_at(fd, directory):  # unlinked by its last user between our open and our lock
                        ending = True
                        self._close(directory)
                        break
                    held.add(number)
                    self._next = number + 1
                    return number
                if _locked_whole(fd, number):
                    ending = True
                    break
            if not ending:
                self._end_if_unused(directory)
                raise OSError(errno.EAGAIN, f"no free number from {first} to {first + count - 1} in {directory}/{NAME}")
            if directory in self._files and not held:
                self._close(directory)
            time.sleep(_PAUSE)
        raise OSError(errno.EAGAIN, f"{directory}/{NAME} stays locked as a whole by another process")

    def release(self, directory: str, number: int) -> None:
        """Give a number back. Raises OSError ENOENT when it is not ours."""
        held = self._held.get(directory)
        if held is None or number not in held:
            raise OSError(errno.ENOENT, f"number {number} of {directory}/{NAME} is not leased here")
        held.discard(number)
        for name in [name for name, lease in self._names.items() if lease == (directory, number)]:
            del self._names[name]
        _try_lock(self._files[directory], fcntl.F_UNLCK, number, 1)
        self._end_if_unused(directory)

    def release_all(self) -> None:
        """Give everything back."""
        self._names.clear()
        for directory, held in list(self._held.items()):
            held.clear()
            _try_lock(self._files[directory], fcntl.F_UNLCK, 0, 0)
            self._end_if_unused(directory)

    def _open(self, directory: str) -> int:
        fd = self._files.get(directory)
        if fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(f"{directory}/{NAME}", flags, 0o600)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                os.close(fd)
                raise OSError(errno.EPERM, f"{directory}/{NAME} is not a regular file of user {os.geteuid()}")
            self._files[directory] = fd
            self._held[directory] = set()
        return fd

    def _close(self, directory: str) -> None:
        os.close(self._files.pop(directory))
        del self._held[directory]

    def _end_if_unused(self, directory: str) -> None:
        """Unlink the file if nobody on this host has a number of it; close it if we have none."""
        if self._held[directory]:
            return
        fd = self._files[directory]
        try:
            # Whoever opened the file before the unlink finds after his lock that it is not there, and begins anew.
            if _try_lock(fd, fcntl.F_WRLCK, 0, 0) and _is_at(fd, directory):
                reached("before leases.unlink", directory)
                os.unlink(f"{directory}/{NAME}")
                reached("after leases.unlink", directory)
        except FileNotFoundError:
            pass  # the directory was removed: so was the file
        finally:
            self._close(directory)


def _try_lock(fd: int, kind: int, start: int, length: int) -> bool:
    """Lock or unlock a range (length 0: to the end of all offsets); False when another has a part of it."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True


def _locked_whole(fd: int, number: int) -> bool:
    """Whether the lock that keeps us from `number` is one of the whole file (or was: it is gone by now)."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
    kind, _, _, length, _ = _FLOCK.unpack(answer)
    return bool(kind == fcntl.F_UNLCK or length == 0)


def _is_at(fd: int, directory: str) -> bool:
    """Whether the open file is still the one at its path."""
    try:
        there = os.stat(f"{directory}/{NAME}", follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def any_held(fd: int) -> bool:
    """Whether anybody holds a number of the open file, or is about to remove it. Asks only."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
