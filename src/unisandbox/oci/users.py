"""Users and groups of a container, looked up in its own /etc/passwd and /etc/group, from outside."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Final, NamedTuple

from unisandbox.api import InvalidArgumentError
from unisandbox.host import walking
from unisandbox.host.identity import Identity

FILE_OF_USERS: Final = "/etc/passwd"
FILE_OF_GROUPS: Final = "/etc/group"
# A root file system may be hostile: its files are read only so far.
_LARGEST_FILE: Final = 1 << 20
_LARGEST_ID: Final = 0xFFFF_FFFE


class Credentials(NamedTuple):
    """Who a process is inside.

    Attributes:
        uid, gid: numbers inside.
        groups: supplementary groups.
        home: the home directory.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/root"


ROOT: Final = Credentials()
"""Who a process is when no user is asked for, whatever the container's files say."""


class Inside(NamedTuple):
    """A container's root directory, and whoever is root there: with his rights its files are read."""

    fd: int
    identity: Identity


class Copied(NamedTuple):
    """What was read of a container's files by somebody else, where this process may not look at them."""

    files: Mapping[str, bytes | None]


def resolve_user(root: Inside | Copied, user: str, *, largest_id: int) -> Credentials:
    """Turn "name", "uid", "name:group" into numbers. Source: OCI image-spec config.md, `User`.

    Args:
        root: the container's.
        user: as users write it.
        largest_id: the last id that the container's user namespace maps.

    Raises:
        InvalidArgumentError: a name is not in the container's files, or a number is not mapped.
    """
    name, _, group = user.partition(":")
    entry = _passwd_entry(root, name)
    if entry is not None:
        uid, gid, home, login = entry
    elif name.isdecimal():
        uid, gid, home, login = int(name), 0, "/", None
    else:
        raise InvalidArgumentError(
            f"user {name!r} is not in the container's /etc/passwd", hint="Use a user of the container, or a number."
        )
    groups: tuple[int, ...] = ()
    if group:
        gid = _group_id(root, group)
    elif login is not None:
        groups = tuple(number for number, members in _groups(root).values() if login in members)
    for number in (uid, gid, *groups):
        if number > largest_id:
            raise InvalidArgumentError(f"user {user!r}: id {number} is above {largest_id}, the last that is mapped")
    return Credentials(uid, gid, groups, home)


def _passwd_entry(root: Inside | Copied, name: str) -> tuple[int, int, str, str] | None:
    for line in _lines(root, FILE_OF_USERS):
        fields = line.split(":")
        if len(fields) < 6 or not (_is_id(fields[2]) and _is_id(fields[3])):
            continue
        if name in (fields[0], fields[2]):
            return int(fields[2]), int(fields[3]), fields[5] or "/", fields[0]
    return None


def _group_id(root: Inside | Copied, group: str) -> int:
    known = _groups(root)
    if group in known:
        return known[group][0]
    if group.isdecimal():
        return int(group)
    raise InvalidArgumentError(
        f"group {group!r} is not in the container's /etc/group", hint="Use a group of the container, or a number."
    )


def _groups(root: Inside | Copied) -> dict[str, tuple[int, list[str]]]:
    groups: dict[str, tuple[int, list[str]]] = {}
    for line in _lines(root, FILE_OF_GROUPS):
        fields = line.split(":")
        if len(fields) >= 4 and _is_id(fields[2]):
            groups[fields[0]] = (int(fields[2]), fields[3].split(","))
    return groups


def _is_id(text: str) -> bool:
    return text.isdecimal() and int(text) <= _LARGEST_ID


def _lines(root: Inside | Copied, path: str) -> list[str]:
    """The lines of a small regular file below a root; none where there is no such file."""
    content = root.files.get(path) if isinstance(root, Copied) else beginning(root, path, _LARGEST_FILE)
    return (content or b"").decode("utf-8", "replace").splitlines()


def beginning(root: Inside, path: str, most: int) -> bytes | None:
    """The first bytes of a regular file below a root, at most so many; None where there is no such file."""
    try:
        with root.identity.bare():
            probe = walking.open_inside(root.fd, path, os.O_PATH, root.identity)
            try:
                # What is opened is what was looked at: no device, and no FIFO, whose writer would see it.
                if not stat.S_ISREG(os.fstat(probe).st_mode):
                    return None
                fd = root.identity.reopen(probe, 0)
            finally:
                os.close(probe)
    except OSError:
        return None
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)
