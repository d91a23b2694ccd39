"""Programs that nobody here wrote: Go's own tests of its library, and what Rust makes of a program."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.wasm.toolchains import go_tests, rust_program, said

from unisandbox import Completed, Engine, Mount, Resources, Sandbox
from unisandbox.backends.wasm import WasmBackend

# Go's tests are 5 to 9 MB of code: at the first run on a machine each is built, and compiled in 45 s of processor time.
pytestmark = [pytest.mark.root, pytest.mark.anyio, pytest.mark.timeout(1800)]

ORDINARY = ("io/fs",)
"""Of Go's packages, those that are tested in every run; the others with --long."""

PACKAGES = (*ORDINARY, "path/filepath", "os", "time")

SKIPPED = {
    "TestDevNullFile": "a Wasm sandbox has no devices, and opens none",
    "TestOpenFileDevNull": "the same",
}
"""Tests of Go that cannot pass here. What Go itself skips for wasip1 is not in it."""

RUST = r"""
use std::io::{Read, Write};
fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words[1].as_str() {
        "echo" => println!("{} {}", words[2], std::env::var("A").unwrap()),
        "copy" => {
            let mut data = Vec::new();
            std::io::stdin().read_to_end(&mut data).unwrap();
            std::io::stdout().write_all(&data).unwrap();
        }
        "files" => {
            std::fs::create_dir("/tmp/d").unwrap();
            std::fs::write("/tmp/d/a", "b").unwrap();
            std::fs::rename("/tmp/d/a", "/tmp/d/c").unwrap();
            let names: Vec<_> = std::fs::read_dir("/tmp/d").unwrap().map(|e| e.unwrap().file_name()).collect();
            println!("{:?} {}", names, std::fs::read_to_string("/tmp/d/c").unwrap());
        }
        "sleep" => {
            let begun = std::time::Instant::now();
            std::thread::sleep(std::time::Duration::from_millis(30));
            println!("{}", begun.elapsed().as_millis() >= 30);
        }
        "exit" => std::process::exit(words[2].parse().unwrap()),
        "panic" => panic!("as asked"),
        _ => unreachable!(),
    }
}
"""


@pytest.fixture(params=[pytest.param("asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """One event loop: what is tested runs in threads of guests."""
    return str(request.param)


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    """One that compiles what is large, on a machine that is busy."""
    backend = WasmBackend(compile_seconds=1500, compile_memory=4 << 30)
    async with Engine.open(backends={"wasm": backend}) as opened:
        yield opened


@pytest.mark.parametrize("package", PACKAGES)
async def test_go_s_own_tests_pass(engine: Engine, tmp_path: Path, package: str, pytestconfig: pytest.Config) -> None:
    if package not in ORDINARY and not pytestconfig.getoption("--long"):
        pytest.skip("the tests of this package run with --long")
    module = go_tests(package)
    (tmp_path / "root").mkdir()
    shutil.copy(module, tmp_path / "root" / "tests.wasm")
    top = said("go", "env", "GOROOT")
    # They look at the files of their own package, and at their neighbours.
    async with engine.create(
        isolation="wasm",
        rootfs=tmp_path / "root",
        mounts=[Mount.bind(top, top)],
        resources=Resources(memory="1G", disk="256M"),
    ) as sandbox:
        done = await _tested(sandbox, f"{top}/src/{package}", top)
    passed = re.findall(r"^--- PASS: (\S+)", done.text, re.MULTILINE)
    failed = re.findall(r"^ *--- FAIL: (\S+)", done.text, re.MULTILINE)
    assert (failed, done.exit_code) == ([], 0), done.text[-4000:] + done.stderr.decode(errors="replace")[-4000:]
    assert len(passed) > 5
    assert done.text.rstrip().endswith("PASS")


async def _tested(sandbox: Sandbox, directory: str, top: str) -> Completed:
    skip = ("-test.skip", "^(" + "|".join(SKIPPED) + ")$")
    return await sandbox.run(
        ["/tests.wasm", "-test.v", "-test.short", *skip],
        cwd=directory,
        env={"GOROOT": top},
        timeout=900,
        max_output=64 << 20,
    )


async def test_a_program_from_rust_has_its_arguments_streams_files_clock_and_ends(
    engine: Engine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    rust_program(RUST, root, ("wasm32-wasip1", "wasm32-wasi"))
    async with engine.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["/main", "echo", "word"], env={"A": "b"})).text == "word b\n"
        data = os.urandom(300_000)
        assert (await sandbox.run(["/main", "copy"], input=data)).stdout == data
        assert (await sandbox.run(["/main", "files"])).text == '["c"] b\n'
        assert (await sandbox.run(["/main", "sleep"])).text == "true\n"
        assert (await sandbox.run(["/main", "exit", "7"])).exit_code == 7
        panicked = await sandbox.run(["/main", "panic"])
        assert b"as asked" in panicked.stderr
        assert (panicked.exit.reason, panicked.exit_code) == ("trap", 134)
