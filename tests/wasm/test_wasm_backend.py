"""Wasm sandboxes by the public interface: what runs, what is refused, what ends, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import anyio
import pytest
from tests.wasm.sandboxes import EXIT_7, ITS_OWN, OPENS, engine, make_root, tree_of

from unisandbox import (
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    Resources,
    Rootfs,
    Sandbox,
    Security,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api import DEFAULT_CAPABILITIES, ContainerSpec, CreateTask, Dns, ExecTask, Exit, ProcessSpec, Stdio
from unisandbox.backends.wasm.threads import Threads
from unisandbox.host.latest import EXITS_KEPT

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root") / "r")


@pytest.fixture
async def sandbox(wasm: Engine, root: Path) -> AsyncIterator[Sandbox]:
    async with wasm.create(isolation="wasm", rootfs=root) as made:
        yield made


def test_looking_at_the_backend_imports_no_wasmtime() -> None:
    program = "import sys, unisandbox.backends.wasm as w; w.backend.capabilities; sys.exit('wasmtime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_auto_takes_it_for_nothing_that_it_cannot_run(cache: Path) -> None:
    async with engine(cache) as opened:
        with_host = await opened.explain(rootfs="host")
        assert with_host.backend != "wasm"


async def test_probe_says_what_runs_and_a_deep_one_has_run_it(wasm: Engine) -> None:
    (cheap,) = [probe for probe in await wasm.probe() if probe.backend == "wasm"]
    assert (cheap.available, cheap.deep) == (True, False)
    assert cheap.facts["wasmtime"].startswith("50.")
    (deep,) = [probe for probe in await wasm.probe(deep=True) if probe.backend == "wasm"]
    assert (deep.available, deep.deep) == (True, True)


async def test_a_text_module_runs_and_its_code_is_exact(sandbox: Sandbox) -> None:
    done = await sandbox.run(["seven.wat"])
    assert (done.exit.code, done.exit.reason, done.exit.signal) == (7, "exited", None)


async def test_words_environment_and_directory_arrive(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, env={"A": "1", "B": "2"}, cwd="/etc") as sandbox:
        assert (await sandbox.run(["echo", "a b", "", "ü"])).text == "a b  ü\n"
        assert (await sandbox.run(["env", "A"])).text.strip() == "1"
        assert (await sandbox.run(["env", "B"], env={"B": "3"})).text.strip() == "3"
        assert (await sandbox.run(["pwd"])).text == "/etc\n"
        assert (await sandbox.run(["pwd"], cwd="/bin")).text == "/bin\n"


async def test_input_and_both_outputs_are_streams(sandbox: Sandbox) -> None:
    assert (await sandbox.run(["cat"], input=b"x" * 300_000)).stdout == b"x" * 300_000
    async with sandbox.exec(["cat"], stdin="pipe") as process:
        for word in (b"one\n", b"two\n"):
            await process.stdin.send(word)
            assert await process.stdout.receive() == word
        await process.stdin.aclose()
        assert (await process.wait()).code == 0


async def test_a_guest_has_no_process_id(sandbox: Sandbox) -> None:
    async with sandbox.exec(["cat"], stdin="pipe") as process:
        with pytest.raises(UnsupportedError):
            _ = process.pid
        assert process.id in repr(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1])
async def test_a_signal_ends_a_guest_with_its_number(sandbox: Sandbox, number: signal.Signals) -> None:
    async with sandbox.exec(["sleep", "600"]) as process:
        await process.signal(number)
        end = await process.wait()
    assert (end.code, end.signal, end.reason) == (128 + number, number, "signaled")


async def test_signals_that_are_ignored_are_and_those_that_stop_are_refused(sandbox: Sandbox) -> None:
    async with sandbox.exec(["cat"], stdin="pipe") as process:
        for number in (signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT):
            await process.signal(number)
        with pytest.raises(UnsupportedError):
            await process.signal(signal.SIGSTOP)
        with pytest.raises(InvalidArgumentError):
            await process.signal(999)
        await process.stdin.send(b"still here\n")
        assert await process.stdout.receive() == b"still here\n"


async def test_a_trap_is_told_with_its_name(sandbox: Sandbox) -> None:
    end = (await sandbox.run(["abort"])).exit
    assert (end.reason, end.code) == ("trap", 134)
    assert "unreachable" in end.detail


async def test_memory_is_that_of_all_guests_together(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(memory="64M")) as sandbox:
        end = (await sandbox.run(["eat"])).exit
        assert (end.reason, end.oom_kills) == ("oom", 1)
        metrics = await sandbox.metrics()
        assert metrics.memory_limit_bytes == 64 << 20
        assert 32 << 20 < (metrics.memory_peak_bytes or 0) <= 64 << 20
        assert metrics.oom_kills == 1
        assert (metrics.memory_bytes, metrics.pids) == (0, 0)


async def test_processor_seconds_end_a_guest(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(cpu_seconds=0.2)) as sandbox:
        end = (await sandbox.run(["spin"], timeout=60)).exit
        assert end.reason == "cpu"
        assert 0.2 <= ((await sandbox.metrics()).cpu_seconds or 0) < 2


async def test_fuel_ends_a_guest(cache: Path, root: Path) -> None:
    async with engine(cache, fuel=100_000) as opened, opened.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["seven.wat"])).exit_code == 7
        assert (await sandbox.run(["spin"], timeout=60)).exit.reason == "fuel"


async def test_of_two_starts_of_one_process_one_is_refused(sandbox: Sandbox) -> None:
    await sandbox.files.write("/late.wat", EXIT_7)  # it has to be compiled: time for both
    assert sandbox._entry is not None
    task = sandbox._entry.task
    await task.create(CreateTask("c", container=ContainerSpec("c")))
    await task.start("c")
    await task.exec(ExecTask("c", "e", ProcessSpec(["late.wat"])))
    refused = []

    async def start() -> None:
        try:
            await task.start("c", "e")
        except FailedPreconditionError as error:
            refused.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        group.start_soon(start)
    assert len(refused) == 1
    assert (await task.wait("c", "e")).code == 7
    await task.delete("c")


async def test_the_end_of_a_process_is_not_that_of_one_of_its_id_in_an_earlier_container(sandbox: Sandbox) -> None:
    assert sandbox._entry is not None
    task = sandbox._entry.task
    for code in (3, 5):
        await task.create(CreateTask("c", container=ContainerSpec("c")))
        await task.start("c")
        await task.exec(ExecTask("c", "e", ProcessSpec(["exit", str(code)])))
        await task.start("c", "e")
        assert (await task.wait("c", "e")).code == code
        await task.delete("c")
        assert (await task.wait("c", "e")).code == code  # still known


async def test_of_processes_whose_container_is_gone_the_last_ends_are_known(sandbox: Sandbox) -> None:
    assert sandbox._entry is not None
    containers = sandbox._entry.task._containers  # type: ignore[attr-defined]
    for number in range(6000):
        containers.keep_exit(f"c{number}", "", Exit(code=7))
    known = [number for number in range(6000) if containers.exit_of_gone(f"c{number}", "") is not None]
    assert known == list(range(6000 - EXITS_KEPT, 6000))


async def test_a_start_that_has_failed_keeps_its_streams_and_can_be_repeated(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(threads: Threads, work: object) -> None:
        raise RuntimeError("can't start new thread")

    assert sandbox._entry is not None
    task = sandbox._entry.task
    await task.create(CreateTask("c", container=ContainerSpec("c")))
    await task.start("c")
    reader, writer = os.pipe()
    try:
        await task.exec(ExecTask("c", "e", ProcessSpec(["echo", "said"]), Stdio(None, writer, None)))
        with monkeypatch.context() as patch:
            patch.setattr(Threads, "run", no_thread)
            with pytest.raises(UnavailableError, match="thread"):
                await task.start("c", "e")
        await task.start("c", "e")
        assert (await task.wait("c", "e")).code == 0
        assert os.read(reader, 100) == b"said\n"
    finally:
        os.close(reader)
        os.close(writer)
        await task.delete("c")


async def test_no_more_guests_run_than_pids_allows(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(pids=1)) as sandbox:
        async with sandbox.exec(["cat"], stdin="pipe"):
            with pytest.raises(FailedPreconditionError):
                await sandbox.run(["true"])
        assert (await sandbox.run(["true"])).exit_code == 0


async def test_limits_can_be_changed_while_guests_run(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(memory="32M", cpu=4)) as sandbox:
        assert (await sandbox.run(["fit", str(48 << 20)])).exit.reason == "oom"
        await sandbox.update(Resources(memory="128M", cpu=2, pids=2))
        assert (await sandbox.run(["fit", str(48 << 20)])).exit_code == 0
        assert (await sandbox.metrics()).memory_limit_bytes == 128 << 20
        with pytest.raises(UnsupportedError):
            await sandbox.update(Resources(disk="1M"))
        async with sandbox.exec(["cat"], stdin="pipe") as process:
            await process.stdin.send(b"x")
            await process.stdout.receive()
            with pytest.raises(FailedPreconditionError):
                await sandbox.update(Resources(memory=4096))


async def test_stop_ends_guests_and_keeps_files(sandbox: Sandbox) -> None:
    await sandbox.run(["store", "/kept", "word"])
    process = await sandbox.exec(["sleep", "600"])
    await sandbox.stop(grace=5)
    assert (await process.wait()).signal == signal.SIGTERM
    assert await sandbox.files.read("/kept") == b"word"
    assert (await sandbox.status()).state == "stopped"
    await sandbox.start()
    assert (await sandbox.run(["cat", "/kept"])).text == "word"
    await process.aclose()


async def test_the_directory_is_never_changed(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "own")
    before = tree_of(root)
    async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
        await sandbox.run(["store", "/etc/motd", "mine"])
        await sandbox.run(["rm", "/seven.wat"])
        await sandbox.run(["mkdir", "/new"])
        assert (await sandbox.run(["cat", "/etc/motd"])).text == "mine"
        assert tree_of(root) == before
        async with wasm.create(isolation="wasm", rootfs=root) as other:
            assert (await other.run(["cat", "/etc/motd"])).text == "hello from below\n"
    assert tree_of(root) == before


async def test_a_readonly_root_can_be_written_in_tmp_run_and_home_alone(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=Rootfs.dir(root, readonly=True)) as sandbox:
        for place in ("/tmp", "/run", "/home"):
            assert (await sandbox.run(["store", f"{place}/x", "1"])).exit_code == 0
        for place in ("", "/etc", "/bin"):
            assert (await sandbox.run(["store", f"{place}/x", "1"])).exit_code != 0


async def test_mounts_are_as_the_spec_says(wasm: Engine, root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "f").write_text("given")
    (tmp_path / "file").write_text("one file")
    mounts = [
        Mount.bind(tmp_path / "data", "/ro"),
        Mount.bind(tmp_path / "data", "/deep/rw", readonly=False),
        Mount.bind(tmp_path / "file", "/etc/one"),
        Mount.tmpfs("/scratch", size="1M"),
        Mount("/hidden"),
    ]
    for rootfs in (Rootfs.dir(root), Rootfs.dir(root, readonly=True)):
        async with wasm.create(isolation="wasm", rootfs=rootfs, mounts=mounts) as sandbox:
            assert (await sandbox.run(["cat", "/ro/f", "/etc/one"])).text == "givenone file"
            assert (await sandbox.run(["store", "/ro/f", "x"])).exit_code != 0
            assert (await sandbox.run(["rm", "/ro/f"])).exit_code != 0
            assert (await sandbox.run(["mv", "/ro/f", "/deep/rw/g"])).exit_code != 0
            assert (await sandbox.run(["store", "/hidden/x", "x"])).exit_code != 0
            assert (await sandbox.run(["store", "/deep/rw/written", "by a guest"])).exit_code == 0
            assert (tmp_path / "data" / "written").read_text() == "by a guest"
            filled = await sandbox.run(["fill", "/scratch/x", str(4 << 20)])
            assert 0 < int(filled.text.split()[0]) <= 1 << 20


async def test_what_is_written_is_bounded_by_disk(wasm: Engine, root: Path) -> None:
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(disk="2M")) as sandbox:
        for place in ("/tmp/x", "/x", "/home/x"):
            filled = await sandbox.run(["fill", place, str(8 << 20), "remove"])
            assert 1 << 20 < int(filled.text.split()[0]) <= 2 << 20
        metrics = await sandbox.metrics()
        assert metrics.disk_limit_bytes == 2 << 20


async def test_a_disk_beyond_half_of_the_memory_is_on_disk(wasm: Engine, root: Path) -> None:
    limits = Resources(memory="16M", disk="48M")
    async with wasm.create(isolation="wasm", rootfs=root, resources=limits) as sandbox:
        filled = await sandbox.run(["fill", "/x", str(32 << 20)], timeout=60)
        assert int(filled.text.split()[0]) == 32 << 20
        assert (await sandbox.files.stat("/x")).size == 32 << 20


async def test_containers_share_the_sandbox_and_have_their_own(wasm: Engine, root: Path, tmp_path: Path) -> None:
    other = make_root(tmp_path / "other")
    (other / "etc" / "motd").write_text("another root\n")
    async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
        shared = await sandbox.containers.add(argv=["store", "/tmp/x", "from a container"], rootfs=None)
        assert (await shared.wait()).code == 0
        assert (await sandbox.run(["cat", "/tmp/x"])).text == "from a container"
        async with sandbox.containers.add(argv=["cat", "/etc/motd"], rootfs=other) as container:
            assert (await container.wait()).code == 0
            assert await container.logs() == b"another root\n"
        limited = Resources(memory="8M")
        async with sandbox.containers.add(argv=["eat"], rootfs=None, resources=limited) as container:
            assert (await container.wait()).reason == "oom"
        assert shared.name in {container.name for container in await sandbox.containers.list()}


async def test_files_work_with_nothing_running(sandbox: Sandbox) -> None:
    await sandbox.files.write("/tmp/x", "from outside")
    assert (await sandbox.run(["cat", "/tmp/x"])).text == "from outside"
    assert await sandbox.files.read("/etc/motd") == b"hello from below\n"


async def test_launch_runs_a_main_process(sandbox: Sandbox) -> None:
    container = await sandbox.launch(["sleep", "600"])
    assert (await sandbox.status()).containers[0].state == "running"
    assert (await sandbox.run(["true"])).exit_code == 0
    assert (await container.kill()).signal == signal.SIGKILL


REFUSED: Mapping[str, Mapping[str, object]] = {
    "rootfs 'host'": {"rootfs": "host"},
    "an image": {"rootfs": "busybox"},
    "network": {"network": "host"},
    "userns": {"userns": "host"},
    "share_pid": {"share_pid": True},
    "hostname": {"hostname": "h"},
    "sysctls": {"sysctls": {"net.ipv4.ip_forward": "1"}},
    "dns": {"dns": Dns(servers=("192.0.2.1",))},
    "hosts": {"hosts": {"a": "192.0.2.1"}},
    "user": {"user": "1000"},
    "ttl": {"ttl": 5.0},
    "annotations": {"annotations": {"a": "b"}},
    "capabilities": {"security": Security(capabilities=DEFAULT_CAPABILITIES | {"CAP_SYS_ADMIN"})},
    "new privileges": {"security": Security(no_new_privileges=False)},
    "swap": {"resources": Resources(swap=1 << 20)},
    "core": {"resources": Resources(core=1 << 20)},
    "ids of a mount": {"mounts": [Mount.bind("/usr", "/u", idmap=False)]},
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_wasm_cannot_give_is_refused_before_anything_is_done(wasm: Engine, root: Path, what: str) -> None:
    with pytest.raises(UnsupportedError):
        await wasm.create(**({"isolation": "wasm", "rootfs": root} | dict(REFUSED[what])))  # type: ignore[arg-type]
    assert await wasm.list() == []


@pytest.mark.parametrize(
    "options",
    [
        {"security": Security(seccomp="unconfined")},
        {"security": Security(capabilities=frozenset())},
        {"user": 0},
        {"resources": Resources.unlimited()},
    ],
    ids=["unconfined", "no capabilities", "root", "unlimited"],
)
async def test_what_asks_for_less_is_taken(wasm: Engine, root: Path, options: Mapping[str, object]) -> None:
    async with wasm.create(**({"isolation": "wasm", "rootfs": root} | dict(options))) as sandbox:  # type: ignore[arg-type]
        assert (await sandbox.run(["true"])).exit_code == 0


async def test_no_terminal_no_pause_no_other_user(sandbox: Sandbox) -> None:
    with pytest.raises(UnsupportedError):
        await sandbox.exec(["cat"], tty=True)
    with pytest.raises(UnsupportedError):
        await sandbox.run(["cat"], user="nobody")
    with pytest.raises(UnsupportedError):
        await sandbox.pause()


async def test_policy_keep_is_refused(tmp_path: Path, root: Path) -> None:
    async with Engine.open(tmp_path / "state", policy="keep") as opened:
        with pytest.raises(UnsupportedError):
            await opened.create(isolation="wasm", rootfs=root)


async def test_many_come_and_go_and_nothing_is_left(wasm: Engine, root: Path, count: Callable[[int], int]) -> None:
    for _ in range(count(200)):
        async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
            assert (await sandbox.run(["exit", "3"])).exit_code == 3
    # What is left would be found after this test, descriptors and mounts too.


@pytest.mark.parametrize(("nofile", "most"), [(5, 5), (16, 16), (4096, 256), (None, 256)])
async def test_open_files_are_limited(wasm: Engine, root: Path, nofile: int | None, most: int) -> None:
    (root / "opens.wat").write_text(OPENS)
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(nofile=nofile)) as sandbox:
        assert (await sandbox.run(["opens.wat"])).exit_code == most - ITS_OWN


async def test_a_container_opens_no_more_files_than_its_sandbox(wasm: Engine, root: Path) -> None:
    (root / "opens.wat").write_text(OPENS)
    async with wasm.create(isolation="wasm", rootfs=root, resources=Resources(nofile=20)) as sandbox:
        for nofile, most in ((10, 10), (100, 20)):
            limits = Resources(nofile=nofile, disk=0)
            container = await sandbox.containers.add(
                argv=["opens.wat"], name=f"c{nofile}", rootfs=None, resources=limits
            )
            assert (await container.wait()).code == most - ITS_OWN
