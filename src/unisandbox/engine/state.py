"""The directories of one engine: the state that survives, and the place for mounts that does not."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

import attrs

from unisandbox.api import BackendError, FailedPreconditionError, short_name
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.keeper import Guard

RUNTIME_DIRECTORY: Final = "/run/unisandbox"
_ENGINE_ID: Final = re.compile(r"[a-z2-7]{10}")


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
        """Make the directories; see the attributes.

        Raises:
            BackendError: they cannot be made or written.
            FailedPreconditionError: others could write into the state directory.
        """
        runtime = _runtime_directory()
        try:
            os.makedirs(runtime, mode=0o711, exist_ok=True)
            if directory is None:
                path, temporary = tempfile.mkdtemp(prefix="state-", dir=runtime), True
            else:
                path, temporary = os.path.abspath(os.fspath(directory)), False
                os.makedirs(path, mode=0o700, exist_ok=True)
            _check_private(path)
            engine_id = _engine_id(path)
            work_dir = os.path.join(runtime, engine_id)
            os.makedirs(work_dir, mode=0o711, exist_ok=True)
            return cls(path, engine_id, work_dir, temporary, durable=not temporary)
        except OSError as error:
            raise BackendError(
                f"cannot use the state directory {os.fspath(directory or runtime)!r}: {error.strerror}",
                hint="It must be a directory that this user can write, on a disk with free space.",
            ) from error

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

    def discard(self) -> None:
        """Remove what is left of the directories that the engine made for itself."""
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        for path in (self.work_dir, os.path.dirname(self.work_dir)):
            with contextlib.suppress(OSError):  # the keeper was faster, or another engine uses it
                os.rmdir(path)


def _runtime_directory() -> str:
    if os.geteuid() == 0:
        return RUNTIME_DIRECTORY
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), "unisandbox")


def _check_private(path: str) -> None:
    status = os.stat(path)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedPreconditionError(
            f"the state directory {path!r} can be written by others (owner {status.st_uid}, mode"
            f" {stat.S_IMODE(status.st_mode):o})",
            hint=f"Use a directory of your own: chmod 700 {path}",
        )


def _engine_id(path: str) -> str:
    file = Path(path) / "engine-id"
    with contextlib.suppress(FileNotFoundError):
        known = file.read_text().strip()
        if _ENGINE_ID.fullmatch(known):
            return known
    fresh = short_name(secrets.token_hex(16), "engine")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(fresh + "\n")
    temporary.rename(file)
    return fresh
