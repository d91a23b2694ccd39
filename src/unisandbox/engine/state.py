"""The directories of one engine: the state that survives, and the place for mounts that does not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import attrs

from unisandbox.api import BackendError, FailedPreconditionError, InvalidArgumentError, short_name
from unisandbox.engine import durable
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.keeper import Guard
from unisandbox.host.keeper.leases import NAME as LEASES_NAME
from unisandbox.host.keeper.leases import Leases
from unisandbox.host.keeper.protocol import LOCK_NAME

RUNTIME_DIRECTORY: Final = "/run/unisandbox"
_PARENTS: Final = "cgroups"
_ENGINE_ID: Final = re.compile(r"[a-z2-7]{10}")
# How often to make the runtime directory again that another engine, the last one, removes at this very moment.
_TRIES: Final = 50
# Seconds that a keeper may take to end after it has said that it cannot begin.
_LAST_BREATH: Final = 2.0

_T = TypeVar("_T")


@attrs.frozen
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
    def prepare(cls, directory: str | os.PathLike[str] | None) -> StateDirectory:
        """Make the directories, but for `work_dir`, which the keeper's lock belongs to; see the attributes.

        Raises:
            BackendError: they cannot be made or written.
            FailedPreconditionError: others could write into the state directory.
            InvalidArgumentError: it cannot be a path.
        """
        runtime = _runtime_directory()
        try:
            if directory is None:
                path, temporary = _temporary_directory(runtime), True
            else:
                path, temporary = os.path.abspath(os.fspath(directory)), False
                os.makedirs(path, mode=0o700, exist_ok=True)
            try:
                _check_private(path, "state directory")
                engine_id = _engine_id(path)
                _in_runtime(runtime, lambda: _check_private(runtime, "runtime directory"))
            except BaseException:
                if temporary:
                    shutil.rmtree(path, ignore_errors=True)
                _remove_if_empty(runtime)
                raise
            return cls(path, engine_id, os.path.join(runtime, engine_id), temporary, durable=not temporary)
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
            known = json.loads(Path(self.path, _PARENTS).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {str(key): str(value) for key, value in known.items()} if isinstance(known, dict) else {}

    def keep_cgroup_parents(self, parents: Mapping[str, str]) -> None:
        """Note where they are: who attaches, or comes after a crash, may stand in another cgroup himself."""
        durable.replace(os.path.join(self.path, _PARENTS), json.dumps(dict(parents)).encode(), durable=self.durable)

    @property
    def disk_dir(self) -> str:
        """Where large files go: a temporary state directory may lie in memory."""
        return "/var/tmp" if self.temporary else self.path

    def guards(self, cgroups: Cgroups) -> list[Guard]:
        """How to undo what `prepare` and the cgroup tree made, for the keeper."""
        undo = [
            Guard("engine/runtime", "rmdir", (os.path.dirname(self.work_dir),)),
            Guard("engine/work", "rmdir", (self.work_dir,)),
            Guard("engine/cgroup", "rmdir_cgroup", [f"{place.parent}/{cgroups.name}" for place in cgroups.places]),
        ]
        if self.temporary:
            undo.insert(1, Guard("engine/state", "remove_tree", (self.path,)))
        return undo

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
        with _unlocked(self.path, wait=max(wait, _LAST_BREATH if self.temporary else 0.0)) as unused:
            if not unused:
                return
            _remove_if_empty(self.work_dir)
            if self.temporary:
                shutil.rmtree(self.path, ignore_errors=True)
            _end_leases(os.path.dirname(self.work_dir))
            _remove_if_empty(os.path.dirname(self.work_dir))


def _runtime_directory() -> str:
    if os.geteuid() == 0:
        return RUNTIME_DIRECTORY
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), "unisandbox")


def _make_directory(path: str, mode: int) -> None:
    """Make it with this mode whatever the umask; one that is there keeps its own."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    os.chmod(path, mode)


def _remove_if_empty(path: str) -> None:
    with contextlib.suppress(OSError):  # the keeper was faster, or another engine uses it
        os.rmdir(path)


def _end_leases(runtime: str) -> None:
    """Remove the file of leased numbers if nobody leases any: a keeper that was killed could not."""
    if os.path.exists(os.path.join(runtime, LEASES_NAME)):
        leases = Leases()
        with contextlib.suppress(OSError):  # another engine is about to remove it
            leases.release(runtime, leases.lease(runtime, 0, 1))


def _temporary_directory(runtime: str) -> str:
    try:
        return _in_runtime(runtime, lambda: tempfile.mkdtemp(prefix="state-", dir=runtime))
    except OSError:
        _remove_if_empty(runtime)
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


@contextlib.contextmanager
def _unlocked(state_dir: str, *, wait: float) -> Iterator[bool]:
    """Whether no keeper holds the directory, after up to `wait` seconds; none can while the context lasts."""
    deadline = time.monotonic() + wait
    try:
        fd = os.open(os.path.join(state_dir, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield True  # there is no lock, so there never was a keeper
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


def _check_private(path: str, what: str) -> None:
    status = os.stat(path)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedPreconditionError(
            f"the {what} {path!r} is not this user's alone (owner {status.st_uid}, mode"
            f" {stat.S_IMODE(status.st_mode):o}; this is user {os.geteuid()})",
            hint=f"Use a directory of your own, e.g. chown {os.geteuid()} {path}; chmod go-w {path}",
        )


def _engine_id(path: str) -> str:
    file = Path(path) / "engine-id"
    status = os.stat(path)
    # A copy of the directory is another one: two engines must not share their names.
    place = f"{status.st_dev}:{status.st_ino}"
    known = _known_id(file, place)
    if known:
        return known
    fresh = short_name(secrets.token_hex(16), "engine")
    temporary = file.with_name(f"engine-id.{secrets.token_hex(8)}")
    try:
        temporary.write_text(f"{fresh} {place}\n")
        if file.exists():
            # It is damaged (a full disk of old, say) or copied: nothing could be found by what it says.
            temporary.rename(file)
            return fresh
        # The first one wins: of two engines that are opened at once, the other reads what this one wrote.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return _known_id(file, place) or fresh


def _known_id(file: Path, place: str) -> str:
    try:
        text = file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    known, _, written_for = text.partition(" ")
    return known if _ENGINE_ID.fullmatch(known) and written_for == place else ""
