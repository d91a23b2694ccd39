"""Trees of files that are hard to work with, and looks at them and at whoever does."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox.host import syscalls

MIB = 1 << 20
DEEP = 3_300


def shape(root: Path) -> dict[str, object]:
    """All that is below a directory, with links as they are."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_uid, path.read_bytes() if path.is_file() else None)
        for path in sorted(root.rglob("*"))
    }


def make_deep(top: Path, depth: int) -> None:
    """A chain of directories with a file at its end; no path is long enough for it."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(os.open("end", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    finally:
        os.close(fd)


def depth_of(top: Path) -> int:
    """How deep the chain is, down to the file at its end."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    depth = 0
    try:
        while os.listdir(fd) == ["d"]:
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
            depth += 1
        assert os.listdir(fd) == ["end"]
    finally:
        os.close(fd)
    return depth


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Allow only so many descriptors above those that are open."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def cancelled_at(monkeypatch: pytest.MonkeyPatch, turn: int) -> Iterator[list[int]]:
    """Cancel the block at its `turn`-th checkpoint; yields a list that counts them."""
    seen: list[int] = []
    original = anyio.lowlevel.checkpoint
    with anyio.CancelScope() as scope, monkeypatch.context() as patch:

        async def checkpoint() -> None:
            seen.append(1)
            if len(seen) == turn:
                scope.cancel()
            await original()

        patch.setattr(anyio.lowlevel, "checkpoint", checkpoint)
        yield seen


def identity() -> list[str]:
    """Who this thread is for the kernel's checks of files, and what goes with a change of that."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    kept = ("Uid", "Gid", "Groups", "Cap", "Umask")
    others = [syscalls.prctl(syscalls.PR_GET_DUMPABLE), syscalls.parent_death_signal()]
    return [line for line in lines if line.startswith(kept)] + [str(number) for number in others]
