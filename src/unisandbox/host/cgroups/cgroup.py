"""One cgroup: a directory in every hierarchy that is needed.

A cgroup of a sandbox or container has a directory for each controller; that of a process only what a process needs:
its memory (the OOM count) and the tree that ends it. Everything here is a few system calls and never waits but where
a timeout says so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unisandbox.api.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.api.names import check_name
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import ending, files, hierarchy, v1, v2
from unisandbox.host.cgroups.devices import DeviceRule
from unisandbox.host.cgroups.hierarchy import Place
from unisandbox.host.cgroups.limits import Limits, Stats

if TYPE_CHECKING:
    from unisandbox.host.cgroups.tree import Cgroups

_NO_LIMITS = Limits()
_OOM_SECONDS = 2.0
# What a process of its own needs a directory for.
_FOR_PROCESS = frozenset({"memory", "freezer"})


class Cgroup:
    """One cgroup. Objects are handles: making one does not make the cgroup, and it outlives the object.

    A later cgroup of the same path is another one, whose processes are not ended by this.
    """

    __slots__ = ("_at", "_enabled", "_inherited", "_inodes", "_own", "_tree", "path")

    def __init__(self, tree: Cgroups, path: str, own: Mapping[Place, str], inherited: Mapping[Place, str]) -> None:
        """Use `Cgroups.root`, `Cgroups.find`, `Cgroup.child` or `open_existing`."""
        self.path: str = path
        """Relative to the engine's cgroup; "" is that itself."""
        self._tree = tree
        self._own = dict(own)
        self._inodes = {directory: _inode(directory) for directory in own.values()}
        self._inherited = dict(inherited)
        self._at = {controller: d for place, d in own.items() for controller in place.controllers}
        for place, directory in own.items():
            if place.mount.unified:
                self._at["unified"] = directory
        self._enabled: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Cgroup({self})"

    def __str__(self) -> str:
        """Its path below the engine's parent."""
        return f"{self._tree.name}/{self.path}".rstrip("/")

    @property
    def dirs(self) -> tuple[str, ...]:
        """The directories of this cgroup, absolute; `ending.kill` and `ending.remove` take them."""
        return tuple(self._own.values())

    @property
    def holds_processes(self) -> bool:
        """Whether it is a real one, by which processes can be found and ended; see `Cgroups.nowhere`."""
        return bool(self._own)

    @property
    def procs(self) -> tuple[str, ...]:
        """The cgroup.procs files into which a process's pid must be written for it to be wholly in here.

        Where this cgroup has no directory of its own, it is that of the one above. A write takes 8 to 15 ms when no
        process has been moved for a while, since the kernel waits for an RCU grace period; `entry` is quicker.
        """
        return tuple(f"{directory}/cgroup.procs" for directory in self._everywhere().values())

    @property
    def entry(self) -> tuple[str, ...]:
        """The files into which a process with a single thread writes "0" to move itself in here.

        The same as `procs` but for v1, where `tasks` has no such wait (0.05 ms). Only the v2 directory, when there is
        one, is still slow: see `clone_into`.
        """
        return (*self.tasks, *(f"{directory}/cgroup.procs" for directory in (self.clone_into,) if directory))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The v1 part of `entry`: what is left to do for a process that was born in `clone_into`."""
        return tuple(f"{d}/tasks" for place, d in self._everywhere().items() if not place.mount.unified)

    @property
    def clone_into(self) -> str | None:
        """The v2 directory: a process born there (CLONE_INTO_CGROUP) need not wait. None on pure v1."""
        return next((d for place, d in self._everywhere().items() if place.mount.unified), None)

    def _everywhere(self) -> dict[Place, str]:
        return {**self._own, **self._inherited}

    def admit(self, uid: int) -> None:
        """Let processes of user `uid` (as the host counts) clone themselves into this cgroup (CLONE_INTO_CGROUP).

        The kernel wants that of the cgroup itself and of the nearest one above both it and the cloning process. It
        gives away cgroup.procs alone: nothing of limits, and no cgroups can be made. For v1 there is nothing to do:
        hand open files of `tasks` to the process.

        Raises:
            OSError: the kernel refused.
        """
        directory = self._at.get("unified")
        if directory is not None:
            reached("before cgroup.chown", directory)
            os.chown(f"{directory}/cgroup.procs", uid, -1, follow_symlinks=False)
            reached("after cgroup.chown", directory)

    def predict(self, name: str, *, limits: Limits = _NO_LIMITS, for_process: bool = False) -> tuple[str, ...]:
        """The `dirs` that `child` with the same arguments would have: to register the undo before the side effect."""
        return tuple(self._plan(name, limits, for_process=for_process).values())

    def child(self, name: str, *, limits: Limits = _NO_LIMITS, for_process: bool = False) -> Cgroup:
        """Make a cgroup below this one, with its limits. On failure nothing is left.

        Args:
            name: valid for `api.names.check_name`.
            limits: what it may use.
            for_process: only what one process needs (its memory counters and its end); the rest is shared with this.

        Raises:
            FileExistsError: there is one of that name; it is not touched.
            UnavailableError: a limit cannot be had on this host; says why. Nothing was made.
            OSError: the kernel refused. On v2, EBUSY when this cgroup holds processes itself.
        """
        own = self._plan(name, limits, for_process=for_process)
        self._require(limits, f"{self}/{name}")
        if self._tree.version == "v2":
            self._enable(limits, for_process=for_process)
        _make(tuple(own.values()))
        inherited = {place: d for place, d in self._everywhere().items() if place not in own}
        child = Cgroup(self._tree, f"{self.path}/{name}".lstrip("/"), own, inherited)
        try:
            child._write_limits(limits, fresh=True)
        except BaseException:
            child.remove()
            raise
        return child

    def find(self, name: str) -> Cgroup:
        """The cgroup of this name below this one, made by whomever. Raises FileNotFoundError."""
        return self._tree.find(f"{self.path}/{name}".lstrip("/"))

    def leaf(self, name: str) -> Cgroup:
        """Where a process goes that belongs to the cgroup as a whole: v2 allows none beside children with controllers.

        On v1 and hybrid hosts this cgroup itself, on v2 a child for it.
        """
        return self.child(name, for_process=True) if self._tree.version == "v2" else self

    def _plan(self, name: str, limits: Limits, *, for_process: bool) -> dict[Place, str]:
        check_name(name, "cgroup name")
        if name.partition(".")[0] in (*hierarchy.CONTROLLERS, "cgroup"):
            # Its directory would meet the kernel's files: cgroup.procs, memory.max.
            raise InvalidArgumentError(f"cgroup name {name!r} begins like a file of the kernel's")
        wanted = _FOR_PROCESS | set(limits.controllers()) if for_process else None
        places = (place for place in self._own if wanted is None or wanted & set(place.controllers))
        return {place: f"{self._own[place]}/{name}" for place in places}

    def _enable(self, limits: Limits, *, for_process: bool) -> None:
        wanted = {"memory", *limits.controllers()} if for_process else set(hierarchy.V2_CONTROLLERS)
        controllers = [name for name in hierarchy.V2_CONTROLLERS if name in wanted & self._tree.controllers]
        if not self._enabled.issuperset(controllers):
            v2.enable(self._at["unified"], controllers)
            self._enabled |= set(controllers)

    def enter(self, pid: int) -> None:
        """Move a process (all its threads) in here, and read back that it is.

        Raises:
            ProcessLookupError: there is no such process.
            OSError: the kernel refused, or the process is elsewhere afterwards.
        """
        now = hierarchy.memberships(pid)
        moves = [(place, d) for place, d in self._everywhere().items() if now.get(place.key) != place.mount.name(d)]
        for _, directory in moves:
            files.write(directory, "cgroup.procs", str(pid))
        if not moves:
            return
        now = hierarchy.memberships(pid)
        for place, directory in moves:
            if now.get(place.key) != place.mount.name(directory):
                message = f"process {pid} is in {place.key} cgroup {now.get(place.key)!r} and not in {directory}"
                raise OSError(errno.EIO, message)

    def holds(self, pid: int) -> bool:
        """Whether a process is in here or below, in every hierarchy where this cgroup has a directory.

        Raises:
            ProcessLookupError: there is no such process.
        """
        now = hierarchy.memberships(pid)
        names = {place.key: place.mount.name(directory) for place, directory in self._own.items()}
        return all(f"{now.get(key)}/".startswith(f"{name}/") for key, name in names.items())

    def set_limits(self, limits: Limits) -> None:
        """Make these the limits, also while processes run; those that are None are taken away.

        A memory limit below what is in use is refused, on v2 after an attempt to reclaim. On failure the limits are as
        they were.

        Raises:
            UnavailableError: a limit cannot be had on this host; says why.
            FailedPreconditionError: this is the cgroup of a process and has no such limit.
            OSError: the kernel refused (EBUSY: more is in use).
        """
        self._require(limits, str(self))
        before = self.limits()
        try:
            self._write_limits(limits, fresh=False)
        except OSError:
            self._write_limits(before, fresh=False)
            raise

    def _require(self, limits: Limits, what: str) -> None:
        for controller, limit in limits.controllers().items():
            if controller in self._tree.missing:
                raise UnavailableError(
                    f"a {limit} limit for cgroup {what} cannot be set", hint=self._tree.missing[controller]
                )
            if controller not in self._at:
                raise FailedPreconditionError(f"cgroup {what} has no {limit} limit of its own, only the one above it")

    def _write_limits(self, limits: Limits, *, fresh: bool) -> None:
        version = v2 if self._tree.version == "v2" else v1
        if limits.oom_group and version is v1:
            raise UnavailableError(
                f"processes of {self} cannot be killed for memory as one", hint="It needs cgroup v2."
            )
        if limits.memory is not None and limits.swap and not version.counts_swap(self._at["memory"]):
            raise UnavailableError(
                f"a swap limit for {self._at['memory']} cannot be set: this kernel does not account for swap",
                hint="Boot with swapaccount=1, or leave swap at 0.",
            )
        version.set_limits(self._at, limits, fresh=fresh)

    def limits(self) -> Limits:
        """The limits as the kernel has them (sizes rounded to pages)."""
        return v2.get_limits(self._at) if self._tree.version == "v2" else v1.get_limits(self._at)

    def stats(self) -> Stats:
        """What this cgroup and everything below it uses."""
        return v2.stats(self._at) if self._tree.version == "v2" else v1.stats(self._at)

    @property
    def oom_counter(self) -> tuple[str, str] | None:
        """The file that `oom_kills` reads, and the word before its number there; None where they are not counted."""
        if "memory" not in self._at:
            return None
        return f"{self._at['memory']}/{v2.OOM_FILE if self._tree.version == 'v2' else v1.OOM_FILE}", "oom_kill"

    def oom_kills(self) -> int:
        """How many processes of this very cgroup the kernel killed for memory, whosever limit was hit.

        Raises:
            UnavailableError: the memory controller cannot be used on this host.
            FileNotFoundError: the cgroup is gone: read it before it is removed.
        """
        if "memory" not in self._at:
            hint = self._tree.missing.get("memory", "")
            raise UnavailableError(f"OOM kills in cgroup {self} are not counted", hint=hint)
        try:
            return v2.oom_kills(self._at) if self._tree.version == "v2" else v1.oom_kills(self._at)
        except OSError:
            # Looked at after it: somebody may remove it at any moment.
            if os.path.isdir(self._at["memory"]):
                raise
            raise FileNotFoundError(errno.ENOENT, f"cgroup {self._at['memory']} does not exist") from None

    def oom_kills_below(self) -> int | None:
        """How many in here and below the kernel has killed for memory, also in cgroups that are gone: one look.

        None: it does not add them up (v1), or the cgroup is gone.
        """
        return v2.oom_kills_below(self._at) if self._tree.version == "v2" and "memory" in self._at else None

    def watch_oom(self) -> tuple[int, float]:
        """A descriptor, the caller's to close, that becomes readable when what is in here may be killed for memory.

        With v2 that is when memory has run out in here or below, with v1 when it runs out in here or above, and perhaps
        for somebody else. And how many seconds after that a kill may be counted: v1 gives notice before it looks for a
        victim.

        Raises:
            UnavailableError: the memory controller cannot be used on this host.
            OSError: the kernel refused, or the cgroup is gone.
        """
        if "memory" not in self._at:
            raise UnavailableError(
                f"OOM kills in cgroup {self} are not counted", hint=self._tree.missing.get("memory", "")
            )
        return (v2.watch_oom(self._at), 0.0) if self._tree.version == "v2" else (v1.watch_oom(self._at), _OOM_SECONDS)

    def pids(self) -> tuple[int, ...]:
        """The processes in and below this cgroup, whichever hierarchy they are in."""
        found: set[int] = set()
        for directory in self.dirs:
            found |= ending.pids(directory)
        return tuple(sorted(found))

    def kill(self) -> None:
        """SIGKILL for every process in and below, at once; does not wait for their ends. None there is fine."""
        same = (directory for directory, inode in self._inodes.items() if inode and inode == _inode(directory))
        ending.kill(tuple(same), 0)

    def let_die(self, pid: int) -> None:
        """Let a member that has got a SIGKILL end although the cgroup is stopped; the others stay so."""
        ending.let_die(self.dirs, pid)

    def freeze(self) -> bool:
        """Let every process in and below be stopped; whether all are. To be called until they are: see `patience`.

        Raises:
            UnavailableError: this host has no freezer for us.
        """
        self._need_freezer()
        return v2.freeze(self._at) if self._tree.version == "v2" else v1.freeze(self._at)

    def thaw(self) -> None:
        """Let them run on; fine when they do."""
        self._need_freezer()
        (v2 if self._tree.version == "v2" else v1).thaw(self._at)

    @property
    def is_frozen(self) -> bool:
        """Whether it is stopped by `freeze`, whoever called that; False when it is gone."""
        if "freezer" not in self._at:
            return False
        return v2.is_frozen(self._at) if self._tree.version == "v2" else v1.is_frozen(self._at)

    def _need_freezer(self) -> None:
        if "freezer" not in self._at:
            raise UnavailableError(f"cgroup {self} cannot be frozen", hint=self._tree.missing.get("freezer", ""))

    def allow_devices(self, rules: Sequence[DeviceRule]) -> None:
        """Deny making and opening every device but `rules`, in this cgroup and all below, from the next open on.

        Call it before there are cgroups below (v1 demands it).

        Raises:
            UnavailableError: devices cannot be controlled on this host.
            OSError: the kernel refused.
        """
        if "devices" not in self._at:
            raise UnavailableError(
                f"devices of cgroup {self} cannot be controlled",
                hint=self._tree.missing.get("devices", ""),
            )
        (v2 if self._tree.version == "v2" else v1).allow_devices(self._at, rules)

    def children(self) -> tuple[str, ...]:
        """The names of the cgroups directly below, in any hierarchy."""
        names: set[str] = set()
        for directory in self.dirs:
            if os.path.isdir(directory):
                with os.scandir(directory) as entries:
                    names.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return tuple(sorted(names))

    def exists(self) -> bool:
        """Whether any of its directories is there."""
        return any(os.path.isdir(directory) for directory in self.dirs)

    def remove(self, timeout: float = 0.0) -> bool:
        """Remove this cgroup and all below it; the kernel refuses while processes are there.

        Args:
            timeout: seconds to try for; 0 is one try.

        Returns:
            Whether it is gone; True also when it was gone before.
        """
        gone = ending.remove(self.dirs, timeout)
        if gone and not self.path:
            self._tree.clean_up()
        return gone


def _inode(directory: str) -> int:
    """Its number, which no later directory of its name has; 0: it is not there. Source: fs/kernfs, cyclic ids."""
    try:
        return os.stat(directory, follow_symlinks=False).st_ino
    except OSError:
        return 0


def _make(dirs: Sequence[str]) -> None:
    """mkdir in every hierarchy; the first decides which of two callers makes it."""
    for index, directory in enumerate(dirs):
        reached("before cgroup.mkdir", directory)
        try:
            try:
                os.mkdir(directory, 0o755)
            except FileExistsError:
                # In the first it is somebody's. In a later one it is the rest of a removal that was cut short: only
                # an empty one can be removed.
                if index == 0 or not ending.remove((directory,)):
                    raise
                os.mkdir(directory, 0o755)
        except OSError as error:
            ending.remove(dirs[:index])
            raise OSError(error.errno, f"cannot make cgroup {directory}: {error.strerror}") from None
        reached("after cgroup.mkdir", directory)
