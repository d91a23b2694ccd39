"""What a guest may use: memory for the sum over a sandbox, processor time, a rate of it, fuel, tables, stack."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from tests.wasm.guests import SPINS, Pipe, Runner, program, wait_for

from unisandbox.api import Resources, UnsupportedError
from unisandbox.backends.wasm.budget import Budget, CpuRate
from unisandbox.backends.wasm.domain import Domain
from unisandbox.backends.wasm.guest import Guest, GuestLimits, GuestSpec
from unisandbox.backends.wasm.shares import Shares

MIB = 1 << 20
PAGE = 65536

GROWS_AND_ABORTS = program(
    "(loop (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable)) br 0)",
)
GROWS_AND_SAYS = program(
    """(call $say (i32.const 1024) (i32.const 1)) (drop (call $listen_once))
    (loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (call $say (i32.const 1024) (i32.const 1))
    (i64.store offset=24 (i32.const 4096) (i64.const 1000000000000))
    (drop (call $poll_oneoff (i32.const 4096) (i32.const 8192) (i32.const 1) (i32.const 8)))""",
    """(data (i32.const 1024) ".")
    (func $listen_once (result i32) (i32.store (i32.const 0) (i32.const 2048)) (i32.store (i32.const 4) (i32.const 1))
      (call $check (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))) (i32.const 0))""",
)


def announced(out: Pipe, number: int) -> None:
    """Wait for one byte of each of them."""
    heard = 0
    while heard < number:
        heard += len(out.read_some())


def limited(budget: Budget, *, stdin: int | None = None, stdout: int | None = None) -> GuestSpec:
    return GuestSpec(["x"], limits=GuestLimits(memory=budget), stdin=stdin, stdout=stdout)


def test_the_sum_of_all_memories_of_all_guests_never_exceeds_the_budget(runner: Runner) -> None:
    """wasmtime's own limit is for each memory: 20 guests of 10 MiB passed under 16 MiB."""
    budget = Budget(16 * MIB)
    module = runner.module(GROWS_AND_SAYS)
    with Pipe() as into, Pipe() as out:
        for _ in range(20):
            runner.start(module, limited(budget, stdin=os.dup(into.reader), stdout=os.dup(out.writer)))
        announced(out, 20)
        into.write(b"." * 20)
        announced(out, 20)
        assert sum(guest.memory_bytes for guest in runner.guests) == budget.used == budget.peak == 16 * MIB
        assert budget.refusals >= 20
    for guest in runner.guests:
        guest.kill()
        wait_for(guest)
    assert budget.used == 0


def test_several_memories_of_one_module_count_together(runner: Runner) -> None:
    budget = Budget(10 * PAGE)
    text = """(module (memory (export "memory") 2) (memory $b 3)
      (func (export "_start")
        (if (i32.ne (memory.grow $b (i32.const 5)) (i32.const 3)) (then unreachable))
        (if (i32.ne (memory.grow $b (i32.const 1)) (i32.const -1)) (then unreachable))))"""
    assert runner.end(text, limited(budget)).code == 0
    assert budget.peak == 10 * PAGE
    assert budget.used == 0


def test_an_end_for_memory_is_told_as_such_and_only_then(runner: Runner) -> None:
    end = runner.end(GROWS_AND_ABORTS, limited(Budget(4 * MIB)))
    assert (end.code, end.reason) == (137, "oom")
    assert "unreachable" in end.detail
    # refused, but it went on, and got some, and failed for another reason
    recovers = program(
        """(drop (memory.grow (i32.const 1000))) (drop (memory.grow (i32.const 1))) unreachable""",
    )
    assert runner.end(recovers, limited(Budget(4 * MIB))).reason == "trap"
    divides = program("(drop (memory.grow (i32.const 1000))) (drop (i32.div_u (i32.const 1) (i32.const 0)))")
    assert runner.end(divides, limited(Budget(4 * MIB))).reason == "trap"
    exits = program("(drop (memory.grow (i32.const 1000))) (call $proc_exit (i32.const 2))")
    end = runner.end(exits, limited(Budget(4 * MIB)))
    assert (end.code, end.reason) == (2, "exited")
    assert runner.end(program("unreachable"), limited(Budget(4 * MIB))).reason == "trap"


def test_a_module_that_begins_with_too_much_ends_for_memory_before_it_runs(runner: Runner) -> None:
    with Pipe() as out:
        end = runner.end(
            program("(call $say (i32.const 0) (i32.const 1))", "(memory $more 100)"),
            limited(Budget(4 * MIB), stdout=out.give_writer()),
        )
        assert (end.code, end.reason) == (137, "oom")
        assert "memory" in end.detail
        assert out.read() == b""


def test_the_heap_of_a_collector_counts_too(runner: Runner) -> None:
    text = """(module (type $a (array (mut i8))) (global $kept (mut (ref null $a)) (ref.null $a))
      (func (export "_start") (global.set $kept (array.new_default $a (i32.const 8000000)))))"""
    budget = Budget(4 * MIB)
    end = runner.end(text, limited(budget))
    assert (end.code, end.reason) == (137, "oom")
    assert budget.peak <= 4 * MIB
    budget = Budget(64 * MIB)
    assert runner.end(text, limited(budget)).code == 0
    assert budget.peak >= 8_000_000
    assert budget.used == 0


def test_a_budget_can_be_raised_while_guests_run(runner: Runner) -> None:
    budget = Budget(4 * MIB)
    text = program(
        """(if (i32.ne (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
        (call $say (i32.const 1024) (i32.const 1)) (drop (call $listen))
        (if (i32.eq (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))""",
        '(data (i32.const 1024) ".")',
    )
    with Pipe() as into, Pipe() as out:
        guest = runner.start(text, limited(budget, stdin=into.give_reader(), stdout=out.give_writer()))
        out.read_some()
        budget.limit = 16 * MIB
        into.write(b"x")
        assert wait_for(guest).code == 0


def test_tables_are_bounded(runner: Runner) -> None:
    grows = """(module (table $t 1 funcref) (func (export "_start")
      (loop (if (i32.eq (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1)) (then return)) br 0)))"""
    assert runner.end(grows).code == 0
    begins = '(module (table 200000 funcref) (func (export "_start")))'
    end = runner.end(begins)
    assert end.reason == "trap"
    assert "table" in end.detail
    many = "(module " + "(table 1 funcref)" * 40 + '(func (export "_start")))'
    assert runner.end(many).reason == "trap"


def test_processor_seconds_end_a_guest_and_no_other(runner: Runner) -> None:
    spins = runner.module(program("(loop br 0)"))
    other = runner.start(spins)
    guest = runner.start(spins, GuestSpec(["x"], limits=GuestLimits(cpu_seconds=0.2)))
    end = wait_for(guest)
    assert (end.code, end.reason) == (137, "cpu")
    assert 0.2 <= end.cpu_seconds < 1
    assert other.ended is None


def test_processor_seconds_end_a_guest_that_calls_all_the_time(runner: Runner) -> None:
    calls = program("(loop (drop (call $fd_fdstat_set_flags (i32.const 1) (i32.const 0))) br 0)")
    end = runner.end(calls, GuestSpec(["x"], limits=GuestLimits(cpu_seconds=0.2)))
    assert (end.code, end.reason) == (137, "cpu")


@pytest.mark.parametrize("own", [None, 4.0])
def test_a_rate_that_a_sandbox_gets_later_holds_in_containers_with_limits_of_their_own(own: float | None) -> None:
    sandbox = Shares.of(Resources())
    container = Shares.of(Resources(memory="64M", cpu=own), sandbox)
    sandbox.update(Resources(cpu=0.5), running=0)
    rate = container.cpu
    assert rate is not None
    assert rate.charge(1.0) > 1.5  # two seconds for one of processor time, but for what may be saved up
    sandbox.update(Resources(), running=0)
    assert (container.cpu is None) == (own is None)


@pytest.mark.parametrize(("cores", "guests"), [(0.2, 1), (0.1, 3)])
def test_a_rate_of_processor_time_is_held_for_all_guests_together(runner: Runner, cores: float, guests: int) -> None:
    spins = runner.module(program("(loop br 0)"))
    rate = CpuRate(cores)
    running = [runner.start(spins, GuestSpec(["x"], limits=GuestLimits(cpu=rate))) for _ in range(guests)]
    while not any(guest.cpu_seconds for guest in running):
        time.sleep(0.001)
    began, used = time.monotonic(), sum(guest.cpu_seconds for guest in running)
    spent = 0.0
    # A machine with too much to do gives less for a while; more is given by nobody.
    while time.monotonic() - began < 2.0 or spent < cores * 0.3:
        assert time.monotonic() - began < 60
        time.sleep(0.05)
        spent = (sum(guest.cpu_seconds for guest in running) - used) / (time.monotonic() - began)
    print(f"\nmeasured a rate of {cores}: {spent:.3f}")
    assert spent < cores * 1.2 + 0.01
    for guest in running:
        guest.kill()  # also while it waits for its share
        assert wait_for(guest).signal == 9


def test_fuel_ends_a_guest_where_instructions_are_counted(domain: Domain) -> None:
    with pytest.raises(UnsupportedError, match="fuel"):
        Guest(domain, domain.compile(program("nop")), GuestSpec(["x"], limits=GuestLimits(fuel=1))).start()
    counting = Domain.get(fuel=True)
    try:
        guest = Guest(
            counting, counting.compile(program("(loop br 0)")), GuestSpec(["x"], limits=GuestLimits(fuel=9999))
        )
        guest.start()
        end = wait_for(guest)
        assert (end.code, end.reason) == (137, "fuel")
        guest = Guest(counting, counting.compile(program("nop")), GuestSpec(["x"]))
        guest.start()
        assert wait_for(guest).code == 0
    finally:
        counting.close()


def test_the_stack_is_the_guests_own_however_deep_it_calls(runner: Runner, count: Callable[[int], int]) -> None:
    """Deep in the stack our own calls, Python among them, still have room."""
    deep = program(
        "(call $deep (i32.const 0))",
        """(func $deep (param $i i32)
          (if (i32.eqz (i32.rem_u (local.get $i) (i32.const 64)))
            (then (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 8)))))
          (call $deep (i32.add (local.get $i) (i32.const 1))))""",
    )
    module = runner.module(deep)
    for _ in range(count(50)):
        end = runner.end(module)
        assert end.reason == "trap"
        assert end.detail.startswith("stack_overflow")


ASKS_FOR_MANY_CLOCKS = program(
    """(local $at i32) (drop (memory.grow (i32.const 16))) (local.set $at (i32.const 4096))
    (loop $more
      (i32.store offset=16 (local.get $at) (i32.const 1)) (i32.store16 offset=40 (local.get $at) (i32.const 1))
      (local.set $at (i32.add (local.get $at) (i32.const 48)))
      (br_if $more (i32.lt_u (local.get $at) (i32.const 200704))))
    (call $say (i32.const 1024) (i32.const 1))
    (loop
      (call $check (call $poll_oneoff (i32.const 4096) (i32.const 262144) (i32.const 4096) (i32.const 8))) br 0)""",
    '(data (i32.const 1024) ".")',
)
"""Polls 4,096 moments of its own clock that are over, again and again: most of its time it is asked for that clock."""


def test_processor_time_that_ends_within_a_poll_is_told_as_such(runner: Runner) -> None:
    """The guest's clock is asked for by running Wasm within the call, and the end comes there."""
    for _ in range(3):
        end = runner.end(ASKS_FOR_MANY_CLOCKS, GuestSpec(["x"], limits=GuestLimits(cpu_seconds=0.15)))
        assert (end.code, end.reason) == (137, "cpu")


def test_a_kill_that_comes_within_a_poll_is_told_as_such(runner: Runner) -> None:
    runner.start(SPINS, GuestSpec(["x"], limits=GuestLimits(cpu_seconds=1000)))  # so that epochs go on
    module = runner.module(ASKS_FOR_MANY_CLOCKS)
    for _ in range(6):
        with Pipe() as out:
            guest = runner.start(module, GuestSpec(["x"], stdout=os.dup(out.writer)))
            announced(out, 1)
            guest.kill(9)
            end = wait_for(guest)
        assert (end.code, end.reason, end.signal) == (137, "signaled", 9)


def test_fuel_that_is_used_up_within_a_poll_is_told_as_such() -> None:
    runner = Runner(Domain.get(fuel=True))
    try:
        # The calls within polls take nearly all of it; several amounts, so that some end there.
        for fuel in range(400_000, 400_020):
            end = runner.end(ASKS_FOR_MANY_CLOCKS, GuestSpec(["x"], limits=GuestLimits(fuel=fuel)))
            assert (end.code, end.reason) == (137, "fuel")
    finally:
        runner.domain.close()
