"""A containerd of the benchmark's own, with everything that can carry its pods: its shim, our server, and nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import anyio
import attrs

from benchmarks.bare import ToolFailed

SHIM: Final = "containerd's shim, runc"
OURS: Final = "unisandbox, runc"
OURS_CRUN: Final = "unisandbox, crun"
FLOOR: Final = "nothing (the floor)"

_SECONDS: Final = 60.0
_CALL_SECONDS: Final = 120.0

_CONFIG: Final = """
version = 3
root = "{place}/root"
state = "{state}/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{place}/containerd.sock"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "lab.local/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = "{place}/cni"
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "shim"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.shim]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.shim.options]
        BinaryName = "{runc}"
"""
_SANDBOXER: Final = """
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}]
      runtime_type = "io.containerd.runc.v2"
      sandboxer = "{name}"
"""
_PROXY: Final = """
[proxy_plugins.{name}]
  type = "sandbox"
  address = "{socket}"
"""


@attrs.frozen
class Pod:
    """A pod with one container that runs."""

    id: str
    container: str


@attrs.define(eq=False)
class Node:
    """See `node`.

    Attributes:
        place: its files on a disk.
        state: its files in memory, where containerd has its state by default, and our server too.
        tools: the directory of containerd and its companions.
        handlers: what carries pods, with the name of its runtime handler.
        servers: the sandboxers, by the same.
    """

    place: Path
    state: Path
    tools: Path
    handlers: dict[str, str]
    servers: dict[str, subprocess.Popen[bytes]]
    _count: int = 0

    async def crictl(self, *words: str) -> str:
        """What crictl says. Raises ToolFailed."""
        command = [str(self.tools / "crictl"), "-c", str(self.place / "crictl.yaml"), *words]
        with anyio.fail_after(_CALL_SECONDS):
            done = await anyio.run_process(command, check=False)
        if done.returncode:
            raise ToolFailed(f"crictl {' '.join(words[:2])}: {done.stderr.decode(errors='replace').strip()[-500:]}")
        return done.stdout.decode().strip()

    async def start(self, who: str, times: dict[str, float] | None = None) -> Pod:
        """Make a pod with one container: three calls, each with its milliseconds in `times`."""
        self._count += 1
        name = f"p{self._count}"
        pod = self._write(
            f"{name}.pod",
            {
                "metadata": {"name": name, "namespace": "bench", "uid": name, "attempt": 1},
                "log_directory": str(self.place / "logs"),
                # The host's network: no time of network plug-ins, which is the same for all.
                "linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}},
            },
        )
        container = self._write(
            f"{name}.container",
            {
                "metadata": {"name": "main"},
                "image": {"image": "lab.local/busybox:1"},
                "command": ["sleep", "100000"],
                "log_path": f"{name}.log",
                "linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}},
            },
        )
        times = {} if times is None else times
        with _timed(times, "run the pod"):
            pod_id = await self.crictl("runp", "--runtime", self.handlers[who], pod)
        with _timed(times, "create the container"):
            made = await self.crictl("create", "--no-pull", pod_id, container, pod)
        with _timed(times, "start the container"):
            await self.crictl("start", made)
        return Pod(pod_id, made)

    async def remove(self, *pods: Pod) -> None:
        """Stop and remove pods."""
        if pods:
            await self.crictl("rmp", "-f", *(pod.id for pod in pods))

    def management(self, who: str) -> list[int]:
        """The processes that exist only because there are pods, but for the containers' own."""
        if who == SHIM:
            return [pid for pid in _processes() if self._is_of_shim(pid)]
        server = self.servers[who].pid
        root = str(self.state / self.handlers[who])
        return [server, *(pid for pid in _processes() if pid != server and _holds(pid, root))]

    def _is_of_shim(self, pid: int) -> bool:
        words = _words(pid)
        if not words:
            return False
        if words[0].endswith("containerd-shim-runc-v2"):
            return f"{self.place}/containerd.sock" in words
        return words == ["/pause"]

    def _write(self, name: str, content: dict[str, object]) -> str:
        path = self.place / name
        path.write_text(json.dumps(content))
        return str(path)


@contextlib.contextmanager
def _timed(times: dict[str, float], part: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    times[part] = (time.perf_counter() - begun) * 1e3


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # it has ended
        return []


def _holds(pid: int, root: str) -> bool:
    """Whether a process has a file of this state directory open, as a keeper has its lock."""
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"{root}/"):
                    return True
    return False


def pss(pids: Sequence[int]) -> tuple[int, int]:
    """Bytes of proportional and of private memory of these processes. Source: /proc/PID/smaps_rollup."""
    proportional = private = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            proportional += sum(int(kb) for kb in re.findall(r"^Pss: +(\d+) kB", text, re.MULTILINE))
            private += sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))
    return proportional * 1024, private * 1024


def tools_of(lab: str) -> Path:
    """Where the laboratory has containerd, its shim, crictl and runc; builds them when they are not there yet.

    Raises:
        ToolFailed: it cannot.
    """
    said = subprocess.run([lab, "env"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"PATH=([^:]+):", said)
    if match is None:
        raise ToolFailed(f"{lab} env names no PATH")
    tools = Path(match.group(1))
    if not (tools / ".built").exists():
        for word in ("up", "down"):
            if subprocess.run([lab, word], stdout=sys.stderr, check=False).returncode:
                raise ToolFailed(f"{lab} {word} failed")
    return tools


@contextlib.contextmanager
def node(lab: str) -> Iterator[Node]:
    """Bring it up, and leave nothing of it.

    Raises:
        ToolFailed: something of it does not start.
    """
    tools = tools_of(lab)
    place, state = (Path(tempfile.mkdtemp(prefix="pods-", dir=above)) for above in ("/var/tmp", "/run"))
    handlers = {SHIM: "shim", OURS: "uni-runc", FLOOR: "nothing"}
    if shutil.which("crun"):
        handlers[OURS_CRUN] = "uni-crun"
    made = Node(place, state, tools, handlers, {})
    with contextlib.ExitStack() as stack:
        for directory in (place, state):
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        for name in ("cni", "logs", "log"):
            (place / name).mkdir()
        runc = str(tools / "runc")
        config, proxies = _CONFIG.format(place=place, state=state, runc=runc), ""
        for who, runtime in ((OURS, runc), (OURS_CRUN, "crun"), (FLOOR, "")):
            if who not in handlers:
                continue
            name = handlers[who]
            (place / f"{name}.d").mkdir(mode=0o700)
            socket = f"{place}/{name}.d/s"
            config += _SANDBOXER.format(name=name)
            proxies += _PROXY.format(name=name, socket=socket)
            made.servers[who] = stack.enter_context(_server(made, name, socket, runtime))
        (place / "containerd.toml").write_text(config + proxies)
        address = f"{place}/containerd.sock"
        (place / "crictl.yaml").write_text(
            f"runtime-endpoint: unix://{address}\nimage-endpoint: unix://{address}\ntimeout: {_CALL_SECONDS:.0f}\n"
        )
        path = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        command = [str(tools / "containerd"), "-c", str(place / "containerd.toml"), "-l", "warn"]
        stack.enter_context(_process(command, place / "log" / "containerd", env=path))
        ctr = [str(tools / "ctr"), "--address", address, "--namespace", "k8s.io"]
        _until(lambda: not subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode, "containerd")
        for image in sorted((tools.parent / "img").glob("*.tar")):
            subprocess.run([*ctr, "image", "import", str(image)], check=True, stdout=subprocess.DEVNULL)
        stack.callback(_remove_all, made)
        yield made


def _remove_all(made: Node) -> None:
    command = [str(made.tools / "crictl"), "-c", str(made.place / "crictl.yaml"), "rmp", "-af"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def _server(made: Node, name: str, socket: str, runtime: str) -> Iterator[subprocess.Popen[bytes]]:
    if runtime:
        config = made.place / f"{name}.toml"
        # The shim tells containerd what happens, too.
        events = f"{made.place}/containerd.sock.ttrpc"
        config.write_text(
            f'root = "{made.state}/{name}"\nsocket = "{socket}"\nruntime = "{runtime}"\nevents = "{events}"\n'
        )
        command = [sys.executable, "-m", "unisandbox.cli", "serve", "--config", str(config)]
    else:
        command = [sys.executable, "-m", "benchmarks.nothing", socket]
    with _process(command, made.place / "log" / name) as process:
        _until(lambda: os.path.exists(socket), name)
        yield process


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    try:
        yield process
        if process.poll() is not None:
            raise ToolFailed(f"{command[0]} ended with {process.returncode}: {log.read_text()[-500:]}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(answers: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not answers():
        if time.monotonic() > deadline:
            raise ToolFailed(f"{what} does not answer")
        time.sleep(0.05)
