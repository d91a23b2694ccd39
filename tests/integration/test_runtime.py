"""The driver keeps its promises with every real runtime that is installed."""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from tests.keepers import until
from tests.oci_bundles import FIRST_ID, Lab, lab, process_json

from unisandbox.api.errors import (
    AlreadyExistsError,
    BackendError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from unisandbox.host.cgroups import Cgroups, DeviceRule, Limits
from unisandbox.host.namespaces import namespace_inode, process_namespaces
from unisandbox.oci.features import find_runtimes, pick_runtime
from unisandbox.oci.runtime import Runtime

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture(params=["crun", "runc", "youki"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Lab]:
    found = [program for program in await find_runtimes() if program.name == request.param]
    if not found:
        pytest.skip(f"{request.param} is not installed")
    async with lab(found[0], tmp_path) as made:
        yield made


@pytest.mark.parametrize("userns", [False, True], ids=["root", "userns"])
async def test_a_container_lives_from_create_to_delete_with_an_exact_exit(place: Lab, userns: bool) -> None:
    bundle = await place.bundle(["/bin/sh", "-c", "exit 42"], userns=userns)

    created = await place.create("c1", bundle)
    state = await place.runtime.state("c1")
    assert state is not None
    assert (state.container_id, state.status, state.pid, state.bundle) == ("c1", "created", created.pid, bundle)
    await place.runtime.start("c1", created=created)
    assert await place.exit_code(created) == 42
    stopped = await place.runtime.state("c1")
    assert stopped is not None
    assert stopped.status == "stopped"
    await place.runtime.delete("c1")

    assert await place.runtime.state("c1") is None
    assert place.left() == []


async def test_namespaces_are_the_held_ones(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"], userns=True)
    created = await place.create("c1", bundle)

    has = process_namespaces(created.pid)
    held = await place.keeper.held(os.path.basename(bundle))
    for name, number in held.items():
        assert has[name.rpartition("/")[2]] == namespace_inode(f"/proc/{place.keeper.pid}/fd/{number}")
    assert Path(f"/proc/{created.pid}/uid_map").read_text().split() == ["0", str(FIRST_ID), "65536"]

    signal.pidfd_send_signal(created.pidfd, signal.SIGKILL)
    assert await place.exit_code(created) == -signal.SIGKILL
    await place.runtime.delete("c1")
    assert place.left() == []


async def test_stdio_and_extra_descriptors_are_passed_as_they_are_and_no_others(place: Lab) -> None:
    script = "for n in /proc/self/fd/*; do echo ${n##*/}; done; read line <&0; echo got $line >&4; echo error >&2"
    bundle = await place.bundle(["/bin/sh", "-c", script])
    pairs = [os.pipe() for _ in range(5)]
    own = os.open("/dev/zero", os.O_RDONLY)  # must not arrive
    os.write(pairs[0][1], b"hello\n")
    given = (pairs[0][0], pairs[1][1], pairs[2][1])
    try:
        created = await place.create("c1", bundle, stdio=given, extra_fds=(pairs[3][0], pairs[4][1]))
        await place.runtime.start("c1", created=created)
        assert await place.exit_code(created) == 0
        # The pattern itself makes the shell open the directory: the one number above those that were passed.
        shown = os.read(pairs[1][0], 4096).split()
        assert shown[:5] == [b"0", b"1", b"2", b"3", b"4"]
        assert len(shown) <= 6
        assert os.read(pairs[4][0], 100) == b"got hello\n"
        assert os.read(pairs[2][0], 100) == b"error\n"
    finally:
        for fd in (own, *(fd for pair in pairs for fd in pair)):
            os.close(fd)
    await place.runtime.delete("c1")


async def test_the_container_is_in_the_given_cgroup_before_it_starts(place: Lab) -> None:
    cgroups = Cgroups.detect(f"unisandbox-test-{uuid.uuid4().hex[:8]}")
    above = cgroups.root()
    ours = above.child("c1", limits=Limits(memory=64 << 20, pids=20))
    ours.allow_devices([DeviceRule("c", major, None, "rwm") for major in (1, 5)])  # crun makes the usual ones
    try:
        bundle = await place.bundle(["/bin/sleep", "60"])
        created = await place.create("c1", bundle, cgroup_procs=ours.entry)
        left_by_runtime = [path for path in place.runtime.own_cgroups("c1") if os.path.isdir(path)]

        assert ours.pids() == (created.pid,)
        for path in left_by_runtime:
            # runc's own: empty where we have one, or else harmless
            assert "memory" not in path or not Path(path, "cgroup.procs").read_text()
        assert ours.limits().pids == 20
        await place.runtime.start("c1", created=created)

        done = await place.runtime.exec(
            "c1",
            bundle,
            process_json(["/bin/sleep", "61"]),
            stdio=(0, 1, 2),
            cgroup_procs=ours.entry,
        )
        assert set(ours.pids()) == {created.pid, done.pid}

        ours.kill()
        assert await place.exit_code(created) == -signal.SIGKILL
        assert await place.exit_code(done) == -signal.SIGKILL
        await place.runtime.delete("c1")
        assert ours.exists()
        assert [path for path in left_by_runtime if os.path.isdir(path)] == []
    finally:
        assert ours.remove(20.0)
        assert above.remove(20.0)


async def test_exec_gives_exact_exits_and_output(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"], userns=True)
    created = await place.create("c1", bundle)
    await place.runtime.start("c1", created=created)
    reading, writing = os.pipe()
    try:
        for code in (0, 3, 127, 255):
            done = await place.runtime.exec(
                "c1",
                bundle,
                process_json(["/bin/sh", "-c", f"id -u; exit {code}"]),
                stdio=(0, writing, 2),
            )
            assert await place.exit_code(done) == code
            assert os.read(reading, 100) == b"0\n"
        killed = await place.runtime.exec("c1", bundle, process_json(["/bin/sleep", "60"]), stdio=(0, 1, 2))
        signal.pidfd_send_signal(killed.pidfd, signal.SIGTERM)
        assert await place.exit_code(killed) == -signal.SIGTERM
    finally:
        os.close(reading)
        os.close(writing)
    await place.runtime.kill("c1", signal.SIGKILL)
    await place.exit_code(created)
    await place.runtime.kill("c1", signal.SIGKILL)  # again: no error
    await place.runtime.delete("c1")
    assert place.left() == []


async def test_an_execed_process_that_ends_at_once_is_never_lost(place: Lab, count: Callable[[int], int]) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"])
    created = await place.create("c1", bundle)
    await place.runtime.start("c1", created=created)
    for number in range(count(100)):
        done = await place.runtime.exec(
            "c1", bundle, process_json(["/bin/sh", "-c", f"exit {number % 256}"]), stdio=(0, 1, 2)
        )
        assert await place.exit_code(done) == number % 256
    signal.pidfd_send_signal(created.pidfd, signal.SIGKILL)
    await place.exit_code(created)
    await place.runtime.delete("c1")


@pytest.mark.parametrize(
    ("program", "cwd", "code"),
    [
        ("/no/such/program", "/", 127),
        ("no-such-program", "/", 127),
        ("/tmp/not-executable", "/", 126),
        ("/usr", "/", 126),
        ("/bin/true", "/no/such/directory", 126),
    ],
)
async def test_a_program_that_cannot_be_execed_is_an_invalid_argument(
    place: Lab, program: str, cwd: str, code: int
) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"])
    created = await place.create("c1", bundle)
    await place.runtime.start("c1", created=created)

    with pytest.raises(InvalidArgumentError) as caught:
        await place.runtime.exec("c1", bundle, process_json([program], cwd), stdio=(0, 1, 2), exec_id="e1")
    assert caught.value.exit_code == code
    assert "e1" in str(caught.value)

    signal.pidfd_send_signal(created.pidfd, signal.SIGKILL)
    await place.exit_code(created)
    await place.runtime.delete("c1")
    assert place.left() == []


async def test_a_created_container_whose_init_is_dead_cannot_be_started(place: Lab) -> None:
    bundle = await place.bundle(["/bin/true"])
    created = await place.create("c1", bundle)
    signal.pidfd_send_signal(created.pidfd, signal.SIGKILL)
    await place.keeper.wait_exit(created.pid, created.start_time)

    with anyio.fail_after(20), pytest.raises(BackendError, match="'c1' ended before it was started"):
        await place.runtime.start("c1", created=created)

    os.close(created.pidfd)
    await place.runtime.delete("c1")
    assert place.left() == []


async def test_start_twice_is_a_failed_precondition(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"])
    created = await place.create("c1", bundle)
    await place.runtime.start("c1", created=created)
    with pytest.raises(FailedPreconditionError):
        await place.runtime.start("c1", created=created)
    with pytest.raises(FailedPreconditionError, match="c1"):
        await place.runtime.delete("c1")
    await place.runtime.delete("c1", force=True)
    assert await place.exit_code(created) == -signal.SIGKILL
    assert place.left() == []


async def test_the_command_starts_where_there_is_no_fast_way(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sh", "-c", "exit 5"])
    created = await place.create("c1", bundle)
    await place.runtime.start("c1")
    assert await place.exit_code(created) == 5
    await place.runtime.delete("c1")
    assert place.left() == []


async def test_hooks_run_although_there_are_fast_ways(place: Lab, tmp_path: Path) -> None:
    log = tmp_path / "hooks"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >/dev/null; echo $0 >>{log}"]}
    hooks = {kind: [{**hook, "args": [*hook["args"], kind]}] for kind in ("poststart", "poststop")}
    bundle = await place.bundle(["/bin/true"], hooks=hooks)
    created = await place.create("c1", bundle)
    await place.runtime.start("c1", created=created)
    await place.exit_code(created)
    await place.runtime.delete("c1")
    assert log.read_text().split() == ["poststart", "poststop"]


async def test_ids_and_unknown_containers(place: Lab) -> None:
    bundle = await place.bundle(["/bin/true"])
    created = await place.create("c1", bundle)
    with pytest.raises(AlreadyExistsError, match="c1"):
        await place.create("c1", bundle)
    await place.runtime.delete("c1", force=True)
    await place.exit_code(created)

    await place.runtime.delete("c1")
    await place.runtime.delete("c1", force=True)
    with pytest.raises(NotFoundError):
        await place.runtime.start("c1")
    with pytest.raises(NotFoundError):
        await place.runtime.kill("c1", 9)
    with pytest.raises(NotFoundError):
        await place.runtime.exec("c1", bundle, process_json(["/bin/true"]), stdio=(0, 1, 2))
    for bad in ("", "../x", "a/b", "-x", "x" * 77, "a b"):
        with pytest.raises(InvalidArgumentError):
            await place.runtime.delete(bad)
    assert place.left() == []


async def test_a_failed_create_says_why_and_leaves_nothing(place: Lab) -> None:
    bundle = await place.bundle(["/bin/true"])
    config = json.loads(Path(place.seen(bundle), "config.json").read_text())
    broken = {**config, "root": {"path": "/no/such/root"}}
    place.write(bundle, broken)
    # youki names the bundle only, and crun 1.28 nothing
    others = {"youki": re.escape(bundle), "crun": "/no/such/root|readlink ``: No such file or directory"}
    named = others.get(place.runtime.program.name, "/no/such/root")
    with pytest.raises(BackendError, match=named):
        await place.create("c1", bundle)
    assert place.left() == []

    place.write(bundle, {**config, "process": process_json(["/no/such/program"])})
    # runc looks for the program at create, crun too; a runtime that looks at start only would end its init there
    with pytest.raises(InvalidArgumentError) as caught:
        await place.create("c1", bundle)
    assert caught.value.exit_code == 127
    assert place.left() == []


async def test_cancelled_at_any_moment_create_leaves_nothing(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"], userns=True)
    whole = 0.004 if place.runtime.program.name == "crun" else 0.03
    for part in range(8):
        with anyio.move_on_after(whole * part / 7) as scope:
            created = await place.create(f"c{part}", bundle)
        if not scope.cancelled_caught:
            await place.runtime.delete(f"c{part}", force=True)
            await place.exit_code(created)
        assert place.left() == []


async def test_a_deadline_ends_a_create(place: Lab) -> None:
    bundle = await place.bundle(["/bin/sleep", "60"])
    hook = {"path": "/bin/sleep", "args": ["sleep", "60"]}
    config = json.loads(Path(place.seen(bundle), "config.json").read_text())
    place.write(bundle, {**config, "hooks": {"createRuntime": [hook], "prestart": [hook]}})
    with anyio.fail_after(10), pytest.raises(DeadlineExceededError, match=r"create of container 'c1' .* 0\.5 s"):
        await place.create("c1", bundle, timeout=0.5)
    assert place.left() == []


async def test_two_hundred_containers_leave_no_descriptor_in_anyone(place: Lab, count: Callable[[int], int]) -> None:
    async def life(name: str, bundle: str) -> None:
        created = await place.create(name, bundle)
        await place.runtime.start(name, created=created)
        assert await place.exit_code(created) == 0
        await place.runtime.delete(name)

    bundle = await place.bundle(["/bin/true"], userns=True)
    await life("first", bundle)

    def open_now() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), place.keeper.pid)]

    before = open_now()
    for number in range(count(50)):
        async with anyio.create_task_group() as group:
            for other in range(4):
                group.start_soon(life, f"c{number}x{other}", bundle)
    # The keeper may be about to close one of the last call's; and may have been so before.
    until(lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)), "all are closed")
    assert place.left() == []


async def test_a_second_driver_shares_the_sealed_copy(place: Lab) -> None:
    bundle = await place.bundle(["/bin/true"])
    for name in ("c1", "c2"):
        runtime = Runtime(program=place.runtime.program, root=place.runtime.root, keeper=place.keeper)
        created = await Lab(runtime, place.keeper, place.work).create(name, bundle)
        await runtime.start(name, created=created)
        assert await place.exit_code(created) == 0
        await runtime.delete(name)
    held = await place.keeper.held("engine/runtime/")
    assert len(held) == (1 if place.runtime.program.features.sealed else 0)
    assert all(os.readlink(f"/proc/{place.keeper.pid}/fd/{n}").startswith("/memfd:") for n in held.values())


async def test_what_is_found_is_what_runs() -> None:
    programs = await find_runtimes()
    assert programs
    assert await pick_runtime() == programs[0]
    assert await pick_runtime(programs[-1].path) == programs[-1]
    for program in programs:
        assert os.path.isabs(program.path)
        assert program.version > (0,)
        assert program.oci_version.startswith("1.")
