"""Containers of one sandbox: what they share, and what is their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    Container,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Resources,
    Sandbox,
)
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.waiting import until

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.anyio, pytest.mark.needs("containers")]

of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")

_SERVER = (
    "import socket\ns = socket.create_server(('127.0.0.1', 8080))\nprint('ready', flush=True)\n"
    "c, _ = s.accept()\nc.sendall(b'hello from the other container')\nc.close()"
)
_CLIENT = "import socket; print(socket.create_connection(('localhost', 8080), 10).recv(100).decode())"


@of_processes
async def test_two_containers_talk_over_localhost(sandbox: Sandbox, rootfs: str) -> None:
    server = await sandbox.containers.add(rootfs=rootfs, argv=["python3", "-u", "-c", _SERVER])

    async def ready() -> bool:
        return await server.logs() == b"ready\n"

    await until(ready, "the server listens")
    client = await sandbox.containers.add(rootfs=rootfs, argv=["python3", "-c", _CLIENT])

    assert (await client.wait()).code == 0
    assert await client.logs() == b"hello from the other container\n"
    assert (await server.wait()).code == 0


async def test_the_endings_of_a_container_may_race_with_all_else(
    sandbox: Sandbox, rootfs: str, programs: Programs
) -> None:
    for _ in range(3):
        added = await sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60))
        async with anyio.create_task_group() as group:
            for end in (added.remove, added.remove, added.kill):
                group.start_soon(end)
            group.start_soon(sandbox.run, programs.nothing())
    assert [container.name for container in await sandbox.containers.list()] == ["main"]
    assert (await sandbox.run(programs.nothing())).exit_code == 0


async def test_a_launched_program_that_was_removed_leaves_room_for_the_next(
    sandbox: Sandbox, programs: Programs
) -> None:
    async with await sandbox.launch(programs.sleeps(60)):
        pass
    assert (await sandbox.run(programs.nothing())).exit_code == 0


@of_processes
async def test_they_share_memory_hostname_and_network_but_not_files(create: Create, rootfs: str) -> None:
    async with create(hostname="pod") as sandbox:
        await sandbox.sh("echo shared > /dev/shm/x; echo own > /tmp/x", check=True)
        script = "cat /dev/shm/x; hostname; ls /tmp; readlink /proc/self/ns/net /proc/self/ns/ipc /proc/self/ns/uts"
        other = await sandbox.containers.add(rootfs=rootfs, argv=["sh", "-c", script])
        assert (await other.wait()).code == 0

        words = (await other.logs()).decode().split()
        assert words[:2] == ["shared", "pod"]
        names = (await sandbox.status()).namespaces
        assert words[2:] == [f"{kind}:[{names[kind]}]" for kind in ("net", "ipc", "uts")]
        assert await sandbox.files.read("/tmp/x") == b"own\n"


@pytest.mark.needs("shared_pid", "processes")
@pytest.mark.parametrize("shared", [False, True])
async def test_they_see_each_other_when_that_was_asked_for(create: Create, rootfs: str, shared: bool) -> None:
    async with create(share_pid=shared) as sandbox:
        await sandbox.containers.add(rootfs=rootfs, argv=["sleep", "4242"])
        seen = await sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")

        assert ("sleep 4242" in seen.text) is shared


@pytest.mark.needs("shared_pid", "processes")
async def test_a_shared_view_of_processes_does_not_show_the_hosts_files(
    create: Create, rootfs: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of the host only")
    async with create(share_pid=True) as sandbox:
        await sandbox.containers.add(rootfs=rootfs, argv=["sleep", "60"])
        done = await sandbox.sh(f"for p in /proc/[0-9]*/root /proc/[0-9]*/cwd; do cat $p{tmp_path}/secret; done; true")

        assert b"of the host only" not in done.stdout


async def test_exits_are_exact(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    for code in (0, 1, 137, 255):
        end = await (await sandbox.containers.add(rootfs=rootfs, argv=programs.exits(code))).wait()
        assert (end.code, end.signal, end.reason) == (code, None, "exited")
    end = await (await sandbox.containers.add(rootfs=rootfs, argv=programs.aborts())).wait()
    assert (end.code, end.reason != "exited") == (134, True)


@of_processes
async def test_deadly_signals_are_exact(sandbox: Sandbox, rootfs: str) -> None:
    async def add(*argv: str) -> tuple[int, int | None, str]:
        end = await (await sandbox.containers.add(rootfs=rootfs, argv=argv)).wait()
        return end.code, end.signal, end.reason

    assert await add("sh", "-c", "kill -9 $$") == (137, 9, "signaled")
    assert await add("python3", "-c", "import os; os.abort()") == (134, signal.SIGABRT, "signaled")


@pytest.mark.needs("limits:memory")
async def test_memory_of_its_own_is_limited_and_told(create: Create, rootfs: str, programs: Programs) -> None:
    async with create(resources=Resources(memory="512M")) as sandbox:
        greedy = await sandbox.containers.add(rootfs=rootfs, argv=programs.eats(), resources=Resources(memory="64M"))
        with anyio.fail_after(60):
            end = await greedy.wait()
        assert (end.reason, end.code) == ("oom", 137)
        assert (await sandbox.run(programs.nothing())).exit.oom_kills == 0


async def test_logs_keep_both_streams_and_the_last_of_them(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    noisy = await sandbox.containers.add(rootfs=rootfs, argv=programs.counts(300_000))
    with anyio.fail_after(60):
        assert (await noisy.wait()).code == 0

    async def complete() -> bool:
        return (await noisy.logs()).endswith(b"\n299999\n") and await noisy.logs("stderr") == b"error\n"

    await until(complete, "the last line is in the logs")
    assert len(await noisy.logs()) <= 1 << 20


async def test_signals_kill_and_remove(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    one = await sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60), name="one")
    assert (await one.status()).state == "running"
    await one.signal(signal.SIGTERM)
    assert (await one.wait()).signal == signal.SIGTERM
    assert (await one.status()).state == "stopped"
    await one.signal(signal.SIGTERM)

    two = await sandbox.containers.add(rootfs=rootfs, argv=programs.stubborn())
    assert (await two.kill()).signal == signal.SIGKILL
    assert (await two.kill()).signal == signal.SIGKILL
    await two.remove()
    await two.remove()
    assert (await two.wait()).signal == signal.SIGKILL

    assert [status.name for status in await sandbox.containers.list() if status.name != "main"] == ["one"]
    await one.remove()
    with pytest.raises(NotFoundError):
        await one.status()


@of_processes
async def test_with_its_main_process_everything_in_it_ends(sandbox: Sandbox, rootfs: str) -> None:
    seconds = str(10_000_000 + os.getpid())  # can be told from what others sleep
    async with sandbox.containers.add(
        rootfs=rootfs, argv=["sh", "-c", f"setsid sleep {seconds} & echo $!; exit 0"], name="left"
    ) as left:
        assert (await left.wait()).code == 0
        with anyio.fail_after(20):
            await left.remove()
    assert not _running(seconds)


@pytest.mark.needs("shared_pid", "processes")
@pytest.mark.parametrize("how", ["wait", "kill"])
async def test_with_its_main_process_everything_in_it_ends_also_where_others_are_seen(
    create: Create, rootfs: str, how: str
) -> None:
    seconds = str(20_000_000 + os.getpid())
    async with create(share_pid=True) as sandbox:
        beside = await sandbox.containers.add(rootfs=rootfs, argv=["sleep", "60"])
        container = await sandbox.containers.add(rootfs=rootfs, argv=["sh", "-c", f"setsid sleep {seconds} & exit 3"])

        async def stopped() -> bool:
            return (await container.status()).state == "stopped"

        async def gone() -> bool:
            return not _running(seconds)

        await until(stopped, "its main process has ended")
        assert (await getattr(container, how)()).code == 3
        await until(gone, "what it had left has ended")
        assert (await beside.status()).state == "running"


def _running(word: str) -> list[str]:
    """The processes of this host whose arguments have this word in them."""
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and word.encode() in _cmdline(pid)]


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


async def test_names_are_unique_and_never_in_the_way(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    async with sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60), name="c1"):
        with pytest.raises(AlreadyExistsError):
            await sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60), name="c1")
        async with sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60)) as unnamed:
            assert unnamed.name != "c1"
    async with sandbox.containers.add(rootfs=rootfs, argv=programs.nothing(), name="c1") as again:
        assert (await again.wait()).code == 0


async def test_the_name_of_the_main_container_is_taken(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    # Also before `run` has made it.
    with pytest.raises((AlreadyExistsError, InvalidArgumentError)):
        await sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60), name="main")
    assert (await sandbox.run(programs.nothing())).exit_code == 0


@pytest.mark.parametrize("name", ["..", "a/b", "a b", "a" * 77])
async def test_a_name_that_could_be_a_path_is_refused(
    sandbox: Sandbox, rootfs: str, programs: Programs, name: str
) -> None:
    with pytest.raises(InvalidArgumentError):
        await sandbox.containers.add(rootfs=rootfs, argv=programs.nothing(), name=name)


async def test_a_program_that_cannot_be_started_leaves_nothing(
    sandbox: Sandbox, rootfs: str, programs: Programs
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await sandbox.containers.add(rootfs=rootfs, argv=["/no/such/program"], name="x")
    assert caught.value.exit_code == 127
    assert await sandbox.containers.list() == []
    async with sandbox.containers.add(rootfs=rootfs, argv=programs.nothing(), name="x") as again:
        assert (await again.wait()).code == 0


async def test_environment_and_directory_are_its_own(sandbox: Sandbox, rootfs: str, programs: Programs) -> None:
    c = await sandbox.containers.add(
        rootfs=rootfs, argv=programs.variable_and_directory("WORD"), env={"WORD": "x"}, cwd="/tmp"
    )
    assert (await c.wait()).code == 0

    assert (await c.logs()).decode().split() == ["x", "/tmp"]


async def test_its_directory_is_the_sandboxs_unless_it_has_one(create: Create, rootfs: str, programs: Programs) -> None:
    async with create(cwd="/tmp") as sandbox:
        for given, there in ((None, "/tmp"), ("/", "/")):
            c = await sandbox.containers.add(rootfs=rootfs, argv=programs.variable_and_directory("PATH"), cwd=given)
            assert (await c.wait()).code == 0
            assert (await c.logs()).decode().splitlines()[-1] == there


@of_processes
async def test_environment_directory_and_user_are_its_own(
    sandbox: Sandbox, capabilities: Capabilities, rootfs: str
) -> None:
    uid, gid = ("1000", "1001") if capabilities.users else ("0", "0")
    c = await sandbox.containers.add(
        rootfs=rootfs,
        argv=["sh", "-c", "echo $WORD; pwd; id -u; id -g"],
        env={"WORD": "x"},
        cwd="/tmp",
        user=f"{uid}:{gid}",
    )
    assert (await c.wait()).code == 0

    assert (await c.logs()).decode().split() == ["x", "/tmp", uid, gid]


@pytest.mark.needs("rootfs:dir", "writable_dirs", "host_mounts")
async def test_a_root_of_its_own(
    sandbox: Sandbox, programs: Programs, capabilities: Capabilities, rootfs: str, tmp_path: Path
) -> None:
    if capabilities.processes and rootfs != "host":
        pytest.skip("the programs of this test come from the host's /usr")
    mounts = programs.make_root(tmp_path)
    (tmp_path / "mark").write_text("mine")

    c = await sandbox.containers.add(rootfs=tmp_path, argv=programs.replaces("/mark", "y"), mounts=mounts)
    assert (await c.wait()).code == 0, await c.logs("stderr")
    assert await c.logs() == b"miney\n"
    assert (tmp_path / "mark").read_text() == "mine"


async def test_all_end_with_the_sandbox(create: Create, rootfs: str, programs: Programs) -> None:
    sandbox = await create()
    added = [await sandbox.containers.add(rootfs=rootfs, argv=programs.sleeps(60)) for _ in range(3)]
    await sandbox.stop(grace=0)
    assert not [status for status in (await sandbox.status()).containers if status.state == "running"]
    await sandbox.remove()
    for container in added:
        await container.remove()


async def test_a_handle_of_a_removed_container_tells_its_own_end_and_leaves_a_namesake_alone(
    sandbox: Sandbox, rootfs: str, programs: Programs
) -> None:
    async def add(argv: Sequence[str]) -> Container:
        return await sandbox.containers.add(rootfs=rootfs, argv=argv, name="b")

    first = await add(programs.exits(3))

    async def stopped() -> bool:
        return (await first.status()).state == "stopped"

    await until(stopped, "it has ended")
    await (await sandbox.containers.get("b")).remove()
    second = await add(programs.sleeps(60))
    async with second:
        await (await sandbox.containers.get("b")).kill()
    third = await add(programs.sleeps(60))

    assert (await first.wait()).code == (await first.kill()).code == 3
    assert (await second.wait()).signal == signal.SIGKILL
    for call in (first.status, first.logs, lambda: second.signal(signal.SIGTERM), lambda: anext(second.follow())):
        with pytest.raises(NotFoundError):
            await call()
    async with first:
        await second.remove()
    assert (await third.status()).state == "running"
    await third.remove()
    assert (await first.wait()).code == 3
    assert (await third.wait()).signal == signal.SIGKILL


async def test_a_handle_of_a_launched_program_tells_its_own_end_and_not_that_of_the_next(
    sandbox: Sandbox, programs: Programs
) -> None:
    first = await sandbox.launch(programs.exits(3))

    async def stopped() -> bool:
        return (await first.status()).state == "stopped"

    await until(stopped, "it has ended")
    second = await sandbox.launch(programs.sleeps(60))

    assert (await first.wait()).code == 3
    await first.remove()
    assert (await second.status()).state == "running"


async def test_a_program_is_launched_where_others_have_ended_and_not_where_one_runs(
    sandbox: Sandbox, programs: Programs
) -> None:
    await sandbox.run(programs.nothing())
    async with sandbox.exec(programs.sleeps(60)) as process:
        with pytest.raises(FailedPreconditionError, match="was not waited for"):
            await sandbox.launch(programs.nothing())
        assert process.exit is None
    launched = await sandbox.launch(programs.exits(3))
    assert (await launched.wait()).code == 3

    beside = await sandbox.launch(programs.sleeps(60))
    with pytest.raises(FailedPreconditionError, match="a launched program runs"):
        await sandbox.launch(programs.nothing())
    assert (await sandbox.run(programs.nothing())).exit_code == 0
    assert (await beside.status()).state == "running"


async def test_the_main_container_without_a_program_is_not_waited_for_or_ended_by_its_handle(
    sandbox: Sandbox, programs: Programs
) -> None:
    async with sandbox.exec(programs.sleeps(60)) as process:
        main = await sandbox.containers.get("main")
        for call in (main.wait, main.kill, lambda: main.signal(signal.SIGKILL)):
            with pytest.raises(FailedPreconditionError, match="no main process"):
                await call()
        with pytest.raises(FailedPreconditionError, match="no main process"):
            _ = main.pid
        assert (await main.status()).state == "running"
        await process.signal(signal.SIGTERM)
        assert (await process.wait()).signal == signal.SIGTERM
    await main.remove()
    assert await sandbox.containers.list() == []
