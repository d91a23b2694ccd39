"""A missing, broken, hanging or lying runtime is one clear typed error, and nothing of it is left behind.

The runtimes here are fakes: shell scripts that misbehave in one way each.
"""

# ruff: noqa: ASYNC240 - a test may block its own event loop

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from tests.keepers import keeper_at, until, wait_ended
from tests.oci_bundles import Lab, lab, process_json

from unisandbox import Engine, Resources, Sandbox
from unisandbox.api import short_name
from unisandbox.api.errors import BackendError, DeadlineExceededError, UnavailableError
from unisandbox.backends.runc import RuncBackend
from unisandbox.host.cgroups import hierarchy
from unisandbox.host.keeper import Spawned
from unisandbox.oci import features
from unisandbox.oci.features import Features, FifoKind, RuntimeProgram, find_runtimes, pick_runtime
from unisandbox.oci.runtime import Runtime

pytestmark = [pytest.mark.anyio, pytest.mark.root]


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def fake(path: Path, text: str, *, fifo: FifoKind = "write", sealed: bool = False) -> RuntimeProgram:
    """A fake crun whose create, exec ... do `text`; "$pidfile", "$log" and "$verb" are what it was given."""
    parse = """
    for each; do
        case "$before" in
            --pid-file) pidfile=$each;;
            --log) log=$each;;
        esac
        case "$each" in create|start|exec|state|kill|delete) verb=$each;; esac
        before=$each
    done
    """
    script(path, parse + text)
    able = Features(cgroup_disabled=True, preserve_fds=True, fifo=fifo, sealed=sealed)
    return RuntimeProgram("crun", str(path), (1, 8, 1), "1.8.1", "1.0.2", able, (0, 0, 0, 0))


def silent(place: Path) -> str:
    """A runtime that gives no answer."""
    text = f"echo $$ >{place}/pid.new; mv {place}/pid.new {place}/pid; sleep 87654"
    return str(script(place / "crun", text))


async def end_silent(place: Path) -> None:
    """Kill it from another task of the loop, before the time for an answer is over."""
    while not (place / "pid").exists():
        await anyio.sleep(0.005)
    os.killpg(int((place / "pid").read_text()), signal.SIGKILL)


async def crun() -> RuntimeProgram:
    for program in await find_runtimes():
        if program.name == "crun":
            return program
    pytest.skip("crun is not installed")


def alive(marker: str) -> list[str]:
    """Command lines with the marker."""
    found = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marker in line and int(pid) != os.getpid():
                found.append(line)
    return found


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab(fake(tmp_path / "fake", "exit 1"), tmp_path) as made:
        yield made


async def bundle_for(place: Lab, program: RuntimeProgram) -> tuple[Lab, str]:
    """A lab with another program, and a bundle without anything in it (a fake does not look)."""
    bundle = f"{place.work}/bundle"
    os.makedirs(place.seen(bundle), mode=0o700, exist_ok=True)
    place.write(bundle, {})
    runtime = Runtime(program=program, root=f"{place.work}/runtime", keeper=place.keeper)
    return attrs.evolve(place, runtime=runtime), bundle


# --- looking for one ---


async def test_no_runtime_at_all_says_what_was_looked_for_and_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        await pick_runtime(path=str(tmp_path))
    assert "no OCI runtime found (looked for crun, runc, youki" in str(caught.value)
    assert "apt install crun" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("echo crun version 1.8.1", 0o644, "Permission denied"),
        ("echo hello", 0o755, "not that of a known runtime: 'hello"),
        ("echo crun version unknown", 0o755, "not that of a known runtime"),
        ("echo runc version 1.1.5", 0o755, "says that it is runc"),
        ("exit 3", 0o755, "failed with code 3"),
        ("kill -SEGV $$", 0o755, "failed with signal 11"),
        ("head -c 1073741824 /dev/zero", 0o755, "more than 65536 bytes"),
        ("sleep 87654 & sleep 87655", 0o755, "gave no answer"),
    ],
    ids=["mode", "hello", "version", "name", "code", "signal", "gibibyte", "hangs"],
)
async def test_a_file_that_is_no_runtime_is_rejected_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, reason: str
) -> None:
    monkeypatch.setattr(features, "_QUERY_SECONDS", 0.3 if "sleep" in text else 5.0)
    path = script(tmp_path / "crun", text, mode)
    assert await find_runtimes(str(tmp_path)) == []
    with pytest.raises(UnavailableError) as caught:
        await pick_runtime(path=str(tmp_path))
    assert f"{path}: " in str(caught.value)
    assert reason in str(caught.value)
    until(lambda: not alive("8765"), "what was killed is gone")


async def test_one_that_does_not_answer_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    backends = {"runc": RuncBackend(silent(tmp_path))}
    async with Engine.open(backends=backends) as engine, anyio.create_task_group() as group:
        group.start_soon(end_silent, tmp_path)
        with pytest.raises(UnavailableError, match="failed with signal 9"):
            await engine.create(isolation="runc")


async def test_one_that_does_not_answer_holds_up_no_task_beside_a_recovery(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as engine:
        await engine.create(isolation="runc", name="kept")
    backends = {"runc": RuncBackend(silent(tmp_path))}
    async with anyio.create_task_group() as group:
        group.start_soon(end_silent, tmp_path)
        async with Engine.open(tmp_path / "state", policy="keep", backends=backends) as engine:
            [found] = engine.recovery.sandboxes
            assert (found.action, "failed with signal 9" in found.reason) == ("failed", True)
    async with Engine.open(tmp_path / "state") as engine:
        assert [found.action for found in engine.recovery.sandboxes] == ["adopted"]


async def test_who_gives_up_waiting_for_an_answer_leaves_nothing_of_the_question(tmp_path: Path) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(pick_runtime, silent(tmp_path))
        while not (tmp_path / "pid").exists():
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    until(lambda: not alive("8765"), "what was asked is gone")


async def test_a_directory_or_a_dangling_link_is_no_runtime(tmp_path: Path) -> None:
    (tmp_path / "crun").mkdir()
    (tmp_path / "runc").symlink_to("nowhere")
    assert await find_runtimes(str(tmp_path)) == []


async def test_a_broken_one_does_not_hide_a_good_one(tmp_path: Path) -> None:
    for name, text in (("first", "exit 1"), ("second", "echo crun version 9.9")):
        (tmp_path / name).mkdir()
        script(tmp_path / name / "crun", text)
    found = await find_runtimes(f"{tmp_path}/first:{tmp_path}/second")
    assert [program.path for program in found] == [f"{tmp_path}/second/crun"]


async def test_a_version_that_nobody_has_tested_is_not_trusted_with_private_interfaces(tmp_path: Path) -> None:
    script(tmp_path / "crun", "echo crun version 2.0; echo spec: 9.9.9; echo +SECCOMP")
    (found,) = await find_runtimes(str(tmp_path))
    assert found.version == (2, 0)
    assert found.features.fifo == ""
    assert not found.features.sealed
    assert not found.features.removable_state
    assert found.oci_version == "1.2.1"


async def test_the_current_directory_is_never_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "crun", "echo crun version 1.8.1")
    monkeypatch.chdir(tmp_path)
    assert await find_runtimes(f":.:{tmp_path.name}") == []


async def test_an_upgrade_is_noticed_and_an_unchanged_file_is_asked_once(tmp_path: Path) -> None:
    path = script(tmp_path / "crun", f"echo x >>{tmp_path}/asked; echo crun version 1.8.1")
    assert (await find_runtimes(str(tmp_path)))[0].version == (1, 8, 1)
    assert (await find_runtimes(str(tmp_path)))[0].version == (1, 8, 1)
    assert (tmp_path / "asked").read_text() == "x\n"
    path.write_text(path.read_text().replace("1.8.1", "1.21"))
    assert (await find_runtimes(str(tmp_path)))[0].version == (1, 21)


# --- calling one ---


async def test_a_runtime_that_fails_is_quoted(place: Lab, tmp_path: Path) -> None:
    text = """echo '{"msg":"the moon is full","level":"error","time":"now"}' >>$log; exit 7"""
    place, bundle = await bundle_for(place, fake(tmp_path / "r", text))
    with pytest.raises(BackendError, match="crun create of container 'c1' failed: the moon is full") as caught:
        await place.create("c1", bundle)
    assert caught.value.log == "the moon is full"
    assert place.left() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 7", "exit code 7"),
        ("kill -KILL $$", "signal SIGKILL"),
        ("head -c 300000 /dev/urandom >$log; exit 1", "create of container 'c1' failed"),
        (r"printf '\000\033[31m\377{}[]\n{\"msg\":{}}' >$log; exit 1", "create of container 'c1' failed"),
        ("yes '[' | head -c 200000 | tr -d '\\n' >$log; exit 1", "create of container 'c1' failed"),
        ("exit 0", "wrote no pid-file"),
        ("echo hello >$pidfile", "wrote no pid into its pid-file but b'hello"),
        ("echo -5 >$pidfile", "wrote no pid into its pid-file"),
        ("echo 1 >$pidfile", "wrote no pid into its pid-file"),
        (": >$pidfile", "wrote no pid into its pid-file"),
        ("head -c 100000 /dev/zero | tr '\\0' 7 >$pidfile", "wrote no pid into its pid-file"),
        ("echo 4000000 >$pidfile", "process 4000000 is not there, or not its process"),
        ("echo SELF >$pidfile", "process SELF is not there, or not its process"),
        ("mkdir $pidfile", "wrote no pid-file"),
    ],
)
async def test_garbage_from_a_runtime_is_one_clear_error(place: Lab, tmp_path: Path, text: str, message: str) -> None:
    text, message = (words.replace("SELF", str(os.getpid())) for words in (text, message))
    place, bundle = await bundle_for(place, fake(tmp_path / "r", text))
    with pytest.raises(BackendError) as caught:
        await place.create("c1", bundle)
    assert message in str(caught.value)
    assert "\033" not in str(caught.value)
    assert len(caught.value.log) <= 20000
    assert [name for name in place.left() if "mkdir" not in text] == []


async def test_a_hanging_runtime_is_killed_with_everything_that_it_started(place: Lab, tmp_path: Path) -> None:
    # One that ignores signals, one in a session of its own, one whose parent has ended.
    text = """
    echo '{"msg":"waiting for godot"}' >>$log
    (trap '' TERM INT HUP; sleep 86543) & setsid sleep 86544 & (sh -c 'sleep 86545 & exit' ) & sleep 86546"""
    place, bundle = await bundle_for(place, fake(tmp_path / "r", text))
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"did not end within 2 s .*waiting for godot"):
        await place.create("c1", bundle, timeout=2)
    assert time.monotonic() - began < 20
    with anyio.fail_after(20):
        while alive("8654"):
            await anyio.sleep(0.01)
    assert place.left() == []


async def test_a_cancelled_call_kills_the_runtime_at_once(place: Lab, tmp_path: Path) -> None:
    place, bundle = await bundle_for(place, fake(tmp_path / "r", "sleep 86543 & sleep 86543"))
    began = time.monotonic()
    with anyio.move_on_after(0.3) as scope:
        await place.create("c1", bundle)
    assert scope.cancelled_caught
    assert time.monotonic() - began < 20
    with anyio.fail_after(20):
        while alive("86543"):
            await anyio.sleep(0.01)
    assert place.left() == []


async def test_a_runtime_killed_while_it_writes_its_pid_file_leaves_none(place: Lab, tmp_path: Path) -> None:
    # As runc does: under another name, which it would change at the end.
    text = "echo $$ >${pidfile%/*}/.${pidfile##*/}; sleep 86543"
    place, bundle = await bundle_for(place, fake(tmp_path / "r", text))
    with pytest.raises(DeadlineExceededError):
        await place.create("c1", bundle, timeout=0.3)
    assert place.left() == []
    state = place.seen(f"{place.runtime.root}/state/c1")
    os.makedirs(state)
    with pytest.raises(DeadlineExceededError):
        await place.runtime.exec("c1", bundle, process_json(["x"]), stdio=(0, 1, 2), timeout=0.3)
    os.rmdir(state)
    until(lambda: not alive("86543"), "what was killed is gone")
    assert place.left() == []


async def test_every_verb_has_a_deadline(place: Lab, tmp_path: Path) -> None:
    place, bundle = await bundle_for(place, fake(tmp_path / "r", "sleep 86543"))
    state = place.seen(f"{place.runtime.root}/state/c1")
    os.makedirs(state)
    stdio = (0, 1, 2)
    for call in (
        lambda: place.runtime.start("c1", timeout=0.2),
        lambda: place.runtime.exec("c1", bundle, process_json(["x"]), stdio=stdio, timeout=0.2),
        lambda: place.runtime.kill("c1", 9, timeout=0.2),
        lambda: place.runtime.delete("c1", timeout=0.2),
        lambda: place.runtime.state("c1", timeout=0.2),
    ):
        with pytest.raises(DeadlineExceededError, match="container 'c1'"):
            await call()
    os.rmdir(state)
    until(lambda: not alive("86543"), "what was killed is gone")
    assert place.left() == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("head -c 1073741824 /dev/zero", DeadlineExceededError),
        ("head -c 1073741824 /dev/zero >&2; echo '{'", BackendError),
        ("echo hello", BackendError),
        ("echo '[]'", BackendError),
        ("echo '{\"id\": 5}'", BackendError),
        ("yes '[' | head -c 500000 | tr -d '\\n'", BackendError),
    ],
)
async def test_what_state_prints_is_bounded_and_checked(
    place: Lab, tmp_path: Path, text: str, error: type[Exception]
) -> None:
    place, _ = await bundle_for(place, fake(tmp_path / "r", text))
    state = place.seen(f"{place.runtime.root}/state/c1")
    os.makedirs(state)
    # What ends by itself has all the time that a busy machine takes.
    timeout = 3.0 if error is DeadlineExceededError else 60.0
    with pytest.raises(error, match="state of container 'c1'"):
        await place.runtime.state("c1", timeout=timeout)
    os.rmdir(state)
    assert place.left() == []


async def test_an_init_that_never_comes_to_its_fifo_is_a_deadline(place: Lab, tmp_path: Path) -> None:
    # A child of the keeper that does nothing but live.
    for kind in ("write", "read"):
        program = fake(tmp_path / kind, "sleep 86547 & echo $! >$pidfile", fifo=kind)
        place, bundle = await bundle_for(place, program)
        created = await place.create(f"c-{kind}", bundle)
        state = place.seen(f"{place.runtime.root}/state/c-{kind}")
        os.makedirs(state)
        os.mkfifo(f"{state}/exec.fifo")
        with anyio.fail_after(20), pytest.raises(DeadlineExceededError, match=r"not ready to start within 0\.2 s"):
            await place.runtime.start(f"c-{kind}", created=created, timeout=0.2)

        async with anyio.create_task_group() as group:
            # It dies while we wait.
            group.start_soon(_kill_soon, created.pidfd)
            with pytest.raises(BackendError, match="ended before it was started"):
                await place.runtime.start(f"c-{kind}", created=created, timeout=60)
        await place.exit_code(created)
        os.unlink(f"{state}/exec.fifo")
        os.rmdir(state)


async def _kill_soon(pidfd: int) -> None:
    await anyio.sleep(0.05)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def test_a_runtime_that_was_removed_is_unavailable(place: Lab, tmp_path: Path) -> None:
    for sealed in (False, True):
        place, bundle = await bundle_for(place, fake(tmp_path / "r", "exit 0", sealed=sealed))
        (tmp_path / "r").unlink()
        with pytest.raises(UnavailableError, match="No such file or directory"):
            await place.create("c1", bundle)
        assert place.left() == []


async def test_a_cgroup_that_is_gone_is_named(place: Lab, tmp_path: Path) -> None:
    place, bundle = await bundle_for(place, fake(tmp_path / "r", "exit 0"))
    with pytest.raises(BackendError, match=r"/no/such/cgroup\.procs"):
        await place.create("c1", bundle, cgroup_procs=["/no/such/cgroup.procs"])
    assert place.left() == []


async def test_a_full_disk_under_the_state_directory_is_said(place: Lab, tmp_path: Path) -> None:
    program = await crun()
    bundle = await place.bundle(["/bin/true"])
    full = f"{place.work}/full"
    os.mkdir(place.seen(full))
    ops = [{"op": "tmpfs", "path": "/", "size": 4096, "inodes": 20}]
    await place.keeper.job([{"do": "mounts", "root": full, "ops": ops}])
    Path(place.seen(full), "fill").write_bytes(bytes(4096))
    place = attrs.evolve(place, runtime=Runtime(program=program, root=f"{full}/runtime", keeper=place.keeper))

    with pytest.raises(BackendError, match=r"[Nn]o space left on device"):
        await place.create("c1", bundle)
    assert place.left() == []

    ops = [{"op": "tmpfs", "path": "/", "size": 4096, "inodes": 1}]
    await place.keeper.job([{"do": "mounts", "root": full, "ops": ops}])
    with pytest.raises(BackendError, match=r"cannot be used: No space left on device"):
        await place.create("c1", bundle)


async def test_a_state_directory_that_cannot_be_made_is_named(place: Lab, tmp_path: Path) -> None:
    Path(place.seen(place.work), "file").write_bytes(b"")
    place, bundle = await bundle_for(place, fake(tmp_path / "r", "exit 0"))
    place = attrs.evolve(place, runtime=attrs.evolve(place.runtime, root=f"{place.work}/file"))
    with pytest.raises(BackendError, match=f"its directory {place.work}/file cannot be used: Not a directory"):
        await place.create("c1", bundle)


async def test_a_keeper_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        spawn = keeper.spawn

        async def told(*args: Any, **options: Any) -> Spawned:
            spawned = await spawn(*args, **options)
            os.kill(keeper.pid, signal.SIGKILL)
            return spawned

        keeper.spawn = told  # type: ignore[method-assign]
        runtime = Runtime(fake(tmp_path / "r", "sleep 86548"), f"{tmp_path}/runtime", keeper)
        with anyio.fail_after(20), pytest.raises(UnavailableError, match="keeper"):
            await runtime.create("c1", str(tmp_path), stdio=(0, 1, 2))
    until(lambda: not alive("86548"), "what was killed is gone")
    os.rmdir(f"{tmp_path}/work")


async def test_a_keeper_that_dies_as_it_starts_a_runtime_takes_that_with_it(tmp_path: Path) -> None:
    """It may not have come to telling its pid to anybody."""
    async with keeper_at(tmp_path) as keeper:
        runtime = Runtime(fake(tmp_path / "r", "kill -9 $PPID; exec sleep 86549"), f"{tmp_path}/runtime", keeper)
        with anyio.fail_after(20), pytest.raises(UnavailableError, match="keeper"):
            await runtime.create("c1", str(tmp_path), stdio=(0, 1, 2))
    until(lambda: not alive("86549"), "what was started is gone")
    os.rmdir(f"{tmp_path}/work")


async def test_a_state_that_a_killed_runtime_left_half_written_can_be_deleted(place: Lab, tmp_path: Path) -> None:
    program = await crun()
    runtime = Runtime(program=program, root=f"{place.work}/runtime", keeper=place.keeper)
    for number, content in enumerate((None, "", "{", '{"pid": 1}', '{"pid": "x", "process-start-time": 3}', "[]")):
        state = place.seen(f"{runtime.root}/state/c{number}")
        os.makedirs(state)
        if content is not None:
            Path(state, "status").write_text(content)
        await runtime.delete(f"c{number}", force=True)
        assert not os.path.exists(state)
    assert place.left() == []


@pytest.mark.parametrize("who", ["the same engine", "the next engine", "the next engine, without a record"])
async def test_cgroups_that_runc_has_made_are_gone_after_a_keeper_that_was_killed(tmp_path: Path, who: str) -> None:
    """It makes them beside the sandbox's own, and its state, by which it would remove them, ends with the keeper."""
    if shutil.which("runc") is None:
        pytest.skip("runc is not here")
    backends = {"runc": RuncBackend("runc")}
    async with Engine.open(tmp_path, policy="keep", backends=backends) as engine:
        sandbox = await engine.create(resources=Resources(memory="64M"))
        await sandbox.run(["true"])
        keeper = engine._core.host.keeper
        left = cgroups_of_containers(keeper.pid, engine, sandbox)
        assert left
        os.kill(keeper.pid, signal.SIGKILL)
        wait_ended(keeper.pid)
        if who == "the same engine":
            await sandbox.remove()
    if "record" in who:
        [record] = (tmp_path / "sandboxes").iterdir()
        record.write_text("damaged")
    async with Engine.open(tmp_path, backends=backends):
        pass
    assert not any(map(os.path.exists, left))


def cgroups_of_containers(keeper: int, engine: Engine, sandbox: Sandbox) -> list[str]:
    """Those that runc makes: named as its container."""
    short = short_name(engine._core.host.engine_id, sandbox.id)
    return [path for above in hierarchy.directories_of(keeper) for path in hierarchy.below(above, f"{short}-")]
