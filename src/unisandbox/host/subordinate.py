"""A user namespace for who has not the power of the host's root, with the ids that he may have in it (`power.ids`).

Standard library only: the keeper, which goes into it, imports this module too. Whoever makes it is root of it, so he
may make mounts and further namespaces there; the host gives him no more power over anything than he has.
Source: user_namespaces(7), capabilities(7), newuidmap(1).
"""

from __future__ import annotations

import errno
import os

from unisandbox.host import syscalls
from unisandbox.host.power import standing

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Sequence

Rows = list[list[int]]
"""Of an id map: first id inside, first id outside, count."""

IDS = 65536
"""So many are for namespaces below: every image may use 0 to 65535."""

KINDS = ("uid", "gid")
"""Each has a map of its own."""

PROGRAMS = ("newuidmap", "newgidmap")
"""What writes the maps of an ordinary user, by these kinds."""

RESERVED = 1
"""So many, the last ones, are in no namespace below, where there are more than the user's own."""

# Many a newuidmap stays root when it writes the map of a user's namespace, where root of a container has no power. With
# capabilities of its file it is the user, whose namespace it is. Source: map_write() in kernel/user_namespace.c.
_FILE_CAPABILITIES = (
    b" (without CAP_SYS_ADMIN, as in a container, they need capabilities of their files in the place of the set-user-id"
    b" bit: setcap cap_setuid=ep newuidmap; setcap cap_setgid=ep newgidmap. Or be root in the container.)"
)
# A user's PATH must not choose what is run.
_DIRECTORIES = ("/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin", "/run/wrappers/bin")


class NotMappedError(OSError):
    """The process is in a user namespace that has no ids."""


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


def reserved(rows: Rows) -> int:
    """An id that no namespace below has. What belongs to it is nobody's there, not even for their root.

    There is none where the user has but one.
    """
    return count(rows) - RESERVED


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
        *((f"{kind}_map", " ".join(map(str, *rows))) for kind, rows in zip(KINDS, (uids, gids), strict=True)),
    )
    for name, content in said:
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
        except OSError as error:
            raise NotMappedError(error.errno, f"the kernel does not map the user's own id: {error.strerror}") from error


def groups_stay() -> bool:
    """Whether processes of this user namespace, and of those below, may not leave their groups: see `_enter_alone`."""
    return standing.read("/proc/self/setgroups") == "deny"


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
    for name, rows in zip(PROGRAMS, both, strict=True):
        numbers = [str(number) for row in rows for number in row]
        path = program(name)
        said = [(os.POSIX_SPAWN_DUP2, words, 2)]
        pid = os.posix_spawn(path, [path, str(target), *numbers], {}, file_actions=said)
        if os.waitpid(pid, 0)[1]:
            if standing.without(("CAP_SYS_ADMIN",), "CapBnd"):
                os.write(words, _FILE_CAPABILITIES)
            return False
    return True


def _write_own_maps(target: int, both: Sequence[Rows], words: int) -> bool:
    for kind, rows in zip(KINDS, both, strict=True):
        path = f"/proc/{target}/{kind}_map"
        try:
            with open(path, "wb", buffering=0) as file:
                file.write("".join(f"{inside} {outside} {many}\n" for inside, outside, many in rows).encode())
        except OSError as error:
            os.write(words, f"{path}: {error.strerror}".encode())
            return False
    return True


def program(name: str) -> str:
    """The path of one of `PROGRAMS`; empty where it is not installed."""
    return next((path for path in (f"{d}/{name}" for d in _DIRECTORIES) if os.access(path, os.X_OK)), "")
