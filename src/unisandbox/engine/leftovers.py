"""What engines have left on this host that nobody will clean away any more: found by its mark, removed when told to.

Everything that an engine makes carries its id. An engine lives as long as its state directory is locked, which its
keeper does; a link in the runtime directory leads from the id to that directory. What can be judged so, and whose
engine is gone, may be removed; on any doubt it is only listed. A directory of records that a user has chosen is never
touched: an engine that is opened on it takes over or cleans up what they describe.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

import attrs

from unisandbox.api import BackendError, FailedPreconditionError, short_name
from unisandbox.engine import durable
from unisandbox.engine.records import RecordStore
from unisandbox.engine.state import (
    LARGE_FILES,
    POINTER,
    SANDBOXES,
    TEMPORARY_PREFIX,
    end_leases,
    has_records,
    is_engine_id,
    known_id,
    remove_if_empty,
    runtime_directory,
    unlocked,
)
from unisandbox.host import loop, syscalls
from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import ending
from unisandbox.host.cgroups.hierarchy import read_mounts
from unisandbox.host.keeper import leases
from unisandbox.host.keeper.protocol import LOCK_NAME
from unisandbox.host.removal import remove_tree

Kind = Literal["keeper", "state", "process", "cgroup", "loop", "mount", "image", "directory", "file", "link"]

_MARK: Final = "unisandbox-"
_KEEPER: Final = b"unisandbox-keep"
_SHORT: Final = re.compile(r"[a-z2-7]{10}")
# The second form is a node of a loop device's that lives for the time of one open (host/loop.py).
_IMAGE: Final = re.compile(r"unisandbox-([a-z2-7]{10})-([a-z2-7]{10})\.img(\.loop\d+)?")
_TEMPORARY: Final = re.compile(re.escape(TEMPORARY_PREFIX) + r"[a-z0-9_]{8}")  # tempfile's alphabet
# Seconds. Opening an engine takes milliseconds from its first directory to the lock.
_YOUNG: Final = 60.0
_KILL_TIME: Final = 5.0
# Gone, or not for our eyes. Anything else, such as a full table of descriptors, must not look like "nothing is there".
_NOT_HERE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENOTDIR, errno.EACCES, errno.EPERM})
# Source: PROC_PID_INIT_INO, include/linux/proc_ns.h: the pid namespace of the machine, from which all are seen.
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC


@attrs.frozen
class Leftover:
    """One thing with our mark that no living engine has.

    Attributes:
        kind: "keeper": one that waits for an owner and has no sandboxes; "state": a state directory with records, whose
            keeper is gone. All else is a thing of an engine that has ended.
        what: which one: a path, or a process's number and name.
        engine_id: whose it was; "" when that is not known, or it was shared.
        why: why it is left over, and if it cannot be removed here, why not and what to do.
        removable: `remove` may be tried.
        state_dir: of its engine, where that is known; an engine can be opened on it.
        paths: the directories of a cgroup in all hierarchies.
        process: pid and start time of a process.
    """

    kind: Kind
    what: str
    engine_id: str
    why: str
    removable: bool = True
    state_dir: str = ""
    paths: tuple[str, ...] = ()
    process: tuple[int, int] = (0, 0)


def find() -> list[Leftover]:
    """Everything of this user's engines that is left over, in an order in which it can be removed. Changes nothing."""
    host = _Host.look()
    found: list[Leftover] = []
    for engine_id in sorted(host.engine_ids()):
        found += host.of_engine(engine_id)
    return [*found, *host.without_engine(), *host.shared()]


def remove(leftover: Leftover) -> None:
    """Remove it, if it still is one: that is looked at again, and no engine can begin with it meanwhile.

    What is gone already is fine.

    Raises:
        FailedPreconditionError: it is not to be removed here, or is in use by now.
        BackendError: it cannot be removed.
    """
    if not leftover.removable:
        raise FailedPreconditionError(f"{leftover.kind} {leftover.what} is not removed: {leftover.why}")
    try:
        with _without_engine(leftover):
            _REMOVE[leftover.kind](leftover)
    except OSError as error:
        raise BackendError(
            f"cannot remove {leftover.kind} {leftover.what} of engine {leftover.engine_id or 'unknown'}:"
            f" {error.strerror or error}"
        ) from error
    remove_if_empty(runtime_directory())


# --- which engines live ---


@attrs.frozen
class _Verdict:
    state: Literal["living", "dead", "unsure"]
    why: str = ""


@attrs.frozen
class _Holder:
    """What the lock file of a state directory says; see the keeper's `_write_lock`."""

    owner: int
    start_time: int
    keeper: int
    policy: str


@attrs.define
class _Engine:
    """What was found under one id; paths."""

    state_dir: str = ""
    temporary: bool = False
    pointer: str = ""
    work_dir: str = ""
    cgroups: list[str] = attrs.field(factory=list)
    images: list[str] = attrs.field(factory=list)
    loops: list[tuple[int, str]] = attrs.field(factory=list)
    mounts: list[str] = attrs.field(factory=list)

    def everything(self) -> Iterator[str]:
        """The paths whose age tells when it was made."""
        yield from filter(None, (self.pointer, self.work_dir))
        yield from self.cgroups
        yield from self.images


@attrs.define
class _Host:
    """One look at this host."""

    runtime: str
    keepers: Mapping[str, Sequence[int]]
    engines: dict[str, _Engine] = attrs.field(factory=dict)
    # Temporary state directories in which no id was written yet.
    unnamed: list[str] = attrs.field(factory=list)

    @classmethod
    def look(cls, *, only_engines: bool = False) -> _Host:
        """Look.

        Args:
            only_engines: which engines there are and live, but not what they have.
        """
        host = cls(runtime_directory(), _keepers())
        host._look_at_runtime()
        if not only_engines:
            host._look_at_files()
            for engine_id, path in _cgroups():
                host._engine(engine_id).cgroups.append(path)
            for engine_id, path in _mounts_below(host.runtime):
                host._engine(engine_id).mounts.append(path)
        return host

    def engine_ids(self) -> Iterable[str]:
        """All that left a trace."""
        return self.engines.keys()

    def _engine(self, engine_id: str) -> _Engine:
        return self.engines.setdefault(engine_id, _Engine())

    def _look_at_runtime(self) -> None:
        if not _is_private(self.runtime):
            return  # what is in there, others may have made
        for entry in _scan(self.runtime):
            name, path = entry.name, entry.path
            if is_engine_id(name) and entry.is_dir(follow_symlinks=False):
                self._engine(name).work_dir = path
            elif name.endswith(POINTER) and is_engine_id(name.removesuffix(POINTER)) and entry.is_symlink():
                engine_id = name.removesuffix(POINTER)
                engine = self._engine(engine_id)
                engine.pointer = path
                target = os.readlink(path)
                if os.path.isabs(target) and _is_private(target) and known_id(target) == engine_id:
                    engine.state_dir = target
                    engine.temporary = self._is_temporary(target)
            elif _TEMPORARY.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                engine_id = known_id(path)
                if engine_id:
                    engine = self._engine(engine_id)
                    engine.state_dir, engine.temporary = path, True
                else:
                    self.unnamed.append(path)

    def _is_temporary(self, path: str) -> bool:
        runtime = os.path.realpath(self.runtime)  # as pointers have it
        return os.path.dirname(path) == runtime and _TEMPORARY.fullmatch(os.path.basename(path)) is not None

    def _look_at_files(self) -> None:
        places = {LARGE_FILES, *(engine.state_dir for engine in self.engines.values() if engine.state_dir)}
        for place in sorted(places):
            for entry in _scan(place):
                match = _IMAGE.fullmatch(entry.name)
                # A file, or a node of a block device: neither a directory nor a link.
                if match and (entry.is_file(follow_symlinks=False) or match[3]) and not entry.is_symlink():
                    self._engine(match[1]).images.append(entry.path)
        if os.geteuid() == 0:
            for number, path in loop.attached():
                match = _IMAGE.fullmatch(os.path.basename(path))
                if match and os.path.dirname(path) in places:
                    self._engine(match[1]).loops.append((number, path))

    def verdict(self, engine_id: str) -> _Verdict:
        """Whether an engine lives."""
        engine = self._engine(engine_id)
        if engine_id in self.keepers:
            return _Verdict("living")
        if engine.state_dir:
            return _verdict_of_directory(engine.state_dir)
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
            return _Verdict(
                "unsure",
                "its state directory is not known here, and a keeper in another pid namespace could not be seen;"
                " look again from the host",
            )
        if any(map(_is_young, engine.everything())):
            return _Verdict("unsure", f"it changed within the last {_YOUNG:g} s; look again later")
        return _Verdict("dead", "no keeper of its engine runs")

    # --- what is listed ---

    def of_engine(self, engine_id: str) -> list[Leftover]:
        """What one engine has left; nothing while it lives, but for a keeper that nobody needs."""
        engine = self._engine(engine_id)
        verdict = self.verdict(engine_id)
        if verdict.state == "living":
            return self._idle_keeper(engine_id, engine)
        if verdict.state == "dead" and not engine.temporary and engine.state_dir and has_records(engine.state_dir):
            return [
                *_things(engine_id, _unrecorded(engine_id, engine), verdict),
                Leftover(
                    "state",
                    engine.state_dir,
                    engine_id,
                    f"{verdict.why}; it has records of sandboxes. Open an engine on it, which takes them over or"
                    " cleans up after them",
                    removable=False,
                    state_dir=engine.state_dir,
                ),
            ]
        return _things(engine_id, engine, verdict)

    def _idle_keeper(self, engine_id: str, engine: _Engine) -> list[Leftover]:
        holder = _holder(engine.state_dir) if engine.state_dir else None
        if holder is None or holder.owner or holder.policy != "keep" or has_records(engine.state_dir):
            return []
        if holder.keeper not in self.keepers.get(engine_id, ()):
            return []
        why = "it waits for an owner and has no sandboxes. Open an engine on its state directory and close it"
        return [Leftover("keeper", str(holder.keeper), engine_id, why, removable=False, state_dir=engine.state_dir)]

    def without_engine(self) -> list[Leftover]:
        """Temporary state directories that never came to an engine."""
        found = []
        for path in self.unnamed:
            verdict = _verdict_of_directory(path)
            if verdict.state != "living":
                removable = verdict.state == "dead"
                found.append(Leftover("directory", path, "", verdict.why, removable=removable, state_dir=path))
        return found

    def shared(self) -> list[Leftover]:
        """The file of leased numbers, when nobody leases any."""
        path = os.path.join(self.runtime, leases.NAME)
        if not _is_private(self.runtime) or not _is_unlocked(path):
            return []
        return [Leftover("file", path, "", "no engine leases numbers in it")]


def _verdict_of_directory(path: str) -> _Verdict:
    with unlocked(path, wait=0.0) as unused:
        if not unused:
            return _Verdict("living")
        holder = _holder(path)
    if holder is None:
        if _is_young(path):
            return _Verdict(
                "unsure", f"it changed within the last {_YOUNG:g} s and had no keeper yet; look again later"
            )
        return _Verdict("dead", "its engine never had a keeper")
    if holder.owner and _lives(holder.owner, holder.start_time):
        return _Verdict(
            "unsure",
            f"its keeper has ended, but process {holder.owner}, which opened the engine, lives: it cleans up when it"
            " closes the engine or ends",
        )
    return _Verdict("dead", "its engine's process and keeper have ended")


def _holder(state_dir: str) -> _Holder | None:
    """Who had the lock last; None when nobody ever had."""
    try:
        said = json.loads(durable.read(os.path.join(state_dir, LOCK_NAME), 4096)[0])
        numbers = (said["owner"], said["start_time"], said["keeper"])
        if not all(type(number) is int for number in numbers):
            return None
        return _Holder(*numbers, str(said["policy"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, durable.NotARegularFileError, durable.TooLargeError):
        return None  # killed before it was written: there was no keeper


def _keepers() -> dict[str, list[int]]:
    """The keepers of this user's engines and what they have forked, by engine id, as far as they can be seen."""
    found: dict[str, list[int]] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
                if file.read(64).rstrip(b"\n") != _KEEPER or os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                    continue
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                argument = file.read().rstrip(b"\0").rpartition(b"\0")[2]
            engine_id = os.path.basename(json.loads(argument)["workdir"])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except (ValueError, KeyError, TypeError):
            continue  # it has only the name of one
        found.setdefault(engine_id, []).append(int(pid))
    return found


def _lives(pid: int, start_time: int) -> bool:
    """Whether that process lives; one that nobody has reaped does not."""
    try:
        fd = pidfds.open_verified(pid, start_time)
    except ProcessLookupError:
        return False
    try:
        return not _has_ended(fd, 0.0)
    finally:
        os.close(fd)


def _has_ended(pidfd: int, wait: float) -> bool:
    """Whether a process has ended, after up to `wait` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait * 1000))


# --- what an engine has ---


def _things(engine_id: str, engine: _Engine, verdict: _Verdict) -> list[Leftover]:
    """Everything of one engine, processes first and the way to its state last."""
    listed: list[tuple[Kind, str, tuple[str, ...], tuple[int, int]]] = []
    # One cgroup has a directory in every hierarchy.
    for name in sorted(set(map(os.path.basename, engine.cgroups))):
        paths = tuple(path for path in engine.cgroups if os.path.basename(path) == name)
        listed += [("process", f"{pid} ({comm})", paths, (pid, started)) for pid, started, comm in _members(paths)]
        listed.append(("cgroup", paths[0], paths, (0, 0)))
    listed += [("loop", f"/dev/loop{number} on {path}", (), (0, 0)) for number, path in engine.loops]
    # Mounts may lie upon each other, and in each other.
    listed += [("mount", path, (), (0, 0)) for path in reversed(engine.mounts)]
    listed += [("image", path, (), (0, 0)) for path in engine.images]
    directories = [engine.work_dir, engine.state_dir if engine.temporary else ""]
    listed += [("directory", path, (), (0, 0)) for path in directories if path]
    if engine.pointer:
        listed.append(("link", engine.pointer, (), (0, 0)))
    return [
        Leftover(
            kind,
            what,
            engine_id,
            verdict.why,
            removable=verdict.state == "dead",
            state_dir=engine.state_dir,
            paths=paths,
            process=process,
        )
        for kind, what, paths, process in listed
    ]


def _unrecorded(engine_id: str, engine: _Engine) -> _Engine:
    """What an engine with records has, and none of them speaks of."""
    found = RecordStore(os.path.join(engine.state_dir, SANDBOXES), durable=False).read_all(repair=False)
    if found.damaged:
        return _Engine(engine.state_dir)  # any of it may be what a damaged one spoke of
    recorded = {short_name(engine_id, record.sandbox_id) for record in found.records}
    return _Engine(
        engine.state_dir,
        cgroups=[
            f"{cgroup}/{name}"
            for cgroup in engine.cgroups
            for name in _subdirectories(cgroup)
            if _SHORT.fullmatch(name) and name not in recorded
        ],
        images=[path for path in engine.images if _short_of(path) not in recorded],
        loops=[(number, path) for number, path in engine.loops if _short_of(path) not in recorded],
    )


def _short_of(image: str) -> str:
    match = _IMAGE.fullmatch(os.path.basename(image))
    return match[2] if match else ""


def _cgroups() -> Iterator[tuple[str, str]]:
    """Every cgroup of this user with the name of an engine's, wherever it is, with the engine's id."""
    seen: set[tuple[int, int]] = set()
    for mount in read_mounts():
        if not os.path.exists(f"{mount.directory}/cgroup.procs"):
            continue  # hidden under another mount
        left = [mount.directory]
        while left:
            directory = left.pop()
            for name in _subdirectories(directory):
                path, engine_id = f"{directory}/{name}", name.removeprefix(_MARK)
                if engine_id == name or not is_engine_id(engine_id):
                    left.append(path)
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = os.lstat(path)
                    identity = (status.st_dev, status.st_ino)
                    # A hierarchy may be mounted twice.
                    if status.st_uid == os.geteuid() and identity not in seen:
                        seen.add(identity)
                        yield engine_id, path


def _members(cgroups: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Pid, start time and name of the processes in and below cgroups."""
    for pid in sorted(set().union(*map(ending.pids, cgroups)) - {0}):  # 0: not in our pid namespace
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                yield pid, pidfds.start_time(pid), file.read().rstrip("\n")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended


def _mounts_below(runtime: str) -> Iterator[tuple[str, str]]:
    """What is mounted in our mount namespace in the work directories, with the engine's id, in order of mounting."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
            engine_id = path.removeprefix(f"{runtime}/").partition("/")[0]
            if path.startswith(f"{runtime}/") and is_engine_id(engine_id):
                yield engine_id, path


# --- looking without being led astray ---


def _scan(path: str) -> list[os.DirEntry[str]]:
    """The entries of a directory that belong to this user; none when it is gone, or not for our eyes."""
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        found.append(entry)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    return found


def _subdirectories(cgroup: str) -> list[str]:
    """The names of the cgroups directly below one, whoever they belong to."""
    try:
        # kernfs counts sub-directories in the link count: most cgroups have none and need not be read.
        if os.lstat(cgroup).st_nlink == 2:
            return []
        with os.scandir(cgroup) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return []


def _is_private(path: str) -> bool:
    """Whether it is a directory that this user alone can write, and no link."""
    try:
        status = os.lstat(path)
    except OSError:  # missing, or not for our eyes
        return False
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others


def _is_young(path: str) -> bool:
    try:
        return time.time() - os.lstat(path).st_mtime < _YOUNG
    except FileNotFoundError:
        return False


def _is_unlocked(path: str) -> bool:
    """Whether it is a file of ours that nobody has locked a part of."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # missing, a link, not for our eyes
        return False
    try:
        status = os.fstat(fd)
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not leases.any_held(fd)
    finally:
        os.close(fd)


# --- removing ---


@contextlib.contextmanager
def _without_engine(leftover: Leftover) -> Iterator[None]:
    """Nobody has it, and no engine can be opened with it while this lasts.

    Raises:
        FailedPreconditionError: an engine has it.
    """
    if leftover.kind == "file":
        yield  # what removes it asks for the locks itself
        return
    host = _Host.look(only_engines=True)
    in_use = FailedPreconditionError(
        f"{leftover.kind} {leftover.what} is not removed: its engine has begun to live, or may have", hint="Look again."
    )
    if leftover.engine_id:
        state_dir = host.engines.get(leftover.engine_id, _Engine()).state_dir
        # Without a state directory nothing but the keeper's absence has told that it is dead, and then it was old.
        dead = host.verdict(leftover.engine_id).state == "dead" if state_dir else leftover.engine_id not in host.keepers
    else:
        state_dir = leftover.what
        dead = not known_id(state_dir)
    if not dead:
        raise in_use
    if not state_dir:
        yield
        return
    with unlocked(state_dir, wait=0.0) as unused:
        if not unused:
            raise in_use
        yield


def _end_process(leftover: Leftover) -> None:
    pid, start_time = leftover.process
    try:
        fd = pidfds.open_verified(pid, start_time)
    except ProcessLookupError:
        return
    try:
        # While the pidfd is held its pid is nobody else's: only one that is in the cgroup now is ours.
        if not any(pid in ending.pids(path) for path in leftover.paths):
            return
        pidfds.send_signal(fd, signal.SIGKILL)
        if not _has_ended(fd, _KILL_TIME):
            raise OSError(errno.ETIMEDOUT, f"it did not end within {_KILL_TIME:g} s")
    finally:
        os.close(fd)


def _end_cgroup(leftover: Leftover) -> None:
    ending.kill(leftover.paths, _KILL_TIME)
    if not ending.remove(leftover.paths, _KILL_TIME):
        raise OSError(errno.EBUSY, f"its processes did not end within {_KILL_TIME:g} s")


def _detach_loop(leftover: Leftover) -> None:
    device, _, path = leftover.what.partition(" on ")
    number = int(device.removeprefix("/dev/loop"))
    if (number, path) in set(loop.attached()):
        loop.detach(number, path)


def _unmount(leftover: Leftover) -> None:
    try:
        syscalls.umount(leftover.what, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:  # no mount (any more)
            raise


def _unlink(leftover: Leftover) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(leftover.what)


_REMOVE: Final[Mapping[Kind, Callable[[Leftover], None]]] = {
    "process": _end_process,
    "cgroup": _end_cgroup,
    "loop": _detach_loop,
    "mount": _unmount,
    "image": _unlink,
    "directory": lambda leftover: remove_tree(leftover.what),
    "file": lambda leftover: end_leases(os.path.dirname(leftover.what)),
    "link": _unlink,
}
