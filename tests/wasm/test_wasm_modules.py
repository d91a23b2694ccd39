"""Modules are compiled once, elsewhere, within bounds; what is kept of them is checked before it is run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from tests.wasm.sandboxes import EXIT_7, engine, make_root, pids_of

from unisandbox import DeadlineExceededError, FailedPreconditionError, InvalidArgumentError, Sandbox, UnsupportedError
from unisandbox.backends.wasm import compiling
from unisandbox.backends.wasm.compiling import CompileLimits, judge
from unisandbox.backends.wasm.store import Store

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "root")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "wasm"


@pytest.fixture
async def sandbox(cache: Path, root: Path) -> AsyncIterator[Sandbox]:
    async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as made:
        yield made


def kept(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def bomb(functions: int = 6000, depth: int = 220) -> str:
    """A module whose text is small and whose compilation is not: blocks in blocks, and a table of jumps to them all."""
    blocks = "(block " * depth
    jumps = " ".join(str(n) for n in range(depth))
    body = f"{blocks} (br_table {jumps} (local.get 0)) {')' * depth}"
    return f'(module (memory 1) {f"(func (param i32) {body})" * functions} (func (export "_start")))'


def _compilers() -> int:
    return len(pids_of("wasm/compiler.py"))


async def test_a_module_is_compiled_once_and_then_found(cache: Path, root: Path) -> None:
    for _ in range(2):
        async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
            assert (await sandbox.run(["seven.wat"])).exit_code == 7
        (artefact,) = kept(cache)
        assert [path.stat().st_mode & 0o777 for path in (cache, artefact)] == [0o700, 0o600]


async def test_prefetch_compiles_ahead_and_creates_nothing(cache: Path, root: Path) -> None:
    async with engine(cache) as opened:
        await opened.prefetch("seven.wat", isolation="wasm", rootfs=root)
        assert len(kept(cache)) == 1
        assert await opened.list() == []
        with pytest.raises(InvalidArgumentError) as caught:
            await opened.prefetch("nothing", isolation="wasm", rootfs=root)
        assert caught.value.exit_code == 127
        with pytest.raises(UnsupportedError):
            await opened.prefetch("sh", isolation="wasm", rootfs="host")
        with pytest.raises(UnsupportedError):
            await opened.prefetch("sh", isolation="runc", rootfs="host")


async def test_two_who_ask_at_once_compile_once(sandbox: Sandbox, cache: Path) -> None:
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, _compilers())
            await anyio.sleep(0.005)  # a look at the system's processes

    async with anyio.create_task_group() as watching:
        watching.start_soon(watch)
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(sandbox.run, ["seven.wat"])
        watching.cancel_scope.cancel()
    assert most == 1
    assert len(kept(cache)) == 1


def test_two_processes_compile_once(cache: Path, root: Path, tmp_path: Path) -> None:
    program = f"""
import anyio
from tests.wasm.sandboxes import engine
from pathlib import Path
async def main():
    async with engine(Path({str(cache)!r})) as opened, opened.create(isolation="wasm", rootfs={str(root)!r}) as sandbox:
        print((await sandbox.run(["seven.wat"])).exit_code)
anyio.run(main)
"""
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["7\n", "7\n"]
    assert len(kept(cache)) == 1


async def test_a_wait_for_anothers_compilation_can_be_cancelled_and_changes_nothing(tmp_path: Path) -> None:
    # A lock belongs to the open file, so two stores are as two processes here.
    directory = tmp_path / "store"
    owner, waiter = Store(directory), Store(directory)
    async with owner.alone("key"):
        descriptors = os.listdir("/proc/self/fd")
        with anyio.move_on_after(0.05) as scope:
            async with waiter.alone("key"):
                pytest.fail("two are in there")
        assert scope.cancelled_caught
        assert os.listdir("/proc/self/fd") == descriptors
        assert [path.name for path in kept(directory)] == ["key.lock"]
    assert kept(directory) == []
    with anyio.fail_after(10):
        async with waiter.alone("key"):
            assert [path.name for path in kept(directory)] == ["key.lock"]


async def test_locks_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    killed = f"""
import anyio, os
from unisandbox.backends.wasm.store import Store
async def main():
    async with Store({str(directory)!r}).alone("dead"):
        os.kill(os.getpid(), 9)
anyio.run(main)
"""
    await anyio.run_process([sys.executable, "-c", killed], check=False)
    assert [path.name for path in kept(directory)] == ["dead.lock"]
    artefact = os.memfd_create("artefact")
    try:
        async with Store(directory).alone("alive"):
            await Store(directory).keep("key", artefact)
            assert [path.name for path in kept(directory)] == ["alive.lock", "key.cwasm"]
    finally:
        os.close(artefact)


async def test_a_cut_or_damaged_artefact_is_compiled_anew(cache: Path, root: Path) -> None:
    for damage in ("cut", "changed", "empty", "longer"):
        async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
            assert (await sandbox.run(["seven.wat"])).exit_code == 7
        (artefact,) = kept(cache)
        whole = artefact.read_bytes()
        middle = len(whole) // 2
        damaged = {
            "cut": whole[:middle],
            "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "longer": whole + b"\0" * 100,
        }
        # Another file: the one that is mapped may not shrink under whoever runs it, as with any shared library.
        artefact.unlink()
        artefact.write_bytes(damaged[damage])
        artefact.chmod(0o600)
        async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
            assert (await sandbox.run(["seven.wat"])).exit_code == 7
        assert artefact.stat().st_size == len(whole)


@pytest.mark.parametrize("what", ["directory", "artefact"])
@pytest.mark.parametrize("how", ["writable by the group", "of another user", "a link"])
async def test_what_others_could_have_written_is_not_run(cache: Path, root: Path, what: str, how: str) -> None:
    async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["seven.wat"])).exit_code == 7
    (artefact,) = kept(cache)
    path = cache if what == "directory" else artefact
    if how == "writable by the group":
        path.chmod(path.stat().st_mode | 0o020)
    elif how == "of another user":
        os.chown(path, 12345, -1)
    else:
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
    async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        with pytest.raises(FailedPreconditionError, match=r"compiled modules|no directory"):
            await sandbox.run(["seven.wat"])


async def test_without_a_place_to_keep_it_a_module_runs_all_the_same(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory can be made here")
    async with engine(tmp_path / "file" / "wasm") as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["seven.wat"])).exit_code == 7


def test_for_a_user_without_a_home_nothing_is_kept() -> None:
    program = """
import os, pwd, anyio
from unisandbox.backends.wasm.store import Store, default_directory
async def main():
    os.setuid(54321)
    store = Store(default_directory())
    assert await store.find("key") == -1
    await store.keep("key", -1)
    async with store.alone("key"):
        pass
anyio.run(main)
"""
    environment = {name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_CACHE_HOME"}}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=755", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


async def test_a_full_disk_keeps_nothing_and_the_module_runs(root: Path, full_disk: Path) -> None:
    async with engine(full_disk / "wasm") as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["seven.wat"])).exit_code == 7
    assert kept(full_disk / "wasm") == []


async def test_the_store_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", most=400_000)
    artefact = os.memfd_create("artefact")
    try:
        os.write(artefact, b"x" * 100_000)
        for number in range(6):
            await store.keep(f"{number:064x}", artefact)
            os.utime(tmp_path / "store" / f"{number:064x}.cwasm", (number, number))
        names = {path.name[63:64] for path in kept(tmp_path / "store")}
        assert names == {"3", "4", "5"}
    finally:
        os.close(artefact)


async def test_no_module_is_said_to_be_none(sandbox: Sandbox) -> None:
    for name, content in (
        ("bad.wat", "(module (func"),
        ("bad.wasm", b"\0asm\1\0\0\0garbage"),
        ("short.wasm", b"\0asm"),
    ):
        await sandbox.files.write(f"/{name}", content)
        with pytest.raises(InvalidArgumentError) as caught:
            await sandbox.run([name])
        assert caught.value.exit_code == 126
    await sandbox.files.write("/empty.wat", EXIT_7.replace('(export "_start")', ""))
    with pytest.raises(InvalidArgumentError, match="_start"):
        await sandbox.run(["empty.wat"])


async def test_a_module_made_to_be_slow_is_ended_in_time(cache: Path, root: Path) -> None:
    (root / "bomb.wat").write_text(bomb(functions=18_000))
    async with engine(cache, compile_seconds=3) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        begun = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught:
            await sandbox.run(["bomb.wat"])
        assert time.monotonic() - begun < 20
        assert "compile_seconds=" in caught.value.hint
        assert _compilers() == 0
        # Others are not held up meanwhile, nor afterwards.
        assert (await sandbox.run(["seven.wat"])).exit_code == 7
    assert len(kept(cache)) == 1


def test_a_compiler_that_has_used_up_its_processor_time_is_said_to_be_late() -> None:
    request = {
        "paths": sys.path,
        "settings": {"trust_signals": False, "fuel": False},
        "cpu_seconds": 1,
        "bytes": 1 << 20,
        "memory": 0,
    }
    compiler = [sys.executable, "-I", compiling.__file__.replace("compiling", "compiler"), json.dumps(request)]
    done = subprocess.run(compiler, input=bomb(functions=5000).encode(), capture_output=True, check=False)
    with pytest.raises(DeadlineExceededError, match="processor time"):
        judge(-done.returncode, "", "a bomb", CompileLimits(seconds=0.1), oom=False)


def test_the_limit_of_processor_time_counts_what_all_threads_can_use_in_the_time_there_is() -> None:
    assert CompileLimits(seconds=10).cpu_seconds > 10 * min(os.cpu_count() or 1, 4)


async def test_a_module_made_to_eat_memory_is_ended(cache: Path, root: Path) -> None:
    (root / "bomb.wat").write_text(bomb())
    async with (
        engine(cache, compile_memory=64 << 20) as opened,
        opened.create(isolation="wasm", rootfs=root) as sandbox,
    ):
        with pytest.raises(InvalidArgumentError, match="memory") as caught:
            await sandbox.run(["bomb.wat"])
        assert "compile_memory=" in caught.value.hint
        assert (await sandbox.run(["seven.wat"])).exit_code == 7


async def test_modules_made_to_be_slow_hold_up_no_other_sandbox_and_no_known_module(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_PROCESSORS", 2)
    for number in range(4):
        (root / f"bomb{number}.wat").write_text(bomb(functions=18_000 + number))
    (root / "eight.wat").write_text(EXIT_7.replace("7", "8"))
    (root / "nine.wat").write_text(EXIT_7.replace("7", "9"))
    ended = []
    async with engine(cache) as opened:
        await opened.prefetch("seven.wat", isolation="wasm", rootfs=root)
        async with contextlib.AsyncExitStack() as stack, anyio.create_task_group() as group:
            hostile = [await stack.enter_async_context(opened.create(isolation="wasm", rootfs=root)) for _ in range(2)]
            other = await stack.enter_async_context(opened.create(isolation="wasm", rootfs=root))

            async def run(sandbox: Sandbox, name: str) -> None:
                await sandbox.run([name])
                ended.append(name)

            for number in range(4):
                group.start_soon(run, hostile[number % 2], f"bomb{number}.wat")
            with anyio.fail_after(20):
                while not _compilers():
                    await anyio.sleep(0.01)  # a look at the system's processes
            assert (await hostile[0].run(["seven.wat"])).exit_code == 7
            for name, code in (("eight.wat", 8), ("nine.wat", 9)):
                assert (await other.run([name])).exit_code == code
            assert ended == []
            group.cancel_scope.cancel()
    assert _compilers() == 0


async def test_what_takes_long_is_compiled_when_its_turn_among_the_long_ones_has_come(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_PROCESSORS", 2)
    monkeypatch.setattr(compiling, "_SHORT_SECONDS", 0.05)  # everything does
    names = [f"slow{number}.wat" for number in range(3)]
    for number, name in enumerate(names):
        (root / name).write_text(bomb(functions=50 + number))
    async with engine(cache) as opened, contextlib.AsyncExitStack() as stack, anyio.create_task_group() as group:
        for name in names:
            sandbox = await stack.enter_async_context(opened.create(isolation="wasm", rootfs=root))
            group.start_soon(sandbox.run, [name])
    assert len(kept(cache)) == 3


async def test_a_cancelled_start_ends_the_compiler(cache: Path, root: Path) -> None:
    (root / "bomb.wat").write_text(bomb())
    async with engine(cache) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        async with anyio.create_task_group() as group:
            group.start_soon(sandbox.run, ["bomb.wat"])
            with anyio.fail_after(20):
                while not _compilers():
                    await anyio.sleep(0.01)  # a look at the system's processes
            group.cancel_scope.cancel()
        assert _compilers() == 0
        with pytest.raises(DeadlineExceededError):
            await sandbox.run(["bomb.wat"], timeout=0.5)
        assert _compilers() == 0
    assert kept(cache) == []


def test_a_killed_host_leaves_no_compiler(cache: Path, root: Path) -> None:
    (root / "bomb.wat").write_text(bomb())
    program = f"""
import anyio
from tests.wasm.sandboxes import engine
from pathlib import Path
async def main():
    async with engine(Path({str(cache)!r})) as opened, opened.create(isolation="wasm", rootfs={str(root)!r}) as sandbox:
        await sandbox.run(["bomb.wat"])
anyio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as host:
        try:
            deadline = time.monotonic() + 30
            while not _compilers():
                assert time.monotonic() < deadline
                time.sleep(0.01)  # a look at the system's processes
        finally:
            host.kill()
    deadline = time.monotonic() + 15
    while _compilers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kept(cache) in ([], [cache / name for name in os.listdir(cache) if name.endswith(".lock")])
