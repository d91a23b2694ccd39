"""The directories of one engine: the state that survives, and the place for mounts that does not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

import attrs

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    short_name,
)
from unisandbox.engine import durable
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.cgroups.hierarchy import SLICE
from unisandbox.host.keeper import Guard
from unisandbox.host.keeper.leases import NAME as LEASES_NAME
from unisandbox.host.keeper.leases import Leases
from unisandbox.host.keeper.protocol import LOCK_NAME
from unisandbox.host.removal import remove_tree

RUNTIME_DIRECTORY: Final = "/run/unisandbox"
LARGE_FILES: Final = "/var/tmp"
"""Where the disks of temporary engines are."""
POINTER: Final = ".state"
"""How the links in the runtime directory end that say which state directory an engine has."""
TEMPORARY_PREFIX: Final = "state-"
SANDBOXES: Final = "sandboxes"
"""The directory of records in a state directory."""
_PARENTS: Final = "cgroups"
_ID_FILE: Final = "engine-id"
# Files that get their name when they are whole.
_LEFT: Final = re.compile(r"(engine-id\.[0-9a-f]{16})|(cgroups\.[0-9a-f]{8}\.tmp)")
_ENGINE_ID: Final = re.compile(r"[a-z2-7]{10}")
# How often to make the runtime directory again that another engine, the last one, removes at this very moment.
_TRIES: Final = 50
# Seconds that a keeper may take to end after it has said that it cannot begin.
_LAST_BREATH: Final = 2.0
_ending_leases: Final = threading.Lock()

_T = TypeVar("_T")


@attrs.frozen(eq=False, repr=False)
class StateDirectory:
    """Where an engine keeps its state.

    Attributes:
        path: the state directory; absolute.
        engine_id: 10 base32 characters, made when the directory is first used and kept in it.
        work_dir: an empty directory on the host over which the keeper mounts its private tmpfs. Its parents can be
            traversed by everybody, since runtimes reach the root file systems as the sandbox's user.
        temporary: the directory was made for this engine alone, and goes with it.
        durable: it lies on a disk, so that what is written must be synced.
    """

    path: str
    engine_id: str
    work_dir: str
    temporary: bool
    durable: bool

    @classmethod
    def prepare(cls, directory: str | os.PathLike[str] | None, *, attached: bool = False) -> StateDirectory:
        """Make the directories, but for `work_dir`, which the keeper's lock belongs to; see the attributes.

        Args:
            directory: None: a temporary one.
            attached: for one that has found a keeper there. The pointer is not its business: that keeper may be about
                to end and remove it, and then nobody would remove another one.

        Raises:
            BackendError: they cannot be made or written.
            FailedPreconditionError: others could write into the state directory.
            InvalidArgumentError: it cannot be a path.
        """
        runtime = runtime_directory()
        try:
            if directory is None:
                path, temporary = _temporary_directory(runtime), True
            else:
                path, temporary = os.path.abspath(os.fspath(directory)), False
                reached("before state.mkdir", path)
                os.makedirs(path, mode=0o700, exist_ok=True)
                reached("after state.mkdir", path)
            try:
                _check_private(path, "state directory")
                engine_id = _engine_id(path)
                _in_runtime(runtime, lambda: _check_private(runtime, "runtime directory"))
                state = cls(path, engine_id, os.path.join(runtime, engine_id), temporary, durable=not temporary)
                if not attached:
                    state.point()
            except BaseException:
                if temporary:
                    _remove_tree(path)
                remove_if_empty(runtime)
                raise
            return state
        except FileExistsError as error:
            raise BackendError(
                f"cannot use the state directory {os.fspath(error.filename)!r}: it is not a directory",
                hint="Give the path of a directory, or one that does not exist yet.",
            ) from error
        except OSError as error:
            place = os.fspath(directory or runtime)
            raise BackendError(
                f"cannot use the state directory {place!r}: {error.strerror}"
                + (f" ({os.fspath(error.filename)})" if error.filename not in {None, place} else ""),
                hint="It must be a directory that this user can write, on a disk with free space.",
            ) from error
        except ValueError as error:
            raise InvalidArgumentError(f"{os.fspath(directory or '')!r} is no path of a directory: {error}") from error

    def cgroup_parents(self) -> dict[str, str]:
        """Where the cgroups of the engine are, by hierarchy; empty when that was never noted."""
        try:
            with open(os.path.join(self.path, _PARENTS), encoding="utf-8") as file:
                known = json.load(file)
        except (FileNotFoundError, ValueError):
            return {}
        return {str(key): str(value) for key, value in known.items()} if isinstance(known, dict) else {}

    def keep_cgroup_parents(self, parents: Mapping[str, str]) -> None:
        """Note where they are: who attaches, or comes after a crash, may stand in another cgroup himself."""
        durable.replace(os.path.join(self.path, _PARENTS), json.dumps(dict(parents)).encode(), durable=self.durable)

    def tidy(self) -> None:
        """Remove what writers that were killed have left; for the owner."""
        with os.scandir(self.path) as entries:
            for entry in list(entries):
                # Of two that are opened at once the one that does not become the owner finds its own gone; see
                # `_engine_id`.
                if _LEFT.fullmatch(entry.name):
                    durable.remove_temporary(entry.path)

    @property
    def disk_dir(self) -> str:
        """Where large files go: a temporary state directory may lie in memory."""
        return LARGE_FILES if self.temporary else self.path

    @property
    def pointer(self) -> str:
        """The link by which whoever finds something with the engine's id finds its state directory."""
        return self.work_dir + POINTER

    def point(self) -> None:
        """Make the pointer, or see that it is right. Repeating is harmless.

        Raises:
            OSError: it cannot be made.
        """
        runtime = os.path.dirname(self.work_dir)
        # Whoever follows it asks whether the directory is this user's own, and then does not want another link.
        path = os.path.realpath(self.path)
        for _ in range(_TRIES):
            reached("before state.point", self.pointer)
            try:
                _in_runtime(runtime, lambda: os.symlink(path, self.pointer))
            except FileExistsError:
                if _target(self.pointer) == path:
                    return
                # The directory was moved, or one that held the same place on the disk before is gone.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.pointer)
            else:
                reached("after state.point", self.pointer)
                return
        raise OSError(errno.EEXIST, "somebody else changes it all the time", self.pointer)

    def guards(self, cgroups: Cgroups) -> list[Guard]:
        """How to undo what `prepare` and the cgroup tree made, for the keeper that holds the lock now.

        The pointer is made again: a former keeper of the directory may have removed it, as it ended after `prepare`.

        Raises:
            BackendError: it cannot be made.
        """
        try:
            self.point()
        except OSError as error:
            raise BackendError(
                f"cannot open an engine on {self.path}: {self.pointer}: {error.strerror}",
                hint=f"Free space in {os.path.dirname(self.work_dir)}.",
            ) from error
        slices = [place.parent for place in cgroups.places if os.path.basename(place.parent) == SLICE]
        undo = [
            Guard("engine/runtime", "rmdir", (os.path.dirname(self.work_dir),)),
            Guard("engine/slice", "rmdir", slices),
            # Late, so that what a keeper that is killed here leaves can still be told from others' things.
            Guard("engine/pointer", "unlink", (self.pointer,)),
            Guard("engine/work", "rmdir", (self.work_dir,)),
            Guard("engine/cgroup", "rmdir_cgroup", [f"{place.parent}/{cgroups.name}" for place in cgroups.places]),
        ]
        if self.temporary:
            undo.insert(2, Guard("engine/state", "remove_tree", (self.path,)))
        return undo

    @staticmethod
    def kept_for_records() -> list[str]:
        """Of the guards those that would take away what belongs to sandboxes that are to be left as they are."""
        return ["engine/pointer", "engine/cgroup"]

    def discard(self, *, wait: float = 0.0) -> None:
        """Remove what is left of the directories that the engine made for itself.

        They may be another engine's by now, or may always have been: the place for mounts is empty in our view while
        its keeper has mounts there, and removing the mount point would take them away from it. So this happens only
        while no keeper holds the directory's lock, which is waited for up to `wait` seconds.

        Source: unlink(2), rmdir(2); since Linux 3.18 a mount point that is one in another mount namespace only can be
        removed, and is unmounted there (d_invalidate, detach_mounts).
        """
        # A keeper that could not begin lets go of the lock when its process ends, in a moment; a temporary directory is
        # nobody else's, so that is what is waited for.
        with unlocked(self.path, wait=max(wait, _LAST_BREATH if self.temporary else 0.0)) as unused:
            if unused:
                self.discard_now()

    def discard_now(self) -> None:
        """The same, for whoever sees to it that no keeper can begin meanwhile."""
        reached("before state.discard", self.path)
        remove_if_empty(self.work_dir)
        if self.temporary:
            _remove_tree(self.path)
        if self.temporary or not has_records(self.path):
            with contextlib.suppress(OSError):  # the keeper's guard was faster
                os.unlink(self.pointer)
        reached("after state.discard", self.path)
        end_leases(os.path.dirname(self.work_dir))
        remove_if_empty(os.path.dirname(self.work_dir))


def runtime_directory() -> str:
    """Where this user's engines have what does not survive a restart of the machine."""
    if os.geteuid() == 0:
        return RUNTIME_DIRECTORY
    directory = os.environ.get("XDG_RUNTIME_DIR")
    if not directory:
        import tempfile  # heavy, and only for users without a session

        directory = tempfile.gettempdir()
    return os.path.join(directory, "unisandbox")


def _make_directory(path: str, mode: int) -> None:
    """Make it with this mode whatever the umask; one of ours that is there gets what it lacks.

    A service manager may have made it for this user alone, and the root of a user namespace, who is somebody else,
    reaches the root file system of its sandbox through it.
    """
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        status = os.stat(path)
        had = stat.S_IMODE(status.st_mode)
        if mode & ~had and status.st_uid == os.geteuid():
            os.chmod(path, had | mode)
        return
    os.chmod(path, mode)


def has_records(path: str) -> bool:
    """Whether a state directory has records of sandboxes, or files that may be."""
    try:
        with os.scandir(os.path.join(path, SANDBOXES)) as entries:
            return any(entry.name.endswith(".json") for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # it is gone, or no link
        return ""


def remove_if_empty(path: str) -> None:
    """Remove a directory that all engines share, or that is the caller's, once nothing is in it."""
    with contextlib.suppress(OSError):  # the keeper was faster, or another engine uses it
        os.rmdir(path)


def end_leases(runtime: str) -> None:
    """Remove the file of leased numbers if nobody leases any: a keeper that was killed could not."""
    # One thread at a time: the locks are the process's, so that two would not keep each other out.
    with _ending_leases:
        if os.path.exists(os.path.join(runtime, LEASES_NAME)):
            leases = Leases()
            with contextlib.suppress(OSError):  # another engine is about to remove it
                leases.release(runtime, leases.lease(runtime, 0, 1))


def _remove_tree(path: str) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed now is found by its name later
        remove_tree(path)


def _new_directory(runtime: str) -> str:
    while True:
        path = os.path.join(runtime, f"{TEMPORARY_PREFIX}{os.urandom(4).hex()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            return path


def _temporary_directory(runtime: str) -> str:
    try:
        return _in_runtime(runtime, lambda: _new_directory(runtime))
    except OSError:
        remove_if_empty(runtime)
        raise


def _in_runtime(runtime: str, action: Callable[[], _T]) -> _T:
    """Make the runtime directory and use it; again when another engine, which was the last, has removed it between."""
    for left in reversed(range(_TRIES)):
        try:
            _make_directory(runtime, 0o711)
            return action()
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError("the loop returns or raises")


def is_engine_id(name: str) -> bool:
    """Whether this can be the id of an engine."""
    return _ENGINE_ID.fullmatch(name) is not None


@contextlib.contextmanager
def unlocked(state_dir: str, *, wait: float) -> Iterator[bool]:
    """Whether no keeper holds the directory, after up to `wait` seconds; none can while the context lasts."""
    deadline = time.monotonic() + wait
    try:
        fd = os.open(os.path.join(state_dir, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # there is no lock, so there never was a keeper
        return
    except OSError:
        yield False  # it cannot be told (no file descriptors left): then nothing is touched
        return
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.002)  # a lock has no event with a deadline
        yield True
    finally:
        os.close(fd)


def check_directory(path: str) -> None:
    """Look whether a state directory can be used; one that is not there can.

    Raises:
        FailedPreconditionError: others could write into it.
        OSError: it cannot be reached, or is no directory.
    """
    try:
        _check_private(path, "state directory")
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _check_private(path: str, what: str) -> None:
    status = os.stat(path)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedPreconditionError(
            f"the {what} {path!r} is not this user's alone (owner {status.st_uid}, mode"
            f" {stat.S_IMODE(status.st_mode):o}; this is user {os.geteuid()})",
            hint=f"Use a directory of your own, e.g. chown {os.geteuid()} {path}; chmod go-w {path}",
        )


def _engine_id(path: str) -> str:
    known = known_id(path)
    if known:
        return known
    file = os.path.join(path, _ID_FILE)
    status = os.stat(path)
    place = f"{status.st_dev}:{status.st_ino}"
    fresh = short_name(os.urandom(16).hex(), "engine")
    temporary = f"{file}.{os.urandom(8).hex()}"
    reached("before state.engine_id", path)
    try:
        with open(temporary, "x", encoding="ascii") as out:
            out.write(f"{fresh} {place}\n")
            out.flush()
            os.fsync(out.fileno())  # a record on the disk is of no use without the names that derive from this
        with contextlib.suppress(FileNotFoundError), open(file, "r+b") as old:
            fcntl.flock(old.fileno(), fcntl.LOCK_EX)  # for the time of one renaming, by which the first one wins
            if known := known_id(path):
                return known  # another engine that is opened at once was quicker
            # It is damaged (a full disk of old, say) or copied: nothing could be found by what it says.
            os.rename(temporary, file)
            return fresh
        # The first one wins: of two engines that are opened at once, the other reads what this one wrote.
        reached("after state.engine_id", path)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(temporary, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return known_id(path) or fresh


def known_id(path: str) -> str:
    """The engine id that a state directory has; "" when it has none (yet), or one that is damaged or copied.

    A copy of the directory is another one: two engines must not share their names.
    """
    try:
        status = os.stat(path)
        with open(os.path.join(path, _ID_FILE), encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
    except FileNotFoundError:
        return ""
    known, _, written_for = text.partition(" ")
    return known if is_engine_id(known) and written_for == f"{status.st_dev}:{status.st_ino}" else ""
