"""A user namespace for who has not the power of the host's root, with the ids that he may have in it.

An ordinary user has those that /etc/subuid and /etc/subgid give him, or his own only; root of a container, whose power
is small, those that he has already. Standard library only: the keeper, which goes into it, imports this module too.
Whoever makes it is root of it, so he may make mounts and further namespaces there; the host gives him no more power
over anything than he has. Source: user_namespaces(7), capabilities(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import errno
import os
import stat

from unisandbox.host import syscalls

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Rows = list[list[int]]
"""Of an id map: first id inside, first id outside, count."""

IDS = 65536
"""So many are for namespaces below: every image may use 0 to 65535."""

RESERVED = 1
"""So many, the last ones, are in no namespace below, where there are more than the user's own."""

LEAST_IDS = 1001 + RESERVED
"""Fewer would not do: a sandbox has a user 1000."""

# What root needs to do all that is done as root: mounts and namespaces, what belongs to processes of other ids, the
# loopback of a network namespace, and files and ids of others. By their numbers.
# Source: include/uapi/linux/capability.h.
_POWER = {
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_PTRACE": 19,
    "CAP_NET_ADMIN": 12,
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_SYS_CHROOT": 18,
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,
}
# Many a newuidmap stays root when it writes the map of a user's namespace, where root of a container has no power. With
# capabilities of its file it is the user, whose namespace it is. Source: map_write() in kernel/user_namespace.c.
_FILE_CAPABILITIES = (
    b" (without CAP_SYS_ADMIN, as in a container, they need capabilities of their files in the place of the set-user-id"
    b" bit: setcap cap_setuid=ep newuidmap; setcap cap_setgid=ep newgidmap. Or be root in the container.)"
)
_NAMED = 3  # so many of those that are missing say enough
# Who has these maps ids without a program that does it for him: all that he has himself, 0 among them.
_MAPPING = ("CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP")
_KINDS = ("uid", "gid")
_FIRST_FREE = 100_000  # SUB_UID_MIN and SUB_GID_MIN, login.defs(5)
_PROGRAMS = ("newuidmap", "newgidmap")
# A user's PATH must not choose what is run.
_DIRECTORIES = ("/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin", "/run/wrappers/bin")
_MAX = "/proc/sys/user/max_user_namespaces"
_SWITCH = "/proc/sys/kernel/unprivileged_userns_clone"
_APPARMOR = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"


class NotMappedError(OSError):
    """The process is in a user namespace that has no ids."""


def is_needed() -> bool:
    """Whether this process has not all the power of the host's root, so that its keeper needs such a namespace."""
    return bool(lacking())


def lacking() -> str:
    """What this process is instead of the host's root, or root without; empty when it has all that is needed."""
    if os.geteuid() != 0:
        return "not root"
    if is_inside():
        return "root of a user namespace only"
    if missing := _without(_POWER):
        more = len(missing) - _NAMED
        return f"root without {', '.join(missing[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
    from unisandbox.host import confinement  # the keeper has no use for it

    return "root that may write no cgroup" if confinement.no_cgroup_is_given() else ""


def may_mount() -> bool:
    """Whether this process may mount where it is."""
    return not _without(("CAP_SYS_ADMIN",))


def unmapped_without() -> list[str]:
    """The capabilities without which root can map no ids, if he is without any."""
    return [] if os.geteuid() else _without(_MAPPING)


def _without(names: Iterable[str], of: str = "CapEff") -> list[str]:
    words = _read("/proc/self/status").partition(f"\n{of}:")[2].split(maxsplit=1)
    mask = int(words[0], 16) if words else 0
    return [name for name in names if not mask >> _POWER[name] & 1]


def obstacle() -> tuple[str, str]:
    """What keeps this user from any such namespace, and the remedy; empty when nothing that is seen does."""
    limit = _read(_MAX)
    if not limit:
        return "this kernel has no user namespaces", "Use a kernel with CONFIG_USER_NS, or run it as root."
    if limit == "0":
        return "user namespaces are off (user.max_user_namespaces is 0)", "sysctl -w user.max_user_namespaces=15000"
    if _read(_SWITCH) == "0" and not may_mount():
        return (
            "only root may make user namespaces (kernel.unprivileged_userns_clone is 0)",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        )
    if _read(_APPARMOR) == "1" and _read("/proc/self/attr/current") in {"", "unconfined"}:
        return (
            "AppArmor leaves nothing to user namespaces of ordinary programs"
            " (kernel.apparmor_restrict_unprivileged_userns is 1)",
            "Give this Python an AppArmor profile with the rule 'userns,', or"
            " sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        )
    return _obstacle_of_root() if os.geteuid() == 0 else ("", "")


def scarcity() -> tuple[str, str]:
    """Why this user has no id there but his own, and what gives him a range; two empty strings where he has one."""
    if os.geteuid() == 0:
        return "", ""  # he maps those that he has
    programs = [_program(name) for name in _PROGRAMS]
    if not all(programs):
        return "newuidmap and newgidmap are not installed", "apt install uidmap"
    if powerless := [path for path in programs if not _has_power(path)]:
        # Copies of a system without extended attributes, as in images, lose their capabilities.
        return f"{powerless[0]} is not set-uid and has no capabilities, or may not use them where it is (nosuid)", (
            f"chmod u+s {' '.join(powerless)}"
        )
    if "\nNoNewPrivs:\t1\n" in _read("/proc/self/status"):
        return (
            "this process may gain no privileges (no_new_privs), so newuidmap cannot map ids",
            "Start it without that (systemd: NoNewPrivileges=no; Docker, podman: without --security-opt"
            " no-new-privileges; Kubernetes: allowPrivilegeEscalation: true), or run as root.",
        )
    for what, rows in zip(_KINDS, _ranges(), strict=True):
        if count(rows) < LEAST_IDS:
            return (
                f"this user has {count(rows) - 1} subordinate {what}s, {LEAST_IDS - 1} are needed (/etc/sub{what})",
                f"usermod --add-subuids {_free()} --add-subgids {_free()} {_name()}",
            )
        if not _are_here(what, rows):
            return (
                f"the subordinate {what}s of this user (/etc/sub{what}) are not in the user namespace of this process",
                f"Give that namespace more ids where it is made, or this user some that it has (/etc/sub{what}).",
            )
    return "", ""


def _obstacle_of_root() -> tuple[str, str]:
    if missing := unmapped_without():
        return f"without {', '.join(missing)} no ids can be mapped", f"Add {', '.join(missing)}."
    for kind, rows in zip(_KINDS, maps(), strict=True):
        if count(rows) < LEAST_IDS:
            return (
                f"this user namespace has {count(rows)} {kind}s, {LEAST_IDS} are needed",
                f"Give it more of them where it is made (podman: subordinate ids of the user, /etc/sub{kind}; unshare:"
                " --map-auto).",
            )
    return "", ""


def is_inside() -> bool:
    """Whether this process is in a user namespace that is not the host's: its map is another one than all to itself."""
    return _read("/proc/self/uid_map").split() != ["0", "0", "4294967295"]


def maps() -> tuple[Rows, Rows]:
    """The user map and the group map that this user may have: he is 0, and what is subordinate to him follows."""
    if os.geteuid() == 0:
        return _own_rows("uid"), _own_rows("gid")
    if scarcity()[0]:
        return [[0, os.geteuid(), 1]], [[0, os.getegid(), 1]]
    return _ranges()


def count(rows: Rows) -> int:
    """How many ids are mapped."""
    return sum(row[2] for row in rows)


def are_single(both: Sequence[Rows]) -> bool:
    """Whether these maps have the user's own id only: whatever is in such a namespace is his, and root's."""
    return min(map(count, both)) == 1


def below(rows: Rows) -> Rows:
    """The map of a namespace below that has the same ids as the one with this map, but for those that are reserved."""
    left = max(count(rows) - RESERVED, 1)
    return [[first, first, min(many, left - first)] for first, _, many in rows if first < left]


def ids_below() -> int:
    """How many ids, from 0 on, a namespace below the one of this process has."""
    maps = [[_numbers(line) for line in _read(f"/proc/self/{kind}_map").splitlines()] for kind in _KINDS]
    return min(count(below(rows)) for rows in maps)


def reserved(rows: Rows) -> int:
    """An id that no namespace below has. What belongs to it is nobody's there, not even for their root.

    There is none where the user has but one.
    """
    return count(rows) - RESERVED


def _ranges() -> tuple[Rows, Rows]:
    return _rows("/etc/subuid", os.geteuid()), _rows("/etc/subgid", os.getegid())


def _own_rows(kind: str) -> Rows:
    """As many of the ids that this process has as are needed, from 0 on and without a gap, each as itself.

    In the rows in which they are here: the kernel takes none that spans two. Source: map_id_range_down.
    """
    rows: Rows = []
    for first, _, many in sorted(map(_numbers, _read(f"/proc/self/{kind}_map").splitlines())):
        there = count(rows)
        wanted = min(many, IDS + RESERVED - there)
        if first == there and wanted > 0:
            rows.append([first, first, wanted])
    return rows


def _numbers(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def _rows(path: str, own: int) -> Rows:
    rows, names = [[0, own, 1]], {str(os.geteuid()), _name()}
    for line in _read(path).splitlines():
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
    for kind in _KINDS:
        for line in _read(f"/etc/sub{kind}").splitlines():
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


def enter(uids: Rows, gids: Rows) -> None:
    """Make such a namespace and enter it; the calling process has one thread.

    The maps are written by newuidmap and newgidmap, which the user may use for a process of his own: by a child that
    stays outside. Those of his own id alone the process writes itself.

    Raises:
        NotMappedError: the ids are refused, and the process is of no use any more.
        OSError: the kernel refuses; nothing has changed.
    """
    if are_single((uids, gids)):
        _enter_alone(uids, gids)
    else:
        _enter_ranges(uids, gids)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _enter_alone(uids: Rows, gids: Rows) -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    # Nobody may map his group before he has given up changing his further ones: a file may forbid it something. So they
    # stay, here and in all namespaces below. Source: user_namespaces(7), "The /proc/pid/setgroups file".
    said = (
        ("setgroups", "deny"),
        *((f"{kind}_map", " ".join(map(str, *rows))) for kind, rows in zip(_KINDS, (uids, gids), strict=True)),
    )
    for name, content in said:
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
        except OSError as error:
            raise NotMappedError(error.errno, f"the kernel does not map the user's own id: {error.strerror}") from error


def groups_stay() -> bool:
    """Whether processes of this user namespace, and of those below, may not leave their groups: see `_enter_alone`."""
    return _read("/proc/self/setgroups") == "deny"


def _enter_ranges(uids: Rows, gids: Rows) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    words = os.memfd_create("unisandbox-words", os.MFD_CLOEXEC)
    target = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(writing)
            if os.read(reading, 1) and _write_maps(target, (uids, gids), words):
                code = 0
        finally:
            os._exit(code)
    os.close(reading)
    try:
        _enter(writing, child, words)
    finally:
        os.close(words)


def _enter(writing: int, child: int, words: int) -> None:
    try:
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(writing, b"\0")
        finally:
            os.close(writing)
    except BaseException:
        os.waitpid(child, 0)
        raise
    if os.waitpid(child, 0)[1]:
        said = " ".join(os.pread(words, 1000, 0).decode("utf-8", "replace").split())
        raise NotMappedError(errno.EACCES, f"no ids were mapped: {said or 'newuidmap or newgidmap does not say why'}")
    # The groups of the user are nobody's in there.
    os.setgroups([])


def _write_maps(target: int, both: Sequence[Rows], words: int) -> bool:
    if os.geteuid() == 0:
        return _write_own_maps(target, both, words)
    for name, rows in zip(_PROGRAMS, both, strict=True):
        numbers = [str(number) for row in rows for number in row]
        program = _program(name)
        said = [(os.POSIX_SPAWN_DUP2, words, 2)]
        pid = os.posix_spawn(program, [program, str(target), *numbers], {}, file_actions=said)
        if os.waitpid(pid, 0)[1]:
            if _without(("CAP_SYS_ADMIN",), "CapBnd"):
                os.write(words, _FILE_CAPABILITIES)
            return False
    return True


def _write_own_maps(target: int, both: Sequence[Rows], words: int) -> bool:
    for kind, rows in zip(_KINDS, both, strict=True):
        path = f"/proc/{target}/{kind}_map"
        try:
            with open(path, "wb", buffering=0) as file:
                file.write("".join(f"{inside} {outside} {many}\n" for inside, outside, many in rows).encode())
        except OSError as error:
            os.write(words, f"{path}: {error.strerror}".encode())
            return False
    return True


def _program(name: str) -> str:
    return next((path for path in (f"{d}/{name}" for d in _DIRECTORIES) if os.access(path, os.X_OK)), "")


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
    pieces = [[int(word) for word in line.split()] for line in _read(f"/proc/self/{kind}_map").splitlines()]
    return all(
        any(here <= first and first + many <= here + size for here, _, size in pieces) for _, first, many in rows
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip() if path != "/proc/self/status" else file.read()
    except OSError:
        return ""
