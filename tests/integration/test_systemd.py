"""The service of examples/service under a real systemd: where its sandboxes are, and what ends them."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from tests.keepers import until

from unisandbox import Engine, Resources, Sandbox
from unisandbox.engine.runtime_directory import runtime_directory
from unisandbox.engine.state_files import known_id
from unisandbox.host.cgroups.hierarchy import SLICE, read_mounts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/service"
UNITS = Path("/run/systemd/system")
SECONDS = 300.0

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not UNITS.is_dir() or shutil.which("systemctl") is None, reason="systemd does not run here"),
]


class Service:
    """The example's unit, under a name of its own; it runs `policy`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = Path("/var/lib", name)

    def install(self, policy: Literal["keep", "stop"], *settings: str) -> None:
        """What is said differently from the example's unit: where it is, its state, and `settings`."""
        other = UNITS / f"{self.name}.service.d/other.conf"
        other.parent.mkdir(exist_ok=True)
        (UNITS / f"{self.name}.service").write_text((EXAMPLE / "worker.service").read_text())
        lines = ["ExecStart=", f"ExecStart={sys.executable} -W error {EXAMPLE / 'worker.py'} {policy}"]
        lines += ["StateDirectory=", f"StateDirectory={self.name}", "RestartSec=0", *settings]
        other.write_text("\n".join(["[Service]", *lines, ""]))
        self.do("daemon-reload")

    def uninstall(self) -> None:
        self.do("stop")
        self.do("reset-failed", check=False)
        self.do("clean", "--what=state")
        (UNITS / f"{self.name}.service").unlink()
        shutil.rmtree(UNITS / f"{self.name}.service.d")
        self.do("daemon-reload")

    def do(self, verb: str, *arguments: str, check: bool = True) -> None:
        """`systemctl` with this unit; the end of its journal is in the error."""
        unit = [] if verb == "daemon-reload" else [self.name]
        done = subprocess.run(["systemctl", verb, *arguments, *unit], check=False, capture_output=True, timeout=SECONDS)
        assert not check or done.returncode == 0, (done, self.journal())

    def journal(self) -> str:
        argv = ["journalctl", "--no-pager", "--output", "cat", "--unit", self.name]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def tells(self, name: str) -> str:
        argv = ["systemctl", "show", "--value", "--property", name, self.name]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    @property
    def job(self) -> tuple[str, int]:
        """The id and the process of its job, as the running program says it."""
        words = self.tells("StatusText").split()
        return words[1].rstrip(","), int(words[3])

    def wait_restarted(self, main: str) -> None:
        """Until another main process is ready."""
        until(lambda: self.tells("ActiveState") == "active" and self.tells("MainPID") != main, "a restart", SECONDS)


@pytest.fixture
def service() -> Iterator[Service]:
    """Such a service; it and its state are removed after the test, and so is what it has kept."""
    made = Service(f"sandboxes-test-{os.urandom(4).hex()}")
    made.install("keep")
    yield made
    made.do("stop")
    # A run with the other policy frees it.
    made.install("stop")
    made.do("start")
    made.uninstall()


def cgroup_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


@asynccontextmanager
async def work_of(service: Service) -> AsyncIterator[Sandbox]:
    """Its sandbox, had by a process that is no service."""
    async with Engine.attach(str(service.state)) as engine:
        yield await engine.get("work")


async def keeper_of(service: Service) -> int:
    async with Engine.attach(str(service.state)) as engine:
        return engine._core.host.keeper.pid


def cgroups_of(service: Service) -> list[str]:
    name = f"unisandbox-{known_id(str(service.state))}"
    return [place for top in read_mounts() if os.path.isdir(place := f"{top.directory}/{SLICE}/{name}")]


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


@pytest.mark.anyio
async def test_what_is_kept_goes_on_while_the_service_is_restarted_or_stopped(service: Service) -> None:
    service.do("start")
    main, job = service.tells("MainPID"), service.job
    for pid in (job[1], await keeper_of(service)):
        assert service.name not in cgroup_of(pid), "systemd would end it with the service"

    assert cgroups_of(service)

    service.do("restart")
    assert service.tells("MainPID") != main
    assert service.job == job, service.journal()

    service.do("stop")
    assert (service.tells("Result"), service.tells("ExecMainStatus")) == ("success", "0")
    async with work_of(service) as sandbox:
        [process] = await sandbox.processes()
        assert (process.id, process.pid) == job
        await process.stdin.send(b"this\n")
        assert await process.stdout.receive() == b"this is done\n"
        await process.stdin.aclose()
        assert (await process.wait()).code == 7


@pytest.mark.parametrize("how", ["restart", "stop", "kill"])
def test_what_is_not_kept_ends_with_the_service(service: Service, how: str) -> None:
    service.install("stop")
    service.do("start")
    main, (_, pid) = service.tells("MainPID"), service.job
    pidfd = os.pidfd_open(pid)
    try:
        if how == "kill":
            service.do("kill", "--signal=KILL")
            service.wait_restarted(main)
        else:
            service.do(how)
        until(lambda: ended(pidfd), "the job's end", SECONDS)
    finally:
        os.close(pidfd)
    service.do("stop")

    assert (service.tells("Result"), service.tells("ExecMainStatus")) == ("success", "0")
    # Whoever is killed leaves it to the next run to free the rest.
    assert service.journal().count("left in good order") == 1 + (how == "restart")
    assert os.listdir(service.state / "sandboxes") == []
    assert cgroups_of(service) == []


def test_what_is_kept_goes_on_when_the_service_is_killed(service: Service) -> None:
    service.do("start")
    main, job = service.tells("MainPID"), service.job

    service.do("kill", "--signal=KILL")
    service.wait_restarted(main)

    assert service.job == job, service.journal()


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["keep", "stop"])
async def test_a_sandbox_without_memory_ends_no_service(service: Service, policy: Literal["keep", "stop"]) -> None:
    """As it would by OOMPolicy=stop, the default, if sandboxes were in the service's cgroup."""
    service.install(policy)
    service.do("start")
    main = service.tells("MainPID")
    async with Engine.attach(str(service.state)) as engine:
        async with engine.create(resources=Resources(memory="64M")) as sandbox:
            done = await sandbox.run(["python3", "-c", "bytearray(1 << 30)"])
    assert done.exit.reason == "oom"

    service.do("kill", "--signal=CONT", "--kill-who=main")  # systemd has seen all that was before
    assert (service.tells("ActiveState"), service.tells("MainPID"), service.tells("NRestarts")) == ("active", main, "0")


_TRY = """
import anyio
from unisandbox import Sandbox, SandboxError

async def main():
    try:
        async with Sandbox.create(isolation="runc") as sandbox:
            print((await sandbox.run(["id", "-u"])).text)
    except SandboxError as error:
        print(f"{error.message}\\n{error.hint}")

anyio.run(main)
"""
_PROBE = """
import anyio
from unisandbox.backends.runc import backend

async def main():
    probe = await backend.probe()
    print(f"{probe.reason}\\n{probe.hint}")

anyio.run(main)
"""
IN_THE_WAY = {
    "ProtectControlGroups=yes": "/sys/fs/cgroup is mounted read-only",
    "ProtectKernelTunables=yes": "/proc/acpi is masked",
    "ProtectKernelLogs=yes": "/proc/kmsg is masked",
    "ProtectHostname=yes": "forbids sethostname",
    "RestrictNamespaces=yes": "forbids unshare",
    "RestrictSUIDSGID=yes": "forbids openat2",
}


def in_unit(*settings: str, code: str = _TRY) -> str:
    """What a program says of the sandbox that it tries, as a service with these settings."""
    options = [word for setting in settings for word in ("--property", setting)]
    argv = ["systemd-run", "--wait", "--pipe", "--quiet", "--collect", *options, sys.executable, "-W", "error"]
    done = subprocess.run(
        [*argv, "-c", code], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    return done.stdout.strip()


@pytest.mark.parametrize("setting", IN_THE_WAY)
def test_a_setting_of_the_unit_that_is_in_the_way_is_named(setting: str) -> None:
    said = in_unit(setting)

    assert IN_THE_WAY[setting] in said
    assert "eave out of the unit run-" in said
    assert setting.partition("=")[0] + "=" in said
    assert not os.path.exists(runtime_directory()), "the engine that was opened for it has left something"


def test_a_filter_that_lets_no_engine_be_opened_is_named_by_probe() -> None:
    said = in_unit("SystemCallFilter=~@mount:EPERM", code=_PROBE)

    assert said.startswith("a filter of system calls (seccomp) forbids mount\n")
    assert "SystemCallFilter=" in said


def test_settings_that_are_said_to_be_possible_are() -> None:
    """Those of docs/systemd.md."""
    page = (EXAMPLE.parents[1] / "docs/systemd.md").read_text()
    settings = re.findall(r"^- `(\w+=[\w-]+)`", page, re.MULTILINE)
    assert len(settings) > 5

    assert in_unit(*settings) == "0"
