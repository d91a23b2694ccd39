"""One guest: how it ends, its streams and its descriptors, on both event loops where it is waited for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest
from tests.wasm.guests import Pipe, Runner, program

from unisandbox.api import InvalidArgumentError, UnsupportedError
from unisandbox.backends.wasm.domain import Domain
from unisandbox.backends.wasm.guest import Guest, GuestSpec, Preopen

HELLO = program("(call $say (i32.const 1024) (i32.const 6))", '(data (i32.const 1024) "hello\\n")')
ECHO = program("(call $say (i32.const 2048) (call $listen)) (call $say (i32.const 2048) (call $listen))")


@pytest.mark.parametrize("code", [0, 1, 7, 125, 126, 127, 255])
def test_every_exit_code_arrives(runner: Runner, code: int) -> None:
    end = runner.end(program(f"(call $proc_exit (i32.const {code})) unreachable"))
    assert (end.code, end.reason, end.signal) == (code, "exited", None)


def test_of_a_larger_exit_code_the_low_byte_counts_as_for_a_process(runner: Runner) -> None:
    assert runner.end(program("(call $proc_exit (i32.const 513))")).code == 1
    assert runner.end(program("(call $proc_exit (i32.const -1))")).code == 255


def test_the_return_from_start_is_success(runner: Runner) -> None:
    end = runner.end(program("nop"))
    assert (end.code, end.reason, end.detail) == (0, "exited", "")
    assert end.ended_at > 1_700_000_000


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("unreachable", "unreachable"),
        ("(drop (i32.div_u (i32.const 1) (i32.const 0)))", "integer_division_by_zero"),
        ("(drop (i32.load (i32.const 0x7ffffff0)))", "memory_out_of_bounds"),
        ("(call_indirect (i32.const 0))", "indirect_call_to_null"),
        ("(call $deep)", "stack_overflow"),
    ],
)
def test_a_trap_is_told_with_its_name_and_where(runner: Runner, body: str, name: str) -> None:
    end = runner.end(program(body, "(table 1 funcref) (func $deep (call $deep))"))
    assert (end.code, end.reason, end.signal) == (134, "trap", None)
    assert end.detail.startswith(name)
    assert "wasm backtrace" in end.detail
    assert len(end.detail) <= 8192


def test_a_missing_import_is_named_before_anything_runs(domain: Domain) -> None:
    for text, named in (
        ('(module (import "env" "emscripten_sleep" (func)) (func (export "_start")))', "env.emscripten_sleep"),
        (
            '(module (import "wasi_snapshot_preview1" "no_such" (func)) (memory (export "memory") 1)'
            ' (func (export "_start")))',
            "no_such",
        ),
        ('(module (import "unisandbox:wasm" "read" (func)) (func (export "_start")))', "unisandbox:wasm.read"),
        ('(module (import "wasi_snapshot_preview1" "fd_read" (func)) (func (export "_start")))', "fd_read"),
        ("(module)", "_start"),
        ('(module (func (export "_start") (param i32)))', "_start"),
    ):
        guest = Guest(domain, domain.compile(text), GuestSpec(argv=["x"]))
        with pytest.raises(InvalidArgumentError, match=named):
            guest.start()


def test_what_is_no_module_is_refused(domain: Domain, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        domain.compile(b"\x7fELF")
    with pytest.raises(UnsupportedError, match=r"wasm\+process"):
        domain.compile(b"\0asm\x0d\x00\x01\x00")
    broken = tmp_path / "x.cwasm"
    broken.write_bytes(b"no artefact")
    with pytest.raises(InvalidArgumentError):
        domain.load(str(broken))
    with pytest.raises(InvalidArgumentError):
        domain.load(str(tmp_path / "missing"))


def test_an_artefact_that_was_compiled_before_runs(runner: Runner, tmp_path: Path) -> None:
    artefact = tmp_path / "hello.cwasm"
    artefact.write_bytes(runner.module(HELLO).module.serialize())
    with Pipe() as out:
        assert runner.end(runner.domain.load(str(artefact)), GuestSpec(["x"], stdout=out.give_writer())).code == 0
        assert out.read() == b"hello\n"


def test_a_component_artefact_is_refused_by_name(runner: Runner, tmp_path: Path) -> None:
    from wasmtime import component

    artefact = tmp_path / "c.cwasm"
    artefact.write_bytes(component.Component(runner.domain.engine, "(component)").serialize())
    with pytest.raises(UnsupportedError, match=r"wasm\+process"):
        runner.domain.load(str(artefact))


def test_its_words_pass_in_both_directions(runner: Runner) -> None:
    with Pipe() as into, Pipe() as out:
        runner.start(ECHO, GuestSpec(["x"], stdin=into.give_reader(), stdout=out.give_writer()))
        into.write(b"first")
        assert out.read_some() == b"first"
        into.write(b"second")
        assert out.read() == b"second"


def test_the_end_of_its_input_is_no_bytes(runner: Runner) -> None:
    with Pipe() as into:
        into.close_writer()
        assert (
            runner.end(program("(call $proc_exit (call $listen))"), GuestSpec(["x"], stdin=into.give_reader())).code
            == 0
        )
    assert runner.end(program("(call $proc_exit (call $listen))")).code == 0


def test_a_closed_output_ends_the_writer_as_sigpipe_would(runner: Runner) -> None:
    with Pipe() as out:
        out.close_reader()
        end = runner.end(HELLO, GuestSpec(["x"], stdout=out.give_writer()))
    assert (end.code, end.reason, end.signal) == (141, "signaled", signal.SIGPIPE)


def test_descriptors_are_closed_at_its_end_and_stay_ours_when_it_does_not_start(runner: Runner) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Pipe() as into, Pipe() as out, Pipe() as err:
        given = GuestSpec(["x"], stdin=into.give_reader(), stdout=out.give_writer(), stderr=err.give_writer())
        runner.end(program("unreachable"), given)
        assert (out.read(), err.read()) == (b"", b"")
    with Pipe() as out:
        with pytest.raises(InvalidArgumentError):
            runner.start("(module)", GuestSpec(["x"], stdout=out.writer))
        out.write(b"still ours")
        assert out.read_some() == b"still ours"
    assert set(os.listdir("/proc/self/fd")) - before <= {str(fd) for fd in _watch_descriptors()}


def _watch_descriptors() -> list[int]:
    """Of the domain: its epoll and its bell."""
    return [
        int(fd)
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}") in {"anon_inode:[eventpoll]", "anon_inode:[eventfd]"}
    ]


def test_its_close_of_an_output_is_seen_outside_at_once(runner: Runner) -> None:
    with Pipe() as into, Pipe() as out:
        runner.start(
            program("(call $check (call $fd_close (i32.const 1))) (drop (call $listen))"),
            GuestSpec(["x"], stdin=into.give_reader(), stdout=out.give_writer()),
        )
        assert out.read() == b""
        assert runner.guests[0].ended is None
        into.close_writer()


def test_a_closed_stream_is_bad_and_its_number_can_be_a_file(runner: Runner, tmp_path: Path) -> None:
    """fd 1 is closed; the next file that is opened takes its number, and what is written goes there."""
    with Pipe() as out:
        end = runner.end(
            program(
                """
                (call $check (call $fd_close (i32.const 1)))
                (if (i32.ne (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 8)) (i32.const 8))
                  (then (call $proc_exit (i32.const 1))))
                (call $check (call $path_open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const 1)
                  (i32.const 1) (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 16)))
                (call $check (call $fd_renumber (i32.load (i32.const 16)) (i32.const 1)))
                (call $say (i32.const 1024) (i32.const 4))
                """,
                '(data (i32.const 1024) "file")',
            ),
            GuestSpec(["x"], preopens=[Preopen(str(tmp_path), "/", writable=True)], stdout=out.give_writer()),
        )
        assert (end.code, end.detail) == (0, "")
        assert out.read() == b""
    assert (tmp_path / "f").read_bytes() == b"file"


def test_a_renumbered_stream_keeps_its_pipe(runner: Runner) -> None:
    """fd 2 becomes fd 1: the pipe of fd 1 is closed, and that of fd 2 is written to as fd 1."""
    with Pipe() as out, Pipe() as err:
        end = runner.end(
            program(
                """
                (call $check (call $fd_renumber (i32.const 2) (i32.const 1)))
                (call $say (i32.const 1024) (i32.const 4))
                (call $proc_exit (call $fd_close (i32.const 2)))
                """,
                '(data (i32.const 1024) "word")',
            ),
            GuestSpec(["x"], stdout=out.give_writer(), stderr=err.give_writer()),
        )
        assert end.code == 8  # badf: nothing has the number 2 any more
        assert (out.read(), err.read()) == (b"", b"word")


def test_a_guest_that_will_not_wait_is_told_to_try_again(runner: Runner) -> None:
    """O_NONBLOCK is the guest's own: the host's end of the pipe, and its other readers, never see it."""
    with Pipe() as into:
        reader = os.dup(into.reader)
        end = runner.end(
            program(
                """
                (call $check (call $fd_fdstat_set_flags (i32.const 0) (i32.const 4)))
                (call $check (call $fd_fdstat_get (i32.const 0) (i32.const 512)))
                (if (i32.ne (i32.load16_u offset=2 (i32.const 512)) (i32.const 4)) (then unreachable))
                (i32.store (i32.const 0) (i32.const 2048)) (i32.store (i32.const 4) (i32.const 16))
                (call $proc_exit (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
                """
            ),
            GuestSpec(["x"], stdin=reader),
        )
        assert end.code == 6  # again
        assert os.get_blocking(into.reader)


def test_pointers_out_of_its_memory_are_faults_and_no_more(runner: Runner) -> None:
    for call in (
        "$fd_write (i32.const 1) (i32.const 65532) (i32.const 1) (i32.const 8)",
        "$fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 65533)",
        "$fd_read (i32.const 0) (i32.const -8) (i32.const 1) (i32.const 8)",
        "$poll_oneoff (i32.const 65500) (i32.const 0) (i32.const 1) (i32.const 8)",
        "$poll_oneoff (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 8)",
    ):
        assert runner.end(program(f"(call $proc_exit (call {call}))")).code == 21, call


def test_a_large_output_arrives_whole_from_one_write(runner: Runner) -> None:
    with Pipe() as out:
        runner.start(
            program("(drop (memory.grow (i32.const 16))) (call $say (i32.const 0) (i32.const 1000000))"),
            GuestSpec(["x"], stdout=out.give_writer()),
        )
        assert len(out.read()) == 1_000_000


def test_a_file_and_the_null_device_are_streams_too(runner: Runner, tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_bytes(b"from a file")
    target = tmp_path / "target"
    end = runner.end(
        program("(call $say (i32.const 2048) (call $listen))"),
        GuestSpec(
            ["x"],
            stdin=os.open(file, os.O_RDONLY),
            stdout=os.open(target, os.O_WRONLY | os.O_CREAT),
            stderr=os.open("/dev/null", os.O_WRONLY),
        ),
    )
    assert end.code == 0
    assert target.read_bytes() == b"from a file"
    assert (
        runner.end(program("(call $proc_exit (call $listen))"), GuestSpec(["x"], stdin=os.open("/dev/null", 0))).code
        == 0
    )


def test_only_what_is_a_file_or_a_directory_can_be_opened(runner: Runner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    (tmp_path / "l").symlink_to("p")
    (tmp_path / "f").write_text("x")
    (tmp_path / "d").mkdir()
    for name, expected in (("p", 58), ("l", 58), ("f", 0), ("d", 0), ("n", 44)):
        end = runner.end(
            program(
                """(call $proc_exit (call $path_open (i32.const 3) (i32.const 1) (i32.const 8) (i32.const 1)
                (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))""",
                f'(data (i32.const 8) "{name}")',
            ),
            GuestSpec(["x"], preopens=[Preopen(str(tmp_path), "/", writable=True)]),
        )
        assert end.code == expected, name


def test_a_signal_ends_it_with_that_number_or_is_ignored_as_usual(runner: Runner) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        guest = runner.start(program("(loop br 0)"))
        for nothing in (0, signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT):
            guest.kill(nothing)
        with pytest.raises(UnsupportedError):
            guest.kill(signal.SIGSTOP)
        assert guest.ended is None
        guest.kill(number)
        guest.kill(signal.SIGKILL)
        end = runner.ended(guest)
        assert (end.code, end.reason, end.signal) == (128 + number, "signaled", number)
        guest.kill()
        assert guest.ended == end


@pytest.mark.anyio
async def test_many_can_wait_for_its_end_and_give_up(runner: Runner) -> None:
    with Pipe() as into:
        guest = runner.start(program("(call $proc_exit (call $listen))"), GuestSpec(["x"], stdin=into.give_reader()))
        with anyio.move_on_after(0.01) as gave_up:
            await guest.wait()
        assert gave_up.cancelled_caught
        codes: list[int] = []

        async def waits() -> None:
            codes.append((await guest.wait()).code)

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(waits)
            await anyio.lowlevel.checkpoint()
            into.write(b"abc")
        assert codes == [3] * 20
        assert (await guest.wait()).code == 3
