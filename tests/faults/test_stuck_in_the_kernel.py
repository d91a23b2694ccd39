"""A process that sits in the kernel can be neither stopped nor ended for a while: nobody else waits for that."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from tests.keepers import until

from unisandbox import Engine, Mount, Process, Resources, Sandbox
from unisandbox.host import loop, syscalls
from unisandbox.host.cgroups import Cgroup, Cgroups, patience

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SMALL = Resources(memory="64M")
# Source: include/uapi/linux/fs.h.
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878


class Disk:
    """A file system that can be held up, as a disk is that does not answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._held = False

    def hold_up(self) -> None:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        self._held = True

    def let_go(self) -> None:
        if self._held:
            fcntl.ioctl(self._fd, FITHAW, 0)
            self._held = False

    def close(self) -> None:
        self.let_go()
        os.close(self._fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with ExitStack() as stack:
        image, path = str(tmp_path / "image"), tmp_path / "disk"
        path.mkdir()
        loop.make_image(image, 4 << 20)
        device, name = loop.attach(image)
        stack.callback(os.close, device)
        syscalls.mount(name, str(path), "ext4", 0, "")
        stack.callback(until, lambda: _unmounted(path), "the disk is not in use any more")
        made = Disk(path)
        stack.callback(made.close)
        yield made


def _unmounted(path: Path) -> bool:
    try:
        syscalls.umount(str(path), 0)
    except OSError:
        return False
    return True


@pytest.fixture
async def engine(anyio_backend: str, disk: Disk) -> AsyncIterator[Engine]:
    async with Engine.open() as opened:
        yield opened


async def _stuck(engine: Engine, disk: Disk) -> tuple[Sandbox, Process]:
    """A sandbox with a process that waits for the disk."""
    sandbox = await engine.create(
        isolation="runc", resources=SMALL, mounts=[Mount.bind(disk.path, "/mnt/d", readonly=False)]
    )
    process = await sandbox.exec(["sh", "-c", "read line; echo x >/mnt/d/file"], stdin="pipe")
    disk.hold_up()
    await process.stdin.send(b"\n")
    status = Path(f"/proc/{process.pid}/stat")
    with anyio.fail_after(20):
        while status.read_text().rpartition(")")[2].split()[0] != "D":
            await anyio.sleep(0.002)
    return sandbox, process


@pytest.mark.parametrize("end", ["pause", "kill", "remove"])
async def test_what_cannot_be_stopped_or_ended_yet_holds_up_no_other_task(engine: Engine, disk: Disk, end: str) -> None:
    other = await engine.create(isolation="runc", resources=SMALL)
    sandbox, process = await _stuck(engine, disk)
    begun = anyio.Event()
    calls: dict[str, Callable[[], object]] = {"pause": sandbox.pause, "kill": sandbox.kill, "remove": sandbox.remove}

    async def call() -> None:
        begun.set()
        await calls[end]()  # type: ignore[misc]

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await begun.wait()
            # It needs what is let go only after other tasks have had many turns.
            for _ in range(3):
                assert (await other.run(["echo", "here"])).text == "here\n"
            disk.let_go()
        if end == "pause":
            assert [container.state for container in (await sandbox.status()).containers] == ["paused"]
            await sandbox.resume()
            assert (await process.wait()).code == 0
        else:
            assert (await process.wait()).signal == 9
    await process.aclose()
    await sandbox.remove()
    await other.remove()


async def test_a_pause_that_is_given_up_leaves_nothing_paused(engine: Engine, disk: Disk) -> None:
    sandbox, process = await _stuck(engine, disk)
    with anyio.move_on_after(0.2) as scope:
        await sandbox.pause()
    assert scope.cancelled_caught
    disk.let_go()
    with anyio.fail_after(20):
        assert (await process.wait()).code == 0
    await process.aclose()
    await sandbox.remove()


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """One whose processes are ended one by one, held by the freezer: as on a host with cgroup v1 alone."""
    if not os.path.isdir("/sys/fs/cgroup/freezer"):
        pytest.skip("the kernel ends a whole cgroup here")
    root = Cgroups.detect(f"unisandbox-t{os.getpid()}", use_unified=False).root()
    yield root
    root.kill()
    assert root.remove(10)


async def test_a_kill_by_the_freezer_waits_for_nothing_that_cannot_be_stopped_yet(
    disk: Disk, cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        slept.append(seconds)
        actually(seconds)

    slept: list[float] = []
    actually = time.sleep
    # Who waits for a file system can be stopped by newer kernels, who waits for a disk cannot.
    loop.make_image(f"{disk.path}/second", 1 << 20)
    device, _ = loop.attach(f"{disk.path}/second")
    write = [
        "dd",
        "if=/dev/zero",
        f"of=/proc/{os.getpid()}/fd/{device}",
        "bs=4096",
        "count=1",
        "oflag=direct",
        "status=none",
    ]
    process = await anyio.open_process(["sh", "-c", f"read line; exec {' '.join(write)}"])
    assert process.stdin is not None
    try:
        for procs in cgroup.procs:
            Path(procs).write_text(str(process.pid))
        disk.hold_up()
        await process.stdin.send(b"\n")
        # Not while it waits for its own program to be read from the disk.
        waiting = Path("/sys/block", Path(os.readlink(f"/proc/self/fd/{device}")).name, "inflight")
        with anyio.fail_after(20):
            while (
                waiting.read_text().split()[1] == "0"
                or Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "D"
            ):
                await anyio.sleep(0.002)
        monkeypatch.setattr(time, "sleep", sleep)
        cgroup.kill()
        assert sum(slept) < 0.01
        assert not await patience.kill(cgroup.dirs, 0)
        assert sum(slept) < 0.01
    finally:
        disk.let_go()
        os.close(device)
        with anyio.CancelScope(shield=True):
            await process.aclose()
    assert process.returncode == -signal.SIGKILL
