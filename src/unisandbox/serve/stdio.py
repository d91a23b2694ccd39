"""The streams of a container: FIFOs of the engine, whose ends the processes get as they are, or pipes (`streaming`).

What goes through FIFOs is not copied. The opposite ends are held by the keeper, so that neither a restart of the engine
nor of this server closes a stream that a process uses: a writer waits for its reader to come back, and standard input
ends when the engine says so (CloseIO).
"""

from __future__ import annotations

import json
import os
import stat
from typing import Final, NamedTuple

import anyio

from unisandbox.api import InvalidArgumentError, Stdio, UnsupportedError
from unisandbox.host.keeper import Keeper

LAST_OUTPUT_SECONDS: Final = 10.0
"""How long somebody may still read what a process has written once it is freed."""

_MAIN: Final = "-"
_TOLD: Final = "told"
_NAMES: Final = ("stdin", "stdout", "stderr")
_PIECE: Final = 32 << 10


class Streams(NamedTuple):
    """What an engine has said of a process's streams.

    Attributes:
        stdin, stdout, stderr: paths of FIFOs, addresses of streams, or empty.
        terminal: they are those of a terminal.
        bundle: of its container.
    """

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False
    bundle: str = ""


class End(NamedTuple):
    """The outer end of one stream of a process; its number is that of the process's descriptor."""

    container: str
    exec_id: str
    number: int


def ends_of(container: str, exec_id: str, streams: Streams) -> dict[str, End]:
    """Those of a process's streams that are asked for by an id, by it."""
    ids = enumerate(_streaming_id(path) for path in streams[:3])
    return {name: End(container, exec_id, index) for index, name in ids if name}


def _streaming_id(address: str) -> str:
    """Source: containerd, internal/cri/io/helpers.go."""
    return address.partition("?streaming_id=")[2]


class Told(NamedTuple):
    """What an engine was told of a process.

    Attributes:
        exit: its end.
        oom_kills: of a first one: how many processes of its container were killed for memory.
    """

    exit: bool = False
    oom_kills: int = 0


class Ends:
    """Both ends of a process's FIFOs or pipes, as descriptors of ours; -1 for none.

    Attributes:
        inside: the process's: standard input for reading, the others for writing.
        outside: the opposite ones.
    """

    def __init__(self) -> None:
        self.inside: list[int] = [-1, -1, -1]
        self.outside: list[int] = [-1, -1, -1]

    @classmethod
    def open(cls, streams: Streams, address: str) -> Ends:
        """Open them; never waits for the engine.

        Args:
            streams: what the engine says.
            address: of the pod, where streams without a FIFO are asked for.

        Raises:
            UnsupportedError: a stream that is neither a FIFO's path nor asked for at the pod's address.
            InvalidArgumentError: the path cannot be opened, or is no FIFO.
        """
        ends = cls()
        try:
            for index, path in enumerate(streams[:3]):
                if path.partition("?")[0] == address and _streaming_id(path):
                    ends._make(index)
                elif path:
                    ends._open(index, path)
        except BaseException:
            ends.close()
            raise
        return ends

    def _open(self, index: int, path: str) -> None:
        if "://" in path:
            hint = "Use io_type = 'fifo' or 'streaming'."
            raise UnsupportedError(f"{_NAMES[index]} by {path!r:.200}", "serve", hint=hint)
        if not os.path.isabs(path):
            raise InvalidArgumentError(f"{_NAMES[index]} must be an absolute path, got {path!r:.200}")
        reader = _open_fifo(path, os.O_RDONLY | os.O_NONBLOCK, _NAMES[index])
        readers, writers = self._sides(index)
        readers[index] = reader
        # There is a reader now, so this does not wait.
        writers[index] = _open_fifo(path, os.O_WRONLY | os.O_NONBLOCK, _NAMES[index])
        os.set_blocking(self.inside[index], True)  # what programs expect

    def _make(self, index: int) -> None:
        readers, writers = self._sides(index)
        readers[index], writers[index] = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.outside[index], False)

    def _sides(self, index: int) -> tuple[list[int], list[int]]:
        return (self.inside, self.outside) if index == 0 else (self.outside, self.inside)

    def give_to(self, uid: int, gid: int) -> None:
        """Let a process of this user open its streams again (/dev/stdout), which those of root are closed to."""
        for fd in self.inside:
            if fd >= 0:
                os.fchown(fd, uid, gid)

    def stdio(self) -> Stdio:
        """The process's ends."""
        return Stdio(*(fd if fd >= 0 else None for fd in self.inside))

    def close(self) -> None:
        """Close all of them here."""
        for fds in (self.inside, self.outside):
            for index, fd in enumerate(fds):
                if fd >= 0:
                    os.close(fd)
                fds[index] = -1


def _open_fifo(path: str, flags: int, what: str) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise InvalidArgumentError(f"{what} cannot be opened: {path}: {error.strerror}") from error
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgumentError(f"{what} must be a FIFO: {path}")
    return fd


class HeldStreams:
    """What the keeper holds of the streams of one pod's processes.

    Args:
        keeper: who holds it.
        prefix: of everything of the pod, ending with "/".
    """

    def __init__(self, keeper: Keeper, prefix: str) -> None:
        self._keeper = keeper
        self._prefix = f"{prefix}io/"

    def _name(self, container: str, exec_id: str) -> str:
        return f"{self._prefix}{container}/{exec_id or _MAIN}"

    async def hold(self, container: str, exec_id: str, streams: Streams, ends: Ends) -> None:
        """Keep what is known of a process's streams, and their outer ends; what was told is of a former namesake."""
        name = self._name(container, exec_id)
        self._keeper.drop_now([f"{name}/{_TOLD}"])
        held = {f"{name}/{index}": fd for index, fd in enumerate(ends.outside) if fd >= 0}
        if held:
            await self._keeper.spools.hold_now(held)
        await self._keeper.notes.write(name, json.dumps(streams._asdict()))

    async def of(self, container: str, exec_id: str) -> Streams:
        """What was said of a process's streams; nothing for one that is not known."""
        name = self._name(container, exec_id)
        note = await self._keeper.notes.find(name)
        return Streams() if note is None else Streams(**json.loads(note))

    async def end_of(self, streaming_id: str) -> End | None:
        """Whose stream is asked for by this id; None while there is no such process."""
        for (container, exec_id), note in (await self._processes()).items():
            if end := ends_of(container, exec_id, Streams(**json.loads(note))).get(streaming_id):
                return end
        return None

    async def take(self, end: End) -> int:
        """A copy of an outer end, the caller's to close. Raises FileNotFoundError."""
        return await self._keeper.take(f"{self._name(end.container, end.exec_id)}/{end.number}")

    async def _processes(self) -> dict[tuple[str, str], str]:
        """What was said of each process's streams, by container and exec id."""
        notes = await self._keeper.notes.read(self._prefix)
        names = {name: name.removeprefix(self._prefix).split("/") for name in notes}
        return {
            (parts[0], parts[1].removeprefix(_MAIN)): notes[name] for name, parts in names.items() if len(parts) == 2
        }

    def note_told(self, container: str, exec_id: str, told: Told) -> None:
        """Keep what the engine was told of a process."""
        self._keeper.notes.write_now(f"{self._name(container, exec_id)}/{_TOLD}", json.dumps(told))

    async def told(self) -> dict[tuple[str, str], Told]:
        """What the engine was told of each process that is known, by container and exec id."""
        notes = await self._keeper.notes.read(self._prefix)
        known = await self._processes()
        return {key: Told(*json.loads(notes.get(f"{self._name(*key)}/{_TOLD}", "[]"))) for key in known}

    async def close_stdin(self, container: str, exec_id: str) -> None:
        """No more comes: the process sees the end of its standard input when the engine has closed its end, too."""
        await self._keeper.drop([f"{self._name(container, exec_id)}/0"])

    def forget(self, container: str, exec_id: str) -> None:
        """The process is gone; with the first one all others of its container."""
        if exec_id:
            name = self._name(container, exec_id)
            self._keeper.drop_now([name], prefix=f"{name}/")
        else:
            self._keeper.drop_now(prefix=f"{self._prefix}{container}/")


async def copy_terminal(master: int, ends: Ends) -> None:
    """Copy between a terminal's master and FIFOs until its last process has closed it; closes both.

    Args:
        master: of the terminal.
        ends: `inside` is read from and written to here, in the place of the process.
    """
    try:
        for fd in (master, *ends.inside):
            if fd >= 0:
                os.set_blocking(fd, False)
        async with anyio.create_task_group() as group:
            if ends.inside[0] >= 0:
                group.start_soon(_copy, ends.inside[0], os.dup(master))
            await _copy(master, ends.inside[1], close=False)
            group.cancel_scope.cancel()
    finally:
        ends.close()
        os.close(master)


async def _copy(source: int, target: int, *, close: bool = True) -> None:
    try:
        while True:
            await anyio.wait_readable(source)
            try:
                piece = os.read(source, _PIECE)
            except BlockingIOError:
                continue
            except OSError:
                return  # EIO: a terminal without processes
            if not piece:
                return
            while piece and target >= 0:
                try:
                    piece = piece[os.write(target, piece) :]
                except BlockingIOError:
                    await anyio.wait_writable(target)
                except OSError:
                    return  # EIO as above, or EPIPE: nobody reads any more
    finally:
        if close:
            os.close(target)
