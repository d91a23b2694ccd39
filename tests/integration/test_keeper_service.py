"""Policy "keep" of a host program that is a service of systemd's: what systemd does to a service ends nothing of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.keepers import DEADLINE, wait_ended

from unisandbox.host.cgroups import ending, hierarchy

pytestmark = pytest.mark.root

UNIT = f"unisandbox-test-{os.getpid()}.service"

# A program that tells one line, and goes on until it is killed.
_PROGRAM = """
import anyio, json, sys
from unisandbox import Engine
from unisandbox.api.errors import FailedPreconditionError
from unisandbox.host.keeper import Keeper
place = sys.argv[1]
def tell(**words):
    print(json.dumps(words), flush=True)
async def main():
{body}
    await anyio.sleep_forever()
anyio.run(main)
"""


class Service:
    """A program in the cgroup of a service, in a mount namespace in which systemd seems to run."""

    def __init__(self, process: subprocess.Popen[str], dirs: list[str]) -> None:
        self._process = process
        self._dirs = dirs
        assert process.stdout is not None
        self.told: dict[str, Any] = json.loads(process.stdout.readline())

    def stop(self) -> None:
        """As systemd does: end all in its cgroup and below, then remove what is empty there."""
        for directory in self._dirs:
            while pids := ending.pids(directory):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                    wait_ended(pid)
        self._process.wait()
        assert ending.remove(self._dirs, DEADLINE)


@contextmanager
def service(place: Path, body: str, *commands: str) -> Iterator[Service]:
    """Run a program as a service; `commands` come first, in its mount namespace."""
    tops = [m.directory for m in hierarchy.read_mounts() if m.unified or "name=systemd" in m.controllers]
    dirs = [f"{top}/{UNIT}" for top in tops if os.path.exists(f"{top}/cgroup.procs")]
    made_run = not os.path.exists("/run/systemd")
    os.makedirs("/run/systemd", exist_ok=True)
    for directory in dirs:
        os.mkdir(directory)
    setup = [f"echo 0 > {directory}/cgroup.procs" for directory in dirs]
    setup += ["mount -t tmpfs none /run/systemd", "mkdir /run/systemd/system", *commands]
    script = " && ".join([*setup, 'exec "$@"'])
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh"]
    argv += [sys.executable, "-c", _PROGRAM.format(body=indented), str(place)]
    try:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            try:
                started = Service(process, dirs)
                yield started
            finally:
                process.kill()
                process.wait()
        started.stop()
    finally:
        for directory in dirs:
            if os.path.isdir(directory):
                os.rmdir(directory)
        if made_run:
            os.rmdir("/run/systemd")


def slices() -> list[str]:
    """The slices of ours that there are; other engines may have some."""
    found = [f"{mount.directory}/{hierarchy.SLICE}" for mount in hierarchy.read_mounts()]
    return [path for path in found if os.path.isdir(path)]


def unit_of(pid: int) -> bool:
    return UNIT in Path(f"/proc/{pid}/cgroup").read_text()


KEEP = """
engine = await Engine.open(place, policy="keep")
idle = await engine.create(name="idle", isolation="runc")
busy = await engine.create(name="busy", isolation="runc")
process = await busy.exec(["sh", "-c", "echo begun; read x; exit 7"], stdin="pipe")
tell(keeper=engine._core.host.keeper.pid, id=process.id, pid=process.pid)
"""

GO_ON = """
engine = await Engine.open(place, policy="stop")
idle, busy = await engine.get("idle"), await engine.get("busy")
process = (await busy.processes())[0]
await process.stdin.send(b"x\\n")
exit = await process.wait()
done = await idle.run(["echo", "here"])
tell(keeper=engine._core.host.keeper.pid, id=process.id, code=exit.code, said=done.text)
await engine.close()
"""


def test_what_is_kept_outlives_the_service_and_its_next_run_goes_on_with_it(tmp_path: Path) -> None:
    before = slices()
    with service(tmp_path, KEEP) as first:
        first.stop()
    with service(tmp_path, GO_ON) as second:
        told = second.told
        assert (told["keeper"], told["id"]) == (first.told["keeper"], first.told["id"])
        assert (told["code"], told["said"]) == (7, "here\n")
        wait_ended(told["keeper"])
    assert slices() == before


KEEPER = """
keeper = await Keeper.start(place + "/state", workdir=place + "/work", policy={policy!r})
tell(keeper=keeper.pid)
"""


def test_a_keeper_that_is_to_stop_stays_in_the_service(tmp_path: Path) -> None:
    with service(tmp_path, KEEPER.format(policy="stop")) as program:
        assert unit_of(program.told["keeper"])
        program.stop()
        wait_ended(program.told["keeper"])


REFUSED = """
try:
    await Keeper.start(place + "/state", workdir=place + "/work", policy="keep")
except FailedPreconditionError as error:
    tell(error=str(error))
"""
CHANGED = """
keeper = await Keeper.start(place + "/state", workdir=place + "/work", policy="stop")
try:
    await keeper.set_policy("keep")
except FailedPreconditionError as error:
    tell(error=str(error), policy=keeper.hello.policy)
"""


def test_where_the_keeper_cannot_leave_the_service_keep_is_refused(tmp_path: Path) -> None:
    with service(tmp_path, REFUSED, *_read_only()) as program:
        assert UNIT in program.told["error"]
        assert "systemd-run --scope" in program.told["error"]
        assert not os.path.exists(tmp_path / "state/keeper.sock")  # the one that was tried has ended


def test_a_keeper_in_a_service_does_not_change_to_keep(tmp_path: Path) -> None:
    with service(tmp_path, CHANGED) as program:
        assert UNIT in program.told["error"]
        assert program.told["policy"] == "stop"


def _read_only() -> list[str]:
    return [f"mount -o remount,bind,ro {m.directory}" for m in hierarchy.read_mounts()]
