"""The files of a sandbox, reached from outside: nothing needs to run in it, and no link leads out of it.

The calls do not wait for a process; they work in pieces of 1 MiB and let the event loop run in between. How paths are
looked up is in `inside`, how things are made in `placing`, how trees are copied in `copying`, and who does it where
this process may not in `reaching`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import anyio.lowlevel

from unisandbox.api import (
    AlreadyExistsError,
    FailedPreconditionError,
    FileBounds,
    FileInfo,
    InvalidArgumentError,
    NotFoundError,
)
from unisandbox.engine.entry import Entry
from unisandbox.host import removal
from unisandbox.host.identity import CALLER, Identity
from unisandbox.sandbox import inside
from unisandbox.sandbox.arguments import check_kind, check_limit, check_mode, content_of, local_path
from unisandbox.sandbox.copying import ENTRY, PIECE, Copy, final_mode
from unisandbox.sandbox.inside import Root, Side, named
from unisandbox.sandbox.placing import Placer
from unisandbox.sandbox.reaching import root_of, where_it_may_be_done

_OVERFLOW_ID: Final = 65534  # what the kernel shows for an id without a mapping; source: user_namespaces(7)
# Entries between two turns of the event loop; each some 5 us.
_ENTRIES: Final = 500
DEFAULT_READ_LIMIT: Final = 256 << 20
DEFAULT_LIST_LIMIT: Final = 250_000
DEFAULT_DOWNLOAD_LIMIT: Final = 4 << 30


class Files:
    """The files of one sandbox, as its root user sees them.

    What is read and changed is what the sandbox's root could read and change: with its ids, and with its capabilities
    (`Security.capabilities`) over what belongs to ids of the sandbox. What belongs to others, files of the host below
    `/usr` say, or in a mount with `idmap=False`, can be reached as far as its mode lets everybody; otherwise the call
    raises FailedPreconditionError.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    @where_it_may_be_done
    async def read(self, path: str, *, limit: int = DEFAULT_READ_LIMIT) -> bytes:
        """The content of a regular file; links inside the sandbox are followed.

        Args:
            path: absolute path inside.
            limit: bytes; a larger file is refused, never cut.

        Raises:
            NotFoundError: it does not exist.
            InvalidArgumentError: it is not a regular file, or larger than `limit`.
        """
        await self._entry.sharing.reach()
        check_limit(limit)
        with root_of(self._entry) as root, named(path):
            fd = root.open_regular(path)
            try:
                content = io.BytesIO()
                while piece := os.read(fd, min(PIECE, limit + 1 - content.tell())):
                    content.write(piece)
                    if content.tell() > limit:
                        raise InvalidArgumentError(
                            f"{path!r} is larger than {limit} bytes", hint="Give a larger limit=, or use download()."
                        )
                    if len(piece) == PIECE:
                        await anyio.lowlevel.checkpoint()
                return content.getvalue()
            finally:
                os.close(fd)

    @where_it_may_be_done
    async def write(self, path: str, data: bytes | str, *, mode: int | None = None) -> None:
        """Put a file there, all of it or nothing: readers see the old or the new content.

        An existing file's mode is kept, and its owner if the sandbox has such a user; a new one belongs to the
        sandbox's root. A link at `path` is replaced, not followed; so is a FIFO, a socket or a device.

        Args:
            path: absolute path inside; its directory must exist.
            data: the content; text is written as UTF-8.
            mode: permission bits; None: those of the existing file, or 0o644.

        Raises:
            NotFoundError: the directory does not exist.
            InvalidArgumentError: it is a directory.
            FailedPreconditionError: the place is read-only, `path` is a mount point, or the disk limit is reached.
        """
        await self._entry.sharing.reach()
        check_mode(mode)
        view = content_of(path, data)
        with root_of(self._entry) as root, named(path), contextlib.ExitStack() as stack:
            check_kind(path, is_directory=False)
            with root.identity.bare():
                directory, name = stack.enter_context(root.parent(path))
                placer = Placer(root.identity, root.bounds)
                fd = stack.enter_context(placer.file(directory, name, path, mode))
            while view:
                placer.room(fd, min(len(view), PIECE) + ENTRY)
                view = view[os.write(fd, view[:PIECE]) :]
                if view:
                    await anyio.lowlevel.checkpoint()

    @where_it_may_be_done
    async def list(self, path: str = "/", *, limit: int = DEFAULT_LIST_LIMIT) -> list[FileInfo]:
        """What is in a directory, sorted by name; what vanishes meanwhile is left out.

        Args:
            path: absolute path inside; links are followed.
            limit: entries; a larger directory is refused, never cut.

        Raises:
            NotFoundError: it does not exist.
            InvalidArgumentError: it is not a directory, or has more than `limit` entries.
        """
        await self._entry.sharing.reach()
        check_limit(limit)
        found: list[FileInfo] = []
        with root_of(self._entry) as root, named(path):
            directory = root.open_directory(path)
            try:
                with os.scandir(directory) as entries:
                    while names := [entry.name for entry in itertools.islice(entries, _ENTRIES)]:
                        if found:
                            await anyio.lowlevel.checkpoint()
                        with root.identity.over(directory):
                            infos = [self._info(directory, name) for name in names]
                        found += [info for info in infos if info is not None]
                        if len(found) > limit:
                            raise InvalidArgumentError(
                                f"{path!r} has more than {limit} entries", hint="Give a larger limit=."
                            )
            finally:
                os.close(directory)
        found.sort(key=lambda info: info.name)
        return found

    @where_it_may_be_done
    async def stat(self, path: str) -> FileInfo:
        """What is at `path`; a link in the last place is not followed.

        Raises:
            NotFoundError: nothing is there.
        """
        await self._entry.sharing.reach()
        with root_of(self._entry) as root, named(path):
            fd = root.open(path, os.O_PATH | os.O_NOFOLLOW)
            try:
                name = os.path.basename(path.rstrip("/")) or "/"
                return self._describe(name, os.fstat(fd), lambda: inside.link_target(fd))
            finally:
                os.close(fd)

    @where_it_may_be_done
    async def exists(self, path: str) -> bool:
        """Whether something is at `path`; also a link that leads nowhere."""
        await self._entry.sharing.reach()
        with root_of(self._entry) as root, named(path):
            try:
                os.close(root.open(path, os.O_PATH | os.O_NOFOLLOW))
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    @where_it_may_be_done
    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = True) -> None:
        """Make a directory that belongs to the sandbox's root; one that is there already is fine.

        Args:
            path: absolute path inside.
            mode: permission bits of what is made.
            parents: make missing parents too.

        Raises:
            AlreadyExistsError: something else is there.
            NotFoundError: its parent is missing and `parents` is False.
        """
        await self._entry.sharing.reach()
        check_mode(mode)
        parts = [part for part in inside.absolute(path).split("/") if part not in {"", "."}]
        with root_of(self._entry) as root, named(path):
            for depth in range(1 if parents else len(parts), len(parts) + 1):
                self._make_directory(root, "/" + "/".join(parts[:depth]), mode)
                if depth % 50 == 0:
                    await anyio.lowlevel.checkpoint()

    @where_it_may_be_done
    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link (not what it points to) or a directory.

        No mount is entered or removed; the rest of the tree goes, and then the error is raised.

        Args:
            path: absolute path inside.
            recursive: also a directory that is not empty.

        Raises:
            NotFoundError: nothing is there.
            FailedPreconditionError: the directory is not empty, the place is read-only, or a mount point is in the way.
        """
        await self._entry.sharing.reach()
        with root_of(self._entry) as root, named(path), root.parent(path) as (directory, name):
            if path.endswith("/"):
                check_kind(path, is_directory=_is_directory(inside.look(root.identity, directory, name)))
            if root.bounds is not None:
                _check_bounds(root.bounds, directory, inside.look(root.identity, directory, name))
            if recursive:
                with contextlib.closing(removal.removing(directory, name, path, root.identity)) as steps:
                    for _ in steps:
                        await anyio.lowlevel.checkpoint()
                return
            status = inside.look(root.identity, directory, name)
            if status is None:
                raise NotFoundError(f"{path!r} does not exist")
            with root.identity.over(directory, entries=[status]):
                if stat.S_ISDIR(status.st_mode):
                    os.rmdir(name, dir_fd=directory)
                else:
                    os.unlink(name, dir_fd=directory)

    @where_it_may_be_done
    async def rename(self, source: str, target: str) -> None:
        """Move a file or directory within one file system of the sandbox; an existing file at `target` is replaced.

        Raises:
            NotFoundError: nothing is at `source`, or the directory of `target` is missing.
            FailedPreconditionError: they are on different file systems, or one is a mount point.
        """
        await self._entry.sharing.reach()
        with root_of(self._entry) as root, contextlib.ExitStack() as stack:
            with named(source):
                from_directory, from_name = stack.enter_context(root.parent(source))
                moved = inside.look(root.identity, from_directory, from_name)
                if root.bounds is not None:
                    _check_bounds(root.bounds, from_directory, moved)
                if moved is None:
                    raise NotFoundError(f"{source!r} does not exist")
                check_kind(source, is_directory=_is_directory(moved))
            with named(target):
                to_directory, to_name = stack.enter_context(root.parent(target))
                inside.look(root.identity, to_directory, to_name)
                check_kind(target, is_directory=_is_directory(moved))
            with named(f"{source} -> {target}"):
                Placer(root.identity, root.bounds).rename(from_directory, from_name, to_directory, to_name)

    @where_it_may_be_done
    async def upload(self, local: str | os.PathLike[str], path: str) -> None:
        """Copy a file or a directory tree of the host to `path`; links are copied as links, holes as holes.

        Everything belongs to the sandbox's root and has the permission bits of the original. A directory is merged into
        one that is there, files and links below are replaced.

        Raises:
            NotFoundError: `local` or the directory of `path` does not exist.
            InvalidArgumentError: the host's path holds something that is no file, directory or link.
        """
        await self._entry.sharing.reach()
        origin = local_path(local)
        with root_of(self._entry) as root, contextlib.ExitStack() as stack:
            with named(origin, "host"):
                probe = os.open(origin, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, probe)
            copy = Copy(CALLER, Placer(root.identity, root.bounds), origin, "host", path, "sandbox", None)
            status = os.fstat(probe)
            if not stat.S_ISDIR(status.st_mode):
                with named(path):
                    check_kind(path, is_directory=False)
                    directory, name = stack.enter_context(root.parent(path))
                await copy.entry(probe, directory, name)
                return
            mode = stat.S_IMODE(status.st_mode) & 0o777
            with named(path):
                target, made = self._open_or_make(root, path, mode | 0o700)
            await copy.tree(*_with_source(CALLER, probe, target, origin, "host"), mode if made else None)

    @where_it_may_be_done
    async def download(self, path: str, local: str | os.PathLike[str], *, limit: int = DEFAULT_DOWNLOAD_LIMIT) -> None:
        """Copy a file or a directory tree to the host; links are copied as links and never followed below `path`.

        Everything belongs to the caller and has the permission bits of the original under his umask; holes stay holes.
        An existing file at `local` is replaced, a directory is merged into, a link below that is in the way of a
        directory is replaced. Where the links that were copied lead to is the sandbox's choice: do not follow them, nor
        give a `local` that goes through one.

        Args:
            path: absolute path inside; a link is copied as a link.
            local: path on the host. For a directory missing parents are made, and it must not be a link itself.
            limit: bytes in all, each entry counted with 4 KiB at least; what is more is refused when it is met.

        Raises:
            NotFoundError: `path` or the directory of `local` does not exist.
            InvalidArgumentError: there is more than `limit`; a device, FIFO or socket is in the tree.
            FailedPreconditionError: `local` is a link and `path` a directory; there is no room on the host.
        """
        await self._entry.sharing.reach()
        check_limit(limit)
        goal = local_path(local)
        with root_of(self._entry) as root, contextlib.ExitStack() as stack:
            with named(path):
                probe = root.open(path, os.O_PATH | os.O_NOFOLLOW)
                stack.callback(os.close, probe)
            copy = Copy(root.identity, Placer(CALLER), path, "sandbox", goal, "host", limit)
            status = os.fstat(probe)
            if not stat.S_ISDIR(status.st_mode):
                with named(goal, "host"):
                    directory, name = stack.enter_context(_local_parent(goal))
                await copy.entry(probe, directory, name)
                return
            mode = stat.S_IMODE(status.st_mode) & 0o777
            with named(goal, "host"):
                target, made = _local_directory(goal, mode | 0o700)
            await copy.tree(
                *_with_source(root.identity, probe, target, path, "sandbox"), final_mode(target, mode) if made else None
            )

    def _open_or_make(self, root: Root, path: str, mode: int) -> tuple[int, bool]:
        """The directory at `path`, links followed, and whether it was made."""
        try:
            return root.open_directory(path), False
        except FileNotFoundError:
            with root.parent(path) as (directory, name):
                return Placer(root.identity, root.bounds).make_directory(directory, name, mode), True

    def _make_directory(self, root: Root, path: str, mode: int) -> None:
        try:
            fd, _ = self._open_or_make(root, path, mode)
        except FileExistsError:
            # Somebody was quicker, which is fine, or a link leads nowhere.
            try:
                fd = root.open_directory(path)
            except FileNotFoundError:
                raise AlreadyExistsError(f"{path!r} exists already, and is a link that leads nowhere") from None
        except NotADirectoryError as error:
            try:
                fd = root.open(path, os.O_PATH)
            except OSError:
                raise error from None  # it is something on the way to it
            os.close(fd)
            raise AlreadyExistsError(f"{path!r} exists already and is not a directory") from None
        os.close(fd)

    def _info(self, directory: int, name: str) -> FileInfo | None:
        while True:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                return self._describe(name, status, lambda: os.readlink(name, dir_fd=directory))
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EINVAL:  # readlink: it is no link any more
                    raise

    def _describe(self, name: str, status: os.stat_result, target: Callable[[], str]) -> FileInfo:
        kind = inside.kind_of(status.st_mode)
        first, count = self._entry.sandboxer.host_ids(self._entry.sandbox_id)

        def id_inside(host_id: int) -> int:
            return host_id - first if first <= host_id < first + count else _OVERFLOW_ID

        return FileInfo(
            name=name,
            kind=kind,
            size=status.st_size,
            mode=stat.S_IMODE(status.st_mode),
            mtime=status.st_mtime,
            uid=id_inside(status.st_uid),
            gid=id_inside(status.st_gid),
            target=target() if kind == "symlink" else "",
        )


def _check_bounds(bounds: FileBounds, directory: int, status: os.stat_result | None) -> None:
    """Where the kernel does not say it: nothing goes from a place that is read-only, and no mount point does."""
    bounds.check(directory)
    if status is not None and (status.st_dev, status.st_ino) in bounds.places:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def _is_directory(status: os.stat_result | None) -> bool:
    return status is None or stat.S_ISDIR(status.st_mode)


def _with_source(reader: Identity, probe: int, target: int, path: str, side: Side) -> tuple[int, int]:
    """A descriptor to read the directory behind `probe`, and `target`, which is closed if there is none."""
    try:
        with named(path, side):
            return reader.reopen(probe, os.O_DIRECTORY), target
    except BaseException:
        os.close(target)
        raise


@contextmanager
def _local_parent(path: str) -> Iterator[tuple[int, str]]:
    """The directory of the host that holds the caller's `path`, and the last part of it."""
    directory, name = os.path.split(path)
    if name in {"", ".", ".."}:
        raise InvalidArgumentError(f"{path!r} does not name a file in a directory")
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd, name
    finally:
        os.close(fd)


def _local_directory(path: str, mode: int) -> tuple[int, bool]:
    """The host's directory at the caller's `path`, and whether it was made.

    A link in the last place is refused: an earlier download of the same path may have put it there, when the sandbox
    had a link where it has a directory now.
    """
    path = path.rstrip("/") or "/"
    parent = os.path.dirname(path)
    if parent:
        os.makedirs(parent, exist_ok=True)
    try:
        os.mkdir(path, mode)
        made = True
    except FileExistsError:
        made = False
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC), made
    except NotADirectoryError:
        if not os.path.islink(path):
            raise
    raise FailedPreconditionError(
        f"{path!r} is a link, perhaps one that was downloaded earlier",
        hint="If it is yours, give the directory that it leads to; otherwise remove it.",
    )
