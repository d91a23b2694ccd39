"""What a test could leave behind, listed before and after it: processes, mounts, cgroups, fds, files, global state.

Standard library only, and quick (about 1 ms a listing), since every test takes two of them. A difference is given
time to settle, for the kernel frees some things late: the cgroup of a dying process, the socket of an ended one.

What counts as ours when the listing meets the rest of the machine: descendants of this process; processes and
cgroup directories below the cgroup of this test run (see `scope.py`); outside of such a run, whatever carries the
project's name (processes `unisandbox-keep`, cgroup directories, sockets and files `unisandbox*`).

A worker of a run that pytest-xdist shares out leaves out what the whole machine has but once (sockets' names, loop
devices, cgroups elsewhere): whose those are cannot be told there. What has them open is a process, and that is listed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

RUN_PREFIX: Final = "unisandbox-tests-"
"""The name of a test run's own cgroup begins so; the rest is the process id of the run."""

_NAME: Final = "unisandbox"
_SLICE: Final = "unisandbox.slice"  # cgroup v2: where engines of root put their directories; it may stay, empty
_KEEPER_COMM: Final = b"unisandbox-keep"
_PR_GET_CHILD_SUBREAPER: Final = 37

_BOTH_WAYS: Final = frozenset({"fd", "mount", "namespace", "process state", "environment", "device"})
"""Kinds in which a loss is as wrong as a gain: a closed fd, a lost mount of the host, a changed umask.

Of the others (processes, cgroups, files, ...) only gains count: somebody else may tidy up while a test runs."""

_THREADS_OF_OTHERS: Final = ("Trio thread ",)
"""Trio keeps idle worker threads for 10 s after a run, to use them again (trio._core._thread_cache.IDLE_TIMEOUT)."""

_VOLATILE_ENVIRONMENT: Final = frozenset({"PYTEST_CURRENT_TEST"})

_STATUS_FIELDS: Final = re.compile(
    rb"^(Umask|Uid|Gid|Groups|SigBlk|SigIgn|SigCgt|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):.*$",
    re.MULTILINE,
)

_SIGNALS_OF_OTHERS: Final = 1 << (signal.SIGALRM - 1) | 1 << 31 | 1 << 32
"""Signals 32 and 33 are glibc's, which takes them with the first thread. SIGALRM is pytest-timeout's in every test."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Inventory:
    """One listing. `things` maps a kind ("process", "mount", "fd", ...) to its members and how often each is there."""

    things: Mapping[str, Counter[str]]

    @classmethod
    def take(cls) -> Inventory:
        """List what is there now. Opens nothing that stays open and changes nothing."""
        own = own_cgroups()
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        cgroups = Counter(_cgroup_directories(own, elsewhere=alone))
        return cls(
            {
                "process": Counter(_processes(own, cgroups)),
                "cgroup": cgroups,
                "hidden cgroup directory": Counter(_hidden_below_mount_points() if alone else ()),
                "mount": Counter(_lines("/proc/self/mounts")),
                "namespace": Counter(_namespaces()),
                "unix socket": Counter(_sockets() if alone else ()),
                "fd": Counter(_descriptors()),
                "thread": Counter(_threads()),
                "file": Counter(_files()),
                "loop device": Counter(_loop_devices() if alone else ()),
                "device": Counter(_devices()),
                "process state": Counter(_process_state()),
                "environment": Counter(f"{k}={v}" for k, v in os.environ.items() if k not in _VOLATILE_ENVIRONMENT),
            }
        )

    def diff(self, after: Inventory) -> list[str]:
        """What `after` has that this listing had not, and what it lost: one readable line each, empty when equal."""
        found: list[str] = []
        for kind, before in self.things.items():
            now = after.things[kind]
            if before == now:
                continue
            found += [f"left behind: {kind} {_explain(kind, item)}" for item in (now - before).elements()]
            if kind in _BOTH_WAYS:
                found += [f"gone: {kind} {item}" for item in (before - now).elements()]
        return found


def settle(before: Inventory, timeout: float = 10.0, *, kind: str = "") -> list[str]:
    """Wait until nothing differs from `before`.

    Args:
        before: the listing to come back to.
        timeout: seconds; how long the kernel may take to free things.
        kind: look only for what is left of this ("process", say); empty: for all.

    Returns:
        The differences that stayed, as of `Inventory.diff`; empty when all is as before.
    """

    def differences() -> list[str]:
        return [line for line in before.diff(Inventory.take()) if not kind or line.startswith(f"left behind: {kind} ")]

    deadline, pause = time.monotonic() + timeout, 0.001
    left = differences()
    if left:
        gc.collect()  # an exception's traceback in a reference cycle may hold the fds of frames that have ended
    while left and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
        left = differences()
    return left


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except FileNotFoundError:  # /proc/net/unix is missing where the kernel has no unix sockets to show
        return []


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


# devices

# Those of the host that sandboxes see as theirs: none may be taken from it.
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def _devices() -> Iterator[str]:
    for name in _DEVICES:
        try:
            status = os.stat(f"/dev/{name}")
        except FileNotFoundError:
            continue
        yield f"/dev/{name} of {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):o}"


# cgroups


def _hierarchies() -> dict[str, str]:
    """Mount point of every cgroup hierarchy, by its controllers as in /proc/self/cgroup ("" is version 2)."""
    global _hierarchies_cache  # noqa: PLW0603 - hierarchies do not come and go while tests run; 10 us instead of 200
    if _hierarchies_cache is None:
        found: dict[str, str] = {}
        for line in _lines("/proc/self/mounts"):
            _, where, kind, options = line.split(" ")[:4]
            if kind == "cgroup2":
                found.setdefault("", where)
            elif kind == "cgroup":
                found.setdefault(where.rsplit("/", 1)[-1] if "name=" not in options else _named(options), where)
        _hierarchies_cache = found
    return _hierarchies_cache


_hierarchies_cache: dict[str, str] | None = None


def _named(options: str) -> str:
    return next(option for option in options.split(",") if option.startswith("name="))


def own_cgroups() -> dict[str, str]:
    """The absolute directory of this process in every mounted hierarchy, by its mount point."""
    mounted = _hierarchies()
    own: dict[str, str] = {}
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        where = mounted.get(controllers)
        if where is None:  # co-mounted controllers ("cpu,cpuacct") may be mounted under another order of their names
            where = next(
                (m for c, m in mounted.items() if c and set(c.split(",")) == set(controllers.split(","))), None
            )
        if where is not None:
            own[where] = where + path.rstrip("/")
    return own


def _is_run(path: str) -> bool:
    """Whether this is the cgroup of a test run, so that all that is in it and below it is the run's."""
    return path.rsplit("/", 1)[-1].startswith(RUN_PREFIX)


def _is_named(name: str) -> bool:
    return name.startswith(_NAME) and not name.startswith(RUN_PREFIX) and name != _SLICE


def _cgroup_directories(own: Mapping[str, str], *, elsewhere: bool) -> Iterator[str]:
    for where, path in own.items():
        for child in _subdirectories(path):
            if _is_run(path) or (elsewhere and _is_named(child)):
                yield from _tree(f"{path}/{child}")
        for above in _above(path, where) if elsewhere else ():
            for child in _subdirectories(above):
                if child.startswith(f"{_NAME}-") and not child.startswith(RUN_PREFIX):
                    yield from _tree(f"{above}/{child}")
        for child in _subdirectories(f"{where}/{_SLICE}"):
            yield from _tree(f"{where}/{_SLICE}/{child}")


def _above(path: str, where: str) -> Iterator[str]:
    """Cgroups above that of this process where engines may have put theirs: the top, on v2 also what is between.

    There an ordinary user's are in the nearest subtree that was delegated to him and holds no processes.
    """
    unified = os.path.exists(f"{where}/cgroup.controllers")
    while path != where:
        path = os.path.dirname(path)
        if unified or path == where:
            yield path


def _subdirectories(path: str) -> list[str]:
    try:
        # kernfs counts subdirectories in st_nlink: two says that there are none, ten times quicker than a listing
        if os.stat(path).st_nlink == 2:
            return []
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # ended meanwhile, or not for our eyes
        return []


def _tree(path: str) -> Iterator[str]:
    if os.path.isdir(path):
        yield path
        for child in _subdirectories(path):
            yield from _tree(f"{path}/{child}")


def _hidden_below_mount_points() -> Iterator[str]:
    """Directories that lie under the mount points of hybrid hosts, where nobody sees them.

    crun makes one per container under the mount point of a cgroup2 tree that was unmounted before it ran. A detached
    copy of the mount above (open_tree) shows the plain directories; it is made once and kept open.
    """
    above = _view_above_cgroups()
    if above is None:
        return
    directory, names = above
    for name in names:
        for child in _subdirectories(f"/proc/self/fd/{directory}/{name}"):
            yield f"{name}/{child}"


_view: tuple[int, tuple[str, ...]] | None = None
_view_tried = False


def _view_above_cgroups() -> tuple[int, tuple[str, ...]] | None:
    global _view, _view_tried  # noqa: PLW0603 - one detached mount for the process: making it costs 1 ms, dropping it 10
    if _view_tried:
        return _view
    _view_tried = True
    names = tuple(where.rsplit("/", 1)[-1] for where in _hierarchies().values() if where.count("/") == 4)
    if names and os.geteuid() == 0:
        from unisandbox.host.syscalls import AT_FDCWD, OPEN_TREE_CLOEXEC, OPEN_TREE_CLONE, open_tree

        try:
            _view = (open_tree(AT_FDCWD, "/sys/fs/cgroup", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), names)
        except OSError:  # not permitted in this container: then nothing that runs here could hide anything either
            _view = None
    return _view


# processes


def _processes(own: Mapping[str, str], cgroups: Mapping[str, int]) -> Iterator[str]:
    pids = set(_descendants(os.getpid()))
    of_run = [path for path in own.values() if _is_run(path)]
    for directory in [*cgroups, *of_run]:
        try:
            pids.update(int(pid) for pid in _read(f"{directory}/cgroup.procs").split())
        except OSError:  # removed meanwhile; or a threaded cgroup, which has no processes of its own
            continue
    if not of_run:
        pids.update(_keepers())
    pids.discard(os.getpid())
    for pid in pids:
        try:
            stat = _read(f"/proc/{pid}/stat")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        comm = stat[stat.index(b"(") + 1 : stat.rindex(b")")].decode(errors="replace")
        yield f"{pid} started {stat[stat.rindex(b')') + 2 :].split()[19].decode()} {comm}"


def _descendants(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        children = [int(child) for tid in threads for child in _read(f"/proc/{pid}/task/{tid}/children").split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield child
        yield from _descendants(child)


def _keepers() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if _read(f"/proc/{name}/comm").rstrip() == _KEEPER_COMM:
                    yield int(name)
            except (FileNotFoundError, ProcessLookupError):
                continue


def _namespaces() -> set[str]:
    """The namespaces of all threads of this process: a worker thread that has unshared stays so and is used again."""
    found: set[str] = set()
    for tid in os.listdir("/proc/self/task"):
        try:
            found.update(
                os.readlink(f"/proc/self/task/{tid}/ns/{name}") for name in os.listdir(f"/proc/self/task/{tid}/ns")
            )
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    return found


def _threads() -> Iterator[str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for tid in os.listdir("/proc/self/task"):
        name = names.get(int(tid))
        if name is None:
            try:
                name = _read(f"/proc/self/task/{tid}/comm").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
            if name.startswith(_tolerated):
                continue
            name += " (without a Python name)"
        if not name.startswith(_THREADS_OF_OTHERS):
            yield f"{tid} {name}"


@contextmanager
def tolerating(threads: Iterable[str]) -> Iterator[None]:
    """Within the block threads without a Python name, whose name for the kernel begins so, are not listed."""
    global _tolerated  # noqa: PLW0603 - tests come one after the other, and list in many places
    before, _tolerated = _tolerated, tuple(threads)
    try:
        yield
    finally:
        _tolerated = before


_tolerated: tuple[str, ...] = ()


def _descriptors() -> Iterator[str]:
    kept = None if _view is None else str(_view[0])
    for number in os.listdir("/proc/self/fd"):
        if number != kept:
            try:
                yield os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:  # the directory that listdir had open
                continue


def _process_state() -> Iterator[str]:
    yield f"cwd {os.getcwd()}"
    yield f"hostname {os.uname().nodename}"
    yield f"oom_score_adj {_read('/proc/self/oom_score_adj').decode().strip()}"
    for match in _STATUS_FIELDS.finditer(_read("/proc/self/status")):
        name, value = match.group().decode().split(":", 1)
        yield (
            f"{name} {int(value, 16) & ~_SIGNALS_OF_OTHERS:x}"
            if name in {"SigCgt", "SigIgn"}
            else f"{name} {value.strip()}"
        )
    for line in _read("/proc/self/limits").decode().splitlines()[1:]:
        yield f"limit {line}"
    for number in signal.valid_signals():
        if number != signal.SIGALRM:
            yield f"signal {int(number)} {signal.getsignal(number)!r}"
    subreaper = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(subreaper), 0, 0, 0)
    yield f"child subreaper {subreaper.value}"


# files, sockets and devices


def _sockets() -> Iterator[str]:
    for line in _lines("/proc/net/unix"):
        if _NAME in line:
            yield line.rsplit(" ", 1)[-1]


def _files() -> Iterator[str]:
    for place in {
        "/run",
        "/dev/shm",
        "/var/lib",
        "/var/tmp",
        tempfile.gettempdir(),
        os.environ.get("XDG_RUNTIME_DIR", "/run"),
    }:
        try:
            with os.scandir(place) as entries:
                found = [entry for entry in entries if entry.name.startswith(_NAME)]
        except OSError:  # a place that this machine has not, or that is not for our eyes
            continue
        for entry in found:
            yield from _two_levels(entry)


def _two_levels(entry: os.DirEntry[str]) -> Iterator[str]:
    """The entry and what is in it. An empty directory is no leftover: engines share the one above theirs."""
    if not entry.is_dir(follow_symlinks=False):
        yield entry.path
        return
    try:
        with os.scandir(entry.path) as inside:
            yield from (child.path for child in inside)
    except (FileNotFoundError, PermissionError):
        return


def _loop_devices() -> Iterator[str]:
    try:
        devices = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    except FileNotFoundError:  # no sysfs in this container
        return
    for name in devices:
        try:
            yield f"{name} {_read(f'/sys/block/{name}/loop/backing_file').decode(errors='replace').strip()}"
        except OSError:  # not attached
            continue


def _explain(kind: str, item: str) -> str:
    """The item, with what helps to find who made it."""
    if kind == "process":
        pid = item.split(" ", 1)[0]
        try:
            command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")[:300]
            return f"{item}: {command} (state {_read(f'/proc/{pid}/stat').rsplit(b') ', 1)[1][:1].decode()})"
        except (OSError, IndexError):  # ended while we looked
            return item
    if kind == "fd":
        numbers = [n for n in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}")]
        same = [n for n in numbers if _link(n) == item]
        return f"{item} (number {', '.join(same) or 'closed meanwhile'})"
    return item


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""


def main() -> None:
    """Print a listing, for a look by hand: python -m unisandbox.conformance.inventory."""
    for kind, members in Inventory.take().things.items():
        for item, times in sorted(members.items()):
            sys.stdout.write(f"{kind}: {item}{f' x{times}' if times > 1 else ''}\n")


@contextmanager
def leaves_nothing_behind() -> Iterator[None]:
    """Raise AssertionError when after the block, and some time to settle, the machine differs from before it."""
    before = Inventory.take()
    yield
    left = settle(before)
    assert not left, "after this test things differ from before:\n  " + "\n  ".join(left)


if __name__ == "__main__":
    main()
