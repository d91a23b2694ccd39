"""Promises of the public surface that are easily broken unseen: each was, once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from unisandbox import (
    Engine,
    FailedPreconditionError,
    Mount,
    NotFoundError,
    Resources,
    Sandbox,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api import InvalidArgumentError, SandboxSpec
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.runc.making import Maker
from unisandbox.conformance.waiting import until
from unisandbox.engine import programs
from unisandbox.host.cgroups import Cgroups

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@contextlib.contextmanager
def _descriptors_left(free: int) -> Iterator[None]:
    """This process can open so many files more, and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(free):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


async def _limit(sandbox: Sandbox, container_nofile: int | None = None) -> str:
    if container_nofile is None:
        return (await sandbox.sh("ulimit -n")).text.strip()
    limits = Resources(nofile=container_nofile)
    async with sandbox.containers.add(argv=["sh", "-c", "ulimit -n"], resources=limits) as container:
        await container.wait()
        return (await container.logs()).decode().strip()


async def test_a_containers_limits_are_below_those_of_its_sandbox() -> None:
    async with Sandbox.create(resources=Resources(nofile=64)) as sandbox:
        assert await _limit(sandbox) == "64"
        assert await _limit(sandbox, 4096) == "64"
        assert await _limit(sandbox, 32) == "32"


async def test_mounts_for_the_sandboxs_own_files_alone_are_refused(tmp_path: Path) -> None:
    async with Sandbox.create() as sandbox:
        for mount in (Mount.bind(tmp_path, "/data"), Mount.tmpfs("/data")):
            with pytest.raises(UnsupportedError, match=r"mounts in container .*Give the sandbox these mounts"):
                await sandbox.containers.add(argv=["true"], rootfs=None, mounts=[mount])
        assert [container.name for container in await sandbox.containers.list()] == []


async def test_no_mount_hides_one_below_it_whatever_their_order(tmp_path: Path) -> None:
    for name in ("outer/inner", "inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outer/one").write_bytes(b"1")
    (tmp_path / "inner/two").write_bytes(b"2")
    inner, outer = Mount.bind(tmp_path / "inner", "/data/inner"), Mount.bind(tmp_path / "outer", "/data")
    for mounts in ((inner, outer), (outer, inner)):
        async with Sandbox.create(mounts=mounts) as sandbox:
            for path, content in (("/data/one", b"1"), ("/data/inner/two", b"2")):
                assert (await sandbox.run(["cat", path])).stdout == content
                assert await sandbox.files.read(path) == content


async def test_a_containers_mount_hides_none_of_its_sandboxs_below_it(tmp_path: Path) -> None:
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/two").touch()
    outer = Mount.bind(tmp_path / "outer", "/data")
    async with Sandbox.create(mounts=[Mount.bind(tmp_path / "inner", "/data/inner")]) as sandbox:
        container = await sandbox.containers.add(argv=["ls", "/data", "/data/inner"], mounts=[outer])
        assert (await container.wait()).code == 0
        assert (await container.logs()).split() == [b"/data:", b"inner", b"/data/inner:", b"two"]


async def test_a_sandbox_whose_ttl_is_over_while_it_is_made_is_said_to_be_gone_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = Maker._job

    async def slowly(self: Maker, *arguments: Any, **options: Any) -> dict[str, int]:
        held = await make(self, *arguments, **options)
        keeper = self._host.keeper.pid
        while {str(number) for number in held.values()} & {*os.listdir(f"/proc/{keeper}/fd")}:
            await anyio.sleep(0.001)
        return held

    monkeypatch.setattr(Maker, "_job", slowly)
    with anyio.fail_after(20):
        with pytest.raises(NotFoundError, match=r"was removed: its ttl of 0\.3 s is over"):
            await Sandbox.create(ttl=0.3)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Resources(nofile=65), "resources.nofile of a container must be at most 64, which its sandbox has, got 65"),
        (Resources(core="1M"), "resources.core of a container must be at most 1024, which its sandbox has"),
        (Resources(pids=2), "pids must be at least 3"),
    ],
    ids=["nofile", "core", "pids"],
)
async def test_a_containers_limits_that_cannot_hold_are_refused(limits: Resources, said: str) -> None:
    async with Sandbox.create(resources=Resources(nofile=64, core=1024)) as sandbox:
        with pytest.raises(InvalidArgumentError, match=said):
            await sandbox.containers.add(argv=["true"], resources=limits)
        assert await sandbox.containers.list() == []


async def test_a_containers_limits_may_be_as_high_as_its_sandboxs() -> None:
    async with Sandbox.create(resources=Resources(nofile=64, core=1024, pids=3)) as sandbox:
        limits = Resources(nofile=64, core=1024, pids=3)
        async with sandbox.containers.add(argv=["sh", "-c", "ulimit -n"], resources=limits) as container:
            assert (await container.wait()).code == 0
            assert await container.logs() == b"64\n"


@pytest.mark.parametrize("first", [0x7000_0000 - 65535, 0x7123_0000, 0x7FFE_FFFF, 1])
async def test_ids_that_may_be_leased_to_another_sandbox_are_refused(first: int) -> None:
    async with Engine.open() as engine:
        count = 65536 if first > 1 else (1 << 32) - 2
        with pytest.raises(InvalidArgumentError, match="from 1879048192 to 2147418111"):
            await engine._core.create(SandboxSpec(user_ids=(first, count)))
        for free in (0x7000_0000 - 65536, 0x7FFF_0000):
            entry = await engine._core.create(SandboxSpec(user_ids=(free, 65536)))
            await entry.remove()


async def test_a_disk_limit_that_cannot_be_changed_is_refused_and_the_default_stays() -> None:
    async with Sandbox.create(resources=Resources(memory="256M")) as sandbox:
        before = (await sandbox.metrics()).disk_limit_bytes
        await sandbox.update(Resources(memory="512M"))
        with pytest.raises(UnsupportedError, match="disk"):
            await sandbox.update(Resources(memory="512M", disk="256M"))
        assert (await sandbox.metrics()).disk_limit_bytes == before
        with pytest.raises(UnsupportedError, match="disk"):
            await sandbox.containers.add(argv=["true"], resources=Resources(memory="64M", disk="32M"))


async def test_a_start_for_which_there_is_no_room_is_no_wrong_argument_and_says_what_is_full() -> None:
    """The same call is right a moment later."""
    said = r"(?s)Resource temporarily unavailable.*Resources\.pids"
    async with Sandbox.create(resources=Resources(pids=8)) as sandbox, contextlib.AsyncExitStack() as stack:

        async def fill() -> None:
            for _ in range(9):
                await stack.enter_async_context(sandbox.exec(["sleep", "1000"]))

        with pytest.raises(FailedPreconditionError, match=said):
            await fill()
        with pytest.raises(FailedPreconditionError, match=said):
            await sandbox.run(["true"])
        with pytest.raises(FailedPreconditionError, match=said):
            await sandbox.containers.add(argv=["true"])
        await stack.aclose()
        assert (await sandbox.run(["true"])).exit_code == 0


@pytest.mark.parametrize("directory", [None, "state"])
async def test_an_engine_that_has_too_few_open_files_says_that_and_leaves_nothing(
    directory: str | None, tmp_path: Path
) -> None:
    place = directory and tmp_path / directory
    told: list[str] = []
    for free in range(24):
        try:
            with _descriptors_left(free):
                async with Engine.open(place):
                    pass
        except SandboxError as error:
            told.append(f"{type(error).__name__}: {error}")
    assert told
    assert [text for text in told if not re.search(r"^UnavailableError: .*open files.*ulimit -n", text)] == []
    async with Engine.open(place):
        pass


async def test_a_sandbox_that_had_too_few_open_files_for_its_first_program_runs_the_next() -> None:
    async with Engine.open() as engine:
        for free in range(14):
            async with engine.create() as sandbox:
                with contextlib.suppress(SandboxError), _descriptors_left(free):
                    await sandbox.run(["true"])
                assert (await sandbox.run(["echo", "again"])).text == "again\n", f"after {free} were left"


async def test_too_few_open_files_are_an_error_of_ours_whatever_is_asked_for() -> None:
    async with Engine.open() as engine, engine.create() as sandbox, sandbox.exec(["sleep", "1000"]) as process:
        asks: list[Callable[[], Awaitable[object]]] = [
            lambda: sandbox.run(["true"]),
            lambda: sandbox.exec(["sleep", "1000"]),
            lambda: sandbox.containers.add(argv=["sleep", "1000"]),
            sandbox.status,
            sandbox.metrics,
            lambda: process.signal(0x12),
            lambda: sandbox.files.read("/etc/passwd"),
            process.kill,
            sandbox.stop,
            sandbox.start,
            sandbox.remove,
        ]
        for ask in asks:
            for free in (0, 1, 2, 5, 7):
                with _descriptors_left(free):
                    try:
                        await ask()
                    except SandboxError as error:
                        said: SandboxError | None = error
                    else:
                        said = None
                assert said is None or isinstance(said, UnavailableError), said
                assert said is None or "limit" in said.hint, said


async def test_output_that_cannot_be_waited_for_with_too_few_open_files_is_told_as_that_and_not_lost() -> None:
    async with Sandbox.create() as sandbox, sandbox.exec(["cat"], stdin="pipe") as process:
        for free in (0, 1, 2):
            with _descriptors_left(free), pytest.raises(UnavailableError) as caught:
                await anext(process)
            assert "limit" in caught.value.hint
        await process.stdin.send(b"there")
        assert (await anext(process)).data == b"there"


async def test_the_end_of_a_container_is_told_once() -> None:
    async with Engine.open() as engine:
        async with engine.create() as sandbox:
            container = await sandbox.containers.add(name="c", argv=["sh", "-c", "exit 3"])
            await container.wait()
            await container.remove()
            await container.remove()
        kinds: list[tuple[str, str]] = []
        async for event in engine.events():
            kinds.append((event.kind, event.container_id))
            if event.kind == "sandbox.removed":
                break
    ours = [kind for kind, container_id in kinds if container_id == "c"]
    assert ours == ["container.created", "container.started", "container.exited"]


async def test_a_stop_that_is_cut_stops_all_the_same() -> None:
    async with Sandbox.create() as sandbox:
        stubborn = await sandbox.exec(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"])
        assert await stubborn.stdout.receive() == b"up\n"
        with anyio.move_on_after(0.3) as cut:
            await sandbox.stop(grace=60)
        assert cut.cancelled_caught
        assert (await stubborn.wait()).signal == 9
        await sandbox.start()
        assert (await sandbox.run(["echo", "works"])).text == "works\n"


async def test_what_the_host_process_runs_under_is_not_inherited() -> None:
    code = """
import asyncio, json, os, resource
os.nice(5)
os.sched_setaffinity(0, {0})
resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
from unisandbox import Sandbox
async def main():
    async with Sandbox.create() as sandbox:
        inside = "import os, resource, json; print(json.dumps([os.nice(0), len(os.sched_getaffinity(0)),"
        inside += " resource.getrlimit(resource.RLIMIT_STACK)[0], resource.getrlimit(resource.RLIMIT_AS)[0]]))"
        print((await sandbox.run(["python3", "-c", inside], check=True)).text)
asyncio.run(main())
"""
    done = await anyio.run_process([sys.executable, "-c", code], stderr=subprocess.PIPE)
    nice, cpus, stack, space = json.loads(done.stdout)

    assert nice == 0
    assert cpus == len(os.sched_getaffinity(0))
    assert stack == 8 << 20
    assert space == resource.getrlimit(resource.RLIMIT_AS)[1]


async def test_a_deep_probe_runs_nothing_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    for name in ("json", "anyio", "unisandbox"):
        (tmp_path / f"{name}.py").write_text(f"open({str(trap)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    probe = await RuncBackend("crun").probe(deep=True)

    assert probe.available and probe.deep, probe.reason  # noqa: PT018
    assert not trap.exists()
    assert (await RuncBackend("crun").probe()).reason == probe.reason, "a success is remembered"


async def test_a_deep_probe_is_answered_in_a_program_that_has_many_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"no more than {hard} files can be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    fds = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while fds[-1] < 1024:  # beyond what select(2) can wait for
            fds.append(os.open("/dev/null", os.O_RDONLY))
        probe = await RuncBackend("crun").probe(deep=True)
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert probe.available and probe.deep, probe.reason  # noqa: PT018


async def test_programs_run_to_their_ends_on_a_host_without_a_memory_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detect = Cgroups.detect

    def without_memory(name: str, *, parent: str | None = None) -> Cgroups:
        layout = detect(name, parent=parent)._layout
        places = [
            attrs.evolve(place, controllers=tuple(c for c in place.controllers if c != "memory"))
            for place in layout.places
        ]
        used = tuple(place for place in places if place.controllers or place.mount.unified)
        return Cgroups(name, layout._replace(places=used, missing={"memory": "it is not there"}))

    monkeypatch.setattr(Cgroups, "detect", without_memory)
    async with Engine.open() as engine:
        with pytest.raises(UnavailableError, match="memory limit"):
            await engine.create(resources=Resources(memory="64M"))
        async with engine.create(resources=Resources.unlimited()) as sandbox:
            done = await sandbox.sh("sleep 60 >/dev/null 2>&1 & exit 3")
            assert (done.exit_code, done.exit.reason) == (3, "exited")
            assert (await sandbox.sh("kill -9 $$")).exit.reason == "signaled"
            async with sandbox.containers.add(argv=["true"]) as container:
                assert (await container.wait()).code == 0
            assert (await sandbox.metrics()).oom_kills is None, "not counted is not none"
            await sandbox.stop(grace=0)


async def _drained(engine: Engine, *, living: bool = False) -> int:
    """How many pipes of background processes the keeper has: all that it has heard of, or those still written to."""
    held = await engine._core.host.keeper.held()
    return sum("/drain/" in name and (number >= 0 or not living) for name, number in held.items())


async def test_what_runs_have_left_in_the_background_costs_the_keeper_nothing_any_more_when_it_has_ended() -> None:
    async with Engine.open() as engine, engine.create() as sandbox:

        async def all_ended() -> bool:
            return await _drained(engine, living=True) == 0

        await sandbox.sh("mkfifo /tmp/go")
        for _ in range(4):
            await sandbox.sh("(read word < /tmp/go) &")
            assert (await _drained(engine), await _drained(engine, living=True)) == (2, 2)
            await sandbox.sh("echo > /tmp/go")
            await until(all_ended, "nobody writes to the pipes of the run any more")


COLLECTING = """
import socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taking:
    taking.bind("/tmp/taking")
    print("up", flush=True)
    while True:
        taking.recvmsg(1, socket.CMSG_LEN(8))
"""
GIVING = """
import socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as giving:
    giving.connect("/tmp/taking")
    socket.send_fds(giving, [b"."], [1, 2])
"""


async def test_many_at_once_leave_no_more_pipes_to_the_keeper_than_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "_MOST_DRAINED", 6)
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["python3", "-c", COLLECTING]) as process, anyio.create_task_group() as group:
            await process.stdout.receive()
            for _ in range(8):
                group.start_soon(sandbox.run, ["python3", "-c", GIVING])
        assert await _drained(engine) == 6


async def test_a_program_that_keeps_the_pipes_of_others_does_not_use_up_the_keepers_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "_MOST_DRAINED", 6)
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["python3", "-c", COLLECTING]) as process:
            await process.stdout.receive()
            for runs in range(1, 6):
                assert (await sandbox.run(["python3", "-c", GIVING])).exit_code == 0
                assert await _drained(engine, living=True) == min(2 * runs, 6)

        async def there_is_room() -> bool:
            return await _drained(engine, living=True) < 6

        await until(there_is_room, "the pipes of who has been killed are closed")
        assert (await sandbox.sh("sleep 1000 &")).exit_code == 0
        assert await _drained(engine, living=True) == 2
