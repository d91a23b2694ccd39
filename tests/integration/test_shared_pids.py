"""Sandboxes with a shared pid namespace: its first process, and what becomes of one that has lost it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from unisandbox import (
    BackendError,
    Engine,
    Resources,
    Sandbox,
)
from unisandbox.backends.runc import pidns
from unisandbox.host import namespaces

pytestmark = [pytest.mark.anyio, pytest.mark.root]


def lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def first_of_its_namespace(pid: int) -> int:
    """The process 1 of a process's pid namespace."""
    space = os.readlink(f"/proc/{pid}/ns/pid")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{name}/status").read_text()
            if os.readlink(f"/proc/{name}/ns/pid") == space and re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                return int(name)
    raise AssertionError("it has none")


@pytest.mark.parametrize("userns", ["private", "host"])
async def test_the_first_process_of_a_shared_pid_namespace_has_nothing_and_may_nothing(userns: Any) -> None:
    async with (
        Sandbox.create(resources=Resources(memory="128M"), share_pid=True, userns=userns) as sandbox,
        sandbox.exec(["sleep", "60"]) as process,
    ):
        first = first_of_its_namespace(process.pid)
        status = dict(line.split(":\t", 1) for line in lines_of(f"/proc/{first}/status"))
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Groups"].strip()) == ("1", "")
        assert status["Seccomp"] == "2"
        assert len(lines_of(f"/proc/{first}/mountinfo")) == 1
        assert os.listdir(f"/proc/{first}/root") == []
        assert os.listdir(f"/proc/{first}/fd") == []
        spaces = namespaces.process_namespaces(first)
        known = (await sandbox.status()).namespaces
        assert {kind: spaces[kind] for kind in known} == known
        assert "/run/" not in (await sandbox.sh("cat /proc/1/cmdline")).text
        seen = await sandbox.sh("cat /proc/1/status; ls /proc/1/root/ /proc/1/fd; kill -9 1; kill -0 1 && echo alive")
        assert ("Name:\tinit" in seen.text, seen.text.endswith("alive\n")) == (True, True)


_MADE_TO_CALL = """
import ctypes, os, sys
pid, number = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
regs = (ctypes.c_uint64 * 27)()  # struct user_regs_struct
def ptrace(request, data=None):
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
ptrace(0x4206)  # PTRACE_SEIZE
ptrace(0x4207)  # PTRACE_INTERRUPT
os.waitpid(pid, 0x40000000)  # __WALL
ptrace(12, regs)  # PTRACE_GETREGS
regs[15], regs[10] = 2**64 - 1, number  # orig_rax: nothing to restart; rax
regs[14], regs[13], regs[12], regs[7] = 2**64 - 1, 0, 1, 0  # rdi, rsi, rdx, r10
regs[16] -= 2  # rip: the instruction `syscall` again
ptrace(13, regs)  # PTRACE_SETREGS
for _ in ("before it", "after it", "before the next"):
    ptrace(24)  # PTRACE_SYSCALL
    status = os.waitpid(pid, 0x40000000)[1]
print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "going on")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the registers of x86_64")
async def test_the_first_process_of_a_shared_pid_namespace_may_wait_and_ends_if_it_is_made_to_do_more() -> None:
    async def made_to_call(pid: int, number: int) -> str:
        done = await anyio.run_process([sys.executable, "-c", _MADE_TO_CALL, str(pid), str(number)])
        return done.stdout.decode().strip()

    async with Sandbox.create(resources=Resources(memory="128M"), share_pid=True) as sandbox:
        async with sandbox.exec(["sleep", "60"]) as process:
            first = first_of_its_namespace(process.pid)
            assert await made_to_call(first, 61) == "going on"  # wait4
            assert await made_to_call(first, 39) == str(signal.SIGSYS.value)  # getpid
        await until_stopped(sandbox)


async def test_the_first_process_of_a_shared_pid_namespace_reaps_orphans() -> None:
    async with (
        Sandbox.create(resources=Resources(memory="128M"), share_pid=True) as sandbox,
        sandbox.exec(["sleep", "60"]) as process,
    ):
        first = first_of_its_namespace(process.pid)
        # Not by the sandbox: the orphans of a container are its init's.
        script = "for i in $(seq 20); do (sleep 0.01 &); done"
        await anyio.run_process(["nsenter", "--target", str(first), "--pid", "sh", "-c", script])
        with anyio.fail_after(10):
            while lines_of(f"/proc/{first}/task/{first}/children"):
                await anyio.sleep(0.005)


async def test_a_shared_pid_namespace_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Engine.open() as engine:
        with monkeypatch.context() as patched:
            patched.setattr(pidns, "EMPTY_ROOT", "/missing")
            with pytest.raises(BackendError, match="root: No such file"):
                await engine.create(resources=Resources(memory="128M"), share_pid=True)
        async with engine.create(resources=Resources(memory="128M"), share_pid=True) as sandbox:
            assert (await sandbox.run(["true"])).exit_code == 0


async def test_a_container_may_have_any_name_beside_a_shared_pid_namespace() -> None:
    async with Sandbox.create(resources=Resources(memory="128M"), share_pid=True) as sandbox:
        for name in ("pid", "pid-first"):
            async with sandbox.containers.add(name=name, argv=["sh", "-c", "exit 3"]) as container:
                assert (await container.wait()).code == 3
        await sandbox.stop(grace=0)
        await sandbox.start()
        assert (await sandbox.run(["true"])).exit_code == 0


async def until_stopped(sandbox: Sandbox) -> None:
    """The first process of a namespace ends after all others in it, and what has ended it does not wait for that."""
    with anyio.fail_after(20):
        while (await sandbox.status()).state != "stopped":
            await anyio.sleep(0.01)


async def test_a_sandbox_that_has_lost_its_shared_pid_namespace_starts_again() -> None:
    async with Sandbox.create(resources=Resources(memory="128M"), share_pid=True) as sandbox:
        for _ in range(2):
            async with sandbox.exec(["sleep", "60"]) as process:
                os.kill(first_of_its_namespace(process.pid), signal.SIGKILL)
                assert (await process.wait()).signal == signal.SIGKILL
            await until_stopped(sandbox)
            await sandbox.start()
            assert (await sandbox.status()).state == "ready"
            assert (await sandbox.run(["true"])).exit_code == 0


async def test_who_has_attached_sees_that_a_lost_pid_namespace_is_there_again(tmp_path: Path) -> None:
    async with (
        Engine.open(tmp_path) as engine,
        Engine.attach(tmp_path) as other,
        engine.create(name="a", resources=Resources(memory="128M"), share_pid=True) as sandbox,
    ):
        same = await other.get("a")
        async with sandbox.exec(["sleep", "60"]) as process:
            os.kill(first_of_its_namespace(process.pid), signal.SIGKILL)
            await process.wait()
        await until_stopped(same)
        await sandbox.stop(grace=0)
        await sandbox.start()
        assert (await same.status()).state == "ready"
        assert (await same.run(["true"])).exit_code == 0
        assert ((await same.status()).state, (await sandbox.status()).state) == ("ready", "ready")


async def test_looks_at_a_shared_pid_namespace_end_while_others_change_the_sandbox(tmp_path: Path) -> None:
    async with (
        Engine.open(tmp_path) as engine,
        Engine.attach(tmp_path) as other,
        engine.create(name="a", resources=Resources(memory="128M"), share_pid=True) as sandbox,
    ):
        same = await other.get("a")
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:

                async def look() -> None:
                    for _ in range(100):
                        assert (await same.status()).state == "ready"

                async def change(one: Sandbox) -> None:
                    for number in range(25):
                        await one.update(Resources(memory=f"{128 + number}M"))

                for _ in range(4):
                    group.start_soon(look)
                group.start_soon(change, sandbox)
                group.start_soon(change, same)
