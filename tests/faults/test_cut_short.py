"""What was half done when it was cut: bugs that the crash matrix has found, each reduced to one test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from tests.programs import program

from unisandbox import BackendError, Engine, Resources, SandboxError
from unisandbox.host import boundary

pytestmark = [pytest.mark.root, pytest.mark.anyio]
SMALL = Resources(memory="64M")

# Kills itself at the point that it is given.
HOST = """
from unisandbox.host import boundary
def die(name, of):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
async def main():
    engine = await Engine.open(sys.argv[2], policy="keep")
    sandbox = await engine.create(name="a", resources=Resources(memory="64M"), share_pid=sys.argv[4] == "share")
    if sys.argv[4] != "share":
        await sandbox.run(["true"])
    boundary.watch(die)
    await DO(sandbox)
anyio.run(main, backend=sys.argv[1])
"""


@contextmanager
def cut_at(name: str) -> Iterator[None]:
    """Cancel what is done when this point is reached."""
    with anyio.CancelScope() as scope:
        boundary.watch(lambda reached, _: scope.cancel() if reached == name else None)
        try:
            yield
        finally:
            boundary.watch(None)
    assert scope.cancelled_caught


def killed(what: str, backend: str, state: Path, point: str, how: str = "") -> None:
    """Let a host program kill itself in the middle of something."""
    with program(f"DO = lambda sandbox: {what}\n{HOST}", backend, str(state), point, how) as host:
        assert host.finish()[0] == -9


@pytest.mark.parametrize("shared", [False, True])
async def test_a_creation_that_is_cut_while_the_first_tree_is_made_does_not_spoil_the_next(
    shared: bool, tmp_path: Path
) -> None:
    async with Engine.open(tmp_path / "state" if shared else None) as engine:
        for _ in range(10):  # the job is killed wherever it is
            with cut_at("after keeper.*"):
                await engine.create(resources=SMALL)
        async with engine.create(resources=SMALL) as sandbox:
            assert (await sandbox.run(["id", "-u"])).text == "0\n"


@pytest.mark.parametrize("point", ["after keeper.*", "after runtime.create", "before runtime.start"])
async def test_a_main_container_that_is_half_made_is_made_again(point: str, anyio_backend: str, tmp_path: Path) -> None:
    what = "sandbox.containers.add(name='box', argv=['sleep', '1000'])"
    killed(what, anyio_backend, tmp_path, point)
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.get("a")
        assert [container.name for container in await sandbox.containers.list()] == ["main"]
        async with sandbox.containers.add(name="box", argv=["sleep", "1000"]):
            assert (await sandbox.run(["true"])).exit_code == 0


@pytest.mark.parametrize("point", ["before init.go", "after init.go", "after init.exec"])
async def test_an_exec_that_nobody_was_told_of_runs_once_or_not_at_all(
    point: str, anyio_backend: str, tmp_path: Path
) -> None:
    what = "sandbox.exec(['sh', '-c', 'echo once >> /tmp/times; exec sleep 1000'], operation_id='op')"
    killed(what, anyio_backend, tmp_path, point)
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.get("a")
        process = await sandbox.exec(["sh", "-c", "echo once >> /tmp/times; exec sleep 1000"], operation_id="op")
        with anyio.fail_after(10):
            while (await sandbox.run(["pgrep", "-c", "sleep"])).exit_code != 0:
                await anyio.sleep(0.01)
        assert (await sandbox.run(["pgrep", "-c", "sleep"])).text == "1\n"
        assert (await process.kill()).signal == 9


async def test_a_shared_pid_namespace_that_is_half_gone_is_made_again(anyio_backend: str, tmp_path: Path) -> None:
    killed("sandbox.stop(grace=0)", anyio_backend, tmp_path, "after cgroup.kill", "share")
    async with Engine.open(tmp_path) as engine:
        sandbox = await engine.get("a")
        await sandbox.start()
        assert (await sandbox.run(["true"])).exit_code == 0


async def test_images_and_temporary_files_of_the_killed_are_removed(tmp_path: Path) -> None:
    async with Engine.open(tmp_path) as engine:
        number = engine.id
    left = [f"unisandbox-{number}-aaaaaaaaaa.img", "cgroups.01234567.tmp", "engine-id.0123456789abcdef"]
    for name in left:
        (tmp_path / name).write_bytes(b"")
    other = tmp_path / "unisandbox-bbbbbbbbbb-aaaaaaaaaa.img"  # another engine's: it is not ours to judge
    other.write_bytes(b"")
    async with Engine.open(tmp_path):
        assert {*left} & {*os.listdir(tmp_path)} == set()
        assert other.exists()


async def test_a_keeper_that_was_just_beginning_when_its_owner_died_is_no_obstacle(
    anyio_backend: str, tmp_path: Path
) -> None:
    code = """
from unisandbox.host import boundary
boundary.watch(lambda name, of: name == sys.argv[3] and os.kill(os.getpid(), signal.SIGKILL))
async def main():
    await Engine.open(sys.argv[2], policy="keep")
anyio.run(main, backend=sys.argv[1])
"""
    for point in ("before keeper process", "after keeper process"):
        with program(code, anyio_backend, str(tmp_path), point) as host:
            assert host.finish()[0] == -9
        async with Engine.open(tmp_path, policy="keep") as engine:
            assert await engine.list() == []


async def test_without_a_keeper_starting_fails_in_our_words(tmp_path: Path) -> None:
    from tests.crash.points import kill_keeper

    engine = await Engine.open(tmp_path, policy="keep")
    sandbox = await engine.create(resources=SMALL, share_pid=True)
    await sandbox.stop(grace=0)
    kill_keeper(str(tmp_path))
    with pytest.raises(SandboxError, match="keeper"):
        await sandbox.start()
    with pytest.raises(SandboxError, match="keeper"):
        await sandbox.run(["true"])
    await engine.close()
    async with Engine.open(tmp_path) as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["removed"]


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "failed"])
async def test_a_start_with_a_shared_pid_namespace_that_is_cut_may_be_repeated(cancelled: bool) -> None:
    async with Engine.open() as engine:
        sandbox = await engine.create(resources=SMALL, share_pid=True)
        await sandbox.stop(grace=0)
        with anyio.CancelScope() as scope:

            def cut(name: str, _of: str) -> None:
                if name == "before first.create":
                    if not cancelled:
                        raise BackendError("it cannot be made")
                    scope.cancel()

            boundary.watch(cut)
            try:
                with contextlib.suppress(BackendError):
                    await sandbox.start()
                    pytest.fail("it was not cut")
            finally:
                boundary.watch(None)
        await sandbox.start()
        assert (await sandbox.run(["true"])).exit_code == 0
