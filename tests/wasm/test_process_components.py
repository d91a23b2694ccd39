"""Components (WASI 0.2) run in processes only: built from Rust for wasm32-wasip2."""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.wasm.sandboxes import ITS_OWN
from tests.wasm.toolchains import rust_program
from wasmtime import wat2wasm

from unisandbox import Engine, InvalidArgumentError, Resources, Sandbox, UnsupportedError
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.wasm import WasmBackend
from unisandbox.backends.wasm.process import WasmProcessBackend
from unisandbox.backends.wasm.process.worker import MOST_INSTANCES, MOST_TABLES
from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.engine.registry import Backend

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SOURCE = r"""
use std::io::{Read, Write};
fn main() -> std::process::ExitCode {
    let words: Vec<String> = std::env::args().collect();
    match words[1].as_str() {
        "echo" => println!("{}", words[2]),
        "env" => println!("{}", std::env::var(&words[2]).unwrap()),
        "copy" => {
            let mut data = Vec::new();
            std::io::stdin().read_to_end(&mut data).unwrap();
            std::io::stdout().write_all(&data).unwrap();
        }
        "store" => std::fs::write(&words[2], &words[3]).unwrap(),
        "return" => return std::process::ExitCode::from(3),
        "fail" => std::process::exit(7),
        "panic" => panic!("as asked"),
        "spin" => loop { std::hint::black_box(0); },
        "sleep" => { println!("go"); std::thread::sleep(std::time::Duration::from_secs(1000)) }
        "open" => {
            let mut files = Vec::new();
            for number in 0.. {
                match std::fs::File::create(format!("/tmp/{number}")) { Ok(file) => files.push(file), Err(_) => break }
            }
            println!("{}", files.len());
        }
        "list" => for entry in std::fs::read_dir(&words[2]).unwrap() {
            println!("{}", entry.unwrap().path().display())
        },
        _ => unreachable!(),
    }
    std::process::ExitCode::SUCCESS
}
"""


@pytest.fixture(scope="module")
def component(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A component that does what its first word says."""
    return rust_program(SOURCE, tmp_path_factory.mktemp("component"), ("wasm32-wasip2",))


@pytest.fixture
def root(tmp_path: Path, component: Path) -> Path:
    """A directory with the component in it."""
    directory = tmp_path / "root"
    directory.mkdir()
    GuestPrograms().make_root(directory)
    shutil.copy(component, directory / "bin" / "main.wasm")
    return directory


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    """One with both modes."""
    backends: dict[str, Backend] = {"wasm+process": WasmProcessBackend(), "runc": RuncBackend(), "wasm": WasmBackend()}
    async with Engine.open(backends=backends) as opened:
        yield opened


@pytest.fixture
async def sandbox(engine: Engine, root: Path) -> Sandbox:
    """One with the usual limits."""
    return await engine.create(isolation="wasm+process", rootfs=root)


async def test_a_component_runs_with_its_arguments_environment_streams_and_files(sandbox: Sandbox) -> None:
    assert (await sandbox.run(["main", "echo", "word"])).stdout == b"word\n"
    assert (await sandbox.run(["main", "env", "A"], env={"A": "b"})).stdout == b"b\n"
    assert (await sandbox.run(["main", "copy"], input=b"x" * 300_000)).stdout == b"x" * 300_000
    assert (await sandbox.run(["main", "store", "/tmp/a", "b"])).exit_code == 0
    assert await sandbox.files.read("/tmp/a") == b"b"
    assert (await sandbox.run(["main", "list", "/proc"])).stdout == b""


async def test_a_component_tells_success_or_failure_only_and_its_traps(engine: Engine, sandbox: Sandbox) -> None:
    assert any("0 or 1" in note for note in WasmProcessBackend().capabilities.notes)
    assert (await sandbox.run(["main", "echo", "x"])).exit_code == 0
    for word in ("fail", "return"):
        failed = await sandbox.run(["main", word])
        assert (failed.exit.code, failed.exit.reason) == (1, "exited")
    panicked = await sandbox.run(["main", "panic"])
    assert b"as asked" in panicked.stderr
    assert (panicked.exit.code, panicked.exit.reason) == (134, "trap")
    assert panicked.exit.detail.startswith("wasm `unreachable` instruction executed\n")


async def test_a_component_that_sleeps_or_spins_is_ended(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm+process", rootfs=root, resources=Resources(cpu_seconds=0.4))
    async with sandbox.exec(["main", "sleep"]) as process:
        assert await process.stdout.receive() == b"go\n"
        await process.signal(signal.SIGTERM)
        assert (await process.wait()).signal == signal.SIGTERM
    assert (await sandbox.run(["main", "spin"], timeout=30)).exit.reason == "cpu"


async def test_in_process_a_component_is_refused_and_the_other_mode_named(engine: Engine, root: Path) -> None:
    sandbox = await engine.create(isolation="wasm", rootfs=root)
    with pytest.raises((UnsupportedError, InvalidArgumentError), match=r"wasm\+process"):
        await sandbox.run(["main", "echo", "x"])


@pytest.mark.parametrize("nofile", [5, 16, 4096, None])
async def test_a_component_has_no_more_files_open_than_it_may(engine: Engine, root: Path, nofile: int | None) -> None:
    limits = Resources(nofile=nofile)
    async with engine.create(isolation="wasm+process", rootfs=root, resources=limits) as sandbox:
        opened = int((await sandbox.run(["main", "open"])).text)
        assert opened == min(nofile or 256, 256) - ITS_OWN


def with_core_instances(number: int) -> str:
    return f"(component (core module $m) {'(core instance (instantiate $m))' * number} {RUN})"


def with_tables(number: int) -> str:
    tables = "(table 1 funcref) " * number
    return f"(component (core module $t {tables}) (core instance (instantiate $t)) {RUN})"


def with_a_table_of(elements: int) -> str:
    return f"(component (core module $t (table {elements} funcref)) (core instance (instantiate $t)) {RUN})"


RUN = """
  (core module $main (func (export "run") (result i32) (i32.const 0)))
  (core instance $main (instantiate $main))
  (type $run (func (result (result))))
  (func $run (type $run) (canon lift (core func $main "run")))
  (instance $exported (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $exported))
"""


@pytest.mark.parametrize(
    ("few", "many"),
    [
        (with_core_instances(MOST_INSTANCES - 1), with_core_instances(MOST_INSTANCES)),
        (with_tables(MOST_TABLES), with_tables(MOST_TABLES + 1)),
        (with_a_table_of(100_000), with_a_table_of(100_001)),
    ],
    ids=["instances", "tables", "elements"],
)
async def test_a_components_tables_and_instances_are_limited(sandbox: Sandbox, root: Path, few: str, many: str) -> None:
    await sandbox.files.write("/bin/few.wasm", bytes(wat2wasm(few)))
    await sandbox.files.write("/bin/many.wasm", bytes(wat2wasm(many)))
    assert (await sandbox.run(["few"])).exit_code == 0
    with pytest.raises(InvalidArgumentError) as caught:
        await sandbox.run(["many"])
    assert caught.value.exit_code == 126
