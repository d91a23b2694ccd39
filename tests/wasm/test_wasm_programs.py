"""Which module a word means: as a shell finds programs, within the root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from unisandbox import InvalidArgumentError
from unisandbox.backends.wasm.programs import Program, Programs

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MODULE = b"\0asm\1\0\0\0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("usr/local/bin/one.wasm", "usr/bin/one.wasm", "usr/bin/two", "bin/three.wasm", "tools/four.wasm"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MODULE)
    (tmp_path / "root" / "five.wasm").write_bytes(MODULE)
    (tmp_path / "root" / "text.wat").write_text("(module)")
    (tmp_path / "root" / "bin" / "script").write_text("#!/bin/sh\n")
    return tmp_path / "root"


@pytest.fixture
def fd(root: Path) -> Iterator[int]:
    opened = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield opened
    os.close(opened)


async def content_of(program: Program) -> bytes:
    fd = os.memfd_create("content")
    try:
        await program.copy(fd)
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("word", "env", "cwd", "found"),
    [
        ("one", {}, "/", "/usr/local/bin/one.wasm"),
        ("one.wasm", {}, "/", "/usr/local/bin/one.wasm"),
        ("two", {}, "/", "/usr/bin/two"),
        ("three", {}, "/", "/bin/three.wasm"),
        ("four", {"PATH": "/nothing:/tools"}, "/", "/tools/four.wasm"),
        ("four", {"PATH": ""}, "/tools", "/tools/four.wasm"),
        ("/tools/four", {}, "/", "/tools/four.wasm"),
        ("./four", {}, "/tools", "/tools/./four.wasm"),
        ("tools/four.wasm", {}, "/", "/tools/four.wasm"),
        ("../tools/four", {}, "/bin", "/bin/../tools/four.wasm"),
        ("five.wasm", {}, "/", "/five.wasm"),
        ("text.wat", {}, "/", "/text.wat"),
    ],
)
async def test_a_word_is_found_as_a_shell_finds_it(
    fd: int, word: str, env: dict[str, str], cwd: str, found: str
) -> None:
    programs = Programs()
    for _ in range(2):  # looked for, and known
        program = await programs.find(word, env, fd, fd, cwd=cwd)
        assert program.path == found
        assert (await content_of(program))[:4] in {MODULE[:4], b"(mod"}
        program.close()


@pytest.mark.parametrize(
    ("word", "code"),
    [("none", 127), ("five", 127), ("/none", 127), ("script", 126), ("/bin", 126), ("four", 127), ("text", 127)],
)
async def test_what_is_none_has_the_code_of_a_shell(fd: int, word: str, code: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await Programs().find(word, {}, fd, fd)
    assert caught.value.exit_code == code


async def test_a_module_that_is_too_large_is_not_read(root: Path, fd: int) -> None:
    with (root / "bin" / "huge.wasm").open("wb") as file:
        file.write(MODULE)
        file.truncate(1 << 40)
    with pytest.raises(InvalidArgumentError, match="at most") as caught:
        await Programs().find("huge", {}, fd, fd)
    assert caught.value.exit_code == 126


async def test_a_changed_file_is_read_again(root: Path, fd: int) -> None:
    programs = Programs()
    first = await programs.find("three", {}, fd, fd)
    status = (root / "bin" / "three.wasm").stat()
    (root / "bin" / "three.wasm").write_bytes(MODULE[:-1] + b"\1")
    os.utime(root / "bin" / "three.wasm", ns=(status.st_atime_ns, status.st_mtime_ns))
    second = await programs.find("three", {}, fd, fd)
    assert first.digest != second.digest
    with pytest.raises(InvalidArgumentError, match="changed"):
        await content_of(first)
    first.close()
    second.close()


async def test_others_have_their_turn_while_a_large_module_is_read(root: Path, fd: int) -> None:
    with (root / "bin" / "large.wasm").open("wb") as file:
        file.write(MODULE)
        file.truncate(32 << 20)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        program = await Programs().find("large", {}, fd, fd)
        assert turns > 16
        turns = 0
        assert len(await content_of(program)) == 32 << 20
        assert turns > 16
        group.cancel_scope.cancel()
    program.close()
