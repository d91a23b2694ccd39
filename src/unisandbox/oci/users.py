"""Users and groups of a container, looked up in its own /etc/passwd and /etc/group, from outside."""

from __future__ import annotations

import os
import stat
from typing import Final, NamedTuple

from unisandbox.api import InvalidArgumentError
from unisandbox.host import syscalls

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


def resolve_user(root_fd: int, user: str, *, largest_id: int) -> Credentials:
    """Turn "name", "uid", "name:group" into numbers. Source: OCI image-spec config.md, `User`.

    Args:
        root_fd: the container's root directory.
        user: as users write it.
        largest_id: the last id that the container's user namespace maps.

    Raises:
        InvalidArgumentError: a name is not in the container's files, or a number is not mapped.
    """
    name, _, group = user.partition(":")
    entry = _passwd_entry(root_fd, name)
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
        gid = _group_id(root_fd, group)
    elif login is not None:
        groups = tuple(number for number, members in _groups(root_fd).values() if login in members)
    for number in (uid, gid, *groups):
        if number > largest_id:
            raise InvalidArgumentError(f"user {user!r}: id {number} is above {largest_id}, the last that is mapped")
    return Credentials(uid, gid, groups, home)


def _passwd_entry(root_fd: int, name: str) -> tuple[int, int, str, str] | None:
    for line in _lines(root_fd, "/etc/passwd"):
        fields = line.split(":")
        if len(fields) < 6 or not (_is_id(fields[2]) and _is_id(fields[3])):
            continue
        if name in (fields[0], fields[2]):
            return int(fields[2]), int(fields[3]), fields[5] or "/", fields[0]
    return None


def _group_id(root_fd: int, group: str) -> int:
    known = _groups(root_fd)
    if group in known:
        return known[group][0]
    if group.isdecimal():
        return int(group)
    raise InvalidArgumentError(
        f"group {group!r} is not in the container's /etc/group", hint="Use a group of the container, or a number."
    )


def _groups(root_fd: int) -> dict[str, tuple[int, list[str]]]:
    groups: dict[str, tuple[int, list[str]]] = {}
    for line in _lines(root_fd, "/etc/group"):
        fields = line.split(":")
        if len(fields) >= 4 and _is_id(fields[2]):
            groups[fields[0]] = (int(fields[2]), fields[3].split(","))
    return groups


def _is_id(text: str) -> bool:
    return text.isdecimal() and int(text) <= _LARGEST_ID


def _lines(root_fd: int, path: str) -> list[str]:
    """The lines of a small regular file below `root_fd`; none where there is no such file."""
    try:
        fd = syscalls.openat2(
            root_fd,
            path,
            os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY,
            resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS,
        )
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        return os.read(fd, _LARGEST_FILE).decode("utf-8", "replace").splitlines()
    finally:
        os.close(fd)
