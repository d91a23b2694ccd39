"""The bare tools, given the same work: crun, runc, bwrap, podman, each with the config that a sandbox of ours has.

What is the same for crun and runc: the user, pid, mount, ipc, uts, network and cgroup namespaces, the tree of this
machine's programs (built once, by the same operations), /proc, /sys, /dev and its pts, shm and mqueue, a bounded tmpfs
for /tmp, /run and /home, masked and read-only paths, capabilities, limits, device rules, no_new_privs and the seccomp
profile. What differs is what a plain user of crun has: it makes the namespaces itself instead of joining pins, compiles
the seccomp profile itself from JSON, makes and removes the cgroup itself, and the program is PID 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, cast

import attrs

from benchmarks import spawner
from unisandbox.api import SandboxSpec
from unisandbox.backends.runc.rootfs import Layer, host_tree
from unisandbox.host import seccomp
from unisandbox.host.cgroups import Cgroups, ending, hierarchy
from unisandbox.oci.bundle import Bundle, OciMount, OciNamespace
from unisandbox.oci.features import RuntimeProgram

Seccomp = Literal["json", "bpf"]

# A range of ids that nobody leases: below ours (see `backends.runc.making`), above what useradd gives.
_FIRST_ID: Final = 0x6FFE_0000
_IDS: Final = 65536
_SHM_BYTES: Final = 64 << 20
_TMPFS: Final = ("nosuid", "nodev")
_ENV: Final = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")
_SWAP_IS_COUNTED: Final = ("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "/sys/fs/cgroup/cgroup.controllers")
_SCRATCH: Final = "/run"
# The process says whose it is: see `_sweep`.
_OURS: Final = re.compile(r"unisandbox-bench-([0-9]+)-.*")
_READY_SECONDS: Final = 10.0
_CGROUP_SECONDS: Final = 2.0


class ToolFailed(Exception):
    """A bare tool did not do what it was asked to; the text says what it wrote."""


def config(
    program: RuntimeProgram, tree: str, argv: Sequence[str], *, how: Seccomp = "json", terminal: bool = False
) -> str:
    """The config.json of a plain user who wants what a default sandbox is."""
    spec = SandboxSpec()
    limits = spec.resources
    layer = Layer.of(limits)
    sized = (*_TMPFS, f"size={layer.size}")
    bundle = Bundle(
        oci_version=program.oci_version,
        args=argv,
        env=_ENV,
        root=tree,
        root_readonly=True,
        mounts=[
            OciMount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
            OciMount("/dev", "tmpfs", "tmpfs", ("nosuid", "noexec", "strictatime", "mode=755", "size=65536k")),
            OciMount(
                "/dev/pts",
                "devpts",
                "devpts",
                ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            ),
            OciMount("/dev/shm", "tmpfs", "shm", (*_TMPFS, "noexec", "mode=1777", f"size={_SHM_BYTES}")),
            OciMount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
            OciMount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
            OciMount("/tmp", "tmpfs", "tmpfs", (*sized, "mode=1777")),
            OciMount("/run", "tmpfs", "tmpfs", (*sized, "mode=755")),
            OciMount("/home", "tmpfs", "tmpfs", (*sized, "mode=755")),
        ],
        namespaces=[OciNamespace(kind) for kind in ("user", "pid", "mount", "ipc", "uts", "network", "cgroup")],
        ids=([(0, _FIRST_ID, _IDS)], [(0, _FIRST_ID, _IDS)]),
        capabilities=spec.security.capabilities,
        rlimits={"RLIMIT_NOFILE": (limits.nofile or 0, limits.nofile or 0), "RLIMIT_CORE": (0, 0)},
        oom_score_adj=500,
        seccomp=seccomp.DEFAULT.to_oci(os.uname().machine) if how == "json" else None,
        seccomp_bpf=seccomp.compile_bpf(seccomp.DEFAULT) if how == "bpf" else b"",
        terminal=terminal,
    )
    text = json.loads(bundle.to_json())
    text["hostname"] = "bench"
    memory = {"limit": limits.memory}
    if any(os.path.exists(path) for path in _SWAP_IS_COUNTED):
        memory["swap"] = limits.memory  # memory and swap together: none
    text["linux"]["resources"] |= {"memory": memory, "pids": {"limit": limits.pids}}
    return json.dumps(text)


@attrs.frozen
class Tool:
    """How to run a program once with a bare tool.

    Attributes:
        label: what the table calls it.
        argv: the command; "ID" in it becomes a new name each time.
        opened: a file that is its descriptor 3, or "".
    """

    label: str
    argv: tuple[str, ...]
    opened: str = ""


class Bare:
    """The bare tools that this host has; a context manager that leaves nothing.

    Args:
        runtimes: the OCI runtimes that this host has.

    Attributes:
        programs: these, by name.
    """

    def __init__(self, runtimes: Sequence[RuntimeProgram]) -> None:
        self.programs: dict[str, RuntimeProgram] = {program.name: program for program in runtimes}
        self._stack = contextlib.ExitStack()
        self._scratch = ""
        self._pid = 0
        self._count = 0
        self._sock: socket.socket

    def __enter__(self) -> Self:
        _sweep()
        # Not below a private temporary directory: root inside is a stranger to the host and walks this path.
        self._scratch = tempfile.mkdtemp(prefix=f"unisandbox-bench-{os.getpid()}-", dir=_SCRATCH)
        self._stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        try:
            self._start()
            self._ask("mounts", root=self._scratch, ops=host_tree("/tree", local=False))
            Path(self._outside(), "filter.bpf").write_bytes(seccomp.compile_bpf(seccomp.DEFAULT))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        # What a runtime leaves of containers that failed: empty directories.
        ending.remove(_cgroups(str(self._pid)), _CGROUP_SECONDS)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hidden = ["/sys/fs/cgroup/unified"] if Cgroups.detect("unisandbox-bench").version == "hybrid" else []
        with theirs:
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, spawner.__file__, self._scratch, *hidden],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
            )
        self._sock = ours
        self._stack.callback(os.waitid, os.P_PID, self._pid, os.WEXITED)
        self._stack.callback(ours.close)

    def _outside(self) -> str:
        return f"/proc/{self._pid}/root{self._scratch}"

    def _ask(self, do: str, **fields: object) -> dict[str, object]:
        self._sock.send(json.dumps({"do": do, **fields}).encode())
        packet = self._sock.recv(spawner.PACKET)
        if not packet:
            raise ToolFailed("the spawner of the bare tools has ended")
        answer = cast("dict[str, object]", json.loads(packet))
        if "error" in answer:
            raise ToolFailed(f"{do}: {answer['error']}")
        return answer

    # --- what can be run ---

    def runtime(
        self, name: str, argv: Sequence[str], *, how: Seccomp = "json", terminal: bool = False, label: str = ""
    ) -> Tool:
        """`crun run` or `runc run` of a program in a container of its own."""
        program = self.programs[name]
        self._count += 1
        bundle = f"{self._scratch}/bundle-{self._count}"
        os.mkdir(f"/proc/{self._pid}/root{bundle}", 0o700)
        text = config(program, f"{self._scratch}/tree", argv, how=how, terminal=terminal)
        Path(f"/proc/{self._pid}/root{bundle}/config.json").write_text(text)
        return Tool(label or f"{name} run", (*self._command(name), "run", "--bundle", bundle, "ID"))

    def _command(self, name: str) -> tuple[str, ...]:
        manager = ("--cgroup-manager=cgroupfs",) if name == "crun" else ()
        return (self.programs[name].path, "--root", f"{self._scratch}/{name}", *manager)

    def bwrap(self, argv: Sequence[str]) -> Tool | None:
        """Bubblewrap over the same tree: it has no cgroups, no devices rules, no masked paths."""
        path = shutil.which("bwrap")
        if path is None:
            return None
        size = str(Layer.of(SandboxSpec().resources).size)
        words = [path, "--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0", "--hostname", "bench"]
        words += ["--cap-drop", "ALL", "--seccomp", "3", "--ro-bind", f"{self._scratch}/tree", "/", "--proc", "/proc"]
        words += ["--dev", "/dev"]
        for place in ("/tmp", "/run", "/home"):
            words += ["--size", size, "--tmpfs", place]
        return Tool("bwrap", (*words, "--", *argv), f"{self._scratch}/filter.bpf")

    def podman(self, argv: Sequence[str]) -> Tool | None:
        """Podman over the same tree, with its own defaults."""
        path = shutil.which("podman")
        if path is None:
            return None
        words = (path, "run", "--rm", "--network=none", "--read-only", "--memory=512m", "--rootfs")
        return Tool("podman run", (*words, f"{self._scratch}/tree", *argv))

    @staticmethod
    def plain(argv: Sequence[str]) -> Tool:
        """The program alone: posix_spawn and waitid."""
        return Tool("plain process", tuple(argv))

    # --- running ---

    def run(self, tool: Tool, *, at_once: int = 1, tty: bool = False) -> tuple[float, int]:
        """Run it, or several at once: seconds to the last end, and the bytes that they wrote.

        Raises:
            ToolFailed: one of them did not end with code 0.
        """
        argvs = [self._named(tool.argv) for _ in range(at_once)]
        answer = self._ask("run", argvs=argvs, tty=tty, open=tool.opened or None)
        codes = cast("list[int]", answer["codes"])
        if any(codes):
            failed = sum(1 for code in codes if code)
            raise ToolFailed(f"{tool.label}: {failed} of {at_once} failed: {str(answer['said']).strip()}")
        return cast("float", answer["seconds"]), cast("int", answer["bytes"])

    def _named(self, argv: Sequence[str]) -> list[str]:
        self._count += 1
        return [f"unisandbox-bench-{self._pid}-{self._count}" if word == "ID" else word for word in argv]

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[str]:
        """A container of that runtime that sleeps; its id."""
        argv = self._named(self.runtime(name, ("/bin/sleep", "infinity")).argv)
        container = argv[-1]
        pid = self._ask("keep", argv=argv)["pid"]
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while True:
                # Neither runtime tells anybody when its container runs.
                try:
                    self.run(self.executed(name, container, ("/bin/true",)))
                    break
                except ToolFailed:
                    if time.monotonic() > deadline:
                        raise
            yield container
        finally:
            with contextlib.suppress(ToolFailed):  # `end` says what matters
                self.run(Tool("kill", (*self._command(name), "kill", container, "KILL")))
            self._ask("end", pid=pid)

    def executed(self, name: str, container: str, argv: Sequence[str], *, tty: bool = False) -> Tool:
        """`crun exec` or `runc exec` in a running container."""
        terminal = ("--tty",) if tty else ()
        return Tool(f"{name} exec", (*self._command(name), "exec", *terminal, container, *argv))


def _cgroups(pid: str) -> list[str]:
    """The cgroups of containers that the spawner with this pid started; "*": any."""
    found = (Path(mount.directory).glob(f"unisandbox-bench-{pid}-*") for mount in hierarchy.read_mounts())
    return [str(path) for paths in found for path in paths]


def _sweep() -> None:
    """End and remove what benchmarks that were killed have left. Others that run now are let alone."""
    cgroups = [path for path in _cgroups("*") if _is_orphan(path)]
    ending.kill(cgroups, _CGROUP_SECONDS)
    ending.remove(cgroups, _CGROUP_SECONDS)
    for path in Path(_SCRATCH).glob("unisandbox-bench-*-*"):
        if _is_orphan(str(path)):
            shutil.rmtree(path, ignore_errors=True)


def _is_orphan(path: str) -> bool:
    found = _OURS.fullmatch(os.path.basename(path))
    # A zombie has no program any more.
    return found is not None and not os.path.exists(f"/proc/{found[1]}/exe")
