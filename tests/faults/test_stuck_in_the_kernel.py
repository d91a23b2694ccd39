"""A process that sits in the kernel can be neither stopped nor ended for a while: nobody else waits for that."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from tests.keepers import until

from unisandbox import Engine, Mount, Process, Resources, Sandbox
from unisandbox.host import loop, syscalls

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
