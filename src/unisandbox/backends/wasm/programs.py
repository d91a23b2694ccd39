"""Which module a command means: found in a root as a shell finds programs, and read once.

Everything is looked up by the kernel within the root (openat2), so that no link and no ".." leads out, and a FIFO or
a device is never opened. What was read is known again by its file's identity, size and times, so that a start of a
known program reads nothing. Reading goes in pieces, between which others have their turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Final

import anyio.lowlevel
import attrs

from unisandbox.api import InvalidArgumentError
from unisandbox.api.units import MIB
from unisandbox.host import syscalls

PATH: Final = "/usr/local/bin:/usr/bin:/bin"
"""Where a name without "/" is looked for when the environment does not say."""

LARGEST_MODULE: Final = 256 * MIB
_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_ATTEMPTS: Final = 100  # openat2 answers EAGAIN when something was renamed while it followed a ".."; source: openat2(2)
_MAGIC: Final = b"\0asm"
_KNOWN: Final = 1024
_PIECE: Final = MIB
# A file that changes right after it was read may keep its times within the kernel's clock tick.
_SETTLED_SECONDS: Final = 2.0
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126

Identity = tuple[int, int, int, int, int]
"""Of a file as it is: device, inode, size, and the times of its last changes in nanoseconds."""

Originals = int | Mapping[Identity, Identity]
"""A descriptor of the user's directory below a root: what nobody has changed in the root is the file there. Or the
identities of his files by those of their copies in a root."""


@attrs.define(eq=False)
class Program:
    """A module that was found; close it after use.

    Attributes:
        path: where it is in the root.
        digest: SHA-256 of its bytes, in hexadecimal.
        fd: O_PATH descriptor of the file.
    """

    path: str
    digest: str
    fd: int

    async def copy(self, into: int) -> None:
        """Write its bytes to a descriptor.

        Raises:
            InvalidArgumentError: they are others than when it was found.
        """
        digest = hashlib.sha256()
        async with contextlib.aclosing(_pieces(self.fd, self.path)) as pieces:
            async for _, piece in pieces:
                digest.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(into, view) :]
        if digest.hexdigest() != self.digest:
            raise InvalidArgumentError(f"{self.path} was changed while it was started", exit_code=_NOT_EXECUTABLE)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class Programs:
    """Finds programs, and remembers what it has read. One for an engine."""

    def __init__(self) -> None:
        self._known: OrderedDict[Identity, str] = OrderedDict()

    async def find(self, argv0: str, env: Mapping[str, str], root: int, lower: Originals, *, cwd: str = "/") -> Program:
        """The module that a command's first word means.

        A word with "/" is a path in the root (from `cwd` when it is relative), any other one is looked for in PATH;
        each also with ".wasm" behind it. A word that ends in ".wasm" or ".wat" is found in "/" as well.

        Args:
            argv0: the word.
            env: of the process.
            root: descriptor of the root.
            lower: where the user's own files are.
            cwd: absolute.

        Returns:
            The program, which is the caller's to close.

        Raises:
            InvalidArgumentError: there is none (exit code 127), or it is no module (126).
        """
        refused: InvalidArgumentError | None = None
        for path in _candidates(argv0, env, cwd):
            fd = _open(root, path)
            if fd < 0:
                continue
            try:
                return Program(path, await self._look(fd, path, argv0, lower), fd)
            except BaseException as error:
                os.close(fd)
                if not isinstance(error, InvalidArgumentError):
                    raise
                refused = refused or error
        if refused is not None:
            raise refused
        where = "" if "/" in argv0 else f" Its PATH is {env.get('PATH', PATH)!r}."
        raise InvalidArgumentError(
            f"cannot start {argv0!r}: there is no such module in the sandbox",
            hint=f"A Wasm sandbox runs modules of its root directory (name or name.wasm).{where}",
            exit_code=_NOT_FOUND,
        )

    async def _look(self, fd: int, path: str, argv0: str, lower: Originals) -> str:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise InvalidArgumentError(f"cannot start {argv0!r}: {path} is {what}", exit_code=_NOT_EXECUTABLE)
        if status.st_size > LARGEST_MODULE:
            raise InvalidArgumentError(
                f"cannot start {argv0!r}: {path} has {status.st_size} bytes; a module has at most {LARGEST_MODULE}",
                exit_code=_NOT_EXECUTABLE,
            )
        original = _original(lower, path, status) or identity(status)
        known = self._known.get(original)
        if known is not None:
            self._known.move_to_end(original)
            return known
        digest = await _digest(fd, path)
        if digest is None:
            raise InvalidArgumentError(
                f"cannot start {argv0!r}: {path} is no WebAssembly module",
                hint="A Wasm sandbox runs no programs of this machine; use isolation='runc' for these.",
                exit_code=_NOT_EXECUTABLE,
            )
        if time.time() - original[-1] / 1e9 > _SETTLED_SECONDS and identity(os.fstat(fd)) == identity(status):
            self._known[original] = digest
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return digest


def _candidates(argv0: str, env: Mapping[str, str], cwd: str) -> Iterator[str]:
    names = [argv0] if argv0.endswith((".wasm", ".wat")) else [argv0, f"{argv0}.wasm"]
    if "/" in argv0:
        start = "" if argv0.startswith("/") else f"{cwd.rstrip('/')}/"
        yield from (f"{start}{name}" for name in names)
        return
    # An empty part of PATH means the working directory, as for a shell.
    places = [place or cwd for place in env.get("PATH", PATH).split(":")]
    for place in places:
        directory = place if place.startswith("/") else f"{cwd.rstrip('/')}/{place}"
        yield from (f"{directory.rstrip('/')}/{name}" for name in names)
    if len(names) == 1:
        yield f"/{argv0}"


def _open(root: int, path: str) -> int:
    """An O_PATH descriptor; -1 where nothing is."""
    for _ in range(_ATTEMPTS):
        try:
            return syscalls.openat2(root, path, os.O_PATH, resolve=_INSIDE)
        except BlockingIOError:
            continue
        except OSError:
            return -1
    return -1


def identity(status: os.stat_result) -> Identity:
    """Of what has this status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _original(lower: Originals, path: str, status: os.stat_result) -> Identity | None:
    """The identity of the file below the sandbox's layer, if that is what was found: every sandbox has its own devices.

    An overlay shows the inode number and the times of the file below; one that was changed has a later ctime, which
    nobody can set. Source: Documentation/filesystems/overlayfs.rst, "Inode properties".
    """
    if not isinstance(lower, int):
        return lower.get(identity(status))
    fd = _open(lower, path)
    if fd < 0:
        return None
    try:
        below = identity(os.fstat(fd))
    finally:
        os.close(fd)
    return below if below[1:] == identity(status)[1:] else None


async def _digest(fd: int, path: str) -> str | None:
    """Of a file's bytes; None: it is neither a module nor, with the suffix for that, the text of one."""
    digest = hashlib.sha256()
    is_text = False
    async with contextlib.aclosing(_pieces(fd, path)) as pieces:
        async for offset, piece in pieces:
            if offset == 0 and not piece.startswith(_MAGIC):
                is_text = True
            if is_text and (b"\0" in piece or not path.endswith(".wat")):
                return None
            digest.update(piece)
    return digest.hexdigest()


async def _pieces(fd: int, path: str) -> AsyncGenerator[tuple[int, bytes], None]:
    """All of a file with the offsets, in pieces that take a millisecond or two; others have their turn in between."""
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        offset = 0
        while piece := os.pread(reader, _PIECE, offset):
            yield offset, piece
            offset += len(piece)
            if offset > LARGEST_MODULE:
                raise InvalidArgumentError(f"{path} grows while it is read", exit_code=_NOT_EXECUTABLE)
            if len(piece) == _PIECE:
                await anyio.lowlevel.checkpoint()
    finally:
        os.close(reader)
