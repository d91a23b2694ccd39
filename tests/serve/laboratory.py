"""A real containerd with crictl, brought up by a script that the caller names; see tools/test_serve.sh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
from tests.command_line import CLI
from tests.keepers import until

LAB: Final = os.environ.get("UNISANDBOX_CONTAINERD_LAB", "")
SECONDS: Final = 60.0


@attrs.define
class Lab:
    """containerd, and our server where it expects it.

    Attributes:
        place: a directory for files.
        script: brings containerd up, says where it is (`env`), calls crictl.
    """

    place: Path
    script: str = LAB
    server: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return os.environ.get("UNISANDBOX_SOCKET", "/run/unisandbox/serve/sandboxer.sock")

    @property
    def containerd(self) -> str:
        said = subprocess.run([self.script, "env"], capture_output=True, text=True, check=True, timeout=SECONDS).stdout
        return next(word.partition("=")[2] for word in said.split() if word.startswith("CONTAINERD_ADDRESS="))

    def start(self, settings: str = "") -> None:
        config = self.place / "serve.toml"
        config.write_text(settings or f'events = "{self.containerd}.ttrpc"\n')
        words = [*CLI, "serve", "--root", str(self.place / "root"), "--socket", self.socket, "--config", str(config)]
        with (self.place / "log").open("ab") as log:
            self.server = subprocess.Popen(words, stderr=log)
        until(lambda: b"serving" in self.said(), "the server serves", SECONDS)

    def said(self) -> bytes:
        return (self.place / "log").read_bytes()

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.server is not None
        self.server.send_signal(number)
        self.server.wait(SECONDS)
        (self.place / "log").rename(self.place / f"log-{uuid.uuid4().hex}")

    def crictl(self, *words: str, stdin: bytes = b"", code: int | None = 0) -> str:
        done = self.call("crictl", *words, stdin=stdin)
        assert code is None or done.returncode == code, done.stderr.decode() + self.said().decode()
        return done.stdout.decode().strip()

    def call(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Call the script (`crictl` or `ctr`, say), however that ends."""
        return subprocess.run([self.script, *words], input=stdin, capture_output=True, check=False, timeout=SECONDS)

    def file(self, content: dict[str, Any]) -> str:
        path = self.place / f"{uuid.uuid4().hex}.json"
        path.write_text(json.dumps(content))
        return str(path)

    def pod(self, handler: str = "uni", **changes: Any) -> tuple[str, str]:
        """A pod: its id, and the file that says what it is."""
        name = uuid.uuid4().hex[:8]
        file = self.file(
            {
                "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
                "log_directory": str(self.place),
                "hostname": "pod-one",
                "dns_config": {"servers": ["10.1.1.1"], "searches": ["x.local"], "options": ["ndots:2"]},
                **changes,
            }
        )
        return self.crictl("runp", "--runtime", handler, file), file

    def container(self, pod: tuple[str, str], *command: str, **changes: Any) -> str:
        """A started container."""
        made = self.crictl("create", pod[0], self.container_file(*command, **changes), pod[1])
        self.crictl("start", made)
        return made

    def container_file(self, *command: str, **changes: Any) -> str:
        """The file that says what a container is."""
        name = uuid.uuid4().hex[:8]
        return self.file(
            {
                "metadata": {"name": name},
                "image": {"image": "lab.local/busybox:1"},
                "command": list(command),
                "log_path": f"{name}.log",
                "linux": {},
                **changes,
            }
        )


@contextmanager
def laboratory(place: Path, settings: str = "") -> Iterator[Lab]:
    """containerd and a server that it has found; both end, and no pod is left.

    Args:
        place: a directory for files.
        settings: of the server, whose pods are of the backend "runc" unless more is said.
    """
    lab = Lab(place)
    lab.start(settings)
    try:
        # Built before; see tools/test_serve.sh.
        if lab.call("up").returncode:
            # Where processes begin slowly the script may have looked before containerd was one.
            until(lambda: not lab.call("status").returncode, "containerd runs", SECONDS)
            subprocess.run([LAB, "up"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
        # gRPC's client in containerd waits a moment before it comes again to where nobody was.
        until(lambda: _reached(lab), "containerd has found the server", SECONDS)
        yield lab
    finally:
        lab.crictl("rmp", "-af", code=None)
        subprocess.run([LAB, "down"], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS)
        until(lambda: bool(lab.call("status").returncode), "containerd has ended", SECONDS)
        lab.end()


def _reached(lab: Lab) -> bool:
    pod = lab.file({"metadata": {"name": "probe", "namespace": "default", "uid": "p", "attempt": 1}})
    made = lab.crictl("runp", "--runtime", "uni", pod, code=None)
    if made:
        lab.crictl("rmp", "-f", made)
    return bool(made)
