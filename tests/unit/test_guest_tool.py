"""The programs of the conformance tests that are one Wasm module: each does what it says, under a plain wasmtime."""

from __future__ import annotations

import gc
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from unisandbox.conformance.guest_programs import GuestPrograms
from unisandbox.conformance.inventory import leaves_nothing_behind, tolerating
from unisandbox.conformance.programs import BLOCK, Bad

wasmtime = pytest.importorskip("wasmtime")

PROGRAMS = GuestPrograms()


class Done(NamedTuple):
    """How a run ended: its code, or the words of its trap."""

    code: int | str
    out: bytes
    err: bytes


Run = Callable[..., Done]


class Tool:
    """The module, compiled once; a guest that is not through in time is ended."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        config.epoch_interruption = True
        config.signals_based_traps = False
        config.parallel_compilation = False
        self.engine = wasmtime.Engine(config)
        module = resources.files("unisandbox.conformance").joinpath("guest", "tool.wasm").read_bytes()
        self.module = wasmtime.Module(self.engine, module)
        self.linker = wasmtime.Linker(self.engine)
        self.linker.define_wasi()
        # What wasmtime starts for files once in a process, and keeps, is there before the first test.
        with wasmtime.Store(self.engine) as store:
            store.set_epoch_deadline(1)
            wasi = wasmtime.WasiConfig()
            wasi.argv = ["fds"]
            wasi.stdout_file = "/dev/null"
            store.set_wasi(wasi)
            self.linker.instantiate(store, self.module).exports(store)["_start"](store)


@pytest.fixture(scope="module")
def tool() -> Iterator[Tool]:
    made = Tool()
    yield made
    for owned in (made.linker, made.module, made.engine):
        owned.close()
    gc.collect()  # a trap that a test has caught keeps its instance, and that the module's memory file


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tool: Tool) -> Iterator[None]:
    """As everywhere, but for the threads on which wasmtime does the work with files."""
    with tolerating(["tokio-rt-worker"]), leaves_nothing_behind():
        yield


@contextmanager
def interrupted(tool: Tool, output: Path, size: int) -> Iterator[None]:
    """End the guest that runs meanwhile, again and again, from when it has written so much."""
    over = threading.Event()
    output.touch()

    def end() -> None:
        while not over.wait(0.02):  # the file's size has no event
            if output.stat().st_size >= size:
                tool.engine.increment_epoch()

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    (path / "tmp").mkdir(parents=True)
    return path


@pytest.fixture
def run(tool: Tool, root: Path, tmp_path: Path) -> Run:
    """Run it with these words; the first is the name that it is called by."""

    def run(argv: list[str], *, env: dict[str, str] | None = None, data: bytes = b"", memory: int = 64 << 20) -> Done:
        for name, content in (("in", data), ("out", b""), ("err", b"")):
            (tmp_path / name).write_bytes(content)
        wasi = wasmtime.WasiConfig()
        wasi.argv = argv
        wasi.env = list((env or {}).items())
        wasi.stdin_file, wasi.stdout_file, wasi.stderr_file = (str(tmp_path / name) for name in ("in", "out", "err"))
        wasi.preopen_dir(str(root), "/")
        with wasmtime.Store(tool.engine) as store:
            store.set_limits(memory_size=memory)
            store.set_epoch_deadline(1)
            store.set_wasi(wasi)
            code: int | str = 0
            try:
                instance = tool.linker.instantiate(store, tool.module)
                instance.exports(store)["_start"](store)
            except wasmtime.ExitTrap as end:
                code = end.code
            except (wasmtime.Trap, wasmtime.WasmtimeError) as end:
                code = str(end)
        return Done(code, (tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes())

    return run


def test_it_is_called_by_its_last_name_or_by_its_first_argument(run: Run) -> None:
    for argv in (["exit", "7"], ["exit.wasm", "7"], ["/bin/exit.wasm", "7"], ["/bin/tool", "exit", "7"]):
        assert run(argv).code == 7
    assert run(["no-such-command"]).err == b"tool: no such command: no-such-command\n"


def test_every_command_has_a_module_of_its_name(tmp_path: Path) -> None:
    assert PROGRAMS.make_root(tmp_path) == []
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {f"{name}.wasm" for name in PROGRAMS.COMMANDS}
    source = (Path(__file__).parents[2] / "native" / "guest" / "tool.c").read_text()
    table = source[source.index("} commands[] = {") : source.index("};", source.index("} commands[] = {"))]
    assert {*re.findall(r'\{"(\w+)", do_', table), "tool"} == set(PROGRAMS.COMMANDS)
    assert (tmp_path / "bin" / "true.wasm").read_bytes() == PROGRAMS.program()


def test_streams(run: Run) -> None:
    assert run(PROGRAMS.nothing()) == (0, b"", b"")
    assert run(PROGRAMS.exits(125)) == (125, b"", b"")
    assert run(PROGRAMS.echo("a b")) == (0, b"a b\n", b"")
    said = run(PROGRAMS.says(("stdout", b"a\xff\xc3\xa9"), ("stderr", "e\n"), ("stdout", "\\1 $x"), code=3))
    assert said == (3, b"a\xff\xc3\xa9\\1 $x", b"e\n")
    assert run(PROGRAMS.copies(), data=BLOCK * 2) == (0, BLOCK * 2, b"")
    assert run(PROGRAMS.writes(3)) == (0, BLOCK * 3, b"")
    assert run(["write", "2", "err"]) == (0, b"", BLOCK * 2)
    counted = run(PROGRAMS.counts(20_000))
    assert counted == (0, "".join(f"{n}\n" for n in range(20_000)).encode(), b"error\n")


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 65535, 65536, 65537, 200_000])
def test_a_digest(run: Run, size: int) -> None:
    data = (BLOCK * 4)[:size]
    assert run(PROGRAMS.digest(), data=data).out == f"{hashlib.sha256(data).hexdigest()}  -\n".encode()


def test_lines(run: Run, root: Path) -> None:
    argv = PROGRAMS.asks(7, before="before", after="after", log="/tmp/log")
    assert run(argv, data=b"word\nnext\n") == (7, b"before\nafter word\n", b"")
    assert run(argv, data=b"").code == 1
    assert (root / "tmp" / "log").read_bytes() == b"started\n" * 2
    assert run(PROGRAMS.asks(7, after="after", patient=True), data=b"x\n") == (7, b"after x\n", b"")


def test_ends_that_are_no_exits(run: Run) -> None:
    aborted = run(PROGRAMS.aborts())
    assert isinstance(aborted.code, str)
    assert "unreachable" in aborted.code
    assert "!do_abort" in aborted.code
    divided = run(["divide"])
    assert isinstance(divided.code, str)
    assert "divide by zero" in divided.code


def test_memory(run: Run) -> None:
    assert run(PROGRAMS.fits(32 << 20)) == (0, b"fits\n", b"")
    for argv in (PROGRAMS.fits(128 << 20), PROGRAMS.eats()):
        assert "unreachable" in str(run(argv).code)


def test_time(run: Run) -> None:
    for argv in (PROGRAMS.sleeps(0.05), PROGRAMS.works(0.05)):
        begun = time.monotonic()
        assert run(argv) == (0, b"", b"")
        assert 0.05 <= time.monotonic() - begun < 20
    assert run(PROGRAMS.lingers(0.01, "late", 5)) == (5, b"late\n", b"")


def test_what_it_was_given(run: Run) -> None:
    env = {"PWD": "/tmp", "WORD": "x y"}
    assert run(PROGRAMS.environment(), env=env).out == b"PWD=/tmp\0WORD=x y\0"
    assert run(PROGRAMS.directory(), env=env).out == b"/tmp\n"
    assert run(PROGRAMS.directory()).out == b"/\n"
    assert run(PROGRAMS.variable_and_directory("WORD"), env=env).out == b"x y\n/tmp\n"
    assert run(PROGRAMS.arguments("", "a b", "ü")).out == "\0a b\0ü\0".encode()
    assert run(PROGRAMS.descriptors()).out == b"0\n1\n2\n"
    assert run(["sockets"]).out == b""
    assert len(run(["random", "64"]).out) == 64


def test_files(run: Run, root: Path) -> None:
    tmp = root / "tmp"
    assert run(PROGRAMS.stores("/tmp/f", "line")).code == 0
    assert run(PROGRAMS.shows("/tmp/f")).out == b"line\n"
    assert run(["store", "g", "here"], env={"PWD": "/tmp"}).code == 0
    assert run(PROGRAMS.replaces("/tmp/g", "new")).out == b"herenew\n"
    assert run(["mkdir", "/tmp/d"]).code == 0
    assert run(["ln", "../tmp/f", "/tmp/l"]).code == 0
    assert run(PROGRAMS.lists("/tmp")).out == b"d\nf\ng\nl\n"
    assert run(["stat", "/tmp/f", "/tmp/l"]).out == b"file 5\nsymlink 8\n"
    assert run(["mv", "/tmp/f", "/tmp/d/f"]).code == 0
    assert run(["tool", "rm", "/tmp/d/f", ";", "rmdir", "/tmp/d", ";", "rm", "/tmp/l"]).code == 0
    missing = run(PROGRAMS.shows("/tmp/none"))
    assert (missing.code, missing.err) == (1, b"tool: /tmp/none: No such file or directory (ENOENT)\n")
    assert run(["ln", "/etc/passwd", "/tmp/absolute"]).code == 1
    assert [path.name for path in tmp.iterdir()] == ["g"]


def test_many_and_large_files(run: Run, root: Path) -> None:
    tmp = root / "tmp"
    assert run(PROGRAMS.makes_files("/tmp", 30)).out == b"30 none\n"
    assert len(list(tmp.iterdir())) == 30
    assert run(PROGRAMS.fills("/tmp/fill", 100_000)).out == b"100000\n"
    assert not (tmp / "fill").exists()
    assert run(PROGRAMS.fills("/tmp/fill", 100_000, keep=True)).out == b"100000\n"
    assert (tmp / "fill").stat().st_size == 100_000
    assert run(PROGRAMS.pretends("/tmp/big")).code == 0
    assert (tmp / "big").stat().st_size >= 1 << 30
    assert run(PROGRAMS.nests("/tmp", 20)).code == 0
    assert (tmp / "/".join(["d"] * 20)).is_dir()
    (tmp / "torn").write_bytes(b"0001")
    torn = run(PROGRAMS.finds_whole("/tmp/torn", 4))
    assert (torn.code, torn.out) == (1, b"go\n")


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        *((PROGRAMS.bad(what), b"started\n") for what in get_args(Bad)),
        (PROGRAMS.churns("/tmp"), b"go\n"),
        (PROGRAMS.swaps("bad", "good", "/tmp/way"), b"go\n"),
        (PROGRAMS.worst(), b""),
        (PROGRAMS.repeats(), b"x\nx\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_end_is_ended_from_outside_and_has_begun(
    tool: Tool, run: Run, tmp_path: Path, argv: list[str], out: bytes
) -> None:
    with interrupted(tool, tmp_path / "out", len(out)):
        ended = run(argv)

    assert "interrupt" in str(ended.code)
    assert ended.out.startswith(out)


def test_a_link_is_swapped_for_another(tool: Tool, run: Run, root: Path, tmp_path: Path) -> None:
    with interrupted(tool, tmp_path / "out", len(b"go\n")):
        run(PROGRAMS.swaps("bad", "good", "/tmp/way"))

    assert (root / "tmp" / "way").readlink().name in {"bad", "good"}
