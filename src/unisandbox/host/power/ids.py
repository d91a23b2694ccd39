"""Which ids this process may have in a user namespace of its own.

An ordinary user has those that /etc/subuid and /etc/subgid give him, or his own only; root of a container, whose power
is small, those that he has already. Source: subuid(5), newuidmap(1), user_namespaces(7).
"""

from __future__ import annotations

import os
import stat

from unisandbox.host import subordinate
from unisandbox.host.power import standing
from unisandbox.host.power.remedies import Obstacle
from unisandbox.host.subordinate import IDS, KINDS, RESERVED, Rows, count

LEAST_IDS = 1001 + RESERVED
"""Fewer would not do: a sandbox has a user 1000."""

_FIRST_FREE = 100_000  # SUB_UID_MIN and SUB_GID_MIN, login.defs(5)


def maps() -> tuple[Rows, Rows]:
    """The user map and the group map that this user may have: he is 0, and what is subordinate to him follows."""
    if os.geteuid() == 0:
        return _own_rows("uid"), _own_rows("gid")
    if scarcity():
        return [[0, os.geteuid(), 1]], [[0, os.getegid(), 1]]
    return _ranges()


def scarcity() -> Obstacle | None:
    """Why this user has no id there but his own, and what gives him a range; None where he has one."""
    if os.geteuid() == 0:
        return None  # he maps those that he has
    programs = [subordinate.program(name) for name in subordinate.PROGRAMS]
    if not all(programs):
        return Obstacle("newuidmap and newgidmap are not installed", "apt install uidmap")
    if powerless := [path for path in programs if not _has_power(path)]:
        # Copies of a system without extended attributes, as in images, lose their capabilities.
        return Obstacle(
            f"{powerless[0]} is not set-uid and has no capabilities, or may not use them where it is (nosuid)",
            f"chmod u+s {' '.join(powerless)}",
        )
    if standing.gains_nothing():
        return Obstacle(
            "this process may gain no privileges (no_new_privs), so newuidmap cannot map ids",
            "Start it without that (systemd: NoNewPrivileges=no; Docker, podman: without --security-opt"
            " no-new-privileges; Kubernetes: allowPrivilegeEscalation: true), or run as root.",
        )
    for what, rows in zip(KINDS, _ranges(), strict=True):
        if count(rows) < LEAST_IDS:
            return Obstacle(
                f"this user has {count(rows) - 1} subordinate {what}s, {LEAST_IDS - 1} are needed (/etc/sub{what})",
                f"usermod --add-subuids {_free()} --add-subgids {_free()} {_name()}",
            )
        if not _are_here(what, rows):
            return Obstacle(
                f"the subordinate {what}s of this user (/etc/sub{what}) are not in the user namespace of this process",
                f"Give that namespace more ids where it is made, or this user some that it has (/etc/sub{what}).",
            )
    return None


def shortage() -> Obstacle | None:
    """Why the ids that root has where he is are too few for sandboxes."""
    for kind, rows in zip(KINDS, maps(), strict=True):
        if count(rows) < LEAST_IDS:
            return Obstacle(
                f"this user namespace has {count(rows)} {kind}s, {LEAST_IDS} are needed",
                f"Give it more of them where it is made (podman: subordinate ids of the user, /etc/sub{kind}; unshare:"
                " --map-auto).",
            )
    return None


def ids_below() -> int:
    """How many ids, from 0 on, a namespace below the one of this process has."""
    maps = [[_numbers(line) for line in standing.read(f"/proc/self/{kind}_map").splitlines()] for kind in KINDS]
    return min(count(subordinate.below(rows)) for rows in maps)


def _ranges() -> tuple[Rows, Rows]:
    return _rows("/etc/subuid", os.geteuid()), _rows("/etc/subgid", os.getegid())


def _own_rows(kind: str) -> Rows:
    """As many of the ids that this process has as are needed, from 0 on and without a gap, each as itself.

    In the rows in which they are here: the kernel takes none that spans two. Source: map_id_range_down.
    """
    rows: Rows = []
    for first, _, many in sorted(map(_numbers, standing.read(f"/proc/self/{kind}_map").splitlines())):
        there = count(rows)
        wanted = min(many, IDS + RESERVED - there)
        if first == there and wanted > 0:
            rows.append([first, first, wanted])
    return rows


def _numbers(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def _rows(path: str, own: int) -> Rows:
    rows, names = [[0, own, 1]], {str(os.geteuid()), _name()}
    for line in standing.read(path).splitlines():
        owner, _, rest = line.partition(":")
        first, _, many = rest.partition(":")
        if owner in names and first.isdecimal() and many.isdecimal():
            there = count(rows)
            wanted = min(int(many), IDS + RESERVED - there)
            if wanted > 0:
                rows.append([there, int(first), wanted])
    return rows


def _free() -> str:
    """A range that is given to nobody in either file: usermod takes any, and two users must not have the same ids."""
    first = _FIRST_FREE
    for kind in KINDS:
        for line in standing.read(f"/etc/sub{kind}").splitlines():
            _, start, many = [*line.split(":"), "", ""][:3]
            if start.isdecimal() and many.isdecimal():
                first = max(first, int(start) + int(many))
    return f"{first}-{first + IDS - 1}"


def _name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _has_power(path: str) -> bool:
    """Whether a program may do more than its user. Source: execve(2); xattr(7), security.capability."""
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return False
    if os.stat(path).st_mode & stat.S_ISUID:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def _are_here(kind: str, rows: Rows) -> bool:
    """Whether ids that are to be mapped are ids of this process's own user namespace, each range in one piece."""
    pieces = [[int(word) for word in line.split()] for line in standing.read(f"/proc/self/{kind}_map").splitlines()]
    return all(
        any(here <= first and first + many <= here + size for here, _, size in pieces) for _, first, many in rows
    )
