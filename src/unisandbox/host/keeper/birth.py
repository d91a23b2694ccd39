"""How the keeper begins: from whatever process started it to a clean one of its own. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal

from unisandbox.host import subordinate, syscalls
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.inheritance import reset_attributes
from unisandbox.host.keeper.loop import note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisandbox.host.subordinate import Rows

_LEAST_NOFILE = 4096
NAME = "unisandbox-keep"  # 15 bytes: all that the kernel stores

#: The soft limit of file descriptors that children get back: the keeper raises its own as far as it may.
inherited_soft_nofile: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def leave_inheritance(keep: Sequence[int]) -> None:
    """Close every fd but 0-2 and `keep`, set signals, umask, directory, name and attributes; become a subreaper.

    Signal mask and handlers were reset by the spawn that started us. The starting process's other fds may be here if it
    opened them inheritable: they must not live as long as we do.
    """
    low = 3
    for fd in sorted(keep):
        if fd > low:
            syscalls.close_range(low, fd - 1)
        low = fd + 1
        os.set_inheritable(fd, False)
    syscalls.close_range(low)
    # A log on a full disk or a client gone while we write are errors to us, not deaths. Nobody has a terminal for us.
    # Handlers, and not SIG_IGN: they are gone after an exec, so a child has nothing to reset.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    os.umask(0o077)
    os.chdir("/")
    _take_descriptors()
    reset_attributes()
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(NAME)


def enter(cgroups: Sequence[str]) -> None:
    """Move to these cgroups, by their `cgroup.procs` files, before anything of ours is inherited or hidden.

    One that cannot be entered is noted: whoever wants it looks where we are.
    """
    for path in cgroups:
        try:
            with open(path, "wb", buffering=0) as file:
                file.write(b"0")
        except OSError as error:
            note(f"cannot move to another cgroup by {path}: {error.strerror}")


def _take_descriptors() -> None:
    """Use all the file descriptors that we may have, and at least those that one message can bring."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, _LEAST_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (PermissionError, ValueError):
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_hidden: dict[str, int] = {}
"""What lies under the paths that were hidden, by path."""


def reach(path: str) -> str:
    """`path` of the host as we can open it, also below what is hidden from us."""
    for hidden, fd in _hidden.items():
        if path.startswith(hidden + "/"):
            return f"/proc/self/fd/{fd}{path[len(hidden) :]}"
    return path


def hidden_fds() -> list[int]:
    """The fds by which `reach` goes: whoever uses such a path in another process needs them there."""
    return list(_hidden.values())


class View:
    """The mount namespace that we are in, and the way from there to what the host sees.

    Args:
        former: an fd of the host's mount namespace; -1 where we are in it, or may not go back to it.
        covered: where we have mounted something over what is the host's, the last one last.
    """

    def __init__(self, former: int = -1, covered: Sequence[str] = ()) -> None:
        self.is_private: bool = bool(covered) or former >= 0
        #: What `leave` needs.
        self.fds: list[int] = [former] if former >= 0 else []
        self._covered = list(covered)

    def leave(self) -> None:
        """Let a child see what the host sees: cgroups may be hidden from us, and what it mounts may be covered."""
        if self.fds:
            syscalls.setns(self.fds[0], syscalls.CLONE_NEWNS)
        elif self.is_private:
            # Root of a user namespace may not go back to the host's mounts. In a copy of ours nothing need be covered.
            syscalls.unshare(syscalls.CLONE_NEWNS)
            for path in reversed(self._covered):
                syscalls.umount(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        os.chdir("/")


def own_user_namespace(ids: tuple[Rows, Rows] | None) -> bool:
    """Move to a user namespace with these user and group ids, for a user who is not root; None: root needs none.

    Returns:
        Whether we are in one. Why not is noted; such a keeper has no mounts of its own.
    """
    if ids is None:
        return False
    try:
        subordinate.enter(*ids)
    except subordinate.NotMappedError:
        raise
    except OSError as error:
        note(f"no user namespace of our own: {error.strerror}")
        return False
    return True


def own_mount_namespace(hide: Sequence[str], workdir: str, *, is_user: bool = False) -> View:
    """Move to a mount namespace of our own, with `hide` hidden and a private tmpfs on `workdir` ("" for none).

    Args:
        hide, workdir: see there.
        is_user: we are root of a user namespace only.

    Returns:
        What we see. Where we may not make a namespace of our own nothing is hidden and `workdir` is an ordinary
        directory.
    """
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors < 2 * protocol.FDS_LIMIT:
        raise OSError(
            errno.EMFILE,
            f"the limit of open files is {descriptors}, a keeper needs {2 * protocol.FDS_LIMIT}: raise it (ulimit -n)",
        )
    former = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    except PermissionError as error:
        os.close(former)
        note(f"no mounts of our own: {error.strerror}")
        return View()
    # Slave: what the host mounts later is seen here, what we mount is seen by nobody else.
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    nosuid = syscalls.MS_NOSUID | syscalls.MS_NODEV
    for path in hide:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Above the numbers that a program's descriptors are moved to before it enters its cgroups.
        _hidden[path] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, protocol.FDS_LIMIT + 4)
        os.close(fd)
        # Over it, not umounted: crun would make directories under the mount point and leave them there.
        syscalls.mount(
            "none",
            path,
            "tmpfs",
            nosuid | syscalls.MS_NOEXEC | syscalls.MS_RDONLY,
            "mode=0555,size=4k,nr_inodes=2",
        )
    if workdir:
        syscalls.mount("none", workdir, "tmpfs", nosuid, "mode=0711")
    if not is_user:
        return View(former)
    os.close(former)
    return View(covered=[*hide, *([workdir] if workdir else [])])
