"""As whom this process looks up and changes files that a stranger has named: with his rights, not with its own.

The kernel checks access to files by the ids and capabilities of the calling *thread*; a block of an `Identity` changes
those of this thread and of no other one. It must not give up the thread (no await, no yield). Standard library only.
Source: credentials(7); capabilities(7), "Effect of user ID changes on capabilities"; kernel/capability.c,
capable_wrt_inode_uidgid: a capability in a user namespace counts for inodes whose owner and group it has.
"""

from __future__ import annotations

import functools
import os
from stat import S_ISDIR

from unisandbox.host import subordinate, syscalls
from unisandbox.host.entries import open_entry

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Final

# Bits of the capabilities over files that a stranger may have; source: include/uapi/linux/capability.h.
_OVER_FILES: Final = {"CAP_CHOWN": 1 << 0, "CAP_DAC_OVERRIDE": 1 << 1, "CAP_FOWNER": 1 << 3, "CAP_FSETID": 1 << 4}
# And those that he never has: DAC_READ_SEARCH, LINUX_IMMUTABLE, MKNOD, MAC_OVERRIDE.
_ALL: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 9 | 1 << 27 | 1 << 32
_CHOWN: Final = 1 << 0
_DAC_OVERRIDE: Final = 1 << 1


class Identity:
    """The root of a user namespace, as the kernel would let it act; or the caller himself, and then nothing changes.

    Args:
        first: the id of this host that is 0 there.
        count: how many ids from there on it has.
        capabilities: those of that root ("CAP_..."); what does not concern files is left out. None: the caller.
        owner: user and group of what the caller makes, with exactly the mode that is given; None: as usual.
    """

    def __init__(
        self, first: int, count: int, capabilities: Iterable[str] | None, owner: tuple[int, int] | None = None
    ) -> None:
        self._first = first
        self._end = first + count
        self._is_caller = capabilities is None
        self._owner = owner if self._is_caller else (first, first)
        self._mask = 0
        for name in capabilities or ():
            self._mask |= _OVER_FILES.get(name, 0)
        self._before: _Credentials | None = None

    @property
    def owner(self) -> tuple[int, int] | None:
        """Whom it is on this host: user and group; None: the caller."""
        return self._owner

    def has(self, uid: int, gid: int) -> bool:
        """Whether these ids of the host are ids there."""
        return self._first <= uid < self._end and self._first <= gid < self._end

    def bare(self) -> _Block:
        """A block of system calls with its ids and no capability over files: whatever they reach, it may."""
        return _Block(self, 0)

    def may_give(self, uid: int, gid: int) -> bool:
        """Whether it can make what is its own belong to these."""
        return bool(self._mask & _CHOWN) and self.has(uid, gid)

    def over(self, *inodes: int | os.stat_result, entries: Sequence[os.stat_result] | None = None) -> _Block:
        """A block of system calls with the capabilities that count for all that they concern.

        Args:
            inodes: the directories in which names are looked up or changed, or what is opened or changed: a pinned
                descriptor, or its status. Nothing else may be entered on the way: one name each, and no link.
            entries: what is removed, replaced or moved there.
        """
        return _Block(self, 0 if self._is_caller else self._counting(inodes, entries))

    def open_directory(self, directory: int, name: str, resolve: int) -> int:
        """Open the directory `name` to read it. Raises OSError: ENOTDIR or ELOOP for a link."""
        kind = os.O_DIRECTORY | os.O_NOFOLLOW
        if self._is_caller:
            return open_entry(directory, name, os.O_RDONLY | kind, resolve=resolve)
        with self.bare():
            with self.over(directory):
                probe = open_entry(directory, name, os.O_PATH | kind, resolve=resolve)
            try:
                return self.reopen(probe, os.O_DIRECTORY)
            finally:
                os.close(probe)

    def reopen(self, probe: int, flags: int) -> int:
        """Open for reading what an O_PATH descriptor has pinned: what is opened is what was looked at."""
        with self.over(probe):
            return os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)

    def owning(self, status: os.stat_result) -> _Block:
        """A block in which owner or mode of what has this status is changed, by its descriptor."""
        return _Block(self, self._mask if not self._is_caller and self._has(status) else 0)

    def over_move(self, *directories: int, entries: Sequence[os.stat_result]) -> _Block:
        """The same for a move from one directory to another one, by which a directory that moves is changed, too.

        Args:
            directories: where it comes from, where it goes, and the descriptor of itself if it is a directory.
            entries: itself, and what is replaced.
        """
        with self.bare():
            # Of those that the sandbox does not have, what everybody may do with them is enough.
            asking = [fd for fd in directories if not self._has(os.fstat(fd))]
            if all(syscalls.may_change(fd) for fd in asking):
                directories = tuple(fd for fd in directories if fd not in asking)
        return self.over(*directories, entries=entries)

    def _has(self, status: os.stat_result) -> bool:
        return self.has(status.st_uid, status.st_gid)

    def _is_plain(self, status: os.stat_result) -> bool:
        """Whether its own id is enough for all that is done with it."""
        return status.st_uid == self._first and status.st_mode & 0o700 >= (0o700 if S_ISDIR(status.st_mode) else 0o600)

    def _counting(self, inodes: Iterable[int | os.stat_result], entries: Sequence[os.stat_result] | None) -> int:
        found = [os.fstat(inode) if isinstance(inode, int) else inode for inode in inodes]
        if all(map(self._is_plain, found)) and all(status.st_uid == self._first for status in entries or ()):
            return 0  # as usual; it saves two system calls
        counting = self._mask
        if not all(self._has(status) for status in found):
            counting &= ~_DAC_OVERRIDE
        # FOWNER is asked for the entry of a sticky directory, not for that; source: fs/namei.c, __check_sticky.
        if not all(self._has(status) for status in (found if entries is None else entries)):
            counting &= _DAC_OVERRIDE
        return counting


CALLER: Final = Identity(0, 1 << 32, None)
"""This process: for paths that its own user has named."""


class _Block:
    """Has the thread act as an identity; blocks of the same one may be nested."""

    def __init__(self, identity: Identity, capabilities: int) -> None:
        self._identity = identity
        self._capabilities = capabilities
        self._outer: _Credentials | None = None
        self._outer_capabilities = 0

    def __enter__(self) -> None:
        identity = self._identity
        if identity._is_caller:
            return
        self._outer = outer = identity._before
        if outer is not None:
            self._outer_capabilities = outer.over_files
            outer.allow(self._capabilities)
            return
        identity._before = before = _Credentials(identity._first)
        try:
            before.change(self._capabilities)
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._identity._is_caller:
            return
        try:
            self._leave()
        except BaseException:
            self._leave()  # an exception that a signal handler raised between two calls
            raise

    def _leave(self) -> None:
        if self._outer is not None:
            self._outer.allow(self._outer_capabilities)
        elif self._identity._before is not None:
            self._identity._before.restore()
            self._identity._before = None


@functools.cache
def _groups_stay() -> bool:
    return subordinate.groups_stay()


class _Credentials:
    """What the calling thread had before it was changed."""

    def __init__(self, user: int) -> None:
        self._user = user
        self._uid, self._gid = os.geteuid(), os.getegid()
        # Where they stay, they do for the programs of a stranger as well.
        self._groups = [] if _groups_stay() else os.getgroups()
        self._effective, self._permitted, self._inheritable = syscalls.capget()
        # A change of the ids takes these away too: core dumps would end, and so would the signal at the parent's death.
        # Source: kernel/cred.c, commit_creds.
        self._dumpable = syscalls.prctl(syscalls.PR_GET_DUMPABLE)
        self._death_signal = syscalls.parent_death_signal()
        # Whether the kernel takes these capabilities away with the user id 0, and gives the same ones back with it.
        self._fixup = (
            self._uid == 0 != user
            and self._effective & _ALL == self._permitted & _ALL
            and not syscalls.prctl(syscalls.PR_GET_SECUREBITS) & syscalls.SECBIT_NO_SETUID_FIXUP
        )
        self.over_files = -1

    def change(self, capabilities: int) -> None:
        """Be the user, with these of the capabilities over files."""
        if self._groups:
            syscalls.set_thread_groups(())
        syscalls.setfsgid(self._user)
        syscalls.setfsuid(self._user)
        if self._fixup:
            self.over_files = 0
        self.allow(capabilities)

    def allow(self, capabilities: int) -> None:
        """Have these of the capabilities over files, as far as the thread has them."""
        if capabilities != self.over_files:
            syscalls.capset(self._effective & (~_ALL | capabilities), self._permitted, self._inheritable)
            self.over_files = capabilities

    def restore(self) -> None:
        """Have all as it was; may be repeated."""
        syscalls.restore_filesystem_ids(self._uid, self._gid)
        if not self._fixup or self.over_files != 0:
            syscalls.capset(self._effective, self._permitted, self._inheritable)
        if self._groups:
            syscalls.set_thread_groups(self._groups)
        if self._dumpable < 2:  # 2 cannot be set, and is what the change has made of it
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, self._dumpable)
        if self._death_signal:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, self._death_signal)
