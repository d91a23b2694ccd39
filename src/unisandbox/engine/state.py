"""The directories of one engine: the state that survives, and the place for mounts that does not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

import attrs

from unisandbox.api import BackendError, FailedPreconditionError, InvalidArgumentError, SandboxError
from unisandbox.engine import durable, temporary
from unisandbox.engine.runtime_directory import (
    POINTER,
    TRIES,
    end_leases,
    in_runtime,
    remove_if_empty,
    runtime_directory,
)
from unisandbox.engine.state_files import check_own, engine_id_of, has_records, known_id
from unisandbox.host import small_files
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.cgroups.hierarchy import SLICE
from unisandbox.host.keeper import Guard
from unisandbox.host.keeper.protocol import LOCK_NAME
from unisandbox.host.keeper.starting import is_answered
from unisandbox.host.removal import remove_tree

LARGE_FILES: Final = "/var/tmp"
"""Where the disks of temporary engines are."""
# Seconds that a keeper may take to end after it has said that it cannot begin.
_LAST_BREATH: Final = 2.0


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
        claim: a descriptor that says of a temporary one that somebody is about to use it, until `unclaim`.
    """

    path: str
    engine_id: str
    work_dir: str
    temporary: bool
    durable: bool
    claim: int = -1

    @classmethod
    def prepare(
        cls, directory: str | os.PathLike[str] | None, *, attached: bool = False, work_dir: str = ""
    ) -> StateDirectory:
        """Make the directories, but for `work_dir`, which the keeper's lock belongs to; see the attributes.

        Args:
            directory: None: a temporary one.
            attached: for one that has found a keeper there. The pointer is not its business: that keeper may be about
                to end and remove it, and then nobody would remove another one.
            work_dir: that of the keeper that runs for it, if one was found: it knows whose it is, whatever the
                directory says.

        Raises:
            BackendError: they cannot be made or written: the disk is full or read-only, say.
            FailedPreconditionError: others could write into the state directory.
            InvalidArgumentError: it cannot be a path, or is none of a directory in which files can be made, or holds
                somebody else's.
        """
        runtime, claim = os.path.dirname(work_dir) or runtime_directory(), -1
        try:
            if directory is None:
                temporary.sweep(runtime, lambda dead: _free_names(runtime, dead))
                path, claim = _temporary_directory(runtime)
            else:
                path = os.path.abspath(path_of(directory))
                _make_on_disk(path)
            try:
                _check_private(path, "state directory")
                if directory is not None and not work_dir:
                    check_own(path)
                engine_id = engine_id_of(path, os.path.basename(work_dir))
                in_runtime(runtime, lambda: _check_private(runtime, "runtime directory"))
                work = os.path.join(runtime, engine_id)
                state = cls(path, engine_id, work, directory is None, durable=directory is not None, claim=claim)
                if not attached:
                    state.point()
            except BaseException:
                if directory is None:
                    _remove_tree(path)
                    os.close(claim)
                remove_if_empty(runtime)
                raise
            return state
        except OSError as error:
            raise unusable(os.fspath(directory or runtime), error) from error
        except ValueError as error:
            raise InvalidArgumentError(f"{os.fspath(directory or '')!r} is no path of a directory: {error}") from error

    def unclaim(self) -> None:
        """A keeper has the directory now, or it is gone. Once."""
        if self.claim >= 0:
            os.close(self.claim)

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
        for _ in range(TRIES):
            reached("before state.point", self.pointer)
            try:
                in_runtime(runtime, lambda: os.symlink(path, self.pointer))
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

    def point_again(self) -> None:
        """As the holder of the lock: a former keeper may have removed the pointer, as it ended after `prepare`.

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

    def guards(self, cgroups: Cgroups) -> list[Guard]:
        """How to undo what `prepare` and the cgroup tree make, for the keeper that holds the lock."""
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


def path_of(directory: object) -> str:
    """The path of a state directory, as it was given.

    Raises:
        InvalidArgumentError: it cannot be a path. "" is none: it would be the current directory.
    """
    path = os.fspath(directory) if isinstance(directory, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise InvalidArgumentError(f"a state directory is the path of a directory, got {directory!r}")
    if "\0" in path:
        raise InvalidArgumentError(f"the state directory {directory!r} is no path of a directory: it has a null byte")
    return path


def unusable(place: str, error: OSError) -> SandboxError:
    """What is said of a state directory that cannot be used."""
    about = os.fspath(error.filename or place)
    what = f"cannot use the state directory {place!r}"
    where = f" ({about})" if about != place else ""
    if error.errno in {errno.EEXIST, errno.ENOTDIR}:
        return InvalidArgumentError(
            f"{what}: {os.strerror(errno.ENOTDIR)}{where}",
            hint="Give the path of a directory, or one that does not exist yet.",
        )
    # What procfs and sysfs answer, and a directory in which this user may not write.
    if error.errno in {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}:
        return InvalidArgumentError(
            f"{what}: {error.strerror}{where}", hint="Give a directory in which this user can make files."
        )
    return BackendError(
        f"{what}: {error.strerror}{where}",
        hint="It must be a directory that this user can write, on a disk with free space.",
    )


def _make_on_disk(path: str) -> None:
    """Make a state directory, and what is missing above it; it is on the disk then, as are the records in it later."""
    missing: list[str] = []
    above = path
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    reached("before state.mkdir", path)
    os.makedirs(path, mode=0o700, exist_ok=True)
    reached("after state.mkdir", path)
    for made in missing:
        durable.sync_entry(made)


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # it is gone, or no link
        return ""


def _remove_tree(path: str) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed now is found by its name later
        remove_tree(path)


def _free_names(runtime: str, path: str) -> None:
    """Remove what has the id of an engine that never had a keeper."""
    engine_id = known_id(path)
    if engine_id:
        remove_if_empty(os.path.join(runtime, engine_id))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(runtime, engine_id + POINTER))


def _temporary_directory(runtime: str) -> tuple[str, int]:
    try:
        return in_runtime(runtime, lambda: temporary.make(runtime))
    except OSError:
        remove_if_empty(runtime)
        raise


@contextlib.contextmanager
def unlocked(state_dir: str, *, wait: float) -> Iterator[bool]:
    """Whether no keeper holds the directory, after up to `wait` seconds; none can while the context lasts."""
    deadline = time.monotonic() + wait
    try:
        fd = small_files.opened(os.path.join(state_dir, LOCK_NAME))
    except FileNotFoundError:
        # There never was a keeper, or somebody has removed the file.
        try:
            unused = not _is_answered(state_dir)
        except OSError:
            unused = False  # as below
        yield unused
        return
    except (OSError, small_files.NotARegularFileError):
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


def _is_answered(state_dir: str) -> bool:
    try:
        fd = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False  # it is gone
    try:
        return is_answered(fd)
    finally:
        os.close(fd)


def check_directory(path: str) -> None:
    """Look whether a state directory can be used; one that is not there can.

    Raises:
        FailedPreconditionError: others could write into it.
        OSError: it cannot be reached, or is no directory.
    """
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        _check_private(path, "state directory")
    except FileNotFoundError:
        return


def _check_private(path: str, what: str) -> None:
    status = os.stat(path)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedPreconditionError(
            f"the {what} {path!r} is not this user's alone (owner {status.st_uid}, mode"
            f" {stat.S_IMODE(status.st_mode):o}; this is user {os.geteuid()})",
            hint=f"Use a directory of your own, e.g. chown {os.geteuid()} {path}; chmod go-w {path}",
        )
