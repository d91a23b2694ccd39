"""Every guest can be ended at once, whatever it does, and none that blocks harms another."""

from __future__ import annotations

import os
import select
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.wasm.guests import READS, SPINS, Pipe, Runner, program, wait_for

from unisandbox.backends.wasm import thread
from unisandbox.backends.wasm.domain import Domain, GuestModule
from unisandbox.backends.wasm.guest import Guest, GuestSpec, Preopen

WRITES = program("(drop (memory.grow (i32.const 16))) (call $say (i32.const 0) (i32.const 1000000))")
OPENS_AND_READS_A_FIFO = program(
    """(drop (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
    (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))
    (loop (drop (call $listen)) br 0)""",
    '(data (i32.const 1024) "fifo")',
)
COPIES_A_FILE = program(
    """(call $check (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
    (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))
    (i32.store (i32.const 0) (i32.const 2048)) (i32.store (i32.const 4) (i32.const 1024))
    (call $check (call $fd_read (i32.load (i32.const 16)) (i32.const 0) (i32.const 1) (i32.const 8)))
    (call $say (i32.const 2048) (i32.load (i32.const 8)))""",
    '(data (i32.const 1024) "file")',
)


def subscriptions(*parts: str) -> str:
    """A poll_oneoff over subscriptions laid out from 4096 on, whose events go to 8192; exits with the first's type."""
    return program(
        "\n".join(parts)
        + f"""
        (call $check (call $poll_oneoff (i32.const 4096) (i32.const 8192) (i32.const {len(parts)}) (i32.const 8)))
        (call $proc_exit (i32.load8_u offset=10 (i32.const 8192)))"""
    )


def clock(index: int, which: int, nanoseconds: int, *, absolute: bool) -> str:
    """Subscription number `index`: a clock."""
    at = 4096 + 48 * index
    now = "(i64.const 0)"
    if absolute:
        now = "(i64.load (i32.const 64))"
    return f"""
    (drop (call $clock_time_get (i32.const {which}) (i64.const 1) (i32.const 64)))
    (i64.store (i32.const {at}) (i64.const {index}))
    (i32.store8 offset=8 (i32.const {at}) (i32.const 0))
    (i32.store offset=16 (i32.const {at}) (i32.const {which}))
    (i64.store offset=24 (i32.const {at}) (i64.add {now} (i64.const {nanoseconds})))
    (i32.store16 offset=40 (i32.const {at}) (i32.const {int(absolute)}))"""


def descriptor(index: int, kind: int, fd: int) -> str:
    """Subscription number `index`: `fd` becomes readable (1) or writable (2)."""
    at = 4096 + 48 * index
    return f"""
    (i64.store (i32.const {at}) (i64.const {index}))
    (i32.store8 offset=8 (i32.const {at}) (i32.const {kind}))
    (i32.store offset=16 (i32.const {at}) (i32.const {fd}))"""


SECOND = 1_000_000_000


def kill_times(guests: list[Guest]) -> list[float]:
    """Kill one after the other; milliseconds until each had ended, sorted."""
    times = []
    for guest in guests:
        began = time.perf_counter()
        guest.kill()
        guest.join()
        times.append((time.perf_counter() - began) * 1000)
        end = guest.ended
        assert end is not None
        assert (end.code, end.reason, end.signal) == (137, "signaled", 9)
    return sorted(times)


SOON = 500.0
"""Milliseconds in which 99 of 100 are to be over, whatever else the machine does; the aim is 10, and is printed."""


def told(name: str, times: list[float], most: float = SOON) -> None:
    """Print how long it took, sorted milliseconds, and hold all but one in a hundred of them to a bound.

    One may be held up by anything: where there are fewer than a hundred the bound is ten times as wide.
    """
    most = most if len(times) >= 100 else 10 * most
    middle, nearly_all, longest = times[len(times) // 2], times[int(len(times) * 0.99)], times[-1]
    print(f"\nmeasured {name}: p50 {middle:.2f}, p99 {nearly_all:.2f}, max {longest:.2f} ms")
    assert nearly_all < most, f"{name}: p99 is {nearly_all:.1f} ms"


def announced(out: Pipe, number: int) -> None:
    """Wait for one byte of each of them."""
    heard = 0
    while heard < number:
        heard += len(out.read_some())


def test_guests_that_block_keep_no_other_from_its_files_and_die_at_once(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    os.mkfifo(tmp_path / "fifo")
    reads, copies = runner.module(READS), runner.module(COPIES_A_FILE)
    with Pipe() as silent, Pipe() as out, Pipe() as unread, Pipe() as copied:
        for _ in range(600):
            runner.start(reads, GuestSpec(["x"], stdin=os.dup(silent.reader), stdout=os.dup(out.writer)))
        writes = runner.module(WRITES)
        for _ in range(4):
            runner.start(writes, GuestSpec(["x"], stdout=os.dup(unread.writer)))
        runner.start(
            OPENS_AND_READS_A_FIFO,
            GuestSpec(["x"], preopens=[Preopen(str(tmp_path), "/")], stdin=os.dup(silent.reader)),
        )
        announced(out, 600)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            other = runner.start(
                copies, GuestSpec(["x"], preopens=[Preopen(str(tmp_path), "/")], stdout=os.dup(copied.writer))
            )
            assert copied.read_some() == b"content"
            times.append((time.perf_counter() - began) * 1000)
            assert wait_for(other).code == 0
        times.sort()
        told("start, read a file and write beside 605 that block", times)
        blocked = [guest for guest in runner.guests if guest.ended is None]
        assert len(blocked) == 605
        times = kill_times(blocked)
        told("kill of each of them", times)


def test_a_sleeper_of_every_kind_dies_at_once(runner: Runner) -> None:
    long = 1000 * SECOND
    with Pipe() as silent:
        guests = [
            runner.start(subscriptions(*parts), GuestSpec(["x"], stdin=os.dup(silent.reader)))
            for parts in (
                [clock(0, 0, long, absolute=False)],
                [clock(0, 1, long, absolute=False)],
                [clock(0, 0, long, absolute=True)],
                [clock(0, 1, long, absolute=True)],
                [descriptor(0, 1, 0)],
                [clock(0, 1, long, absolute=False), descriptor(1, 1, 0)],
                [descriptor(0, 1, 0), clock(1, 0, long, absolute=True), clock(2, 1, long, absolute=False)],
            )
        ]
        _until_all_wait(guests)
        times = kill_times(guests)
    told("kill of sleepers of every kind", times)


def _until_all_wait(guests: list[Guest]) -> None:
    """The kernel says that their threads sleep, twice in a row with no processor time between."""
    while True:
        before = [guest.cpu_seconds for guest in guests]
        time.sleep(0.02)
        assert all(guest.ended is None for guest in guests), [guest.ended for guest in guests if guest.ended]
        if all(before) and [guest.cpu_seconds for guest in guests] == before:
            return


def polls(count: int, more: str = "") -> str:
    """Polls `count` clocks that have passed already; then `more`."""
    return program(
        f"""(if (i32.eq (memory.grow (i32.const 8192)) (i32.const -1)) (then unreachable))
        (loop (call $check
          (call $poll_oneoff (i32.const 4096) (i32.const 4096) (i32.const {count}) (i32.const 8))) {more})
        (call $proc_exit (i32.const 0))"""
    )


def test_subscriptions_are_bounded(runner: Runner) -> None:
    assert runner.end(polls(4096)).code == 0
    for count in (0, 4097, 8_000_000):
        assert runner.end(polls(count)).code == 128  # inval


def test_a_guest_with_very_many_subscriptions_dies_at_once_and_takes_no_memory_of_ours(runner: Runner) -> None:
    module = runner.module(polls(4096, "br 0"))
    tracemalloc.start()
    try:
        guests = [runner.start(module) for _ in range(2)]
        while not all(guest.cpu_seconds > 0.1 for guest in guests):
            time.sleep(0.001)
        times = kill_times(guests)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    told("kill of guests with 4,096 subscriptions", times, 2 * SOON)


def test_a_guest_that_writes_very_much_to_a_file_dies_at_once(runner: Runner, tmp_path: Path) -> None:
    # 1,024 buffers that are all the same MiB: a GiB in one call.
    text = program(
        """(drop (memory.grow (i32.const 32)))
        (loop $more
          (i32.store (i32.add (i32.const 4096) (i32.mul (local.get $n) (i32.const 8))) (i32.const 65536))
          (i32.store offset=4 (i32.add (i32.const 4096) (i32.mul (local.get $n) (i32.const 8))) (i32.const 1048576))
          (local.set $n (i32.add (local.get $n) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $n) (i32.const 1024))))
        (drop (call $fd_write (i32.const 1) (i32.const 4096) (i32.const 1024) (i32.const 8)))"""
    ).replace('(export "_start")', '(export "_start") (local $n i32)')
    path = tmp_path / "file"
    guest = runner.start(text, GuestSpec(["x"], stdout=os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)))
    while not path.stat().st_size:
        time.sleep(0.001)
    told("kill of a guest that writes a GiB to a file", kill_times([guest]))
    assert path.stat().st_size < 1 << 30
    path.unlink()


def test_sleeps_last_as_long_as_was_asked(runner: Runner) -> None:
    for parts in (
        [clock(0, 1, SECOND // 10, absolute=False)],
        [clock(0, 0, SECOND // 10, absolute=True)],
        [clock(0, 1, 100 * SECOND, absolute=False), clock(1, 1, SECOND // 10, absolute=True)],
    ):
        module = runner.module(subscriptions(*parts))
        began = time.perf_counter()
        assert runner.end(module).code == 0
        assert 0.09 < time.perf_counter() - began < 20


def test_what_comes_first_ends_a_wait(runner: Runner) -> None:
    with Pipe() as into:
        guest = runner.start(
            subscriptions(clock(0, 1, 1000 * SECOND, absolute=False), descriptor(1, 1, 0)),
            GuestSpec(["x"], stdin=os.dup(into.reader)),
        )
        _until_all_wait([guest])
        into.write(b"x")
        assert wait_for(guest).code == 1  # fd_read
    assert runner.end(subscriptions(descriptor(0, 2, 1))).code == 2  # an output that is thrown away takes all
    assert runner.end(subscriptions(descriptor(0, 1, 9))).code == 108  # badf
    assert runner.end(subscriptions(descriptor(0, 1, 1))).code == 108
    with Pipe() as into:
        into.close_writer()
        assert runner.end(subscriptions(descriptor(0, 1, 0)), GuestSpec(["x"], stdin=into.give_reader())).code == 1


def test_a_file_is_always_ready(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    text = subscriptions(descriptor(0, 1, 4), clock(1, 1, 1000 * SECOND, absolute=False)).replace(
        '(func (export "_start")',
        """(data (i32.const 1024) "file") (func (export "_start")
        (call $check (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
        (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))
        (if (i32.ne (i32.load (i32.const 16)) (i32.const 4)) (then unreachable))""",
    )
    assert runner.end(text, GuestSpec(["x"], preopens=[Preopen(str(tmp_path), "/")])).code == 1


def test_a_guest_that_computes_ends_whatever_moment_it_is_killed_at(
    runner: Runner, count: Callable[[int], int]
) -> None:
    """Each kill lets all eight look for their ends, so that some look just before theirs is set."""
    spins = runner.module(SPINS)
    for _ in range(count(500)):
        spinners = [runner.start(spins) for _ in range(8)]
        while not all(guest.cpu_seconds for guest in spinners):
            time.sleep(0.001)
        for guest in spinners:
            guest.kill()
            wait_for(guest)


def test_sleepers_die_at_once_beside_spinners(runner: Runner, count: Callable[[int], int]) -> None:
    """200 sleepers and 8 spinners, with two processors."""
    sleeps = runner.module(subscriptions(clock(0, 1, 1000 * SECOND, absolute=False)))
    spins = runner.module(SPINS)
    sleepers = [runner.start(sleeps) for _ in range(count(200))]
    _until_all_wait(sleepers)
    spinners = [runner.start(spins) for _ in range(8)]
    while not all(guest.cpu_seconds for guest in spinners):
        time.sleep(0.001)
    times = kill_times(sleepers)
    told("kill of sleepers beside 8 spinners", times, 2 * SOON)
    times = kill_times(spinners)
    told("kill of spinners", times, 2 * SOON)


def test_a_killed_guest_comes_first_and_the_next_one_in_its_thread_does_not(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried: list[tuple[int, int | None, int]] = []

    def hurry(number: int) -> int | None:
        found = really(number)
        hurried.append((number, found, os.getpriority(os.PRIO_PROCESS, number)))
        return found

    really = thread.hurry
    monkeypatch.setattr(thread, "hurry", hurry)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    sleeps = runner.module(subscriptions(clock(0, 1, 1000 * SECOND, absolute=False)))
    for _ in range(5):
        guest = runner.start(sleeps)
        _until_all_wait([guest])
        (number,) = _guest_threads()
        assert os.getpriority(os.PRIO_PROCESS, number) == usual
        guest.kill()
        guest.kill()
        wait_for(guest)
        assert hurried.pop() in {(number, usual, -20), (number, None, usual)}  # not everybody may do that
        assert hurried == []


def _guest_threads() -> list[int]:
    """Kernel ids of the threads that are or were guests."""
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text() == "wasm-guest\n"]


def test_a_kill_before_the_first_instruction_ends_it_too(runner: Runner, count: Callable[[int], int]) -> None:
    spins = runner.module(SPINS)
    for _ in range(count(500)):
        guest = Guest(runner.domain, spins, GuestSpec(["x"]))
        guest.start()
        guest.kill()
        end = wait_for(guest)
        assert (end.code, end.reason) == (137, "signaled")


def test_a_thousand_guests_live_at_once_and_cost_little(runner: Runner) -> None:
    """51 kB each in the design's measurement; the aim is 80 kB, and no descriptor but those that were given."""
    module = runner.module(READS)
    with Pipe() as silent, Pipe() as out:
        # what the first ones cost is not each one's
        for _ in range(10):
            runner.start(module, GuestSpec(["x"], stdin=os.dup(silent.reader), stdout=os.dup(out.writer)))
        announced(out, 10)
        pss, descriptors = _pss(), len(os.listdir("/proc/self/fd"))
        began = time.perf_counter()
        for _ in range(1000):
            runner.start(module, GuestSpec(["x"], stdin=os.dup(silent.reader), stdout=os.dup(out.writer)))
        announced(out, 1000)
        seconds = time.perf_counter() - began
        each = (_pss() - pss) / 1000
        print(f"\nmeasured 1,000 guests: {each:.1f} kB each, {1000 / seconds:.0f} starts per second")
        assert each <= 80
        assert len(os.listdir("/proc/self/fd")) - descriptors == 2000
        assert all(guest.ended is None for guest in runner.guests)
        times = kill_times(runner.guests)
        told("kill of 1,010 readers", times)


def _pss() -> int:
    """kB of this process."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def test_an_unread_output_blocks_its_writer_only(runner: Runner) -> None:
    with Pipe() as unread, Pipe() as out:
        writer = runner.start(WRITES, GuestSpec(["x"], stdout=unread.give_writer()))
        poll = select.poll()
        poll.register(unread.reader, select.POLLIN)
        poll.poll()
        _until_all_wait([writer])
        assert runner.end(READS, GuestSpec(["x"], stdout=os.dup(out.writer))).code == 0
        assert out.read_some() == b"."
        got = 0
        while got < 1_000_000:
            got += len(os.read(unread.reader, 65536))
        assert wait_for(writer).code == 0


def test_one_domain_serves_all_and_ends_its_threads(domain: Domain) -> None:
    assert Domain.get() is domain
    domain.close()
    module: GuestModule = domain.compile(READS)
    with Pipe() as silent:
        guest = Guest(domain, module, GuestSpec(["x"], stdin=silent.give_reader()))
        guest.start()
        guest.kill()
        wait_for(guest)
