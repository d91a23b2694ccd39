"""A filter of system calls over the host program, as systemd's units and engines of containers have: nothing is left.

What such a filter forbids is told by the probes; these tests are about what was begun all the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.programs import program

from unisandbox import Engine, UnavailableError
from unisandbox.host import mounts

OPENAT2 = 437
UNSHARE = {"x86_64": 272, "aarch64": 97}.get(platform.machine(), -1)

pytestmark = [pytest.mark.root, pytest.mark.skipif(UNSHARE < 0, reason="the numbers of another machine's calls")]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def forbidding(number: int, error: int) -> Callable[[], None]:
    """Puts a filter that answers this call with this error over the process that calls it.

    Source: include/uapi/linux/{filter,seccomp,prctl}.h: load the number; is it that one; the error, or allow.
    """
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)

    def load() -> None:
        buffer = ctypes.create_string_buffer(code, len(code))
        filtering = _Program(len(steps), ctypes.addressof(buffer))
        for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.byref(filtering), 0, 0)):
            if libc.prctl(*arguments):
                raise OSError(ctypes.get_errno(), "prctl")

    return load


@pytest.mark.anyio
async def test_a_keeper_that_may_make_no_namespaces_mounts_nothing_on_the_host(tmp_path: Path) -> None:
    """Who attaches to it may do so himself, and so his probe has nothing against it."""
    code = """
async def main():
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with Engine.open(sys.argv[1], policy="keep"):
            tell()
            async for _ in signals:
                return
anyio.run(main)
"""
    state = str(tmp_path / "state")
    before = mounts.mount_points()
    with program(code, state, before_exec=forbidding(UNSHARE, errno.EPERM)) as host:
        host.heard()
        async with Engine.attach(state) as engine:
            with pytest.raises(UnavailableError, match="the keeper has no mounts of its own") as caught:
                await engine.create(isolation="runc")
        assert "RestrictNamespaces=" in (caught.value.hint or "")
        assert mounts.mount_points() == before
        host.process.terminate()
        assert host.finish() == (0, "", "")


@pytest.mark.parametrize("isolation", ["runc", "wasm"])
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=["unknown", "forbidden"])
def test_an_engine_that_may_not_use_openat2_says_so_and_leaves_no_directory(
    tmp_path: Path, isolation: str, error: int
) -> None:
    code = """
async def main():
    async with Engine.open() as engine:
        try:
            await engine.create(rootfs=sys.argv[1], isolation=sys.argv[2])
        except SandboxError as error:
            tell(kind=type(error).__name__, said=error.message, state=engine._core.host.state_dir)
anyio.run(main)
"""
    with program(code, str(tmp_path), isolation, before_exec=forbidding(OPENAT2, error)) as host:
        told = host.heard()
        assert host.finish() == (0, "", "")

    assert told["kind"] == "UnavailableError"
    assert f"{isolation}: a filter of system calls (seccomp) forbids openat2" in told["said"]
    assert not os.path.exists(told["state"])


def test_without_openat2_a_tree_is_removed_as_safely_as_with_it(tmp_path: Path) -> None:
    """No link is followed, no mount is entered, however deep it is."""
    code = """
import errno
from unisandbox.host import syscalls
from unisandbox.host.removal import remove_tree

top, other = sys.argv[1] + "/tree", sys.argv[1] + "/other"
os.makedirs(f"{top}/mount")
os.makedirs(top + "/deep" * 50)
os.makedirs(other)
open(f"{other}/stays", "w").close()
open(f"{top}/deep/file", "w").close()
open(f"{top}/file-mount", "w").close()
os.symlink(other, f"{top}/deep/link")
syscalls.mount(other, f"{top}/mount", "", syscalls.MS_BIND)
syscalls.mount(f"{other}/stays", f"{top}/file-mount", "", syscalls.MS_BIND)
try:
    remove_tree(top)
except OSError as error:
    tell(error=error.errno, left=sorted(os.listdir(top)), other=os.listdir(other))
for name in ("mount", "file-mount"):
    syscalls.umount(f"{top}/{name}", 0)
remove_tree(top)
tell(left=os.listdir(sys.argv[1]), other=os.listdir(other))
"""
    wrapper = ["unshare", "--mount", "--propagation", "private"]
    with program(code, str(tmp_path), wrapper=wrapper, before_exec=forbidding(OPENAT2, errno.ENOSYS)) as host:
        first, second = host.heard(), host.heard()
        assert host.finish() == (0, "", "")

    assert first == {"error": errno.EXDEV, "left": ["file-mount", "mount"], "other": ["stays"]}
    assert second == {"left": ["other"], "other": ["stays"]}
