"""Compiled modules on disk: found by what they were made of, checked before they are run as native code.

An artefact is machine code: whoever can write one runs it here. So the directory and every file must belong to this
user and be writable by nobody else, a file is opened once and loaded by that very descriptor, and behind the artefact
stands a digest of it: one that was cut or damaged is compiled anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import FailedPreconditionError
from unisandbox.api.units import GIB, MIB

STORE_BYTES: Final = 2 * GIB
"""What all artefacts together may take; those that were not used for longest go first."""

_TRAILER: Final = struct.Struct(
    "<8s32sQ"
)  # magic, SHA-256 of the artefact, its length; wasmtime ignores what is behind
_MAGIC: Final = b"usbxcwm1"
_SUFFIX: Final = ".cwasm"
_LOCK_SUFFIX: Final = ".lock"
_STALE_SECONDS: Final = 3600.0
_PIECE: Final = 2 * MIB
_LOCK_POLL: Final = 0.01
# The disk or the directory takes nothing now: then a module is compiled for this process alone.
_NO_ROOM: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
)


def default_directory() -> Path | None:
    """Where artefacts are kept: $XDG_CACHE_HOME/unisandbox/wasm, else below ~/.cache; None: this user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unisandbox" / "wasm"
    except RuntimeError:
        return None


class Store:
    """The artefacts of one directory. Any number of processes may use it."""

    def __init__(self, directory: str | os.PathLike[str] | None, *, most: int = STORE_BYTES) -> None:
        """Args: directory: None: nothing is kept; most: bytes of all artefacts together."""
        self.directory: str | None = None if directory is None else os.path.abspath(os.fspath(directory))
        self._most = most

    def open_directory(self) -> int:
        """A descriptor of the directory, made when it is missing; -1 where it cannot be had.

        Raises:
            FailedPreconditionError: it is not ours alone.
        """
        if self.directory is None:
            return -1
        try:
            os.makedirs(os.path.dirname(self.directory), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise FailedPreconditionError(
                    f"{self.directory}, where compiled modules are kept, is no directory", hint="Remove it."
                ) from error
            return -1
        try:
            _check_ours(fd, self.directory)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def find(self, key: str) -> int:
        """A descriptor of the artefact of this key, the caller's to close; -1 when there is none that is whole.

        Raises:
            FailedPreconditionError: others could write it.
        """
        directory = self.open_directory()
        if directory < 0:
            return -1
        try:
            fd = os.open(key + _SUFFIX, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return -1
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _not_ours(f"{self.directory}/{key}{_SUFFIX}", "it is a link") from error
            return -1
        finally:
            os.close(directory)
        try:
            _check_ours(fd, f"{self.directory}/{key}{_SUFFIX}")
            if await _is_whole(fd):
                with contextlib.suppress(OSError):  # used now: it stays longer
                    os.utime(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return -1

    async def keep(self, key: str, artefact: int) -> None:
        """Copy the artefact (a descriptor) here; where there is no room it is not kept, and nothing is left of it."""
        directory = self.open_directory()
        if directory < 0:
            return
        try:
            await self._write(directory, key, artefact)
            self._tidy(directory, key)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
        finally:
            os.close(directory)

    async def _write(self, directory: int, key: str, artefact: int) -> None:
        name = f"{secrets.token_hex(8)}.part"
        named = False
        try:
            # Without a name: nothing is left of it, whenever this process ends.
            fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}:
                raise
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory)
            named = True
        try:
            digest, length = hashlib.sha256(), 0
            while piece := os.pread(artefact, _PIECE, length):
                digest.update(piece)
                length += len(piece)
                _write_all(fd, piece)
                await anyio.lowlevel.checkpoint()
            _write_all(fd, _TRAILER.pack(_MAGIC, digest.digest(), length))
            if not named:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
                named = True
            os.rename(name, key + _SUFFIX, src_dir_fd=directory, dst_dir_fd=directory)
            named = False
        finally:
            os.close(fd)
            if named:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)

    def _tidy(self, directory: int, kept: str) -> None:
        """Remove what was not used for longest when all together is too much, and what dead processes have left."""
        found: list[tuple[float, int, str]] = []
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if name.endswith(_SUFFIX) and name != kept + _SUFFIX:
                    found.append((status.st_mtime, status.st_size, name))
                elif name.endswith(".part") and time.time() - status.st_mtime > _STALE_SECONDS:
                    os.unlink(name, dir_fd=directory)
                elif name.endswith(_LOCK_SUFFIX):
                    _remove_free_lock(directory, name)
        total = sum(size for _, size, _ in found) + os.stat(kept + _SUFFIX, dir_fd=directory).st_size
        for _, size, name in sorted(found):
            if total <= self._most:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            total -= size

    @contextlib.asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        """Nobody else of this user, in whatever process, is in here for the same key.

        The lock ends with its process, however that ends; its file is removed by whoever had it last.
        """
        directory = self.open_directory()
        if directory < 0:
            yield
            return
        fd, held = -1, False
        name = key + _LOCK_SUFFIX
        try:
            while not held:
                try:
                    fd = os.open(name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        raise
                    break  # no lock to be had: twice the work, and nothing worse
                held = await _locked(fd, directory, name)
                if not held:
                    os.close(fd)
                    fd = -1
            yield
        finally:
            if held:  # whoever has only waited leaves the file to its owner
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
            if fd >= 0:
                os.close(fd)
            os.close(directory)


async def _locked(fd: int, directory: int, name: str) -> bool:
    """Wait for the lock; False when whoever had it has removed the file."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # There is no event for it: a flock would have to be waited for in a thread.
            await anyio.sleep(_LOCK_POLL)
    return _is_there(fd, directory, name)


def _remove_free_lock(directory: int, name: str) -> None:
    """Remove the file of a lock that nobody holds: its owner was killed. Who waits for it sees that it is another."""
    with contextlib.suppress(OSError):
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(fd, directory, name):
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(fd)


def _is_there(fd: int, directory: int, name: str) -> bool:
    """Whether the file that is open is the one with this name."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _check_ours(fd: int, path: str) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise _not_ours(path, f"it belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise _not_ours(path, f"its mode {stat.S_IMODE(status.st_mode):04o} lets others write")


def _not_ours(path: str, why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"compiled modules in {path} are not used: {why}, and whoever writes there runs native code in this process",
        hint="Remove it, or make it this user's alone (chmod go-w).",
    )


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _is_whole(fd: int) -> bool:
    """Whether the file is an artefact as it was written."""
    size = os.fstat(fd).st_size
    if not stat.S_ISREG(os.fstat(fd).st_mode) or size <= _TRAILER.size:
        return False
    length = size - _TRAILER.size
    magic, wanted, told = _TRAILER.unpack(os.pread(fd, _TRAILER.size, length))
    if magic != _MAGIC or told != length:
        return False
    digest, offset = hashlib.sha256(), 0
    while offset < length:
        piece = os.pread(fd, min(_PIECE, length - offset), offset)
        if not piece:
            return False
        digest.update(piece)
        offset += len(piece)
        if offset < length:
            await anyio.lowlevel.checkpoint()
    return bool(digest.digest() == wanted)
