"""What is written in a state directory, beside its records: the engine's id, and where its cgroups are.

All of it may be damaged, lost or copied, and is then as if it never was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from unisandbox.api import InvalidArgumentError, short_name
from unisandbox.engine import durable
from unisandbox.host import small_files
from unisandbox.host.boundary import reached
from unisandbox.host.keeper.protocol import EVENTS_NAME, LOCK_NAME, LOG_NAME, SOCKET_NAME

SANDBOXES: Final = "sandboxes"
"""The directory of records in a state directory."""
OPERATIONS: Final = "operations"
"""The directory of those that were begun under an operation id."""
_PARENTS: Final = "cgroups"
_PARENTS_VERSION: Final = 2
_PARENTS_LIMIT: Final = 1 << 20
_ID_FILE: Final = "engine-id"
# Files that get their name when they are whole.
_LEFT: Final = re.compile(r"(engine-id\.[0-9a-f]{16})|(cgroups\.[0-9a-f]{8}\.tmp)")
# All that there is in a state directory: of the engine, of its keeper, of `serve` ("empty"); some have another name
# until they are whole. And what a file system has at its top.
_OURS: Final = re.compile(
    rf"({'|'.join(map(re.escape, (_ID_FILE, _PARENTS, SANDBOXES, OPERATIONS, LOCK_NAME, LOG_NAME, EVENTS_NAME)))})"
    rf"(\.(new|[0-9a-f]+(\.tmp)?))?|{re.escape(SOCKET_NAME)}|empty|unisandbox-.*\.(img|files)|lost\+found"
)
_ENGINE_ID: Final = re.compile(r"[a-z2-7]{10}")
_ID_LINE: Final = re.compile(rb"[a-z2-7]{10} [0-9]+:[0-9]+( 2 [0-9a-f]+)?\n")
_SHOWN: Final = 3
_ID_LENGTH: Final = 10
_ID_LIMIT: Final = 1024


def is_engine_id(name: str) -> bool:
    """Whether this can be the id of an engine."""
    return _ENGINE_ID.fullmatch(name) is not None


def known_id(path: str) -> str:
    """The engine id that a state directory has; "" when it has none (yet), or one that is damaged or copied.

    A copy of the directory is another one: two engines must not share their names.
    """
    try:
        status = os.stat(path)
        raw = small_files.read(os.path.join(path, _ID_FILE), _ID_LIMIT)[0]
    except (FileNotFoundError, small_files.NotARegularFileError, small_files.TooLargeError):
        return ""
    known, place = raw[:_ID_LENGTH].decode("ascii", "replace"), f"{status.st_dev}:{status.st_ino}"
    first = f"{known} {place}\n".encode()
    return known if is_engine_id(known) and raw in {first, _id_line(known, place)} else ""


def check_own(path: str) -> None:
    """See that a directory is an engine's, or can become one: an engine replaces files that have the names of its own.

    Raises:
        InvalidArgumentError: somebody else's things are in it.
    """
    why = ""
    if os.path.realpath(path) == "/":
        why = "it is the root directory"
    elif not _has_id_of_any(path):
        with os.scandir(path) as entries:
            others = sorted(entry.name for entry in entries if not _OURS.fullmatch(entry.name))
        if others:
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            why = f"it is no engine's, and holds {', '.join(map(repr, others[:_SHOWN]))}{more}"
    if why:
        raise InvalidArgumentError(
            f"{path!r} cannot be a state directory: {why}",
            hint=f"Give a directory of its own, such as {os.path.join(path, 'unisandbox')!r}; it need not be there.",
        )


def _has_id_of_any(path: str) -> bool:
    """Whether an engine's id is written there, be it that of the directory that this one is a copy of."""
    try:
        return _ID_LINE.fullmatch(small_files.read(os.path.join(path, _ID_FILE), _ID_LIMIT)[0]) is not None
    except (FileNotFoundError, small_files.NotARegularFileError, small_files.TooLargeError):
        return False


def engine_id_of(path: str, of_keeper: str = "") -> str:
    """The id that the directory has, or gets now.

    Args:
        path: of the directory.
        of_keeper: what the keeper that runs for it has its names from; "": none does, or it is not known.
    """
    known = known_id(path)
    if known and (not of_keeper or known == of_keeper):
        return known
    file = os.path.join(path, _ID_FILE)
    status = os.stat(path)
    fresh = of_keeper or short_name(os.urandom(16).hex(), "engine")
    temporary = f"{file}.{os.urandom(8).hex()}"
    reached("before state.engine_id", path)
    try:
        with open(temporary, "xb") as out:
            out.write(_id_line(fresh, f"{status.st_dev}:{status.st_ino}"))
            out.flush()
            os.fsync(out.fileno())  # a record on the disk is of no use without the names that derive from this
        with contextlib.suppress(FileNotFoundError), _alone_with(file):  # for one renaming: the first one wins
            if (known := known_id(path)) and (not of_keeper or known == of_keeper):
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
    return of_keeper or known_id(path) or fresh


@contextlib.contextmanager
def _alone_with(file: str) -> Iterator[None]:
    """Nobody else replaces what is there now, if he asks for that in this way. It need not be a file."""
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _id_line(engine_id: str, place: str) -> bytes:
    """The id of an engine in the directory at this place (device and inode). Version 1 had no checksum."""
    said = f"{engine_id} {place}"
    return f"{said} 2 {durable.checksum(said)}\n".encode()


def cgroup_parents(path: str) -> dict[str, str] | None:
    """Where the cgroups of the engine on this directory are, by hierarchy; None when that was never noted, or is lost.

    Raises:
        OSError: what was noted cannot be read now.
    """
    try:
        return _parents_in(small_files.read(os.path.join(path, _PARENTS), _PARENTS_LIMIT)[0])
    except (FileNotFoundError, small_files.NotARegularFileError, small_files.TooLargeError):
        return None


def keep_cgroup_parents(path: str, parents: Mapping[str, str], *, on_disk: bool) -> None:
    """Note where they are: who attaches, or comes after a crash, may stand in another cgroup himself.

    Raises:
        OSError: they cannot be noted, and what was noted before is something else.
    """
    file = os.path.join(path, _PARENTS)
    line = durable.sealed(_PARENTS_VERSION, "parents", json.dumps(dict(parents), sort_keys=True))
    try:
        known = small_files.read(file, _PARENTS_LIMIT)[0]
    except (OSError, small_files.NotARegularFileError, small_files.TooLargeError):
        known = b""
    if known == line:
        return  # nothing is written that need not be: the disk may be full
    try:
        durable.replace(file, line, durable=on_disk)
    except OSError:
        if _parents_in(known) != dict(parents):  # a former version has noted the same, in its own way
            raise


def _parents_in(raw: bytes) -> dict[str, str] | None:
    """What was noted; None when it is damaged. Version 1 was the bare object, without a checksum."""
    try:
        said = json.loads(raw)
        parents = said.get("parents") if "version" in said else said
        known = {str(key): str(value) for key, value in parents.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    sealed = durable.sealed(_PARENTS_VERSION, "parents", json.dumps(known, sort_keys=True))
    return known if raw == sealed or parents is said else None


def tidy(path: str) -> None:
    """Remove what writers that were killed have left; for the owner."""
    with os.scandir(path) as entries:
        for entry in list(entries):
            # Of two that are opened at once the one that does not become the owner finds its own gone; see
            # `engine_id_of`.
            if _LEFT.fullmatch(entry.name):
                durable.remove_temporary(entry.path)


def has_records(path: str) -> bool:
    """Whether a state directory has records of sandboxes, or files that may be."""
    try:
        with os.scandir(os.path.join(path, SANDBOXES)) as entries:
            return any(entry.name.endswith(".json") for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False
