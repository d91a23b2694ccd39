"""What the keeper holds for a client that may die: several fds at once, what they bring meanwhile, and when."""

# ruff: noqa: ASYNC220, ASYNC230, ASYNC240 - a test may block its own event loop

from __future__ import annotations

import fcntl
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from tests.keepers import DEADLINE, adopt, cpu_seconds, fd_count, host, keeper_at, raw_client, said, until, wait_ended

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.keeper import EndEvent, EndNotice, Keeper, Reclaimed

pytestmark = [pytest.mark.anyio, pytest.mark.root]

# Gives the keeper two pipes and a terminal, both ends of each, and dies.
_HOLDER = """
    import pty
    read_1, write_1 = os.pipe()
    read_2, write_2 = os.pipe()
    master, slave = pty.openpty()
    await keeper.spools.hold_now({"s/out": read_1, "s/err": read_2, "s/tty": master, "s/w1": write_1, "s/w2": write_2,
                           "s/slave": slave}, spool={"s/out": 1000, "s/err": 100000, "s/tty": 1000})
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def write(keeper: Keeper, name: str, data: bytes) -> None:
    """Write to a held fd, as a program would that has it; the pipe takes it or the keeper drains it."""
    fd = await keeper.take(name)
    with open(fd, "wb", buffering=0) as file:
        await anyio.to_thread.run_sync(file.write, data)


async def reading_begins(keeper: Keeper, name: str) -> None:
    """Wait until the end of a client has reached the keeper, so that it drains this."""
    with anyio.fail_after(DEADLINE):
        while True:
            try:
                await keeper.spools.ring_read(name, 0)
                return
            except FileNotFoundError:
                await anyio.sleep(0.001)


async def reclaimed(keeper: Keeper, name: str, size: int) -> Reclaimed:
    """Reclaim once the keeper has drained so many bytes."""
    await reading_begins(keeper, name)
    with anyio.fail_after(DEADLINE):
        while (await keeper.spools.ring_read(name, size - 1, limit=1, wait=DEADLINE)).next < size:
            pass
    got = await keeper.spools.reclaim(name)
    keeper.spools.taken(name, got)
    return got


async def test_several_fds_are_held_at_once_and_replace_what_was_there(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        pipes = [os.pipe() for _ in range(32)]
        await keeper.spools.hold_now(
            {f"p{number}": fd for number, fd in enumerate(fd for pair in pipes for fd in pair)}
        )
        held = await keeper.held()
        assert len(held) == 64
        count = fd_count(keeper.pid)
        for pair in pipes:
            for fd in pair:
                os.close(fd)
        reading, writing = os.pipe()
        await keeper.spools.hold_now({"p0": reading, "p1": writing})
        os.close(writing)
        os.close(reading)
        await write(keeper, "p1", b"new")
        copy = await keeper.take("p0")
        assert os.read(copy, 10) == b"new"
        os.close(copy)
        number = (await keeper.held())["p0"]
        assert os.path.exists(f"/proc/{keeper.pid}/fd/{number}")
        assert fd_count(keeper.pid) == count
        with pytest.raises(InvalidArgumentError, match="at most 64"):
            await keeper.spools.hold_now(dict.fromkeys(map(str, range(65)), 0))
        with pytest.raises(InvalidArgumentError, match="not among"):
            await keeper.spools.hold_now({"a": 0}, spool={"b": 1})
        with pytest.raises(InvalidArgumentError, match="not among"):
            await keeper.spools.hold_now({"a": 0}, stamp=["b"])


async def test_what_a_program_writes_while_nobody_is_there_is_kept(tmp_path: Path, anyio_backend: str) -> None:
    with host(tmp_path, anyio_backend, "keep", _HOLDER) as (program, pid):
        program.wait()
        keeper = await adopt(tmp_path)
        try:
            assert keeper.pid == pid
            block = bytes(range(250)) * 2000  # more than a pipe takes: somebody drains it
            await write(keeper, "s/w2", block)
            await write(keeper, "s/w1", b"x" * 900)
            await write(keeper, "s/slave", b"hello")
            out = await reclaimed(keeper, "s/out", 900)
            assert (out.data, out.lost, out.eof) == (b"x" * 900, 0, False)
            err = await reclaimed(keeper, "s/err", len(block))
            assert (err.data, err.lost, err.eof) == (block[-100_000:], 400_000, False)
            tty = await reclaimed(keeper, "s/tty", 5)
            assert (tty.data, tty.lost, tty.eof) == (b"hello", 0, False)
            # What comes from now on is ours, and is not drained.
            await write(keeper, "s/w1", b"for us")
            assert not os.get_inheritable(out.fd)
            assert os.read(out.fd, 100) == b"for us"
            await write(keeper, "s/w1", b"also")
            again = await keeper.spools.reclaim("s/out")
            assert again.data == b""
            assert os.read(out.fd, 100) == b"also"
            for got in (out, err, tty, again):
                os.close(got.fd)
        finally:
            await keeper.close()


async def test_a_spool_goes_on_at_the_end_of_each_of_its_clients(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        one = await Keeper.attach(f"{tmp_path}/state")
        reading, writing = os.pipe()
        await one.spools.hold_now({"out": reading}, spool={"out": 10})
        os.close(reading)
        os.write(writing, b"by the client")
        first = await one.spools.reclaim("out")
        assert (first.data, first.lost, first.eof) == (b"", 0, False)
        assert os.read(first.fd, 100) == b"by the client"
        os.close(first.fd)
        for number in range(3):
            one.abandon()
            assert await _drains(keeper, "out")
            os.write(writing, b"0123456789abcdef")
            with anyio.fail_after(DEADLINE):
                while _unread(writing):
                    await keeper.held()
            one = await Keeper.attach(f"{tmp_path}/state")
            with anyio.fail_after(DEADLINE):
                got = await one.spools.reclaim("out")
            assert (got.data, got.lost) == (b"6789abcdef", 6 * (number + 1))
            os.close(got.fd)
            for left in (4, 0):
                one.spools.taken("out", got, left)
                await one.held()  # it has heard what we have
                one.abandon()
                assert await _drains(keeper, "out")
                one = await Keeper.attach(f"{tmp_path}/state")
                again = await one.spools.reclaim("out")
                assert (again.data, again.lost) == (b"cdef"[:left], 6 * (number + 1))
                os.close(again.fd)
        one.abandon()
        assert await _drains(keeper, "out")
        os.write(writing, b"end")
        os.close(writing)
        while not (await keeper.spools.ring_read("out", 1 << 40, wait=0.01)).eof:
            pass
        end = await keeper.spools.reclaim("out")
        assert (end.fd, end.data, end.lost, end.eof) == (-1, b"end", 18, True)
        keeper.spools.taken("out", end)
        assert await keeper.spools.reclaim("out") == end._replace(data=b"")
        await keeper.drop(["out"])
        with pytest.raises(FileNotFoundError):
            await keeper.spools.reclaim("out")


def _unread(writing: int) -> int:
    """How many bytes are in a pipe."""
    return int.from_bytes(fcntl.ioctl(writing, termios.FIONREAD, bytes(4)), sys.byteorder)


async def _drains(keeper: Keeper, name: str) -> bool:
    """Whether the keeper drains this now; waits for the end of a client to reach it."""
    epoll = next(
        f"/proc/{keeper.pid}/fdinfo/{fd}"
        for fd in os.listdir(f"/proc/{keeper.pid}/fd")
        if "eventpoll" in os.readlink(f"/proc/{keeper.pid}/fd/{fd}")
    )
    number = (await keeper.held())[name]
    wanted = ["tfd:", str(number)]
    with anyio.fail_after(DEADLINE):
        while not any(line.split()[:2] == wanted for line in Path(epoll).read_text().splitlines()):
            await keeper.held()
    return True


async def test_an_answer_that_nobody_reads_loses_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        one = await Keeper.attach(f"{tmp_path}/state")
        await one.spools.hold_now({"out": reading}, spool={"out": 1000})
        await one.held()
        one.abandon()
        os.close(reading)
        os.write(writing, b"first")
        await reading_begins(keeper, "out")
        await keeper.spools.ring_read("out", 0, wait=DEADLINE)
        # A client that is killed behind its request: nobody says that the answer has come.
        for _ in range(3):
            with raw_client(tmp_path) as sock:
                sock.send(b'{"id":1,"op":"reclaim","name":"out"}')
                assert b"Zmlyc3Q" in sock.recv(1000)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(keeper.spools.reclaim, "out")
                scope.cancel()
        os.write(writing, b" second")
        got = await keeper.spools.reclaim("out")
        data = got.data + (os.read(got.fd, 100) if not got.data.endswith(b"second") else b"")
        assert data == b"first second"
        assert got.lost == 0
        os.close(got.fd)
        os.close(writing)


async def test_a_ring_is_reclaimed_like_a_spool(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        await keeper.spools.ring("out", reading, limit=300_000)
        os.close(reading)
        data = os.urandom(250_000)
        await anyio.to_thread.run_sync(os.write, writing, data)
        got = await reclaimed(keeper, "out", len(data))
        assert (got.data, got.lost, got.eof) == (data, 0, False)
        os.write(writing, b"x")
        assert os.read(got.fd, 10) == b"x"
        os.close(got.fd)
        os.close(writing)


async def test_what_cannot_be_spooled_is_held_all_the_same(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        one = await Keeper.attach(f"{tmp_path}/state")
        reading, writing = os.pipe()
        pidfd = os.pidfd_open(os.getpid())
        with subprocess.Popen(["/bin/true"]) as child, open("/etc/passwd", "rb") as file:
            ended = os.pidfd_open(child.pid)
            fds = {"w": writing, "file": file.fileno(), "pid": pidfd, "ended": ended}
            await one.spools.hold_now(fds, spool=dict.fromkeys(fds, 1000))
            await one.held()
        for fd in (reading, writing, pidfd, ended):
            os.close(fd)
        one.abandon()
        used = cpu_seconds(keeper.pid)
        for _ in range(100):
            await keeper.held()
        assert cpu_seconds(keeper.pid) - used < 1
        assert sorted(await keeper.held()) == sorted(fds)
        for name in fds:
            got = await keeper.spools.reclaim(name)
            assert (got.data, got.eof) == (b"", False)
            os.close(got.fd)
        assert (tmp_path / "state/keeper.log").stat().st_size < 4000


async def test_a_spool_keeps_its_limit_whatever_others_may_grow_to(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        one = await Keeper.attach(f"{tmp_path}/state")
        pipes = [os.pipe() for _ in range(8)]
        fds = {f"p{number}": reading for number, (reading, _) in enumerate(pipes)}
        await one.spools.hold_now(fds, spool=dict.fromkeys(fds, 64 << 20))
        await one.held()
        one.abandon()
        for reading, _ in pipes:
            os.close(reading)
        assert await _drains(keeper, "p7")
        block = b"x" * (1 << 20)
        for _ in range(40):
            await anyio.to_thread.run_sync(os.write, pipes[0][1], block)
        got = await reclaimed(keeper, "p0", 40 << 20)
        assert (len(got.data), got.lost) == (40 << 20, 0)
        os.close(got.fd)
        for _, writing in pipes:
            os.close(writing)


async def test_the_stamp_is_the_time_at_which_it_became_readable(tmp_path: Path, anyio_backend: str) -> None:
    body = """
    read_1, write_1 = os.pipe()
    read_2, write_2 = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read_2, 1)
        os._exit(3)
    await keeper.spools.hold_now({"s/r": read_1, "s/w": write_1, "s/never": read_2, "s/pid": os.pidfd_open(child),
                           "s/w2": write_2}, spool={"s/r": 100}, stamp=["s/r", "s/never", "s/pid"])
    print(child, flush=True)
    await anyio.sleep_forever()
    """
    with host(tmp_path, anyio_backend, "keep", body) as (program, _):
        child = int(said(program))
        keeper = await adopt_after_kill(tmp_path, program)
        try:
            for name in ("s/r", "s/never", "s/pid"):
                keeper.events.publish({"n": "begin"}, end=_end_of(name))
            before = time.time()
            await write(keeper, "s/w", b"x")
            os.kill(child, signal.SIGKILL)
            wait_ended(child)
            after = time.time()
            stamps = await _told(keeper, 2)
            assert sorted(stamps) == ["s/pid", "s/r"]
            assert before - 0.001 <= min(stamps.values())
            assert max(stamps.values()) <= after + 0.05
            got = await reclaimed(keeper, "s/r", 1)
            assert got.data == b"x"
            os.close(got.fd)
        finally:
            await keeper.close()


def _end_of(name: str) -> EndNotice:
    return EndNotice(name, "noted", [EndEvent({"n": name}, "")])


async def _told(keeper: Keeper, count: int) -> dict[str, float]:
    """The stamps of so many ends, by name, when they have been told."""
    with anyio.fail_after(DEADLINE):
        while True:
            told = [event for _, event in (await keeper.events.after(0)).events if "end" in event]
            if len(told) >= count:
                return {str(event["n"]): float(str(event["at"])) for event in told}
            await anyio.lowlevel.checkpoint()


async def adopt_after_kill(place: Path, program: subprocess.Popen[str]) -> Keeper:
    program.kill()
    program.wait()
    return await adopt(place)


async def test_a_stamped_fd_that_stays_readable_costs_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        reading, writing = os.pipe()
        one, two = socket.socketpair()
        with two:
            os.write(writing, b"x")
            await keeper.spools.hold_now({"pipe": reading, "socket": one.fileno()}, stamp=["pipe", "socket"])
            one.close()
        os.close(reading)
        os.close(writing)  # and its end has come
        for name in ("pipe", "socket"):
            keeper.events.publish({"n": "begin"}, end=_end_of(name))
        await _told(keeper, 2)
        switches = _wakeups(keeper.pid)
        await anyio.sleep(0.5)  # nothing is to happen: there is no event to wait for
        assert _wakeups(keeper.pid) - switches < 20
        with open("/etc/passwd", "rb") as file:
            await keeper.spools.hold_now({"pipe": file.fileno()}, stamp=["pipe"])
        assert sorted(await keeper.held()) == ["pipe", "socket"]  # refused: what is there stays
        assert "Operation not permitted" in (tmp_path / "state/keeper.log").read_text()


def _wakeups(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt"))


async def test_a_keeper_without_free_fds_holds_all_of_a_message_or_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        hard = resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (fd_count(keeper.pid) + 8, hard))
        null = os.open("/dev/null", os.O_RDONLY)
        await keeper.spools.hold_now({f"n{number}": null for number in range(40)})
        assert await keeper.held() == {}
        until(lambda: "no room for" in (tmp_path / "state/keeper.log").read_text(), "the log says so")
        resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (hard, hard))
        await keeper.spools.hold_now({f"n{number}": null for number in range(40)})
        assert len(await keeper.held()) == 40
        os.close(null)


async def test_a_terminal_whose_program_has_ended_is_at_its_end(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        one = await Keeper.attach(f"{tmp_path}/state")
        master, slave = pty.openpty()
        await one.spools.hold_now({"tty": master}, spool={"tty": 1000})
        await one.held()
        os.close(master)
        one.abandon()
        os.write(slave, b"bye")
        os.close(slave)
        await reading_begins(keeper, "tty")
        with anyio.fail_after(DEADLINE):
            while not (await keeper.spools.ring_read("tty", 3, wait=DEADLINE)).eof:
                pass
        got = await keeper.spools.reclaim("tty")
        assert (got.fd, got.data, got.eof) == (-1, b"bye", True)
