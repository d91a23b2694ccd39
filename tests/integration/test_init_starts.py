"""A process between its start and its exec, and what init cannot hold: each end is exact, each error typed."""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest
from tests.init_container import (
    FIRST_ID,
    Container,
    closing,
    make_request,
    status_of,
    until,
)

from unisandbox.api.errors import (
    BackendError,
    DeadlineExceededError,
    UnavailableError,
)
from unisandbox.host import boundary
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.init import ExecFailed, ended, protocol, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.root]


# ---- the wait before exec ----


async def test_the_process_waits_for_its_cgroup_before_exec(container: Container) -> None:
    seen: list[tuple[str, int]] = []

    def look(pid: int, pidfd: int) -> None:
        seen.append((os.readlink(f"/proc/{pid}/exe"), os.stat(f"/proc/{pid}").st_uid))
        signal.pidfd_send_signal(pidfd, 0)

    assert await container.status("/bin/true", before_exec=look) == 0
    assert len(seen) == 1
    assert "unisandbox-init" in seen[0][0], "it ran nothing of the user's yet"


@pytest.fixture
def birthplace(container: Container) -> Iterator[int]:
    """A cgroup2 directory in which init may give birth."""
    root = Cgroups.detect(f"init-{os.getpid()}").root()
    try:
        home, place = root.child("home"), root.child("place")
        if place.clone_into is None:
            pytest.skip("this host has no cgroup2 tree")
        home.enter(container.pid)
        for cgroup in (root, home, place):
            cgroup.admit(FIRST_ID)
        directory = os.open(place.clone_into, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield directory
        finally:
            os.close(directory)
    finally:
        root.kill()
        assert root.remove(timeout=20)


async def test_nobody_is_asked_to_move_a_process_that_is_about_to_enter_its_cgroups_itself(
    container: Container, birthplace: int
) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)  # in the place of a v1 `tasks`: full, so that the process has to wait
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    os.set_blocking(writer, True)
    steps: list[str] = []
    began = anyio.Event()

    def watch(name: str, _: str) -> None:
        if name == "after init.started":
            began.set()

    async def start() -> None:
        process = await spawn(
            container.control,
            make_request("/bin/true"),
            (0, 1, 2),
            before_exec=lambda pid, pidfd: steps.append("looked at"),
            timeout=10,
            cgroup=(birthplace, writer),
        )
        async with closing(process):
            end = await ended(process.life)
            assert end is not None
            assert end.status == 0

    boundary.watch(watch)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(start)
            await began.wait()
            await anyio.wait_all_tasks_blocked()
            steps.append("let in")
            while os.read(reader, 4096).rstrip(b"\0") != b"0":
                pass
    finally:
        boundary.watch(None)
        os.close(reader)
        os.close(writer)
    assert steps == ["let in", "looked at"]


async def test_an_error_before_exec_ends_the_process(container: Container) -> None:
    def refuse(pid: int, pidfd: int) -> None:
        raise OSError(errno.EBUSY, "no cgroup today")

    with pytest.raises(OSError, match="no cgroup today"):
        await container.start("touch", "/tmp/never", before_exec=refuse)
    await until(lambda: list(container.processes()) == [container.pid])
    assert "never" not in os.listdir(f"/proc/{container.pid}/root/tmp")


async def test_a_process_killed_before_exec_has_its_exact_end(container: Container) -> None:
    def kill(pid: int, pidfd: int) -> None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    assert await container.status("/bin/true", before_exec=kill) == signal.SIGKILL


async def test_a_start_cancelled_at_any_await_leaves_nothing(container: Container) -> None:
    request, null = make_request("sleep", "60"), os.open("/dev/null", os.O_RDWR)
    descriptors = sorted(os.listdir("/proc/self/fd"))

    async def start(scope: anyio.CancelScope, where: str) -> None:
        async def hold(fd: int, pid: int, pidfd: int) -> None:
            if where == "hold":
                scope.cancel()
            await anyio.lowlevel.checkpoint()

        def before(pid: int, pidfd: int) -> None:
            if where == "before":
                scope.cancel()

        if where == "first":
            scope.cancel()
        process = await spawn(
            container.control, request, (null, null, null), before_exec=before, hold_life=hold, timeout=10
        )
        # The exec was quicker than the first await that could be cancelled: then it has simply started.
        async with closing(process):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    try:
        for where in ("first", "hold", "before"):
            with anyio.CancelScope() as scope:
                await start(scope, where)
            await until(lambda: list(container.processes()) == [container.pid])
            assert sorted(os.listdir("/proc/self/fd")) == descriptors
    finally:
        os.close(null)
    assert await container.status("/bin/true") == 0


async def test_a_stopped_init_meets_the_deadline_and_starts_nothing_later(container: Container) -> None:
    os.kill(container.pid, signal.SIGSTOP)
    failed = 0

    async def start() -> None:
        nonlocal failed
        with pytest.raises(DeadlineExceededError):
            await container.start("touch", "/tmp/never", timeout=0.5)
        failed += 1

    try:
        async with anyio.create_task_group() as group:
            for _ in range(300):  # more than the socket's queue takes: the rest waits for room in it
                group.start_soon(start)
    finally:
        os.kill(container.pid, signal.SIGCONT)
    assert failed == 300
    assert await container.status("/bin/true") == 0
    await until(lambda: list(container.processes()) == [container.pid])
    assert "never" not in os.listdir(f"/proc/{container.pid}/root/tmp")


async def test_a_process_of_another_pid_namespace_than_expected_is_refused(container: Container) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    expected = os.stat(f"/proc/{container.pid}/ns/pid").st_ino

    async def start(pid_namespace: int) -> None:
        process = await spawn(
            container.control,
            make_request("true"),
            (null, null, null),
            before_exec=lambda pid, pidfd: None,
            timeout=10,
            pid_namespace=pid_namespace,
        )
        async with closing(process):
            assert await status_of(process.life) == 0

    try:
        await start(expected)
        with pytest.raises(BackendError, match="namespace"):
            await start(expected + 1)
    finally:
        os.close(null)
    await until(lambda: list(container.processes()) == [container.pid])


async def test_a_host_without_descriptors_gets_a_typed_error_at_every_point(container: Container) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    null = os.open("/dev/null", os.O_RDWR)
    filling = [null]
    while filling[-1] <= highest:  # no gaps below the limit
        filling.append(os.dup(null))
    request = make_request("true")
    failures = 0
    for room in range(1, 24):
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (filling[-1] + room, limit[1]))
        try:
            process = await spawn(
                container.control, request, (null, null, null), before_exec=lambda pid, pidfd: None, timeout=10
            )
            taken.append(process)
        except BackendError:
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for process in taken:
            async with closing(process):
                assert await status_of(process.life) == 0
    for fd in filling:
        os.close(fd)
    assert 0 < failures < 23
    await until(lambda: list(container.processes()) == [container.pid])


async def test_without_init_a_start_is_a_typed_error(container: Container) -> None:
    os.kill(container.pid, signal.SIGKILL)
    container.finish()
    with pytest.raises(UnavailableError, match="init"):
        await container.start("/bin/true")


async def test_init_ending_during_a_start_is_a_typed_error(container: Container) -> None:
    def kill_init(pid: int, pidfd: int) -> None:
        os.kill(container.pid, signal.SIGKILL)

    async with closing(await container.start("sleep", "60", before_exec=kill_init)) as process:
        assert await status_of(process.life) is None


# ---- limits of init itself ----


async def test_more_processes_than_init_can_hold_are_refused_with_a_typed_error() -> None:
    with Container(files=80) as container:
        processes = [await container.start("sleep", "60", rlimits={}) for _ in range(48)]
        with pytest.raises(ExecFailed) as failed:
            await container.start("/bin/true")
        assert (failed.value.step, failed.value.errno) == ("table", errno.EAGAIN)
        signal.pidfd_send_signal(processes[0].pidfd, signal.SIGKILL)
        assert await status_of(processes[0].life) == signal.SIGKILL
        assert await container.status("/bin/true") == 0
        for process in processes:
            async with closing(process):
                pass


def _fill(sock: socket.socket) -> int:
    for filled in itertools.count():
        try:
            sock.send(b"x", socket.MSG_DONTWAIT)
        except BlockingIOError:
            return filled
    raise AssertionError("a socket without an end")


async def test_an_end_that_cannot_be_sent_is_kept_until_it_can(container: Container) -> None:
    life, their_life = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    go, their_go = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with life, their_life, go, their_go:
        request = make_request("/bin/true")
        spec = protocol.encode_spec(request)
        memory, null = os.memfd_create("spec"), os.open("/dev/null", os.O_RDWR)
        os.write(memory, spec)
        fds = array.array("i", [their_life.fileno(), their_go.fileno(), memory, null, null, null])
        container.control.sendmsg(
            [protocol.encode_request(request, len(spec))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        )
        their_go.close()
        with anyio.fail_after(10):
            await anyio.wait_readable(life)
        filled = _fill(their_life)
        go.send(b"g")
        await until(lambda: list(container.processes()) == [container.pid])
        assert await container.status("/bin/true") == 0, "others are not kept waiting"
        assert life.recv(64)[:4] == struct.pack("=I", protocol.STARTED)
        for _ in range(filled):
            assert life.recv(64) == b"x"
        their_life.close()
        with anyio.fail_after(10):
            assert await status_of(life) == 0
        os.close(memory)
        os.close(null)
    await until(lambda: len(os.listdir(f"/proc/{container.pid}/fd")) == 5)
