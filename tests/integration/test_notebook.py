"""Between the cells of a notebook its loop goes on, with open sandboxes and nobody who awaits anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from unisandbox import Engine, NotFoundError, Process, Resources, Sandbox, UnavailableError
from unisandbox.conformance.hosts import Watched
from unisandbox.conformance.notebook import Notebook, notebook
from unisandbox.conformance.waiting import line

pytestmark = pytest.mark.root

SMALL = Resources(memory="64M")


@pytest.fixture
def book() -> Iterator[Notebook]:
    with notebook() as opened:
        yield opened


@pytest.fixture
def sandbox(book: Notebook) -> Iterator[Sandbox]:
    made = book.cell(lambda: Sandbox.create(isolation="runc", resources=SMALL))
    yield made
    book.cell(made.remove)


def _ready(book: Notebook, sandbox: Sandbox, script: str) -> Process:
    """A program that has said so."""
    process = book.cell(lambda: sandbox.exec(["sh", "-c", f"echo ready; {script}"], stdin="pipe"))
    assert book.cell(lambda: line(process)) == b"ready\n"
    return process


def test_ends_of_many_programs_between_two_cells_are_exact(book: Notebook, sandbox: Sandbox) -> None:
    processes = [_ready(book, sandbox, f"read line; exit {code}") for code in range(20)]
    added = [
        book.cell(lambda code=code: sandbox.containers.add(argv=["sh", "-c", f"exit {code}"], resources=SMALL))  # type: ignore[misc]
        for code in range(3)
    ]
    for process in processes:
        with Watched(process.pid) as watched:
            os.write(process._pipes.fds()["stdin"], b"\n")  # without the loop
            assert watched.ended()
    book.check_rest()
    assert [book.cell(process.wait).code for process in processes] == list(range(20))
    assert [book.cell(container.wait).code for container in added] == list(range(3))
    for process in processes:
        book.cell(process.aclose)


def test_an_output_that_no_cell_reads_holds_up_its_program_alone(book: Notebook, sandbox: Sandbox) -> None:
    process = _ready(book, sandbox, "read go; head -c 1000000 /dev/zero; exit 3")
    book.cell(lambda: process.stdin.send(b"\n"))
    book.check_rest()
    assert book.cell(lambda: sandbox.run(["echo", "here"])).text == "here\n"

    async def rest() -> int:
        return sum([len(output.data) async for output in process])

    assert book.cell(rest) == 1_000_000
    assert book.cell(process.wait).code == 3
    book.cell(process.aclose)


def test_a_cell_that_is_interrupted_ends_what_it_runs_and_nothing_else(book: Notebook, sandbox: Sandbox) -> None:
    process = _ready(book, sandbox, "cat; exit 4")
    cell = book.begin(lambda: sandbox.run(["sh", "-c", "echo > /tmp/begun; exec sleep 1000"]))
    while book.cell(lambda: sandbox.run(["test", "-e", "/tmp/begun"])).exit_code != 0:
        pass
    cell.cancel()
    with pytest.raises(CancelledError):
        cell.result()
    while b"sleep" in book.cell(lambda: sandbox.sh("cat /proc/[0-9]*/comm")).stdout:
        pass  # it is about to be cleaned up
    book.check_rest()
    book.cell(process.stdin.aclose)
    assert book.cell(process.wait).code == 4
    book.cell(process.aclose)


def test_a_sandbox_whose_time_is_over_between_two_cells_says_so(book: Notebook) -> None:
    sandbox = book.cell(lambda: Sandbox.create(isolation="runc", resources=SMALL, ttl=5))
    process = _ready(book, sandbox, "sleep 1000")
    with Watched(process.pid) as watched:
        assert watched.ended()
    book.check_rest()
    with pytest.raises(NotFoundError, match="ttl"):
        book.cell(lambda: sandbox.run(["true"]))
    book.cell(process.aclose)
    book.check_rest()


def test_the_death_of_the_keeper_between_two_cells_is_told_in_the_next_one(book: Notebook) -> None:
    engine = book.cell(Engine.open)
    sandbox = book.cell(lambda: engine.create(isolation="runc", resources=SMALL))
    process = _ready(book, sandbox, "sleep 1000")
    with Watched(process.pid) as watched:
        os.kill(engine._core.host.keeper.pid, signal.SIGKILL)
        assert watched.ended()
    book.check_rest()
    with pytest.raises(UnavailableError, match="keeper"):
        book.cell(lambda: sandbox.run(["true"]))
    book.check_rest()
    book.cell(engine.close)
    book.check_rest()
