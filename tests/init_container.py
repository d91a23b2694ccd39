"""A container with our init as its PID 1 and nothing else of the project: for the tests of init alone.

A small program makes user, pid, mount, ipc, uts and network namespaces and starts init in them as an OCI runtime
would: control socket as fd 3, init's own program as fd 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio

from unisandbox.host.init import SpawnRequest, Started, ended, open_binary, spawn
from unisandbox.host.null import open_null

FIRST_ID: Final = 1_000_000
"""The host's id of root in the container."""

CAPABILITIES: Final = frozenset(
    {
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    }
)
ATTACKER: Final = CAPABILITIES | {
    "CAP_SYS_PTRACE",
    "CAP_SYS_ADMIN",
    "CAP_SYS_RESOURCE",
    "CAP_NET_ADMIN",
    "CAP_SYS_NICE",
}
PATH: Final = "/usr/local/bin:/usr/bin:/bin"

_LAUNCHER: Final = """
import ctypes, os, resource, sys
control, elf, files, shared, *args = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def must(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
def mount(source, target, kind, flags, data=None):
    must(libc.mount(source, target, kind, ctypes.c_ulong(flags), data), target)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, int(files)), int(files)))
must(libc.unshare(0x1C000000 | 0x60020000), "unshare")
print("unshared", flush=True)
sys.stdin.readline()
os.setgroups([]); os.setgid(0); os.setuid(0)
pid = os.fork()
if pid == 0:
    mount(b"none", b"/", None, 1 << 18 | 16384)
    mount(b"proc", b"/proc", b"proc", 14)
    mount(b"tmpfs", b"/tmp", b"tmpfs", 6, b"mode=1777")
    mount(b"devpts", b"/dev/pts", b"devpts", 10, b"newinstance,ptmxmode=0666,mode=0620,gid=5")
    mount(b"/dev/pts/ptmx", b"/dev/ptmx", None, 4096)
    if shared == "shared" and os.fork():  # init is not PID 1: something else is, as in a shared pid namespace
        os.wait()
        os._exit(0)
    os.setsid()
    os.dup2(int(control), 60); os.dup2(int(elf), 61)
    os.dup2(60, 3); os.dup2(61, 4)
    os.chdir("/")
    os.execve("/proc/self/fd/4", args, {})
print(pid, flush=True)
status = os.waitpid(pid, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""

# crun 1.8 refuses a hybrid host while it sees its cgroup2 tree, so that is hidden in a mount namespace of its own.
_RUNTIME: Final = """
exec 3<&"$1"- 4<&"$2"-
shift 2
exec unshare -m --propagation private sh -c '
    if [ -d /sys/fs/cgroup/unified ]; then mount -t tmpfs none /sys/fs/cgroup/unified || exit; fi
    exec "$@"' sh "$@"
"""


class Container:
    """Init in namespaces of its own. Leaving it closes the control socket, which must end all that is inside.

    `pid` is the host's pid of PID 1 of the container.
    """

    emulated = False

    def __init__(
        self,
        *,
        program: int | None = None,
        files: int = 8192,
        shared: bool = False,
        args: tuple[str, ...] = ("init",),
        runtime: Sequence[str] = (),
    ) -> None:
        self.control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        elf = open_binary() if program is None else os.dup(program)
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(inside.fileno()), str(elf), str(files)]
        if runtime:
            command = ["bash", "-c", _RUNTIME, "bash", str(inside.fileno()), str(elf), *runtime]
        else:
            command += ["shared" if shared else "own", *args]
        null = open_null() if runtime else -1  # crun gives it away
        self._launcher = subprocess.Popen(
            command,
            stdin=null if runtime else subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[inside.fileno(), elf],
        )
        inside.close()
        os.close(elf)
        if null >= 0:
            os.close(null)
        self.pid = 0
        if not runtime:
            self.pid = self._map_ids()

    def _map_ids(self) -> int:
        if self._line() != "unshared":
            raise RuntimeError("the launcher could not unshare")
        for kind in ("uid", "gid"):
            Path(f"/proc/{self._launcher.pid}/{kind}_map").write_text(f"0 {FIRST_ID} 65536")
        assert self._launcher.stdin is not None
        self._launcher.stdin.write("mapped\n")
        self._launcher.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._launcher.stdout is not None
        return self._launcher.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.control.close()
        self.finish()

    def finish(self) -> int:
        """Wait for the end of PID 1 and give its exit code (the low byte of -n for signal n)."""
        try:
            return self._launcher.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or self._launcher.pid, 9)
            self._launcher.wait(10)
            raise
        finally:
            for stream in (self._launcher.stdin, self._launcher.stdout):
                if stream is not None:
                    stream.close()

    def processes(self) -> dict[int, str]:
        """The host's pid and the state letter of every process of the container, PID 1 too."""
        namespace = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                # A zombie has no namespaces to show, so go by the chain of pids as well.
                fields = Path(f"/proc/{int(entry)}/stat").read_text().rsplit(")", 1)[1].split()
                inside = [line for line in Path(f"/proc/{entry}/status").read_text().splitlines() if "NSpid" in line]
                if os.path.exists(f"/proc/{entry}/ns/pid"):
                    if os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                        found[int(entry)] = fields[0]
                elif len(inside[0].split()) > 2 and int(fields[1]) in {self.pid, *found}:
                    found[int(entry)] = fields[0]
        return found

    async def start(
        self, *argv: str | bytes, stdio: tuple[int, int, int] | None = None, timeout: float = 20, **options: object
    ) -> Started:
        """Start a program; stdin and, unless `stdio` says other, stdout are /dev/null, stderr is that of the tests."""
        before_exec = options.pop("before_exec", lambda pid, pidfd: None)
        assert callable(before_exec)
        request = make_request(*argv, **options)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            fds = None if request.tty is not None else stdio or (null, null, 2)
            return await spawn(self.control, request, fds, before_exec=before_exec, timeout=timeout)
        finally:
            os.close(null)

    async def status(self, *argv: str | bytes, **options: object) -> int | None:
        """Start a program and give its raw wait status."""
        async with closing(await self.start(*argv, **options)) as process:  # type: ignore[arg-type]
            with anyio.fail_after(30):
                return await status_of(process.life)

    async def output(self, *argv: str | bytes, **options: object) -> bytes:
        """Start a program and give what it wrote to stdout and stderr, until its end; at most what a pipe holds."""
        read, write = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            async with closing(await self.start(*argv, stdio=(null, write, write), **options)) as process:  # type: ignore[arg-type]
                with anyio.fail_after(30):
                    await ended(process.life)
            os.set_blocking(read, False)
            with contextlib.suppress(BlockingIOError):
                return os.read(read, 65536)
            return b""
        finally:
            for fd in (read, write, null):
                os.close(fd)


def make_request(*argv: str | bytes, **options: object) -> SpawnRequest:
    """A request with the usual PATH and capabilities where the test does not say other."""
    settings: dict[str, object] = {"env": {"PATH": PATH, "LC_ALL": "C"}, "capabilities": CAPABILITIES, **options}
    return SpawnRequest(argv=argv, **settings)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def closing(process: Started) -> AsyncIterator[Started]:
    """Close the three descriptors of a process at the end."""
    try:
        yield process
    finally:
        process.life.close()
        os.close(process.pidfd)
        if process.master is not None:
            os.close(process.master)


async def status_of(life: socket.socket) -> int | None:
    """Wait until the process behind `life` has ended; its raw wait status, if init has told."""
    end = await ended(life)
    return None if end is None else end.status


async def until(true: Callable[[], bool], *, timeout: float = 30) -> None:
    """Look again and again, with a deadline: only for what has no event to wait for (a zombie that is reaped)."""
    with anyio.fail_after(timeout):
        while not true():
            await anyio.sleep(0.005)


def text(path: str) -> str:
    """The content of a small file, such as those of /proc."""
    return Path(path).read_text()


@contextlib.contextmanager
def runtime_container(runtime: str) -> Iterator[Container]:
    """A container by an OCI runtime in a user namespace of its own, with init as fd 4 of its process."""
    with tempfile.TemporaryDirectory(prefix="init-") as directory:
        bundle = Path(directory)
        bundle.chmod(0o755)  # the container's root has another id on the host
        (bundle / "rootfs").mkdir()
        for name in ("bin", "lib", "lib64"):
            (bundle / "rootfs" / name).symlink_to(f"usr/{name}")
        for name in ("usr", "proc", "dev", "tmp"):
            (bundle / "rootfs" / name).mkdir()
        subprocess.run([runtime, "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        ids = [{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]
        config["process"] |= {
            "terminal": False,
            "args": ["/proc/self/fd/4"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), sorted(ATTACKER)),
        }
        config["root"]["readonly"] = True
        config["linux"] |= {
            "namespaces": [{"type": kind} for kind in ("user", "pid", "mount", "ipc", "uts", "network")],
            "uidMappings": ids,
            "gidMappings": ids,
        }
        config["mounts"] = [mount for mount in config["mounts"] if not mount["destination"].startswith("/sys")]
        config["mounts"].append(
            {"destination": "/usr", "source": "/usr", "type": "none", "options": ["rbind", "ro", "nosuid", "nodev"]}
        )
        (bundle / "config.json").write_text(json.dumps(config))
        command = [runtime, "--root", str(bundle / "state")]
        if runtime == "crun":
            command.append("--cgroup-manager=disabled")
        command += ["run", "--preserve-fds", "2", "--bundle", str(bundle), f"init-test-{os.getpid()}"]
        with Container(runtime=command) as container:
            yield container


async def read_until(master: int, word: bytes) -> bytes:
    """What a terminal shows, up to `word`."""
    read = b""
    with anyio.move_on_after(10):
        while word not in read:
            await anyio.wait_readable(master)
            read += os.read(master, 4096)
    assert word in read
    return read
