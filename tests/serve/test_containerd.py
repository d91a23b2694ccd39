"""With a real containerd, by crictl: what a user of Kubernetes' tools does with pods of ours.

Needs containerd and crictl from a laboratory script (`make test-serve`); says so where there is none.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from tests.keepers import until
from tests.serve.laboratory import LAB, SECONDS, Lab, laboratory

EXAMPLE: Final = Path(__file__).resolve().parent.parent.parent / "examples/containerd"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not LAB, reason="needs a real containerd: make test-serve"),
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as lab:
        yield lab


def test_a_pods_life_by_crictl(lab: Lab) -> None:
    sysctls = {"net.ipv4.ip_local_port_range": "1024 65000"}
    pod = lab.pod(linux={"sysctls": sysctls})
    script = "echo started; read x < /proc/self/fd/0; sleep 1000"
    first = lab.container(pod, "sh", "-c", script)
    look = "hostname; cat /etc/resolv.conf /proc/sys/net/ipv4/ip_local_port_range; ip -4 a show eth0 | grep -c inet"
    said = lab.crictl("exec", "-s", first, "sh", "-c", look).split("\n")
    assert said == ["pod-one", "nameserver 10.1.1.1", "search x.local", "options ndots:2", "1024\t65000", "1"]
    lab.crictl("exec", first, "sh", "-c", "exit 3", code=1)
    assert lab.crictl("exec", "-i", first, "cat", stdin=b"typed") == "typed"
    until(lambda: "started" in lab.crictl("logs", first), "its output is in the log", SECONDS)
    second = lab.container(pod, "sh", "-c", "sleep 1000")
    assert "sleep 1000" in lab.crictl("exec", "-s", first, "ps"), "the containers of a pod see each other"
    stats = json.loads(lab.crictl("stats", "-o", "json", first))["stats"]
    assert int(stats[0]["memory"]["workingSetBytes"]["value"]) > 0
    lab.crictl("update", "--memory", str(96 << 20), "--cpu-share", "512", first)
    stats = json.loads(lab.crictl("stats", "-o", "json", first))["stats"]
    assert int(stats[0]["memory"]["availableBytes"]["value"]) < 96 << 20, "the new limit counts"
    lab.crictl("update", "--cpuset-cpus", "0", first, code=1)
    lab.crictl("stop", first)
    state = _status(lab, first)
    assert (state["state"], state["exitCode"]) in {("CONTAINER_EXITED", 143), ("CONTAINER_EXITED", 137)}
    lab.crictl("stopp", pod[0])
    assert json.loads(lab.crictl("inspectp", pod[0]))["status"]["state"] == "SANDBOX_NOTREADY"
    lab.crictl("rm", second)
    lab.crictl("rmp", pod[0])
    assert lab.crictl("pods", "-q") == ""
    assert b"which is a bug" not in lab.said()


def test_events_come_to_containerd_and_say_who_was_killed_for_memory(lab: Lab) -> None:
    pod = lab.pod()
    with subprocess.Popen([LAB, "ctr", "events"], stdout=subprocess.PIPE) as listening:
        try:
            assert listening.stdout is not None
            os.set_blocking(listening.stdout.fileno(), False)
            said = b""

            def hears(topic: str) -> bool:
                nonlocal said
                said += listening.stdout.read() or b""  # type: ignore[union-attr]
                return topic.encode() in said

            until(lambda: bool(lab.container(pod, "true")) and hears("/tasks/start"), "it listens", SECONDS)
            limits = {"memory_limit_in_bytes": 32 << 20, "memory_swap_limit_in_bytes": 32 << 20}
            eater = lab.container(pod, "sh", "-c", "tail /dev/zero; exit 1", linux={"resources": limits})
            until(lambda: hears("/tasks/oom"), "the kill is told", SECONDS)
            until(lambda: hears(f'"container_id":"{eater}","id":"{eater}"'), "its end is told", SECONDS)
        finally:
            listening.kill()
    until(lambda: _status(lab, eater)["state"] == "CONTAINER_EXITED", "its end is known", SECONDS)
    assert (_status(lab, eater)["reason"], _status(lab, eater)["exitCode"]) == ("OOMKilled", 1)


def _status(lab: Lab, container: str) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(lab.crictl("inspect", container))["status"]
    return status


def test_streams_without_fifos(lab: Lab) -> None:
    pod = lab.pod("unistream")
    count = 300_000  # more than any window
    first = lab.container(
        pod,
        "sh",
        "-c",
        f"echo started; head -c {count} /dev/zero | tr '\\0' x; echo; read x; echo ended $x",
        stdin=True,
        stdin_once=True,
    )
    until(lambda: len(lab.crictl("logs", first)) > count, "its output is in the log", SECONDS)
    assert lab.crictl("exec", "-s", first, "echo", "fine") == "fine"
    assert lab.crictl("exec", "-i", first, "cat", stdin=b"x" * count) == "x" * count
    lab.crictl("exec", first, "sh", "-c", "exit 3", code=1)
    assert "ended typed" in lab.crictl("attach", "-i", first, stdin=b"typed\n")
    until(lambda: _status(lab, first)["state"] == "CONTAINER_EXITED", "it has ended", SECONDS)
    assert lab.crictl("logs", "--tail", "1", first) == "ended typed"
    lab.crictl("rmp", "-f", pod[0])


def test_streams_go_on_when_containerd_is_restarted(lab: Lab) -> None:
    container = lab.container(lab.pod("unistream"), "sh", "-c", "while :; do echo line; sleep 0.1; done")
    _restarted(lab, container)


@pytest.mark.parametrize("handler", ["uni", "unistream"])
def test_a_pod_with_a_user_namespace(lab: Lab, handler: str) -> None:
    rows = [{"host_id": 70_000, "container_id": 0, "length": 100_000}]
    security = {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": rows, "gids": rows}}}}
    pod = lab.pod(handler, linux=security)
    container = lab.container(pod, "sh", "-c", "echo out > /dev/stdout; sleep 1000", linux=security)
    script = (
        "cat /proc/self/uid_map; id -u; stat -c %u /bin/busybox; touch /made; ls /sys/class/net; echo > /dev/stderr"
    )
    said = lab.crictl("exec", "-s", container, "sh", "-c", script).split()
    assert said == ["0", "70000", "100000", "0", "0", "eth0", "lo"]
    until(lambda: lab.crictl("logs", container) == "out", "its output is in the log", SECONDS)
    lab.crictl("rmp", "-f", pod[0])


@pytest.mark.parametrize("handler", ["uni", "unistream"])
def test_a_terminal_by_crictl(lab: Lab, handler: str) -> None:
    container = lab.container(lab.pod(handler), "sleep", "1000")
    child, screen = pty.fork()
    if not child:
        os.execv(  # noqa: S606
            LAB,
            [LAB, "crictl", "exec", "-it", container, "sh", "-c", "tty; read x; echo got $x; exit 4"],
        )
    try:
        assert b"/dev/pts/0" in _seen(screen, b"/dev/pts/0")
        os.write(screen, b"word\n")
        assert b"got word" in _seen(screen, b"exit code 4")
    finally:
        os.close(screen)
        os.waitpid(child, 0)


def _seen(screen: int, wanted: bytes) -> bytes:
    seen, end = b"", time.monotonic() + SECONDS
    while wanted not in seen:
        assert select.select([screen], [], [], max(end - time.monotonic(), 0))[0], seen
        seen += os.read(screen, 4096)
    return seen


@contextmanager
def _without_server(lab: Lab, number: int) -> Iterator[None]:
    lab.end(number)
    yield
    lab.start()


def test_pods_live_on_when_the_server_is_killed(lab: Lab) -> None:
    pod = lab.pod()
    container = lab.container(pod, "sh", "-c", "echo $$; exec sleep 1000")
    with _without_server(lab, signal.SIGKILL):
        pass
    until(lambda: bool(lab.crictl("inspectp", pod[0], code=None)), "containerd has found the server", SECONDS)
    assert json.loads(lab.crictl("inspectp", pod[0]))["status"]["state"] == "SANDBOX_READY"
    # What containerd makes of a container whose task service was gone: see docs/serve.md.
    until(lambda: container in lab.crictl("ps", "-aq", "--no-trunc", "--state", "Exited"), "it was noticed", SECONDS)
    again = lab.container(pod, "sh", "-c", "sleep 1000")
    assert lab.crictl("exec", "-s", again, "hostname") == "pod-one"
    lab.crictl("rmp", "-f", pod[0])


def test_containers_live_on_when_containerd_is_restarted(lab: Lab) -> None:
    container = lab.container(lab.pod(), "sh", "-c", "while :; do echo line; sleep 0.1; done")
    _restarted(lab, container)


def _restarted(lab: Lab, container: str) -> None:
    subprocess.run([LAB, "restart"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
    until(lambda: container in lab.crictl("ps", "-q", "--no-trunc", code=None), "containerd has it again", SECONDS)
    before = len(lab.crictl("logs", container))
    until(lambda: len(lab.crictl("logs", container)) > before, "its output goes on", SECONDS)
    assert lab.crictl("exec", "-s", container, "hostname") == "pod-one"


def test_the_example_is_a_whole_set_up(lab: Lab, tmp_path: Path) -> None:
    """containerd with its own settings, ours by `imports`; the server with the example's; then its commands."""
    lab.end()
    serve = (EXAMPLE / "serve.toml").read_text()
    lab.start(serve.replace("/run/containerd/containerd.sock", lab.containerd))
    address, home = lab.containerd, Path(lab.containerd).parent.parent
    subprocess.run([LAB, "down"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
    config = tmp_path / "config.toml"
    config.write_text(
        f'version = 3\nimports = ["{EXAMPLE / "config.toml"}"]\nroot = "{home}/root"\nstate = "{home}/run/state"\n'
        'disabled_plugins = ["io.containerd.nri.v1.nri"]\n'
        f'[grpc]\naddress = "{address}"\n'
        "[plugins.'io.containerd.cri.v1.runtime'.cni]\n"
        f'bin_dirs = ["{home}/bin"]\nconf_dir = "{home}/net.d"\n'
        "[plugins.'io.containerd.cri.v1.images'.pinned_images]\n"
        'sandbox = "lab.local/pause:1"\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "CONTAINER_RUNTIME_ENDPOINT": f"unix://{address}",
        "IMAGE_SERVICE_ENDPOINT": f"unix://{address}",
    }
    with (
        (tmp_path / "containerd.log").open("wb") as log,
        subprocess.Popen(["containerd", "-c", config], env=environment, stdout=log, stderr=log) as containerd,
    ):
        try:
            until(lambda: lab.crictl("images", "-q", code=None) != "", "containerd answers", SECONDS)
            done = subprocess.run(
                [EXAMPLE / "demo.sh", "lab.local/busybox:1"],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            assert done.returncode == 0, done.stderr
        finally:
            lab.crictl("rmp", "-af", code=None)
            containerd.terminate()
    said = done.stdout.splitlines()
    assert said[:2] == ["hello from demo", "the first of its processes: sleep"]
    assert said[-1] == "pods left: 0"
