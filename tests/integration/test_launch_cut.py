"""Launcher, program or keeper die in the middle of a launch: what is told of it is exact, and nothing is left."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    children_of,
    fd_count,
    keeper_at,
    sh,
    sh_exit,
    until,
    wait_ended,
)

import unisandbox
from unisandbox.host.keeper import Keeper, Spawned, SpawnFailed
from unisandbox.host.keeper.launches import binary_path

pytestmark = [pytest.mark.anyio, pytest.mark.root]


class Held:
    """A launch by a keeper that stops in its middle: it has been born, and opens a FIFO that nobody reads yet."""

    def __init__(self, keeper: Keeper, place: Path, cgroup: str) -> None:
        self.keeper = keeper
        self.fifo = place / "fifo"
        self.mark = place / "mark"
        self.entries = [f"{cgroup}/cgroup.procs", str(self.fifo)]
        os.mkfifo(self.fifo)
        self.answer: Spawned | SpawnFailed | None = None

    async def spawn(self) -> None:
        try:
            self.answer = await sh(self.keeper, f"echo > {self.mark}; exit 9", "held", cgroup_procs=self.entries)
        except SpawnFailed as error:
            self.answer = error

    async def processes(self) -> tuple[int, int]:
        """The launcher, and the process that it has made."""
        while True:
            found = children_of(self.keeper.pid)
            inside = [int(pid) for pid in Path(self.entries[0]).read_text().split()]
            if len(inside) == 1 and len(found) == 2:
                return next(pid for pid in found if pid not in inside), inside[0]
            await anyio.sleep(0.002)


async def test_a_launcher_killed_after_the_birth_changes_nothing(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        reader = -1
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                launcher, pid = await held.processes()
                os.kill(launcher, signal.SIGKILL)
                until(lambda: launcher not in children_of(keeper.pid), "it is reaped")
                assert held.answer is None
                reader = os.open(held.fifo, os.O_RDONLY | os.O_NONBLOCK)
        os.close(reader)
        assert isinstance(held.answer, Spawned)
        assert held.answer.pid == pid
        assert os.waitstatus_to_exitcode((await keeper.wait_exit(pid, held.answer.start_time)).status) == 9
        assert children_of(keeper.pid) == []


async def test_a_program_killed_before_its_exec_has_an_exact_exit(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                os.kill(pid, signal.SIGKILL)
        assert isinstance(held.answer, Spawned)
        record = await keeper.wait_exit(pid, held.answer.start_time)
        assert (held.answer.pid, os.waitstatus_to_exitcode(record.status)) == (pid, -signal.SIGKILL)
        until(lambda: children_of(keeper.pid) == [], "nothing is left")
        assert not held.mark.exists()
        exits, _ = await keeper.exits_after(0)
        assert [record.pid for record in exits] == [pid]


async def test_both_killed_is_told_as_an_exit_of_the_program(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                launcher, pid = await held.processes()
                os.kill(launcher, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
        assert isinstance(held.answer, Spawned)
        record = await keeper.wait_exit(pid, held.answer.start_time)
        assert os.waitstatus_to_exitcode(record.status) == -signal.SIGKILL


async def test_a_launch_that_hangs_holds_up_no_other_and_can_be_cancelled(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                for code in range(5):
                    record = await sh_exit(keeper, f"exit {code}", f"other{code}")
                    assert os.waitstatus_to_exitcode(record.status) == code
                group.cancel_scope.cancel()
        until(lambda: children_of(keeper.pid) == [], "it is killed")
        assert not os.path.exists(f"/proc/{pid}")
        await keeper.held()
        assert fd_count(keeper.pid) == fds


async def test_a_program_does_not_run_when_the_keeper_was_killed_meanwhile(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        held = Held(keeper, tmp_path, cgroup)
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as group:
                group.start_soon(held.spawn)
                _, pid = await held.processes()
                os.kill(keeper.pid, signal.SIGKILL)
                wait_ended(keeper.pid)
                reader = os.open(held.fifo, os.O_RDONLY | os.O_NONBLOCK)
                wait_ended(pid)
                os.close(reader)
                group.cancel_scope.cancel()
        assert not held.mark.exists()


# Kills what is on its way between the keeper and a program: a launcher, or what it has made before its exec. Their name
# is the number of the launcher's memory file.
_KILLER = """
import os, random, signal, sys, time
path = f"/proc/{sys.argv[1]}/task/{sys.argv[1]}/children"
while True:
    for pid in open(path).read().split():
        try:
            if open(f"/proc/{pid}/comm").read().strip().isdigit() and random.random() < 0.3:
                os.kill(int(pid), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass
"""


async def test_launchers_killed_at_any_moment_leave_no_spawn_without_an_answer(
    tmp_path: Path, cgroup: str, count: Callable[[int], int]
) -> None:
    number = count(2000)
    outcomes: dict[str, int] = {}
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)

        async def one(key: int) -> None:
            try:
                record = await sh_exit(keeper, "exit 9", f"k{key}", cgroup_procs=[f"{cgroup}/cgroup.procs"])
            except SpawnFailed as error:
                what = "never born" if (error.stage, error.errno) == ("fork", errno.ECHILD) else str(error)
            else:
                code = os.waitstatus_to_exitcode(record.status)
                assert code in {9, -signal.SIGKILL}
                what = "ran" if code == 9 else "killed before it ran"
            outcomes[what] = outcomes.get(what, 0) + 1

        with subprocess.Popen([sys.executable, "-S", "-c", _KILLER, str(keeper.pid)]) as killer:
            try:
                for first in range(0, number, 20):
                    async with anyio.create_task_group() as group:
                        for key in range(first, first + 20):
                            group.start_soon(one, key)
            finally:
                killer.kill()
        until(lambda: children_of(keeper.pid) == [], "nothing is left")
        await keeper.held()
        assert fd_count(keeper.pid) == fds
        exits, _ = await keeper.exits_after(0)
    assert set(outcomes) <= {"never born", "killed before it ran", "ran"}
    assert sum(outcomes.values()) == number
    assert outcomes["ran"]
    assert len({record.seq for record in exits}) == len(exits)


async def test_quick_exits_are_never_somebody_elses(tmp_path: Path, cgroup: str) -> None:
    async with keeper_at(tmp_path) as keeper:
        got: dict[int, int] = {}

        async def one(code: int) -> None:
            record = await sh_exit(keeper, f"exit {code}", f"k{code}", cgroup_procs=[f"{cgroup}/cgroup.procs"])
            got[code] = os.waitstatus_to_exitcode(record.status)

        async with anyio.create_task_group() as group:
            for code in range(120):
                group.start_soon(one, code)
        assert got == {code: code for code in range(120)}
        exits, _ = await keeper.exits_after(0)
        assert len(exits) == 120
        until(lambda: children_of(keeper.pid) == [], "no launcher is left")


_HOST = """
import anyio, sys, unisandbox
from unisandbox.host.keeper import Keeper, SpawnFailed
async def main():
    keeper = await Keeper.start(sys.argv[1] + "/state", workdir=sys.argv[1] + "/work")
    for key in "ab":
        try:
            await keeper.spawn(key, ["/bin/true"], env={})
        except SpawnFailed as error:
            print(error.stage, error.errno, error.strerror)
    await keeper.close()
anyio.run(main)
"""


@pytest.mark.parametrize("kind", ["missing", "damaged", "another"])
async def test_a_keeper_without_its_launcher_says_so_and_lives_on(tmp_path: Path, kind: str) -> None:
    source = Path(next(iter(unisandbox.__path__)))
    copy = shutil.copytree(source, tmp_path / "src" / "unisandbox", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / Path(binary_path()).relative_to(source)
    damage: dict[str, Callable[[], object]] = {
        "missing": path.unlink,
        "damaged": lambda: path.write_bytes(b"\x7fELF"),
        "another": lambda: shutil.copy("/bin/true", path),
    }
    damage[kind]()
    code = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n{_HOST}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = {
        "missing": f"{errno.ENOENT} cannot start a program: cannot run the launcher {path}: No such file or directory",
        "damaged": f"{errno.ENOEXEC} cannot start a program: cannot run the launcher {path}: Exec format error",
        "another": f"{errno.ECHILD} cannot start a program: the launcher {path} ended before it could start a program",
    }
    assert done.stdout.splitlines() == [f"fork {words[kind]}"] * 2


async def test_programs_start_when_the_package_is_gone(tmp_path: Path) -> None:
    source = Path(next(iter(unisandbox.__path__)))
    copy = shutil.copytree(source, tmp_path / "src" / "unisandbox", ignore=shutil.ignore_patterns("__pycache__"))
    gone = f"import shutil; shutil.rmtree({str(copy / 'host' / 'keeper' / 'bin')!r})"
    body = _HOST.replace('    for key in "ab":', f"    {gone}\n    for key in 'ab':")
    code = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n{body}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
