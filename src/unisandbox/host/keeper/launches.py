"""Programs that the keeper starts, by way of a launcher: it does not fork itself. Standard library only.

The launcher (native/launch/launch.c) is a few kB and is started by posix_spawn, which copies no page tables. It makes
the process that becomes the program, a child of ours born in its cgroup. Orders and answers are in a memory file that
is shared with it, so what became of it can be read at any time and whoever was killed; and a pipe ends when the program
runs or cannot. The keeper waits for neither: entering a cgroup or a directory may take long.
"""

from __future__ import annotations

import errno
import os
import resource
import struct

from unisandbox.host import sealed
from unisandbox.host.keeper import birth

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MACHINES = ("x86_64", "aarch64")

# struct order of native/launch/launch.c.
_ORDER = struct.Struct("=2I 4i i 4i 5I 2Q")
_ANSWER = struct.Struct("=4i")
_ANSWER_AT = 8
_MAGIC = 0x484E554C
_VERSION = 1
_STAGES = {1: "mounts", 2: "fds", 3: "cgroup", 4: "cwd", 5: "exec"}


def binary_path(machine: str | None = None) -> str:
    """Where the package has the launcher for `machine` (as `uname -m` says; None: this one)."""
    return os.path.join(os.path.dirname(__file__), "bin", f"launch-{machine or os.uname().machine}")


class Program:
    """What `spawn` was asked to start."""

    __slots__ = ("argv", "cgroup_procs", "cwd", "env", "mounts")

    def __init__(
        self, argv: list[str], env: dict[str, str], cwd: str, cgroup_procs: list[str], mounts: int = -1
    ) -> None:
        if not argv or "/" not in argv[0]:
            raise OSError(errno.EINVAL, f"argv must begin with a path, got {argv[:1]!r}")
        if not cwd.startswith("/"):
            raise OSError(errno.EINVAL, f"cwd must be absolute, got {cwd!r}")
        for name in env:
            if not name or "=" in name:
                raise OSError(errno.EINVAL, f"{name!r:.80} cannot be the name of an environment variable")
        self.argv: list[str] = argv
        self.env: dict[str, str] = env
        self.cwd: str = cwd
        self.cgroup_procs: list[str] = cgroup_procs
        #: The mount namespace that it enters, -1 for the keeper's own.
        self.mounts: int = mounts


class Launcher:
    """The launcher's program, ready to be run.

    It is copied into memory when the keeper begins: so it does not matter with which mode or on what mount the package
    was installed, nor whether it is still there when a program is started. Where memory files may not be executed
    (vm.memfd_noexec) it runs from the package.
    """

    __slots__ = ("_error", "_fd", "_path")

    def __init__(self, path: str | None = None) -> None:
        self._path: str = path or binary_path()
        self._fd: int = -1
        self._error: OSError | None = None
        try:
            self._fd = sealed.sealed_copy(self._path, "unisandbox-launch")
        except PermissionError:
            pass
        except OSError as error:
            self._error = error  # told to whoever wants a program; other requests do not need it

    def run(self, order: int, inherited: Sequence[int]) -> int:
        """Start it with the order behind a memory file; it inherits these fds under their own numbers. Its pid.

        Raises:
            OSError: it cannot be run; says where it should be.
        """
        if self._error is not None:
            raise self._named(self._error)
        path = f"/proc/self/fd/{self._fd}" if self._fd >= 0 else self._path
        # From a number to the same: that it is not close-on-exec, in the child only. Source: POSIX.1-2024, posix_spawn.
        actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (order, *inherited)]
        try:
            return os.posix_spawn(path, ["launch", str(order)], {}, file_actions=actions)
        except OSError as error:
            raise self._named(error) from None

    def close(self) -> None:
        """Close its copy. The keeper has one for its life."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, f"cannot run the launcher {self._path}: {os.strerror(error.errno or errno.EIO)}")

    def silent(self) -> str:
        """The words for one that ended without a trace of a program."""
        return f"the launcher {self._path} ended before it could start a program"


class Launch:
    """A program on its way to run: `prepare`, `start`, then its answers, and `close` in any case."""

    __slots__ = ("_order", "_program", "_writing", "ends", "launcher")

    def __init__(self, program: Program) -> None:
        self._program = program
        self._order = -1
        self._writing = -1
        #: Ends when the program runs, or when it is known why it does not.
        self.ends: int = -1
        #: The pid of the launcher, 0 before it is started. It may be that of the program too.
        self.launcher: int = 0

    def prepare(self) -> None:
        """Open `ends`, to be watched from before the start on.

        Raises:
            OSError: there are no file descriptors left, or no memory.
        """
        self._order = os.memfd_create("unisandbox-order", os.MFD_CLOEXEC)
        self.ends, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def start(self, launcher: Launcher, fds: Sequence[int]) -> None:
        """Start the launcher, with `fds` to be the program's 0..n-1.

        Raises:
            OSError: nothing was started.
        """
        program, writing = self._program, self._writing
        paths = [birth.reach(path) for path in program.cgroup_procs]
        born, cgroup = _open_cgroup(program.cgroup_procs, paths)
        try:
            order = _order(program, paths, fds, (writing, program.mounts, cgroup, born))
            if os.write(self._order, order) != len(order):
                raise OSError(errno.ENOMEM, "no memory for what the program is to be given")
            hidden = birth.hidden_fds() if paths != program.cgroup_procs else []
            inherited = {fd for fd in (*fds, *hidden, writing, program.mounts, cgroup) if fd >= 0}
            self.launcher = launcher.run(self._order, sorted(inherited))
        finally:
            if cgroup >= 0:
                os.close(cgroup)
        os.close(writing)
        self._writing = -1

    def has_ended(self) -> bool:
        """Whether the launch is over, one way or the other."""
        try:
            return os.read(self.ends, 1) == b""
        except BlockingIOError:
            return False

    def pid(self) -> int:
        """The pid of the program's process, 0 when there is none yet, or never was."""
        return int(_ANSWER.unpack(os.pread(self._order, _ANSWER.size, _ANSWER_AT))[0])

    def outcome(self) -> tuple[int, tuple[str, int, str] | None]:
        """The pid, and why the program does not run: stage (see `records.SpawnStage`), errno and message."""
        pid, stage, number, which = _ANSWER.unpack(os.pread(self._order, _ANSWER.size, _ANSWER_AT))
        if not stage:
            return pid, None
        program, name = self._program, _STAGES[stage]
        subject = {
            "mounts": "its mount namespace",
            "fds": "its file descriptors",
            "cgroup": program.cgroup_procs[which] if name == "cgroup" else "",
            "cwd": program.cwd,
            "exec": program.argv[0],
        }[name]
        return pid, (name, number, f"{subject}: {os.strerror(number)}"[:4000])

    def close(self) -> None:
        """Close what it has open here; to be called once."""
        for fd in (self.ends, self._order, self._writing):
            if fd >= 0:
                os.close(fd)
        self.ends = self._order = self._writing = -1


def _open_cgroup(asked: Sequence[str], paths: Sequence[str]) -> tuple[int, int]:
    """The first of these that is in a cgroup2 directory, by its name, and an fd of that; -1, -1 where there is none."""
    for index, path in enumerate(asked):
        if path.endswith("/cgroup.procs"):
            try:
                return index, os.open(os.path.dirname(paths[index]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                break  # the process that writes there will tell what is wrong with it
    return -1, -1


def _order(program: Program, paths: Sequence[str], fds: Sequence[int], places: tuple[int, int, int, int]) -> bytes:
    nofile = birth.inherited_soft_nofile, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    head = _ORDER.pack(
        _MAGIC,
        _VERSION,
        *(0, 0, 0, 0),
        os.getpid(),
        *places,
        *(len(fds), len(paths), len(program.argv), len(program.env)),
        nofile[0] != nofile[1],  # the keeper has raised its own
        # RLIM_INFINITY is -1 to Python.
        *(limit & 0xFFFFFFFFFFFFFFFF for limit in nofile),
    )
    strings = [program.cwd, *paths, *program.argv, *(f"{name}={value}" for name, value in program.env.items())]
    return b"".join((head, struct.pack(f"={len(fds)}i", *fds), os.fsencode("\0".join(strings)), b"\0"))
