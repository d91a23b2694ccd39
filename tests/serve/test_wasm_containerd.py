"""Pods of WebAssembly modules with a real containerd, by crictl, and what its CRI makes of their images.

Needs containerd and crictl from a laboratory script (`make test-serve`); says so where there is none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.keepers import until, wait_ended
from tests.serve.images import Image, registry
from tests.serve.laboratory import LAB, SECONDS, Lab, laboratory
from tests.wasm.sandboxes import NAMES, tool

from unisandbox.serve.config import ANNOTATION

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not LAB, reason="needs a real containerd: make test-serve"),
]

LINUX: Final = {"os": "linux", "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")}
WASI: Final = ({"os": "wasip1", "architecture": "wasm"}, {"os": "wasi", "architecture": "wasm"})
NAME: Final = "lab.local/modules:1"
MODULES: Final = {f"bin/{name}.wasm": tool() for name in NAMES}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path, _settings(Lab(tmp_path))) as lab:
        yield lab
        lab.call("ctr", "images", "rm", "--sync", NAME)


def _settings(lab: Lab) -> str:
    return f'events = "{lab.containerd}.ttrpc"\nannotation = ["wasm+process"]\n'


def imported(lab: Lab, image: Image, *words: str) -> None:
    """`ctr images import`, with these words."""
    archive = image.archive(lab.place / "image.tar", NAME)
    done = lab.call("ctr", "images", "import", *words, str(archive))
    assert done.returncode == 0, done.stderr.decode()


def pod_of_modules(lab: Lab, handler: str = "uni") -> tuple[str, str]:
    return lab.pod(handler, annotations={ANNOTATION: "wasm+process"})


def container(lab: Lab, pod: tuple[str, str], *args: str, **changes: Any) -> str:
    return lab.container(pod, *args, image={"image": NAME}, **changes)


def _status(lab: Lab, container: str) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(lab.crictl("inspect", container))["status"]
    return status


def _has_ended(lab: Lab, container: str, code: int) -> None:
    until(lambda: _status(lab, container)["state"] == "CONTAINER_EXITED", "it has ended", SECONDS)
    assert _status(lab, container)["exitCode"] == code


@pytest.mark.parametrize("handler", ["uni", "unistream"])
def test_the_life_of_a_pod_of_modules_by_crictl(lab: Lab, handler: str) -> None:
    imported(lab, Image().add(LINUX, MODULES, ["/bin/do.wasm"]))
    pod = pod_of_modules(lab, handler)
    words = ["out", "started\n", ";", "err", "a problem\n", ";", "sleep", "1000"]
    first = container(lab, pod, "/bin/do.wasm", *words)
    until(lambda: "started" in lab.crictl("logs", first), "its output is in the log", SECONDS)
    assert lab.crictl("exec", "-s", first, "echo", "from another module") == "from another module"
    lab.crictl("exec", "-s", first, "exit", "3", code=1)
    assert lab.crictl("exec", "-i", first, "cat", stdin=b"typed") == "typed"
    lab.crictl("exec", "-it", first, "true", code=1)
    stats = json.loads(lab.crictl("stats", "-o", "json", first))["stats"]
    assert int(stats[0]["memory"]["workingSetBytes"]["value"]) > 0
    lab.crictl("update", "--memory", str(256 << 20), first)
    stats = json.loads(lab.crictl("stats", "-o", "json", first))["stats"]
    assert int(stats[0]["memory"]["availableBytes"]["value"]) < 256 << 20, "the new limit counts"
    second = container(lab, pod, args=["out", "by its entrypoint\n", ";", "exit", "7"])
    _has_ended(lab, second, 7)
    assert lab.crictl("logs", second) == "by its entrypoint"
    lab.crictl("stop", "--timeout", "30", first)
    _has_ended(lab, first, 143)
    lab.crictl("rm", first, second)
    lab.crictl("stopp", pod[0])
    lab.crictl("rmp", pod[0])
    assert lab.crictl("pods", "-q") == ""
    assert b"which is a bug" not in lab.said()


def test_a_module_that_takes_too_much_memory_was_killed_for_that(lab: Lab) -> None:
    imported(lab, Image().add(LINUX, MODULES))
    pod = pod_of_modules(lab)
    limits = {"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 64 << 20}
    eater = container(lab, pod, "eat", linux={"resources": limits})
    _has_ended(lab, eater, 137)
    until(lambda: _status(lab, eater)["reason"] == "OOMKilled", "containerd was told why", SECONDS)
    lab.crictl("rmp", "-f", pod[0])


def test_what_is_no_module_is_not_started_and_crictl_says_why(lab: Lab) -> None:
    pod = pod_of_modules(lab)
    made = lab.crictl("create", pod[0], lab.container_file("sh", "-c", "true"), pod[1])
    done = lab.call("crictl", "start", made)
    assert done.returncode != 0
    assert b"is no WebAssembly module" in done.stderr
    lab.crictl("rmp", "-f", pod[0])


def test_a_pod_of_modules_lives_on_when_the_server_is_killed(lab: Lab) -> None:
    imported(lab, Image().add(LINUX, MODULES))
    pod = pod_of_modules(lab)
    first = container(lab, pod, "do", "out", "started\n", ";", "sleep", "1000")
    pid = json.loads(lab.crictl("inspect", first))["info"]["pid"]
    assert pid > 0
    lab.end(signal.SIGKILL)
    assert os.path.exists(f"/proc/{pid}"), "it outlives the server"
    lab.start(_settings(lab))
    until(lambda: bool(lab.crictl("inspectp", pod[0], code=None)), "containerd has found the server", SECONDS)
    assert json.loads(lab.crictl("inspectp", pod[0]))["status"]["state"] == "SANDBOX_READY"
    # What containerd makes of a container whose task service was gone: see docs/serve.md.
    until(lambda: first in lab.crictl("ps", "-aq", "--no-trunc", "--state", "Exited"), "it was noticed", SECONDS)
    again = container(lab, pod, "do", "out", "again\n", ";", "sleep", "1000")
    until(lambda: "again" in lab.crictl("logs", again), "a new one runs in the same pod", SECONDS)
    lab.crictl("rmp", "-f", pod[0])
    wait_ended(pid, SECONDS)  # what was left of the first ends with the pod


def test_modules_live_on_when_containerd_is_restarted(lab: Lab) -> None:
    imported(lab, Image().add(LINUX, MODULES))
    pod = pod_of_modules(lab)
    first = container(
        lab, pod, "do", "out", "started\n", ";", "await", ";", "out", "on\n", ";", "exit", "5", stdin=True
    )
    until(lambda: "started" in lab.crictl("logs", first), "its output is in the log", SECONDS)
    subprocess.run([LAB, "restart"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
    until(lambda: first in lab.crictl("ps", "-q", "--no-trunc", code=None), "containerd has it again", SECONDS)
    lab.crictl("exec", "-s", first, "exit", "3", code=1)
    lab.crictl("attach", "-i", first, stdin=b"go\n", code=None)
    _has_ended(lab, first, 5)
    assert lab.crictl("logs", "--tail", "1", first) == "on"
    lab.crictl("rmp", "-f", pod[0])


# --- what containerd's CRI does with images for WebAssembly; docs/serve.md tells it ---


def _pulled(lab: Lab, name: str, *args: str) -> str:
    """A started container of an image that containerd has pulled; the image goes with the test."""
    lab.crictl("pull", name)
    return lab.container(pod_of_modules(lab), *args, image={"image": name})


@pytest.mark.parametrize("platform", WASI, ids=lambda platform: platform["os"])
@pytest.mark.parametrize("says_platform", [True, False])
def test_an_image_of_one_manifest_for_wasi_runs(lab: Lab, platform: dict[str, str], says_platform: bool) -> None:
    image = Image().add(platform, MODULES, ["/bin/do.wasm"], says_platform=says_platform)
    with registry({"modules": image}) as address:
        _has_ended(lab, _pulled(lab, f"{address}/modules:1", "exit", "7"), 7)
        lab.crictl("rmp", "-af")
        lab.crictl("rmi", f"{address}/modules:1")
    imported(lab, image, "--all-platforms")
    pod = pod_of_modules(lab)
    _has_ended(lab, container(lab, pod, "exit", "7"), 7)
    _has_ended(lab, container(lab, pod, args=["exit", "8"]), 8)
    lab.crictl("rmp", "-f", pod[0])


def test_of_an_index_with_an_image_for_the_node_that_one_is_taken(lab: Lab) -> None:
    image = Image().add(WASI[0], {"bin/exit.wasm": b"not for us"}).add(LINUX, MODULES)
    with registry({"modules": image}) as address:
        _has_ended(lab, _pulled(lab, f"{address}/modules:1", "exit", "7"), 7)
        lab.crictl("rmp", "-af")
        lab.crictl("rmi", f"{address}/modules:1")


def only_for_wasi() -> Image:
    return Image().add(WASI[0], MODULES).add({"os": "wasip2", "architecture": "wasm"}, MODULES)


def test_an_index_without_an_image_for_the_node_is_refused_by_containerds_cri(lab: Lab) -> None:
    with registry({"modules": only_for_wasi()}) as address:
        _is_refused(lab, f"{address}/modules:1")
    imported(lab, only_for_wasi(), "--all-platforms")
    pod = pod_of_modules(lab)
    done = lab.call("crictl", "create", pod[0], lab.container_file("true", image={"image": NAME}), pod[1])
    assert done.returncode != 0
    assert b"failed to resolve image" in done.stderr
    lab.crictl("rmp", "-f", pod[0])


def _is_refused(lab: Lab, name: str, *words: str) -> None:
    done = lab.call("crictl", "pull", *words, name)
    assert done.returncode != 0
    assert b"no match for platform in manifest" in done.stderr
    lab.call("ctr", "images", "rm", "--sync", name)


def test_a_module_that_is_an_artefact_is_pulled_and_then_it_is_not_there(lab: Lab) -> None:
    with registry({"modules": Image().add_artefact(tool())}) as address:
        name = f"{address}/modules:1"
        lab.crictl("pull", name)
        pod = pod_of_modules(lab)
        made = lab.crictl("create", pod[0], lab.container_file("/module.wasm", image={"image": name}), pod[1])
        done = lab.call("crictl", "start", made)
        assert b"there is no such module" in done.stderr, done.stderr
        lab.crictl("rmp", "-f", pod[0])
        lab.crictl("rmi", name)


_SAYS_WASI: Final = """
from unisandbox.serve import controller
real = controller.Controller.platform
async def platform(self, request, call):
    answer = await real(self, request, call)
    answer.platform.os, answer.platform.architecture = "wasip1", "wasm"
    return answer
controller.Controller.platform = platform
from unisandbox.cli import main
main()
"""


def test_a_sandboxer_that_says_its_platform_is_wasi_gets_no_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.serve.laboratory.CLI", [sys.executable, "-c", _SAYS_WASI])
    with laboratory(tmp_path, _settings(Lab(tmp_path))) as lab:
        imported(lab, Image().add(WASI[0], MODULES), "--all-platforms")
        pod = pod_of_modules(lab)
        done = lab.call("crictl", "create", pod[0], lab.container_file("true", image={"image": NAME}), pod[1])
        assert b"unsupported spec platform: wasip1" in done.stderr
        lab.crictl("rmp", "-f", pod[0])
        lab.call("ctr", "images", "rm", "--sync", NAME)


def test_the_platform_of_a_runtime_handler_chooses_no_image(tmp_path: Path) -> None:
    with laboratory(tmp_path, _settings(Lab(tmp_path))) as lab:
        address, home = lab.containerd, Path(lab.containerd).parent.parent
        subprocess.run([LAB, "down"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
        until(lambda: bool(lab.call("status").returncode), "containerd has ended", SECONDS)
        config = tmp_path / "config.toml"
        config.write_text(
            f'version = 3\nimports = ["{home}/etc/containerd.toml"]\n'
            "[plugins.'io.containerd.cri.v1.images'.runtime_platforms.uni]\n"
            'platform = "wasip1/wasm"\nsnapshotter = "overlayfs"\n'
        )
        # By which a kubelet says for which handler it pulls.
        wanted = lab.file(
            {
                "metadata": {"name": "x", "namespace": "default", "uid": "x", "attempt": 1},
                "annotations": {"io.containerd.cri.runtime-handler": "uni"},
            }
        )
        environment = {**os.environ, "PATH": f"{home}/bin:{os.environ['PATH']}"}
        with (
            (tmp_path / "containerd.log").open("wb") as log,
            subprocess.Popen(["containerd", "-c", config], env=environment, stdout=log, stderr=log) as containerd,
        ):
            try:
                until(lambda: lab.crictl("images", "-q", code=None) != "", f"{address} answers", SECONDS)
                with registry({"modules": only_for_wasi()}) as there:
                    _is_refused(lab, f"{there}/modules:1", "--pod-config", wanted)
            finally:
                containerd.terminate()
