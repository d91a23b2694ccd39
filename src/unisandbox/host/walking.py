"""Looking a path up inside a root directory with the rights of whoever is inside, without ever leaving it.

The kernel's own walk is quicker and comes first. Where its ids are not enough, a path is walked one part at a time: the
thread's capabilities would count for every directory on the way, and those of an identity count for some only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from unisandbox.host import syscalls
from unisandbox.host.identity import Identity

_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
# openat2 answers EAGAIN when anything on the host was renamed or mounted while it followed a ".."; source: openat2(2).
_ATTEMPTS: Final = 1000
# Those of the kernel; source: path_resolution(7).
_LINKS: Final = 40
# Levels that may be entered, a descriptor each, and parts that are looked up: a hostile path has thousands of them.
_LEVELS: Final = 128
_PARTS: Final = 4096
_ST_NOSYMFOLLOW: Final = 0x2000  # source: include/linux/statfs.h
_NONE: Final[Mapping[tuple[int, int], int]] = MappingProxyType({})


def open_inside(
    root: int, path: str, flags: int, identity: Identity, places: Mapping[tuple[int, int], int] = _NONE
) -> int:
    """Open a path as the identity whose root directory this is would, with its rights. Raises OSError.

    Args:
        root: descriptor of the root directory.
        path: links in it are followed.
        flags: O_PATH, O_DIRECTORY, O_NOFOLLOW; what is read must be a directory, or be looked at first.
        identity: who opens it.
        places: descriptors of directories that are seen in the place of others, by the device and inode of those.
    """
    if not places:
        with contextlib.suppress(PermissionError), identity.bare():
            return _resolved(root, path, flags)
    probe = _walk(root, path, identity, places, follow=not flags & os.O_NOFOLLOW)
    try:
        if not flags & os.O_PATH:
            return identity.reopen(probe, flags)
        if flags & os.O_DIRECTORY and not stat.S_ISDIR(os.fstat(probe).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return os.dup(probe)
    finally:
        os.close(probe)


def _resolved(root: int, path: str, flags: int) -> int:
    for _ in range(_ATTEMPTS):
        try:
            return syscalls.openat2(root, path, flags, resolve=_INSIDE)
        except BlockingIOError:
            continue
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def _walk(root: int, path: str, identity: Identity, places: Mapping[tuple[int, int], int], *, follow: bool) -> int:
    """An O_PATH descriptor of what `path` names below `root`; no link and no ".." leads out.

    Args:
        root: descriptor of the root directory.
        path: of any form.
        identity: who walks.
        places: see `open_inside`.
        follow: also a link in the last place.

    Raises:
        OSError: what the kernel says; ELOOP also for a path of too many parts or levels.
    """
    way = [os.dup(root)]
    parts = deque(_parts(path))
    links = 0
    try:
        for _ in range(_PARTS):
            if not parts:
                return way.pop()
            part = parts.popleft()
            with identity.over(way[-1]):
                fd = syscalls.openat2(way[-1], "." if part == ".." else part, os.O_PATH | os.O_NOFOLLOW)
            if part in {".", ".."}:
                os.close(fd)
                if part == ".." and len(way) > 1:
                    os.close(way.pop())
                continue
            way.append(fd)
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in places:
                way[-1] = os.dup(places[status.st_dev, status.st_ino])
                os.close(fd)
            elif stat.S_ISLNK(status.st_mode) and (parts or follow):
                links += 1
                target = _followed(way[-2], fd, identity)
                os.close(way.pop())
                if target.startswith("/"):
                    while len(way) > 1:
                        os.close(way.pop())
                parts.extendleft(reversed(_parts(target)))
            if links > _LINKS or len(way) > _LEVELS:
                break
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    finally:
        for fd in way:
            os.close(fd)


def _parts(path: str) -> list[str]:
    """What is between the slashes; one at the end says that it is a directory."""
    parts = [part for part in path.split("/") if part]
    return [*parts, "."] if path.endswith("/") else parts


def _followed(directory: int, link: int, identity: Identity) -> str:
    """Where a link leads to, if it may be followed."""
    if os.fstatvfs(link).f_flag & _ST_NOSYMFOLLOW:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    place, owner = os.fstat(directory), os.fstat(link).st_uid
    # As with fs.protected_symlinks=1, which is usual: in a directory like /tmp no stranger's link; source: proc(5).
    shared = stat.S_ISVTX | stat.S_IWOTH
    mine = identity.owner
    if place.st_mode & shared == shared and owner != place.st_uid and mine is not None and owner != mine[0]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return os.readlink("", dir_fd=link)
