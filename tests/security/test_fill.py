"""What somebody inside would try to use up. Each attempt succeeds with a larger limit, so each test can fail."""

from __future__ import annotations

from typing import Final

import pytest
from tests.security.attacks import attack

from unisandbox import Engine, Mount, Resources
from unisandbox.sandbox import SandboxOptions

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def test_processes_cannot_be_made_without_end(engine: Engine) -> None:
    body = (
        "made = []\n    try:\n        for _ in range(400):\n            pid = os.fork()\n"
        "            if pid == 0:\n                import time; time.sleep(60); os._exit(0)\n"
        "            made.append(pid)\n"
        "    finally:\n        for pid in made: os.kill(pid, 9); os.waitpid(pid, 0)"
    )

    assert "held: BlockingIOError" in await attack(engine, body)
    assert await attack(engine, body, resources=Resources(pids=1000)) == "escaped"


async def test_files_cannot_be_written_without_end(engine: Engine) -> None:
    body = 'with open("/tmp/fill", "wb") as f:\n        for _ in range(48): f.write(bytes(1 << 20))'
    small = Resources(memory="256M", disk="32M")

    assert "held: OSError(28" in await attack(engine, body, resources=small)
    assert await attack(engine, body, resources=Resources(memory="256M", disk="64M")) == "escaped"


# Where files can be made, so many that they are too many, and what takes them all the same.
_SMALL: Final = Resources(memory="64M", disk="16M")
_FILES: Final[dict[str, tuple[int, SandboxOptions]]] = {
    "/tmp": (4096, {"resources": Resources(memory="256M", disk="64M")}),
    "/run": (4096, {"resources": Resources(memory="256M", disk="64M")}),
    "/home": (4096, {"resources": Resources(memory="256M", disk="64M")}),
    "/dev": (1 << 17, {"resources": Resources(memory="512M", disk="16M")}),
    "/dev/shm": (10_000, {"resources": _SMALL, "mounts": [Mount.tmpfs("/tmp/large", size="128M")]}),
}


@pytest.mark.parametrize("place", _FILES)
async def test_no_place_takes_files_without_end(engine: Engine, place: str) -> None:
    count, large = _FILES[place]
    body = f'for n in range({count}): os.close(os.open(f"{place}/f{{n}}", os.O_CREAT | os.O_WRONLY, 0o600))'

    # No room for one more, or no memory for what the kernel has to know of them.
    assert await attack(engine, body, resources=_SMALL) in {
        "held: OSError(28, 'No space left on device')",
        "held: killed for its memory",
    }
    body = body.replace("/dev/shm", "/tmp/large")  # the size of that one is nobody's to choose
    assert await attack(engine, body, **large) == "escaped"


# Ways to hold about 60 MiB or more, each charged in another way.
_MEMORY: Final = {
    "of its own": "held = bytearray(96 << 20)\n    for n in range(0, len(held), 4096): held[n] = 1",
    "shared with children": (
        "import mmap\n    held = mmap.mmap(-1, 96 << 20)\n    for n in range(0, len(held), 4096): held[n] = 1"
    ),
    "of children": (
        "made = []\n    try:\n        for _ in range(6):\n"
        "            reading, writing = os.pipe()\n            pid = os.fork()\n            if pid == 0:\n"
        "                held = bytearray(16 << 20)\n                for n in range(0, len(held), 4096): held[n] = 1\n"
        "                os.write(writing, b'x')\n                import signal; signal.pause()\n"
        "            made.append(pid)\n            os.close(writing)\n            assert os.read(reading, 1)\n"
        "        assert not any(os.waitpid(pid, os.WNOHANG)[0] for pid in made)\n"
        "    finally:\n        for pid in made: os.kill(pid, 9); os.waitpid(pid, 0)"
    ),
    "of files without a name": (
        "fd = os.memfd_create('x')\n    for _ in range(96): assert os.write(fd, bytes(1 << 20)) == 1 << 20"
    ),
    "of files in memory": (
        "fd = os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)\n"
        "    for _ in range(60): assert os.write(fd, bytes(1 << 20)) == 1 << 20"
    ),
    "of System V": (
        "held = call('shmget', 0, ctypes.c_size_t(96 << 20), 0o1600)\n    libc.shmat.restype = ctypes.c_void_p\n"
        "    ctypes.memset(libc.shmat(held, None, 0), 1, 96 << 20)"
    ),
    "of the kernel, in pipes": (
        "held = []\n    for _ in range(96 << 4):\n        held.append(os.pipe())\n"
        "        os.set_blocking(held[-1][1], False)\n        os.write(held[-1][1], bytes(1 << 16))"
    ),
    "of the kernel, in sockets": (
        "held = []\n    for _ in range(96 << 4):\n        held.append(socket.socketpair())\n"
        "        held[-1][0].setblocking(False)\n        try:\n            while True: held[-1][0].send(bytes(4096))\n"
        "        except BlockingIOError: pass"
    ),
}


@pytest.mark.parametrize("of", _MEMORY)
async def test_memory_cannot_be_taken_without_end(engine: Engine, of: str) -> None:
    small, large = (Resources(memory=memory, nofile=8192) for memory in ("48M", "512M"))
    body = _MEMORY[of]

    assert (await attack(engine, body, resources=small)).startswith("held: ")
    assert await attack(engine, body, resources=large) == "escaped"
