"""What engines have on this host, living or not: found by its mark, without being led astray by others' files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from unisandbox.engine import temporary
from unisandbox.engine.runtime_directory import POINTER, runtime_directory
from unisandbox.engine.state import LARGE_FILES
from unisandbox.engine.state_files import is_engine_id, known_id
from unisandbox.host import loop
from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import marks
from unisandbox.host.cgroups.hierarchy import read_mounts
from unisandbox.host.keeper.starting import LOCK_BYTES, holder_in

_MARK: Final = "unisandbox-"
_KEEPER: Final = b"unisandbox-keep"
# The second form is a node of a loop device's that lives for the time of one open (host/loop.py), the third a directory
# in the place of an image, where nothing may be mounted.
_IMAGE: Final = re.compile(r"unisandbox-([a-z2-7]{10})-([a-z2-7]{10})\.(?:img(\.loop\d+)?|(files))")
# What is below an engine's cgroup: its sandboxes, by their short names, and what a backend has beside them.
_BELOW: Final = re.compile(r"[a-z2-7]{10}|[a-z]+-[0-9a-f]{8}")
# Gone, or not for our eyes. Anything else, such as a full table of descriptors, must not look like "nothing is there".
_NOT_HERE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENOTDIR, errno.EACCES, errno.EPERM})


@attrs.define
class Traces:
    """What was found under one engine's id; paths."""

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
class HostTraces:
    """One look at this host.

    Attributes:
        runtime: the directory of what does not survive a restart of the machine.
        keepers: pids of the keepers of this user's engines and what they have forked, by engine id.
        engines: traces by engine id.
        unnamed: temporary state directories in which no id was written yet.
        unproven: cgroups that look like an engine's, of which nothing but the name says so.
    """

    runtime: str
    keepers: Mapping[str, Sequence[int]]
    engines: dict[str, Traces] = attrs.field(factory=dict)
    unnamed: list[str] = attrs.field(factory=list)
    unproven: list[str] = attrs.field(factory=list)

    @classmethod
    def look(cls, *, only_engines: bool = False) -> HostTraces:
        """Look.

        Args:
            only_engines: which engines there are and live, but not what they have.
        """
        host = cls(runtime_directory(), _keepers())
        host._look_at_runtime()
        if not only_engines:
            host._look_at_files()
            cgroups = list(engine_cgroups())
            # Where a pointer has the same name, there was such an engine; a keeper removes it when the cgroup is gone.
            proven = {engine_id for engine_id, engine in host.engines.items() if engine.pointer} | host.keepers.keys()
            proven |= {engine_id for engine_id, path in cgroups if marks.is_marked(path)}
            for engine_id, path in cgroups:
                if engine_id in proven:
                    host.of(engine_id).cgroups.append(path)
                elif not _is_anothers(path):
                    host.unproven.append(path)
            for engine_id, path in _mounts_below(host.runtime):
                host.of(engine_id).mounts.append(path)
        return host

    def of(self, engine_id: str) -> Traces:
        """Those of one engine."""
        return self.engines.setdefault(engine_id, Traces())

    def _look_at_runtime(self) -> None:
        if not is_private(self.runtime):
            return  # what is in there, others may have made
        for entry in _scan(self.runtime):
            name, path = entry.name, entry.path
            if is_engine_id(name) and entry.is_dir(follow_symlinks=False):
                self.of(name).work_dir = path
            elif name.endswith(POINTER) and is_engine_id(name.removesuffix(POINTER)) and entry.is_symlink():
                try:
                    target = os.readlink(path)
                except FileNotFoundError:
                    continue  # its engine has just been closed
                engine_id = name.removesuffix(POINTER)
                engine = self.of(engine_id)
                engine.pointer = path
                if os.path.isabs(target) and is_private(target) and known_id(target) == engine_id:
                    engine.state_dir = target
                    engine.temporary = self._is_temporary(target)
            elif temporary.NAME.fullmatch(name) and entry.is_dir(follow_symlinks=False):
                engine_id = known_id(path)
                if engine_id:
                    engine = self.of(engine_id)
                    engine.state_dir, engine.temporary = path, True
                else:
                    self.unnamed.append(path)
        for engine in self.engines.values():
            # In our view it is empty, but where a keeper could have no mount namespace; then the pointer is there, too.
            if engine.work_dir and not engine.pointer and _has_entries(engine.work_dir):
                engine.work_dir = ""

    def _is_temporary(self, path: str) -> bool:
        runtime = os.path.realpath(self.runtime)  # as pointers have it
        return os.path.dirname(path) == runtime and temporary.NAME.fullmatch(os.path.basename(path)) is not None

    def _look_at_files(self) -> None:
        places = {LARGE_FILES, *(engine.state_dir for engine in self.engines.values() if engine.state_dir)}
        for place in sorted(places):
            for entry in _scan(place):
                match = _IMAGE.fullmatch(entry.name)
                if not match or entry.is_symlink():
                    continue
                # A file, or a node of a block device; or that directory.
                is_directory = entry.is_dir(follow_symlinks=False)
                if is_directory if match[4] else entry.is_file(follow_symlinks=False) or match[3]:
                    self.of(match[1]).images.append(entry.path)
        if os.geteuid() == 0:
            for number, path in loop.attached():
                match = _IMAGE.fullmatch(os.path.basename(path))
                if match and os.path.dirname(path) in places:
                    self.of(match[1]).loops.append((number, path))


def short_of(image: str) -> str:
    """Whose a disk image is: the short name of its sandbox; "" when it is none."""
    match = _IMAGE.fullmatch(os.path.basename(image))
    return match[2] if match else ""


def _keepers() -> dict[str, list[int]]:
    """The keepers of this user's engines and what they have forked, by engine id, as far as they can be seen."""
    found: dict[str, list[int]] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
                if file.read(64).rstrip(b"\n") != _KEEPER or os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                    continue
            engine_id = os.path.basename(_argument(int(pid))["workdir"])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except (ValueError, KeyError, TypeError):
            continue  # it has only the name of one
        found.setdefault(engine_id, []).append(int(pid))
    return found


def _argument(pid: int) -> Any:
    """What a keeper was started with; see `host.keeper.server.main`."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return json.loads(file.read().rstrip(b"\0").rpartition(b"\0")[2])


def homeless(keepers: Sequence[int]) -> tuple[int, int] | None:
    """Pid and start time of a keeper that nobody uses, and nobody can reach: its state directory was removed. Or None.

    Args:
        keepers: of one engine, with what they have forked.
    """
    found: list[tuple[int, int]] = []
    for pid in keepers:
        try:
            _, lock, _, state_dir = _argument(pid)["fds"]
            directory = os.stat(f"/proc/{pid}/fd/{state_dir}")
            with open(f"/proc/{pid}/fd/{lock}", "rb", buffering=0) as file:
                holder = holder_in(file.read(LOCK_BYTES))
            if not stat.S_ISDIR(directory.st_mode) or directory.st_nlink or holder.keeper != pid:
                continue  # it is there, or this is a fork of a keeper
            # When the last one of these ends, so does it.
            if not pidfds.lives(holder.owner, holder.start_time) and not _has_clients(pid):
                found.append((pid, pidfds.start_time(pid)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it has ended, or is not for our eyes
    return found[0] if found else None


def _has_clients(keeper: int) -> bool:
    """Whether somebody is connected to a keeper. Source: proc_net(5), /proc/net/unix; 03 is SS_CONNECTED."""
    fds = f"/proc/{keeper}/fd"
    held: set[str] = set()
    for fd in os.listdir(fds):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.add(os.readlink(f"{fds}/{fd}"))
    with open(f"/proc/{keeper}/net/unix", encoding="utf-8", errors="replace") as file:
        for line in file:
            # What has no name has no eighth field.
            fields = line.split(None, 7)
            if len(fields) == 8 and fields[5] == "03" and f"socket:[{fields[6]}]" in held:
                return True
    return False


def engine_cgroups() -> Iterator[tuple[str, str]]:
    """Every cgroup of this user with the name of an engine's, wherever it is, with the engine's id."""
    seen: set[tuple[int, int]] = set()
    for mount in read_mounts():
        if not os.path.exists(f"{mount.directory}/cgroup.procs"):
            continue  # hidden under another mount
        left = [mount.directory]
        while left:
            directory = left.pop()
            for name in subdirectories(directory):
                path, engine_id = f"{directory}/{name}", name.removeprefix(_MARK)
                if engine_id == name or not is_engine_id(engine_id):
                    left.append(path)
                    continue
                # Where it only has such a name there may be engines' below.
                left += [f"{path}/{below}" for below in subdirectories(path) if not _BELOW.fullmatch(below)]
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = os.lstat(path)
                    identity = (status.st_dev, status.st_ino)
                    # A hierarchy may be mounted twice.
                    if status.st_uid == os.geteuid() and identity not in seen:
                        seen.add(identity)
                        yield engine_id, path


def _is_anothers(cgroup: str) -> bool:
    """Whether it only has the name of an engine's cgroup: in that no process is, and below it are sandboxes' alone.

    The name alone says little: "unisandbox-containerd" is one.
    """
    if not all(map(_BELOW.fullmatch, subdirectories(cgroup))):
        return True
    try:
        with open(f"{cgroup}/cgroup.procs", "rb", buffering=0) as file:
            return bool(file.read(1))
    except FileNotFoundError:  # removed meanwhile
        return False


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


def _has_entries(path: str) -> bool:
    try:
        return bool(os.listdir(path))
    except FileNotFoundError:  # removed meanwhile
        return False


def subdirectories(cgroup: str) -> list[str]:
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


def is_private(path: str) -> bool:
    """Whether it is a directory that this user alone can write, and no link."""
    try:
        status = os.lstat(path)
    except OSError:  # missing, or not for our eyes
        return False
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others
