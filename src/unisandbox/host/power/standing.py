"""What this process is and has: its user, capabilities, user namespace, filters, and kernel.

Each fact is read here and nowhere else. Standard library only: the keeper imports this module too.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os

from unisandbox.host import syscalls

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterable

# Source: include/uapi/linux/capability.h.
_NUMBERS = {
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
    "CAP_SYS_RESOURCE": 24,
}
# What root needs to do all that is done as root: mounts and namespaces, what belongs to processes of other ids, the
# loopback of a network namespace, and files and ids of others.
_POWER = [name for name in _NUMBERS if name != "CAP_SYS_RESOURCE"]
_NAMED = 3  # so many of those that are missing say enough
# Who has these maps ids without a program that does it for him: all that he has himself, 0 among them.
_MAPPING = ("CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP")
# Refused by a filter of system calls, and by no argument.
FILTERED = frozenset({errno.EPERM, errno.ENOSYS})


def lacking() -> str:
    """What this process is instead of the host's root, or root without; empty when it has all that is needed.

    Where it lacks something, its keeper needs a user namespace of its own.
    """
    if os.geteuid() != 0:
        return "not root"
    if is_inside():
        return "root of a user namespace only"
    if missing := without(_POWER):
        more = len(missing) - _NAMED
        return f"root without {', '.join(missing[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
    return "root that may write no cgroup" if no_cgroup_is_given() else ""


def is_inside() -> bool:
    """Whether this process is in a user namespace that is not the host's: its map is another one than all to itself."""
    return read("/proc/self/uid_map").split() != ["0", "0", "4294967295"]


def may_mount() -> bool:
    """Whether this process may mount where it is."""
    return not without(("CAP_SYS_ADMIN",))


def unmapped_without() -> list[str]:
    """The capabilities without which root can map no ids, if he is without any."""
    return [] if os.geteuid() else without(_MAPPING)


def without(names: Iterable[str], of: str = "CapEff") -> list[str]:
    """Which of these capabilities this process has not in a set of its own."""
    mask = int(_status(of) or "0", 16)
    return [name for name in names if not mask >> _NUMBERS[name] & 1]


def gains_nothing() -> bool:
    """Whether no program that it starts may have more power than itself (no_new_privs)."""
    return _status("NoNewPrivs") == "1"


def is_filtered() -> bool:
    """Whether any filter of system calls is over this process, whatever it forbids. Source: proc_pid_status(5)."""
    return _status("Seccomp") == "2"


def label() -> str:
    """What a security module (AppArmor, SELinux) calls this process; empty where none confines it."""
    found = read("/proc/self/attr/current")
    return "" if found in {"unconfined", "kernel"} else found


def user_namespaces() -> int:
    """How many user namespaces a user may have; -1 where the kernel has none."""
    limit = read("/proc/sys/user/max_user_namespaces")
    return int(limit) if limit else -1


@functools.cache
def denies_keyrings() -> bool:
    """Whether a filter keeps keyrings from this process, and so from all that it starts. Looked at once."""
    try:
        syscalls.session_keyring()
    except OSError as error:
        return error.errno in FILTERED
    return False


@functools.cache
def no_cgroup_is_given() -> bool:
    """Whether the file systems of cgroups are mounted, and all of them read-only. Looked at once."""
    found = [fields[5].split(",") for fields in mounts() if kind_of(fields) in {"cgroup", "cgroup2"}]
    return bool(found) and all("ro" in options for options in found)


def mounts() -> list[list[str]]:
    """The fields of every line of mountinfo. Source: proc_pid_mountinfo(5)."""
    return [line.split(" ") for line in read("/proc/self/mountinfo").splitlines()]


def kind_of(fields: list[str]) -> str:
    """Of which kind the file system is that such a line is about."""
    return fields[fields.index("-") + 1]


def kernel(release: str = "") -> tuple[int, int]:
    """The version of a kernel: of this one, or as another says it."""
    major, minor = (release or os.uname().release).split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)) or 0)


def read(path: str) -> str:
    """The contents of a small file of the kernel's, or of /etc; empty where it is not."""
    try:
        # Without the layers of a text file, which take longer than the rest.
        with open(path, "rb", buffering=0) as file:
            return file.readall().decode("utf-8", "surrogateescape").strip("\0 \n")
    except OSError:
        return ""


def _status(name: str) -> str:
    words = f"\n{read('/proc/self/status')}".partition(f"\n{name}:")[2].split(maxsplit=1)
    return words[0] if words else ""
