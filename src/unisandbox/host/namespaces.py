"""Namespaces without processes: made with a child that is ended at once, kept by descriptors. Standard library only.

Whoever enters a user namespace cannot come back. So one clone makes the user namespace and all that belong to it, with
a child that only sleeps (`syscalls.clone_paused`: no fork, which would double the time); the caller, who is root of the
parent, may visit the others one after the other to set them up, and returns.

One consequence of making them in one go, as bwrap and `unshare -rn` do: the kernel decides who owns /proc/net and
/sys/class/net/lo before the user namespace has its maps, so inside they belong to nobody. All may read them.
Source: user_namespaces(7), namespaces(7), ioctl_ns(2); fs/proc/proc_net.c, proc_net_ns_init().
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct

from unisandbox.host import syscalls

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Final

KINDS: Final = {
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "ipc": syscalls.CLONE_NEWIPC,
    "mnt": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "pid": syscalls.CLONE_NEWPID,
    "user": syscalls.CLONE_NEWUSER,
    "uts": syscalls.CLONE_NEWUTS,
}
"""The names of /proc/PID/ns and their clone flags."""

_MADE_HERE: Final = ("user", "net", "ipc", "uts")
_NAME_MAX: Final = 64  # __NEW_UTS_LEN
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

IdMap = list[tuple[int, int, int]]
"""Rows of (first id inside, first id outside, count)."""


def namespace_inode(where: int | str) -> int:
    """The inode number of a namespace, by file descriptor or path. Two namespaces are the same if these are equal."""
    return os.stat(where).st_ino


def kind_of(fd: int) -> str:
    """Which kind of namespace `fd` is: "net", "ipc", ...

    Raises:
        OSError: EINVAL: it is no namespace. (An ordinary file answers ENOTTY to the ioctl, and so might a device answer
            something else: so the file system is checked first.)
    """
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith(tuple(f"{kind}:[" for kind in KINDS)) and not _on_nsfs(fd):
            raise OSError(errno.ENOTTY, "no namespace file")
        flag = fcntl.ioctl(fd, syscalls.NS_GET_NSTYPE)
    except OSError as error:
        raise OSError(errno.EINVAL, f"file descriptor {fd} is no namespace: {error.strerror}") from None
    for kind, known in KINDS.items():
        if known == flag:
            return kind
    raise OSError(errno.EINVAL, f"file descriptor {fd} is a namespace of an unknown kind ({flag:#x})")


def _on_nsfs(fd: int) -> bool:
    """Whether `fd` lies on the kernel's namespace file system, also when bind-mounted, as ip-netns(8) does."""
    return os.fstat(fd).st_dev == os.stat("/proc/self/ns/net").st_dev


def owner_userns_inode(fd: int) -> int:
    """The inode number of the user namespace that owns the namespace `fd`.

    Raises:
        PermissionError: it lies outside the caller's own user namespace.
    """
    owner = owner_userns(fd)
    try:
        return namespace_inode(owner)
    finally:
        os.close(owner)


def owner_userns(fd: int) -> int:
    """A descriptor of the user namespace that owns the namespace `fd`; the caller closes it. Raises as above."""
    return fcntl.ioctl(fd, syscalls.NS_GET_USERNS)


def process_namespaces(pid: int) -> dict[str, int]:
    """The inode numbers of the namespaces that process `pid` is in, by kind.

    Raises:
        ProcessLookupError: there is no such process, or it has ended (a zombie is in no namespace).
    """
    try:
        return {kind: os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in KINDS}
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended: it is in no namespace") from None


def create(
    kinds: Sequence[str],
    *,
    uid_map: IdMap | None = None,
    gid_map: IdMap | None = None,
    hostname: str | None = None,
    domainname: str | None = None,
    sysctls: dict[str, str] | None = None,
    loopback: bool = True,
    leave_child: bool = False,
    user_fd: int | None = None,
) -> dict[str, int]:
    """Make namespaces; the caller stays in its own.

    Must be called in a process of one thread with CAP_SYS_ADMIN (it visits the new namespaces).

    Args:
        kinds: of "user", "net", "ipc", "uts". With "user" that one owns the others, without it the caller's own does.
        uid_map: the maps of the user namespace, which must hold id 0. So does `gid_map`.
        gid_map: see uid_map.
        hostname: at most 64 bytes; needs "uts".
        domainname: the NIS domain name, the same.
        sysctls: by name with dots, as for sysctl(8): net.*, and those of System V and POSIX queues. Which of them a
            sandbox may have is for the caller to know.
        loopback: bring `lo` up in a new network namespace.
        leave_child: leave a killed child to the caller to be reaped (waitpid): its end takes as long as all the rest.
        user_fd: a user namespace that shall own them, which is there already and must have these maps.

    Returns:
        Descriptors by kind, each verified to be another namespace than the caller's and rightly owned.

    Raises:
        ValueError: a kind that cannot be made so, or an option without the namespace it belongs to.
        OSError: ENOSPC: a limit in /proc/sys/user is reached; EPERM: the host forbids it; EINVAL: the kernel refuses a
            map, a sysctl's value, ... Nothing is left then.
    """
    sysctls = sysctls or {}
    _check_wishes(kinds, uid_map, gid_map, hostname, domainname, sysctls, is_given=user_fd is not None)
    flags = 0
    for kind in kinds:
        flags |= KINDS[kind]
    root = _outside_root(uid_map, gid_map) if uid_map and gid_map else (0, 0)
    fds: dict[str, int] = {}
    pid = _clone_as_root_of(flags, root) if user_fd is None else _fork_into(user_fd, flags)
    try:
        try:
            for name, rows in (("uid_map", uid_map), ("gid_map", gid_map)):
                if rows and user_fd is None:
                    _write(f"/proc/{pid}/{name}", _rows(rows))
                elif rows and _read_rows(f"/proc/{pid}/{name}") != rows:
                    raise OSError(errno.EINVAL, f"the {name} of the given user namespace is another one")
            for kind in kinds:
                fds[kind] = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.kill(pid, signal.SIGKILL)
        _verify(fds, user_fd)
        _set_up(fds, root, hostname, domainname, sysctls, loopback)
    except BaseException:
        for fd in fds.values():
            os.close(fd)
        os.waitpid(pid, 0)
        raise
    if not leave_child:
        os.waitpid(pid, 0)
    return fds


def _check_wishes(
    kinds: Sequence[str],
    uid_map: IdMap | None,
    gid_map: IdMap | None,
    hostname: str | None,
    domainname: str | None,
    sysctls: dict[str, str],
    *,
    is_given: bool,
) -> None:
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(_MADE_HERE):
        raise ValueError(f"kinds must be some of {', '.join(_MADE_HERE)}, each once, got {list(kinds)}")
    mapped = "user" in kinds or is_given
    if mapped != bool(uid_map) or mapped != bool(gid_map) or ("user" in kinds and is_given):
        raise ValueError("a user namespace needs a uid map and a gid map, and nothing else has them")
    if (hostname is not None or domainname is not None) and "uts" not in kinds:
        raise ValueError("a host or domain name needs a uts namespace of its own")
    for what, name in (("host", hostname), ("domain", domainname)):
        if name is not None and len(name.encode()) > _NAME_MAX:
            raise ValueError(f"a {what} name has at most {_NAME_MAX} bytes, got {name!r}")
    for name in sysctls:
        if _sysctl_kind(name) not in kinds:
            raise ValueError(f"sysctl {name} belongs to no namespace that is made here ({', '.join(kinds)})")


def _set_up(
    fds: dict[str, int],
    root: tuple[int, int],
    hostname: str | None,
    domainname: str | None,
    sysctls: dict[str, str],
    loopback: bool,
) -> None:
    visits: list[tuple[str, Callable[[], None]]] = []
    if hostname is not None or domainname is not None:

        def name() -> None:
            if hostname is not None:
                syscalls.sethostname(hostname)
            if domainname is not None:
                syscalls.setdomainname(domainname)

        visits.append(("uts", name))
    of_net = {name: value for name, value in sysctls.items() if _sysctl_kind(name) == "net"}
    if "net" in fds and (loopback or of_net):

        def connect() -> None:
            if loopback:
                _loopback_up()
            _write_sysctls(of_net, (0, 0))

        visits.append(("net", connect))
    if len(of_net) < len(sysctls):
        of_ipc = {name: value for name, value in sysctls.items() if name not in of_net}
        visits.append(("ipc", lambda: _write_sysctls(of_ipc, root)))
    _visit(fds, visits)


def _outside_root(uid_map: IdMap, gid_map: IdMap) -> tuple[int, int]:
    """The ids outside that are user and group 0 inside."""
    found = []
    for id_map in (uid_map, gid_map):
        rows = [outside for inside, outside, count in id_map if inside == 0 and count > 0]
        if not rows:
            raise ValueError(f"the maps of a user namespace must hold id 0, got {id_map}")
        found.append(rows[0])
    return found[0], found[1]


def _clone_as_root_of(flags: int, root: tuple[int, int]) -> int:
    """Clone with the file system ids of the sandbox's root: /dev/mqueue belongs to whoever makes an ipc namespace."""
    try:
        syscalls.setfsgid(root[1])
        syscalls.setfsuid(root[0])
        return syscalls.clone_paused(flags)
    except OSError as error:
        why = "; a limit in /proc/sys/user is reached" if error.errno == errno.ENOSPC else ""
        raise OSError(error.errno, f"cannot make namespaces: {error.strerror}{why}") from None
    finally:
        syscalls.setfsuid(0)
        syscalls.setfsgid(0)


_PAUSE_SECONDS: Final = 10


def _fork_into(user_fd: int, flags: int) -> int:
    """A child in a user namespace that is there already, and in new ones that belong to it; it sleeps until its end.

    A fork, since who has entered a user namespace is lost for everything else.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            syscalls.setns(user_fd, syscalls.CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            syscalls.unshare(flags)
            signal.alarm(_PAUSE_SECONDS)  # whoever waits for it may be killed
            os.write(writer, b"\0")
            signal.pause()
        except OSError as error:
            os.write(writer, bytes([error.errno or errno.EIO]))
        finally:
            os._exit(1)
    os.close(writer)
    said = os.read(reader, 1) or bytes([errno.EIO])
    os.close(reader)
    if said != b"\0":
        os.waitpid(pid, 0)
        why = os.strerror(said[0])
        raise OSError(said[0], f"cannot make namespaces in the given user namespace: {why}")
    return pid


def _read_rows(path: str) -> IdMap:
    with open(path, encoding="ascii") as file:
        return [(int(inside), int(outside), int(count)) for inside, outside, count in map(str.split, file)]


def _verify(fds: dict[str, int], user_fd: int | None) -> None:
    owner = namespace_inode(fds.get("user", "/proc/self/ns/user" if user_fd is None else user_fd))
    for kind, fd in fds.items():
        if namespace_inode(fd) == namespace_inode(f"/proc/self/ns/{kind}"):
            raise OSError(errno.EBADE, f"the new {kind} namespace is the host's own")
        if kind != "user" and owner_userns_inode(fd) != owner:
            raise OSError(errno.EBADE, f"the new {kind} namespace belongs to another user namespace")


def _visit(fds: dict[str, int], visits: list[tuple[str, Callable[[], None]]]) -> None:
    """Do what is to be done in the namespaces of these kinds, one after the other."""
    homes: list[int] = []
    try:
        for kind, _ in visits:
            homes.append(os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
            try:
                os.close(owner_userns(homes[-1]))
            except PermissionError:
                # It is owned by a user namespace above ours: who leaves it cannot come back.
                _in_child(lambda: _go_round(fds, visits))
                return
        for (kind, action), home in zip(visits, homes, strict=True):
            _go(kind, fds[kind], action, home)
    finally:
        for home in homes:
            os.close(home)


def inside_network(fd: int, action: Callable[[], None]) -> None:
    """Do something in a network namespace, as root of the user namespace that owns it or of one above.

    Raises:
        OSError: as `action` does; EPERM: it is not ours to enter.
    """
    _visit({"net": fd}, [("net", action)])


def _go_round(fds: dict[str, int], visits: list[tuple[str, Callable[[], None]]]) -> None:
    for kind, action in visits:
        _go(kind, fds[kind], action)


def _go(kind: str, there: int, action: Callable[[], None], home: int = -1) -> None:
    syscalls.setns(there, KINDS[kind])
    try:
        action()
    finally:
        if home >= 0:
            syscalls.setns(home, KINDS[kind])


def _in_child(action: Callable[[], None]) -> None:
    """Run it in a fork. What it raises is raised here: an OSError with the same number and words."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            action()
            code = 0
        except OSError as error:
            os.write(writer, f"{error.errno or errno.EIO} {error.strerror}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb", buffering=0) as file:
        said = file.read().decode("utf-8", "replace")
    if os.waitpid(pid, 0)[1]:
        number, _, words = said.partition(" ")
        raise OSError(int(number or errno.EIO), words or "a process that was to set up a namespace has died")


def _rows(id_map: IdMap) -> str:
    return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in id_map)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())  # one write: the kernel takes a map or a sysctl whole
    except OSError as error:
        raise OSError(error.errno, f"writing {text.strip()!r} to {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _loopback_up() -> None:
    """Source: netdevice(7): struct ifreq is 16 bytes of name and the flags as a short, 40 bytes in all."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = bytearray(struct.pack("=16sh22x", b"lo", 0))
        fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("=h", request, 16)[0]
        struct.pack_into("=h", request, 16, flags | _IFF_UP)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)


def _sysctl_kind(name: str) -> str | None:
    """The kind of namespace that a sysctl belongs to; None: it is the host's. Source: namespaces(7), sysctl(5)."""
    if name.startswith("net."):
        return "net"
    if name.startswith(("fs.mqueue.", "kernel.shm", "kernel.msg")) or name == "kernel.sem":
        return "ipc"
    return None


def _write_sysctls(sysctls: dict[str, str], root: tuple[int, int]) -> None:
    """Write each value, as the user ids `root` where the caller's own may not.

    Since Linux 6.9 the sysctls of an ipc namespace belong to root of its user namespace, before that to the host's.
    Source: ipc/ipc_sysctl.c, ipc_permissions().
    """
    if not sysctls:
        return
    base = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, value in sysctls.items():
            try:
                _write_sysctl(base, name, value)
            except PermissionError:
                if root == (0, 0):
                    raise
                os.setegid(root[1])
                os.seteuid(root[0])
                try:
                    _write_sysctl(base, name, value)
                finally:
                    os.seteuid(0)
                    os.setegid(0)
    finally:
        os.close(base)


def _write_sysctl(base: int, name: str, value: str) -> None:
    beneath = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    try:
        fd = syscalls.openat2(base, name.replace(".", "/"), os.O_WRONLY, resolve=beneath)
        try:
            os.write(fd, value.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, f"sysctl {name}={value}: {os.strerror(error.errno or 0)}") from None
