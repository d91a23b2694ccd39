"""System calls that Python's standard library does not have, as plain functions that raise OSError.

Standard library only: the keeper and its jobs import this module too. Flags keep the kernel's names.
Source: man-pages 6.x, include/uapi/linux/{mount,sched,openat2,pidfd}.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
AT_FDCWD: Final = -100

OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_IDMAP: Final = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x00200000

FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6

NS_GET_USERNS: Final = 0xB701
NS_GET_NSTYPE: Final = 0xB703

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_GET_SECUREBITS: Final = 27
PR_SET_TIMERSLACK: Final = 29
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_THP_DISABLE: Final = 41

IN_MODIFY: Final = 0x2

SECBIT_NO_SETUID_FIXUP: Final = 1 << 2

PIDFD_SIGNAL_PROCESS_GROUP: Final = 1 << 2
PIDFD_INFO_EXIT: Final = 1 << 3

# For capget(2) and capset(2): _LINUX_CAPABILITY_VERSION_3, of the calling thread.
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_NO_ID: Final = 0xFFFFFFFF

# These calls are newer than the unification of system call numbers: one number on every architecture.
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_CLOSE_RANGE: Final = 436
_NR_OPENAT2: Final = 437
_NR_FACCESSAT2: Final = 439
_NR_MOUNT_SETATTR: Final = 442
# These are not.
_NR_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
_NR_BPF: Final = {"x86_64": 321, "aarch64": 280}
_NR_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}
_NR_KEYCTL: Final = {"x86_64": 250, "aarch64": 219}
_NR_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_NR_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
_IOPRIO_WHO_PROCESS: Final = 1
_KEYCTL_GET_KEYRING_ID: Final = 0

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# Called several times by every call that touches a file of a sandbox: declared once, and with the GIL held.
_quick = ctypes.PyDLL(None, use_errno=True)
_CapabilityWords = ctypes.c_uint32 * 6
_setfsuid, _setfsgid = _quick.setfsuid, _quick.setfsgid
_setfsuid.argtypes = _setfsgid.argtypes = (ctypes.c_uint,)
_capget, _capset, _prctl = _quick.capget, _quick.capset, _quick.prctl
_capget.argtypes = _capset.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def _check(result: int, what: str, path: str | bytes | None = None) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    message = f"{what}: {os.strerror(number)}"
    raise OSError(number, message, path) if path is not None else OSError(number, message)


def _number(numbers: Mapping[str, int], name: str) -> ctypes.c_long:
    """That of a system call on this machine, which libc has no function for."""
    number = numbers.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of {name} is not known for {os.uname().machine}")
    return ctypes.c_long(number)


def session_keyring() -> int:
    """The number of this process's session keyring.

    Raises:
        OSError: ENOKEY: it has none. EPERM, ENOSYS: it may have nothing to do with keyrings.
    """
    number = _number(_NR_KEYCTL, "keyctl")
    return _check(_syscall(number, ctypes.c_int(_KEYCTL_GET_KEYRING_ID), ctypes.c_int(-3), ctypes.c_int(0)), "keyctl")


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` (CLONE_NEW*). Only ever in a process of one's own, never in a pool thread."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, nstype: int = 0) -> None:
    """Enter the namespace behind `fd`, which must be of kind `nstype` (0: any)."""
    _check(_libc.setns(fd, nstype), f"setns({fd})")


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() if data is not None else None,
        ),
        f"mount {fstype or 'bind'} on {target}",
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    number = _number(_NR_PIVOT_ROOT, "pivot_root")
    _check(_syscall(number, os.fsencode(new_root), os.fsencode(put_old)), f"pivot_root {new_root}")


def sethostname(name: str) -> None:
    """Set the host name of the caller's uts namespace (at most 64 bytes)."""
    raw = name.encode()
    _check(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), f"sethostname {name!r}")


def setdomainname(name: str) -> None:
    """Set the NIS domain name of the caller's uts namespace (at most 64 bytes)."""
    raw = name.encode()
    _check(_libc.setdomainname(raw, ctypes.c_size_t(len(raw))), f"setdomainname {name!r}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments."""
    result: int = _prctl(option, arg2, arg3, arg4, arg5)
    return result if result >= 0 else _check(result, f"prctl({option})")


def personality(persona: int) -> None:
    """personality(2) of the calling thread."""
    _check(_libc.personality(ctypes.c_ulong(persona)), "personality")


def default_ioprio() -> None:
    """Let the calling thread's I/O priority follow its nice value; ioprio_set(2)."""
    number = _number(_NR_IOPRIO_SET, "ioprio_set")
    _check(_syscall(number, ctypes.c_int(_IOPRIO_WHO_PROCESS), ctypes.c_int(0), ctypes.c_int(0)), "ioprio_set")


def default_mempolicy() -> None:
    """Let the calling thread's memory come from where it runs; set_mempolicy(2), MPOL_DEFAULT."""
    number = _number(_NR_SET_MEMPOLICY, "set_mempolicy")
    _check(_syscall(number, ctypes.c_int(0), None, ctypes.c_ulong(0)), "set_mempolicy")


def setfsuid(uid: int) -> None:
    """Set the user id that the calling thread touches files as. The kernel reports no failure: so it is read back."""
    _setfsuid(uid)
    if _setfsuid(_NO_ID) & _NO_ID != uid:
        raise PermissionError(errno.EPERM, f"setfsuid({uid})")


def setfsgid(gid: int) -> None:
    """The same for the group id."""
    _setfsgid(gid)
    if _setfsgid(_NO_ID) & _NO_ID != gid:
        raise PermissionError(errno.EPERM, f"setfsgid({gid})")


def restore_filesystem_ids(uid: int, gid: int) -> None:
    """Set both to the effective ids, which nobody is refused."""
    _setfsuid(uid)
    _setfsgid(gid)


def set_thread_groups(groups: Sequence[int]) -> None:
    """Set them, of this thread alone: libc's setgroups() is for all threads of the process (nptl(7))."""
    number = _number(_NR_SETGROUPS, "setgroups")
    _check(_syscall(number, ctypes.c_size_t(len(groups)), (ctypes.c_uint32 * len(groups))(*groups)), "setgroups")


def capget() -> tuple[int, int, int]:
    """The calling thread's capabilities: effective, permitted and inheritable, a bit for each."""
    sets = _CapabilityWords()
    if _capget(_CAPABILITY_HEADER, sets) < 0:
        _check(-1, "capget")
    return sets[0] | sets[3] << 32, sets[1] | sets[4] << 32, sets[2] | sets[5] << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set them."""
    low = (effective & _NO_ID, permitted & _NO_ID, inheritable & _NO_ID)
    words = _CapabilityWords(*low, effective >> 32, permitted >> 32, inheritable >> 32)
    _check(_capset(_CAPABILITY_HEADER, words), "capset")


def parent_death_signal() -> int:
    """The signal that the calling thread gets when its parent ends; 0: none."""
    number = ctypes.c_int()
    prctl(PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def timerfd(clock: int) -> int:
    """A timer of `clock` (`time.CLOCK_*`) as a non-blocking fd, readable when its time has come; not set."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # TFD_CLOEXEC, TFD_NONBLOCK
    return _check(_libc.timerfd_create(ctypes.c_int(clock), ctypes.c_int(flags)), "timerfd_create")


def timerfd_settime(timer_fd: int, at: float) -> None:
    """Set a timer for the time `at` of its clock, in seconds, in place of the one it had; 0: for none."""
    seconds = int(at)
    # struct itimerspec: it_interval, it_value; a value of zero would disarm.
    value = struct.pack("@4l", 0, 0, seconds, int((at - seconds) * 1e9))
    absolute = 1  # TFD_TIMER_ABSTIME
    _check(_libc.timerfd_settime(ctypes.c_int(timer_fd), ctypes.c_int(absolute), value, None), "timerfd_settime")


def inotify(path: str, mask: int) -> int:
    """A non-blocking inotify of one file."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # IN_CLOEXEC, IN_NONBLOCK
    fd = _check(_libc.inotify_init1(ctypes.c_int(flags)), "inotify_init1")
    try:
        encoded = os.fsencode(path)
        _check(_libc.inotify_add_watch(ctypes.c_int(fd), encoded, ctypes.c_uint32(mask)), "inotify_add_watch", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """Close every file descriptor from `first` to `last`. Linux 5.9."""
    _check(
        _syscall(ctypes.c_long(_NR_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(flags)),
        "close_range",
    )


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open `path` below `dirfd` with rules for its resolution. Always O_CLOEXEC. Linux 5.6."""
    flags |= os.O_CLOEXEC
    how = struct.pack("=QQQ", flags, mode if flags & (os.O_CREAT | os.O_TMPFILE) == os.O_CREAT or mode else 0, resolve)
    return _check(
        _syscall(
            ctypes.c_long(_NR_OPENAT2),
            ctypes.c_int(dirfd),
            os.fsencode(path),
            how,
            ctypes.c_size_t(len(how)),
        ),
        f"openat2 {path}",
        path,
    )


def may_change(directory: int) -> bool:
    """Whether the calling thread may make, rename and remove names in a directory (also O_PATH). Linux 5.8."""
    at_eaccess = 0x200
    number, mode = ctypes.c_long(_NR_FACCESSAT2), ctypes.c_int(os.W_OK | os.X_OK)
    return int(_syscall(number, ctypes.c_int(directory), b"", mode, ctypes.c_int(at_eaccess | AT_EMPTY_PATH))) == 0


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2): an fd of a mount, or with OPEN_TREE_CLONE of a detached copy of it. Linux 5.2."""
    return _check(
        _syscall(
            ctypes.c_long(_NR_OPEN_TREE),
            ctypes.c_int(dirfd),
            os.fsencode(path),
            ctypes.c_uint(flags | OPEN_TREE_CLOEXEC),
        ),
        f"open_tree {path}",
        path,
    )


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int) -> None:
    """move_mount(2): attach a (detached) mount. Linux 5.2."""
    _check(
        _syscall(
            ctypes.c_long(_NR_MOVE_MOUNT),
            ctypes.c_int(from_fd),
            os.fsencode(from_path),
            ctypes.c_int(to_fd),
            os.fsencode(to_path),
            ctypes.c_uint(flags),
        ),
        f"move_mount on {to_path}",
        to_path,
    )


def mount_setattr(
    dirfd: int,
    path: str,
    *,
    set: int = 0,
    clear: int = 0,
    propagation: int = 0,
    recursive: bool = False,
    userns_fd: int = -1,
) -> None:
    """mount_setattr(2): change mount attributes (MOUNT_ATTR_*), also of all submounts. Linux 5.12.

    `MOUNT_ATTR_IDMAP` maps the ids of the mount by `userns_fd`; only for a detached tree. `propagation` is MS_PRIVATE
    or MS_SLAVE (0: as it is).
    """
    attr = struct.pack("=QQQQ", set, clear, propagation, userns_fd if set & MOUNT_ATTR_IDMAP else 0)
    flags = (AT_RECURSIVE if recursive else 0) | (AT_EMPTY_PATH if path == "" else 0)
    _check(
        _syscall(
            ctypes.c_long(_NR_MOUNT_SETATTR),
            ctypes.c_int(dirfd),
            os.fsencode(path),
            ctypes.c_uint(flags),
            attr,
            ctypes.c_size_t(len(attr)),
        ),
        f"mount_setattr {path}",
        path or None,
    )


def fsopen(fstype: str) -> int:
    """fsopen(2): an fd of a file system that is being configured. Linux 5.2."""
    number = ctypes.c_long(_NR_FSOPEN)
    return _check(_syscall(number, fstype.encode(), ctypes.c_uint(FSOPEN_CLOEXEC)), f"fsopen {fstype}")


def fsconfig(fs_fd: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """fsconfig(2): set one option (a string value has at most 255 bytes), or FSCONFIG_CMD_CREATE. Linux 5.2.

    The error carries the kernel's own words about it, where it has any (the file system context's message log).
    """
    result = _syscall(
        ctypes.c_long(_NR_FSCONFIG),
        ctypes.c_int(fs_fd),
        ctypes.c_uint(command),
        key.encode() if key is not None else None,
        os.fsencode(value) if value is not None else None,
        ctypes.c_int(0),
    )
    if result < 0:
        number = ctypes.get_errno()
        said = _fs_messages(fs_fd)
        what = (
            "fsconfig create" if key is None else f"fsconfig {key}={value}" if value is not None else f"fsconfig {key}"
        )
        raise OSError(number, f"{what}: {os.strerror(number)}{': ' + said if said else ''}")


def _fs_messages(fs_fd: int) -> str:
    """What the kernel logged to a file system context: "e text" by each read, then ENODATA. Source: fs/fsopen.c."""
    said: list[str] = []
    try:
        while len(said) < 8:
            said.append(os.read(fs_fd, 1024).decode(errors="replace").strip()[2:])
    except OSError:  # ENODATA: that was all. Whatever else it is, the error that we report is the caller's.
        pass
    return "; ".join(said)


def fsmount(fs_fd: int, attributes: int = 0) -> int:
    """fsmount(2): an fd of a detached mount of a created file system, with MOUNT_ATTR_* set. Linux 5.2."""
    return _check(
        _syscall(
            ctypes.c_long(_NR_FSMOUNT), ctypes.c_int(fs_fd), ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(attributes)
        ),
        "fsmount",
    )


def clone_paused(flags: int, seconds: int = 10) -> int:
    """A child process in new namespaces (`flags`: CLONE_NEW*) which sleeps until it is killed; returns its pid.

    It shares the caller's memory (CLONE_VM: no copy of page tables, so it costs 60 us and not a fork) and runs nothing
    but libc's sleep() on a stack of its own. The caller must end it with SIGKILL and reap it; where the caller is
    killed before it can, the child ends by itself after `seconds`.
    """
    global _pause_stack  # noqa: PLW0603 (it must outlive the child; children are ended before the next call)
    if _pause_stack is None:
        _pause_stack = ctypes.create_string_buffer(32768)
    top = (ctypes.addressof(_pause_stack) + len(_pause_stack)) & ~0xF
    sleep = ctypes.cast(_libc.sleep, ctypes.c_void_p)
    clone_vm = 0x100
    return _check(
        _libc.clone(
            sleep,
            ctypes.c_void_p(top),
            ctypes.c_int(flags | clone_vm | signal.SIGCHLD),
            ctypes.c_void_p(seconds),
        ),
        f"clone({flags:#x})",
    )


_pause_stack: ctypes.Array[ctypes.c_char] | None = None


def bpf(command: int, attr: bytes) -> int:
    """bpf(2) with the raw `union bpf_attr`; pointers in it must stay alive during the call."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    return _check(
        _syscall(_number(_NR_BPF, "bpf"), ctypes.c_int(command), buffer, ctypes.c_uint(len(attr))),
        f"bpf({command})",
    )


def pidfd_exit_status(pidfd: int) -> int | None:
    """The wait status of an ended and reaped process, also of one that is not our child.

    None while it lives or is a zombie, and where the kernel cannot tell (before 6.15).
    Source: PIDFD_GET_INFO, include/uapi/linux/pidfd.h; `exit_code` is a wait(2) status word at byte 60.
    """
    info = bytearray(64)
    struct.pack_into("=Q", info, 0, PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, 0xC000FF0B | (len(info) << 16), info)
    except OSError:
        return None
    mask = struct.unpack_from("=Q", info, 0)[0]
    if not mask & PIDFD_INFO_EXIT:
        return None
    return int(struct.unpack_from("=i", info, 60)[0])
