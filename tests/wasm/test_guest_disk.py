"""What guests write where no kernel bounds it is counted before; what they may only read is never changed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from tests.wasm.guests import Runner
from tests.wasm.sandboxes import tree_of

from unisandbox.backends.wasm.disk import INODE, Disk, Writer
from unisandbox.backends.wasm.guest import GuestSpec, Preopen

MIB = 1 << 20
LIMIT = 4 * MIB

CALLS = """
(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_pwrite" (func $pwrite (param i32 i32 i32 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_allocate" (func $allocate (param i32 i64 i64) (result i32)))
(import "wasi_snapshot_preview1" "fd_filestat_set_size" (func $set_size (param i32 i64) (result i32)))
(import "wasi_snapshot_preview1" "fd_filestat_set_times" (func $set_times (param i32 i64 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_renumber" (func $renumber (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_remove_directory" (func $rmdir (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_unlink_file" (func $unlink (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_link" (func $link (param i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_rename" (func $rename (param i32 i32 i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_filestat_set_times"
  (func $set_times_at (param i32 i32 i32 i32 i64 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
(memory (export "memory") 4)
(data (i32.const 1024) "f") (data (i32.const 1025) "g") (data (i32.const 1026) "d") (data (i32.const 1027) "n")
(func $check (param $errno i32)
  (if (local.get $errno) (then (call $exit (i32.add (i32.const 100) (local.get $errno))))))
;; open NAME of the directory FD with these flags; the descriptor, or -errno
(func $opened (param $fd i32) (param $name i32) (param $oflags i32) (param $rights i64) (result i32) (local $errno i32)
  (local.set $errno (call $open (local.get $fd) (i32.const 0) (local.get $name) (i32.const 1) (local.get $oflags)
    (local.get $rights) (local.get $rights) (i32.const 0) (i32.const 512)))
  (if (local.get $errno) (then (return (i32.sub (i32.const 0) (local.get $errno)))))
  (i32.load (i32.const 512)))
;; write 64 KiB to FD; the errno
(func $some (param $fd i32) (result i32)
  (i32.store (i32.const 0) (i32.const 65536)) (i32.store (i32.const 4) (i32.const 65536))
  (call $write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)))
"""


def program(start: str, more: str = "") -> str:
    return f'(module {CALLS} {more} (func (export "_start") (local $fd i32) (local $n i32) (local $at i64) {start}))'


OPEN_NEW = "(local.set $fd (call $opened (i32.const 3) (i32.const 1024) (i32.const 1) (i64.const 64)))"
# Each ends with the number of times that it went, when it is refused with ENOSPC (51); with 100 + another errno else.
COUNTS = """(loop $more
  (local.set $n (i32.add (local.get $n) (i32.const 1)))
  {again}
  (br_if $more (i32.eqz (i32.load (i32.const 768)))))
(if (i32.ne (i32.load (i32.const 768)) (i32.const 51)) (then (call $check (i32.load (i32.const 768)))))
(call $exit (i32.const 51))"""
HUNGRY = {
    "writes": program(OPEN_NEW + COUNTS.format(again="(i32.store (i32.const 768) (call $some (local.get $fd)))")),
    "scatters bytes": program(
        OPEN_NEW
        + "(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 1))"
        + COUNTS.format(
            again="""(i32.store (i32.const 768)
            (call $pwrite (local.get $fd) (i32.const 0) (i32.const 1) (local.get $at) (i32.const 8)))
            (local.set $at (i64.add (local.get $at) (i64.const 65536)))"""
        )
    ),
    "writes into files that it removes while they are open": program(
        COUNTS.format(
            again=OPEN_NEW
            + """(call $check (call $unlink (i32.const 3) (i32.const 1024) (i32.const 1)))
            (i32.store (i32.const 768) (call $some (local.get $fd)))"""
        )
    ),
    "makes directories in each other": program(
        "(local.set $fd (i32.const 3))"
        + COUNTS.format(
            again="""(i32.store (i32.const 768) (call $mkdir (local.get $fd) (i32.const 1026) (i32.const 1)))
            (if (i32.eqz (i32.load (i32.const 768))) (then
              (i32.store (i32.const 772) (local.get $fd))
              (local.set $fd (call $opened (local.get $fd) (i32.const 1026) (i32.const 2) (i64.const 2)))
              (if (i32.ne (i32.load (i32.const 772)) (i32.const 3))
                (then (call $check (call $close (i32.load (i32.const 772))))))))"""
        )
    ),
    "renumbers what it writes to": program(
        OPEN_NEW
        + """(local.set $n (call $opened (i32.const 3) (i32.const 1025) (i32.const 1) (i64.const 64)))
        (call $check (call $renumber (local.get $fd) (local.get $n))) (local.set $fd (local.get $n))"""
        + COUNTS.format(again="(i32.store (i32.const 768) (call $some (local.get $fd)))")
    ),
}


def really_used(directory: Path) -> int:
    """By blocks, as du(1) counts."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def spec(directory: Path, disk: Disk, *more: Preopen) -> GuestSpec:
    return GuestSpec(["guest"], preopens=[Preopen(str(directory), "/", writable=True), *more], disk=disk)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.mark.parametrize("how", HUNGRY)
def test_a_guest_is_told_that_there_is_no_room_and_takes_no_more(runner: Runner, place: Path, how: str) -> None:
    end = runner.end(HUNGRY[how], spec(place, Disk(str(place), LIMIT)))

    assert end.code == 51, end
    assert really_used(place) <= LIMIT


def test_what_was_overwritten_or_removed_can_be_written_again(runner: Runner, place: Path) -> None:
    """16 times the limit in all: one file that is written anew, and then removed."""
    text = program(
        """(loop $more
          (local.set $fd (call $opened (i32.const 3) (i32.const 1024) (i32.const 9) (i64.const 64)))
          (local.set $n (i32.const 0))
          (loop $piece
            (call $check (call $some (local.get $fd)))
            (br_if $piece (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 32))))
          (call $check (call $close (local.get $fd)))
          (if (i64.gt_u (local.get $at) (i64.const 16))
            (then (call $check (call $unlink (i32.const 3) (i32.const 1024) (i32.const 1)))))
          (br_if $more (i64.lt_u (local.tee $at (i64.add (local.get $at) (i64.const 1))) (i64.const 32))))"""
    )

    assert runner.end(text, spec(place, Disk(str(place), LIMIT))).code == 0


def test_a_file_of_nothing_but_a_hole_takes_no_room(runner: Runner, place: Path) -> None:
    text = program(OPEN_NEW + "(call $check (call $set_size (local.get $fd) (i64.const 1000000000)))")

    assert runner.end(text, spec(place, Disk(str(place), LIMIT))).code == 0
    assert (place / "f").stat().st_size == 1000000000


def test_what_is_written_in_directories_of_the_host_is_not_counted(runner: Runner, place: Path, tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    text = program(
        """(local.set $fd (call $opened (i32.const 4) (i32.const 1024) (i32.const 1) (i64.const 64)))
        (loop $more (call $check (call $some (local.get $fd)))
          (br_if $more (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 256))))"""
        + OPEN_NEW
        + COUNTS.format(again="(i32.store (i32.const 768) (call $some (local.get $fd)))")
    )
    mount = Preopen(str(host), "/data", writable=True, counted=False)

    end = runner.end(text, spec(place, Disk(str(place), LIMIT), mount))

    assert end.code == 51, end
    assert (host / "f").stat().st_size == 16 * MIB
    assert really_used(place) <= LIMIT


def test_nothing_is_moved_between_what_is_counted_and_what_is_not(runner: Runner, place: Path, tmp_path: Path) -> None:
    """As between file systems, also where they are one; within each it goes."""
    host = tmp_path / "host"
    for directory in (place, host):
        directory.mkdir(exist_ok=True)
        (directory / "f").write_text("x")
    f, g = "(i32.const 1024) (i32.const 1)", "(i32.const 1025) (i32.const 1)"

    def said(call: str, errno: int) -> str:
        return f"(if (i32.ne (call {call}) (i32.const {errno})) (then (call $exit (i32.const {errno + 1}))))"

    text = program(
        said(f"$rename (i32.const 3) {f} (i32.const 4) {g}", 75)
        + said(f"$rename (i32.const 4) {f} (i32.const 3) {g}", 75)
        + said(f"$link (i32.const 4) (i32.const 0) {f} (i32.const 3) {g}", 75)
        + said(f"$link (i32.const 3) (i32.const 0) {f} (i32.const 4) {g}", 75)
        + said(f"$rename (i32.const 3) {f} (i32.const 3) {g}", 0)
        + said(f"$rename (i32.const 4) {f} (i32.const 4) {g}", 0)
        + said(f"$link (i32.const 3) (i32.const 0) {g} (i32.const 3) {f}", 0)
        + said(f"$link (i32.const 4) (i32.const 0) {g} (i32.const 4) {f}", 0)
    )

    end = runner.end(
        text, spec(place, Disk(str(place), LIMIT), Preopen(str(host), "/data", writable=True, counted=False))
    )

    assert end.code == 0, end
    assert [sorted(os.listdir(directory)) for directory in (place, host)] == [["f", "g"]] * 2


def test_no_name_that_is_moved_while_it_is_counted_is_missed(runner: Runner, place: Path) -> None:
    """One guest moves a large file to and fro between two directories; another one fills the rest again and again."""
    for name in "dg":
        (place / name).mkdir()
    (place / "d" / "f").write_bytes(bytes(2 * MIB))
    moves = program(
        """(local.set $fd (call $opened (i32.const 3) (i32.const 1026) (i32.const 2) (i64.const 2)))
        (local.set $n (call $opened (i32.const 3) (i32.const 1025) (i32.const 2) (i64.const 2)))
        (loop $more
          (call $move (local.get $fd) (local.get $n)) (call $move (local.get $n) (local.get $fd)) (br $more))""",
        """(func $move (param $from i32) (param $to i32)
          (drop (call $rename (local.get $from) (i32.const 1024) (i32.const 1)
            (local.get $to) (i32.const 1024) (i32.const 1))))""",
    )
    disk = Disk(str(place), LIMIT)
    moving = runner.start(moves, spec(place, disk))
    fills = runner.module(HUNGRY["writes"])
    for _ in range(20):
        assert runner.end(fills, spec(place, disk)).code == 51
        moved = [path for path in (place / "d" / "f", place / "g" / "f") if path.exists()]
        assert (place / "f").stat().st_blocks * 512 <= LIMIT - 2 * MIB, moved
        (place / "f").unlink()
    moving.kill()


def test_guests_that_write_at_the_same_time_have_no_more_together(runner: Runner, place: Path) -> None:
    disk, module = (
        Disk(str(place), LIMIT),
        runner.module(HUNGRY["writes into files that it removes while they are open"]),
    )
    guests = [runner.start(module, spec(place, disk)) for _ in range(4)]

    assert {runner.ended(guest).code for guest in guests} <= {51, 144}  # or another one has removed its file
    assert disk.used() <= LIMIT


def test_what_one_was_given_counts_also_when_he_was_refused_more(place: Path) -> None:
    disk = Disk(str(place), LIMIT)
    writer = Writer(disk)
    writer.take(1)
    with pytest.raises(OSError, match="No space left"):
        writer.take(LIMIT + 1)
    taken = 0
    with contextlib.suppress(OSError):
        for number in range(LIMIT):
            taken += disk.take(number, INODE)

    assert 0 < taken <= LIMIT - INODE


@pytest.mark.parametrize("how", ["removed before", "removed", "a file", "a link"])
def test_a_count_goes_on_while_directories_are_removed(place: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    (place / "d").mkdir()
    (place / "f").write_bytes(bytes(MIB))
    disk, really_open = Disk(str(place), LIMIT), os.open

    def racing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "d" and how != "removed":
            (place / "d").rmdir()
            if how == "a file":
                (place / "d").write_text("in its place")
            elif how == "a link":
                (place / "d").symlink_to("/")
        fd = really_open(path, flags, mode, dir_fd=dir_fd)
        if path == "d":
            (place / "d").rmdir()
        return fd

    monkeypatch.setattr(os, "open", racing)
    assert MIB <= disk.used() < 2 * MIB


def test_a_guest_that_waits_to_be_counted_ends_when_it_is_killed(runner: Runner, place: Path) -> None:
    disk = Disk(str(place), LIMIT)
    guest = runner.start(
        program(OPEN_NEW + "(loop $more (drop (call $some (local.get $fd))) (br $more))"), spec(place, disk)
    )
    guest.kill()

    assert runner.ended(guest).signal == 9


@pytest.mark.parametrize("counted", [False, True])
def test_nothing_is_changed_in_a_directory_that_may_only_be_read(
    runner: Runner, place: Path, tmp_path: Path, counted: bool
) -> None:
    """By whatever call, nor from a directory beside it that may be written, on the same file system."""
    host = tmp_path / "host"
    (host / "d").mkdir(parents=True)
    (host / "f").write_text("of the host")
    (place / "f").write_text("of the guest")
    before = tree_of(host)

    def opened(name: int, flags: int, rights: int) -> str:
        call = f"(call $opened (i32.const 4) (i32.const {name}) (i32.const {flags}) (i64.const {rights}))"
        return f"(i32.lt_s {call} (i32.const 0))"

    one = "(i32.const {}) (i32.const 1)"
    f, g, d, n = (one.format(1024 + number) for number in range(4))
    attempts = [
        *(opened(1024, flags, rights)
          for flags, rights in ((0, 64), (8, 64), (8, 2))),
        *(opened(1025, flags, 66)
          for flags in (1, 5, 9)),
        f"(call $mkdir (i32.const 4) {n})", f"(call $rmdir (i32.const 4) {d})", f"(call $unlink (i32.const 4) {f})",
        f"(call $symlink {f} (i32.const 4) {n})",
        f"(call $link (i32.const 4) (i32.const 0) {f} (i32.const 3) {g})",
        f"(call $link (i32.const 3) (i32.const 0) {f} (i32.const 4) {g})",
        f"(call $link (i32.const 4) (i32.const 0) {f} (i32.const 4) {g})",
        f"(call $rename (i32.const 4) {f} (i32.const 3) {g})", f"(call $rename (i32.const 3) {f} (i32.const 4) {f})",
        f"(call $rename (i32.const 4) {f} (i32.const 4) {g})",
        f"(call $set_times_at (i32.const 4) (i32.const 0) {f} (i64.const 1) (i64.const 1) (i32.const 5))",
        "(call $set_times (i32.const 4) (i64.const 1) (i64.const 1) (i32.const 5))",
        *(f"(call {call})" for call in (
            "$set_size (local.get $fd) (i64.const 1)", "$allocate (local.get $fd) (i64.const 0) (i64.const 4096)",
            "$set_times (local.get $fd) (i64.const 1) (i64.const 1) (i32.const 5)",
            "$pwrite (local.get $fd) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 8)",
        )),
        "(call $some (local.get $fd))",
    ]  # fmt: skip
    tries = "".join(
        f"(if (i32.eqz {attempt}) (then (call $exit (i32.const {number}))))"
        for number, attempt in enumerate(attempts, start=1)
    )
    text = program(
        "(local.set $fd (call $opened (i32.const 4) (i32.const 1024) (i32.const 0) (i64.const 2)))"
        "(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 1))" + tries
    )
    read_only = Preopen(str(host), "/data", writable=False, counted=False)
    given = spec(place, Disk(str(place), LIMIT), read_only)

    end = runner.end(text, given if counted else given._replace(disk=None))

    assert end.code == 0, attempts[end.code - 1] if end.code <= len(attempts) else end
    assert tree_of(host) == before


def test_a_count_finds_each_file_once_and_also_those_without_a_name(tmp_path: Path) -> None:
    place = tmp_path / "place"
    deep = place
    deep.mkdir()
    disk = Disk(str(place), 64 * MIB)
    (place / "f").write_bytes(bytes(MIB))
    os.link(place / "f", place / "again")
    assert MIB <= disk.used() < MIB + 4 * INODE
    fd = os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, bytes(2 * MIB))
        assert 3 * MIB <= disk.used() < 3 * MIB + 8 * INODE
    finally:
        os.close(fd)
    here = os.getcwd()
    assert disk.used() < 2 * MIB
    assert os.getcwd() == here


def test_what_one_has_taken_and_not_written_yet_is_given_to_nobody_else(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), LIMIT)
    slow, quick, written = Writer(disk), Writer(disk), 0
    slow.take(MIB)
    with open(tmp_path / "f", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            quick.take(10_000 + INODE)
            written += file.write(bytes(10_000))

    assert LIMIT // 2 < written <= LIMIT - MIB
    slow.close()
    quick.take(MIB // 2)
