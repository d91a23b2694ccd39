"""The SDK beyond the contract of every backend: openings, the default engine, messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

from unisandbox import (
    AlreadyExistsError,
    Engine,
    FailedPreconditionError,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Resources,
    Rootfs,
    Sandbox,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def test_the_surface_as_written(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine:
        sandbox = await engine.create(rootfs="host", name="w")
        assert (await engine.get("w")).id == sandbox.id
        done = await sandbox.run(
            ["python3", "-c", "print(6*7)"], input=None, cwd=None, env={}, user=None, timeout=30, check=False
        )
        assert (done.exit_code, done.stdout, done.stderr, done.text) == (0, b"42\n", b"", "42\n")
        assert (await sandbox.sh("echo a | wc -c")).text.strip() == "2"
        async with sandbox.exec(["cat"], stdin="pipe", tty=False) as process:
            await process.stdin.send(b"x")
            await process.stdin.aclose()
            assert [output.data async for output in process] == [b"x"]
        await sandbox.files.write("/tmp/a.txt", b"hi")
        assert await sandbox.files.read("/tmp/a.txt") == b"hi"
        container = await sandbox.containers.add(rootfs="host", argv=["sleep", "0.1"])
        assert (await container.wait()).code == 0
        await sandbox.stop(grace=5)
        await sandbox.remove()


async def test_input_that_is_no_text_is_refused(engine: Engine) -> None:
    async with engine.create(isolation="runc") as sandbox:
        for wrong in ("\ud800", 5):
            with pytest.raises(InvalidArgumentError, match="input"):
                await sandbox.run(["cat"], input=wrong)  # type: ignore[arg-type]


async def test_what_is_of_the_wrong_type_is_refused_as_such(engine: Engine, tmp_path: Path) -> None:
    wrong: Any
    async with engine.create(isolation="runc") as sandbox:
        files = sandbox.files
        for wrong in (Path("/tmp/a"), b"/tmp/a", 3, None):
            for call in (
                files.read,
                lambda path: files.write(path, b""),
                files.list,
                files.stat,
                files.exists,
                files.mkdir,
                files.remove,
                lambda path: files.rename(path, "/tmp/b"),
                lambda path: files.upload("/etc/passwd", path),
                lambda path: files.download(path, tmp_path / "x"),
            ):
                with pytest.raises(InvalidArgumentError, match="path"):
                    await call(wrong)
        for wrong in (5, b"/etc/passwd", None):
            with pytest.raises(InvalidArgumentError, match="path"):
                await files.upload(wrong, "/tmp/u")
            with pytest.raises(InvalidArgumentError, match="path"):
                await files.download("/etc/passwd", wrong)
        for wrong in (5, None, ["a"]):
            with pytest.raises(InvalidArgumentError, match="content"):
                await files.write("/tmp/a", wrong)
        for wrong in ("644", True, 1.5):
            with pytest.raises(InvalidArgumentError, match="mode"):
                await files.write("/tmp/a", b"", mode=wrong)
        for wrong in (None, "1", True):
            with pytest.raises(InvalidArgumentError, match="limit"):
                await files.read("/etc/passwd", limit=wrong)
        assert await files.list("/tmp") == []

        container = await sandbox.containers.add(argv=["sleep", "1000"])
        async with sandbox.exec(["cat"], stdin="pipe") as process:
            for wrong in ("TERM", None, 1.5, True):
                with pytest.raises(InvalidArgumentError, match="signal"):
                    await process.signal(wrong)
                with pytest.raises(InvalidArgumentError, match="signal"):
                    await container.signal(wrong)
            for wrong in ("text", None, 5):
                with pytest.raises(InvalidArgumentError, match="bytes"):
                    await process.stdin.send(wrong)
            await process.stdin.send(b"there")
            for wrong in (0, -1, None, "1", True):
                with pytest.raises(InvalidArgumentError, match="max_bytes"):
                    await process.stdout.receive(wrong)
            assert await process.stdout.receive() == b"there"

        for wrong in ("1", True, 10**400, float("nan")):
            with pytest.raises(InvalidArgumentError, match="timeout must be > 0 seconds"):
                await sandbox.run(["true"], timeout=wrong)
            with pytest.raises(InvalidArgumentError, match="grace must be >= 0 seconds"):
                await sandbox.stop(grace=wrong)
        for wrong in (None, True, [], "no"):
            with pytest.raises(InvalidArgumentError, match="stdin must be 'pipe' or 'null'"):
                await sandbox.exec(["true"], stdin=wrong)
        for wrong in ("", 5, []):
            with pytest.raises(InvalidArgumentError, match="name"):
                await sandbox.containers.add(argv=["true"], name=wrong)
        for wrong in ("", 0, []):
            with pytest.raises(InvalidArgumentError, match="env"):
                await sandbox.containers.add(argv=["true"], env=wrong)
        assert {status.name for status in await sandbox.containers.list()} == {"main", container.name}

    for wrong in ([], None, "no"):
        with pytest.raises(InvalidArgumentError, match="policy must be 'stop' or 'keep'"):
            await Engine.open(policy=wrong)
        with pytest.raises(InvalidArgumentError, match="on_recover must be 'adopt', 'stop' or 'report'"):
            await Engine.open(on_recover=wrong)
    for wrong in (5, b"/tmp/state", True):
        with pytest.raises(InvalidArgumentError, match="directory"):
            Engine.open(wrong)
        with pytest.raises(InvalidArgumentError, match="directory"):
            Engine.attach(wrong)
    with pytest.raises(InvalidArgumentError, match="backends"):
        Engine.open(backends=5)  # type: ignore[arg-type]
    for wrong in ("x", None, -1, True):
        with pytest.raises(InvalidArgumentError, match="after"):
            engine.events(wrong)
    with pytest.raises(TypeError, match="no option 'foo'; there are rootfs, "):
        Sandbox.create(foo=1)  # type: ignore[call-arg]


async def test_a_memory_limit_that_nothing_could_be_made_in_is_refused_at_once(engine: Engine) -> None:
    for memory in (1, 4096, "1023K"):
        with pytest.raises(InvalidArgumentError, match="memory must be at least 1048576 bytes"):
            await engine.create(isolation="runc", resources=Resources(memory=memory))
    async with engine.create(isolation="runc") as sandbox:
        with pytest.raises(InvalidArgumentError, match="memory must be at least"):
            await sandbox.update(Resources(memory=1))
        with pytest.raises(InvalidArgumentError, match="memory must be at least"):
            await sandbox.containers.add(argv=["true"], resources=Resources(memory=1))


async def test_a_memory_limit_below_what_is_in_use_is_refused_and_says_how_much_that_is(engine: Engine) -> None:
    async with engine.create(isolation="runc", name="w", resources=Resources(memory="128M")) as sandbox:
        eats = "x = b'x' * (48 << 20); print('full', flush=True); input()"
        async with sandbox.exec(["python3", "-c", eats], stdin="pipe") as process:
            assert await process.stdout.receive() == b"full\n"
            with pytest.raises(FailedPreconditionError, match=r"'w' stay as they are.*\b\d+ bytes are in use"):
                await sandbox.update(Resources(memory="20M"))
            assert (await sandbox.metrics()).memory_limit_bytes == 128 << 20


async def test_an_opening_opens_once(engine: Engine) -> None:
    opening = engine.create(isolation="runc")
    async with opening:
        with pytest.raises(RuntimeError, match="once"):
            await opening


async def test_the_default_engine_is_shared_in_a_loop_and_gone_with_it() -> None:
    async with Sandbox.create(name="one") as one, Sandbox.create(name="two") as two:
        assert one.id != two.id
        with pytest.raises(AlreadyExistsError):
            await Sandbox.create(name="one")


async def test_a_state_directory_has_one_engine(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state"):
        with pytest.raises(FailedPreconditionError, match=re.escape(str(tmp_path))):
            await Engine.open(tmp_path / "state")
    async with Engine.open(tmp_path / "state") as again:
        assert await again.list() == []


async def test_an_engine_leaves_its_state_directory_tidy(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "state") as engine, engine.create(isolation="runc") as sandbox:
        await sandbox.run(["true"])
        assert list((tmp_path / "state" / "sandboxes").iterdir())
    assert not list((tmp_path / "state" / "sandboxes").iterdir())
    assert not list((tmp_path / "state").glob("layer-*"))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"isolation": "nope"}, InvalidArgumentError, "Installed backends: .*runc"),
        ({"rootfs": "debian:12"}, UnsupportedError, "image"),
        ({"rootfs": "/no/such/dir"}, InvalidArgumentError, "/no/such/dir"),
        ({"rootfs": "/etc/passwd"}, InvalidArgumentError, "/etc/passwd"),
        ({"mounts": [Mount.bind("/no/such", "/mnt/x")]}, InvalidArgumentError, "/no/such"),
        ({"network": "/no/such"}, InvalidArgumentError, "/no/such"),
        ({"network": "/etc/passwd"}, InvalidArgumentError, "no network namespace"),
        ({"sysctls": {"kernel.core_pattern": "|/x"}}, InvalidArgumentError, "would change the host"),
        ({"sysctls": {"net.ipv4.ip_forward": "1"}, "network": "host"}, UnsupportedError, "not the sandbox's own"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_had_is_refused_with_the_reason(
    engine: Engine, options: dict[str, object], error: type[SandboxError], says: str
) -> None:
    with pytest.raises(error, match=says):
        await engine.create(**options)  # type: ignore[arg-type]
    assert await engine.list() == []


async def test_settings_names_and_addresses_are_as_asked(engine: Engine) -> None:
    from unisandbox import Dns

    async with engine.create(
        hostname="web",
        sysctls={"net.ipv4.ip_forward": "1", "kernel.shmmax": "65536"},
        hosts={"db": "10.0.0.5"},
        dns=Dns(servers=("10.0.0.1",), search=("example.org",)),
    ) as sandbox:
        done = await sandbox.sh(
            "hostname; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax; cat /etc/hosts /etc/resolv.conf"
        )
    words = done.text.split("\n")
    assert words[:3] == ["web", "1", "65536"]
    assert "10.0.0.5 db" in words
    assert "nameserver 10.0.0.1" in words
    assert "search example.org" in words


async def test_a_directory_as_root_runs_programs_with_a_layer_on_top(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    for name in ("bin", "lib", "lib64"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    for readonly in (False, True):
        rootfs = Rootfs.dir(tmp_path, readonly=readonly)
        async with engine.create(rootfs=rootfs, mounts=[Mount.bind("/usr", "/usr")]) as sandbox:
            done = await sandbox.sh("id -u; echo x > /tmp/x && cat /tmp/x; mkdir /new && echo made")
            assert done.text.split() == (["0", "x"] if readonly else ["0", "x", "made"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "lib", "lib64", "usr"]  # noqa: ASYNC240


async def test_a_huge_file_of_users_holds_up_no_start(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "etc").mkdir()
    for name in ("bin", "lib", "lib64"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    with (tmp_path / "etc" / "passwd").open("wb") as users:
        users.truncate(10 << 30)
    async with engine.create(rootfs=tmp_path, mounts=[Mount.bind("/usr", "/usr")], isolation="runc") as sandbox:
        with anyio.fail_after(20):
            assert (await sandbox.run(["echo", "here"])).text == "here\n"


async def test_mounts_are_there_in_time_and_as_asked(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host")
    script = (
        "cat /tmp/one-file; echo; stat -c %u /data/file; touch /mnt/ro/x 2>/dev/null || echo held;"
        " echo new > /data/new;"
        " head -c 4M /dev/zero > /cache/x 2>/dev/null || stat -c %s /cache/x"
    )
    mounts = [
        Mount.bind(tmp_path, "/mnt/ro"),
        Mount.bind(tmp_path, "/data", readonly=False),
        Mount.bind(tmp_path / "file", "/tmp/one-file"),
        Mount.tmpfs("/cache", size="1M"),
    ]
    async with engine.create(mounts=mounts) as sandbox:
        assert await sandbox.files.read("/mnt/ro/file") == b"of the host"
        done = await sandbox.sh(script)
        assert done.text.split("\n")[:4] == ["of the host", "0", "held", str(1 << 20)]
    assert (tmp_path / "new").read_text() == "new\n"
    assert (tmp_path / "new").stat().st_uid == 0


async def test_a_mount_in_another_mount_has_its_place_there_or_that_is_said(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "file").write_text("inner")
    outer = Mount.bind(tmp_path / "outer", "/work", readonly=False)
    for inner in (Mount.tmpfs("/work/modules"), Mount.bind(tmp_path, "/work/modules")):
        (tmp_path / "outer" / "modules").mkdir()
        async with engine.create(mounts=[outer, inner]) as sandbox:
            assert (await sandbox.sh("cat /work/modules/file")).text == ("inner" if inner.source else "")
        (tmp_path / "outer" / "modules").rmdir()
        with pytest.raises(InvalidArgumentError, match="'/work/modules' of 'new' is not there in the mount") as caught:
            await engine.create(mounts=[outer, inner])
        assert "Make it in that one's source" in caught.value.hint


async def test_a_temporary_file_system_that_is_to_be_read_only_hides_what_is_there_and_cannot_be_written(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    mounts = [Mount.bind(tmp_path, "/data", readonly=False), Mount("/data/private")]
    async with engine.create(mounts=mounts) as sandbox:
        done = await sandbox.sh("ls /data /data/private; touch /data/private/new")

    assert done.text.split() == ["/data:", "private", "/data/private:"]
    assert b"Read-only file system" in done.stderr


async def test_handles_of_one_sandbox_are_equal_in_power(engine: Engine) -> None:
    await engine.create(name="w")
    first, second = await engine.get("w"), await engine.get("w")
    async with first.exec(["cat"], stdin="pipe"):
        await second.remove()
    with pytest.raises(NotFoundError):
        await first.run(["true"])


async def test_events_reach_a_reader_that_waits(engine: Engine) -> None:
    seen: list[str] = []

    async def read() -> None:
        async for event in engine.events():
            seen.append(event.kind)  # noqa: PERF401 - what was seen so far counts

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        async with engine.create() as sandbox:
            await sandbox.run(["true"])
        await engine.close()

    assert seen[0] == "sandbox.created"
    assert seen[-1] == "sandbox.removed"


@pytest.mark.parametrize("name", ["dev", "proc", "sys", "tmp", "run"])
async def test_a_root_whose_places_are_no_directories_is_named(engine: Engine, tmp_path: Path, name: str) -> None:
    for what in ("a symbolic link", "not a directory"):
        if what == "a symbolic link":
            (tmp_path / name).symlink_to("/etc")
        else:
            (tmp_path / name).touch()
        with pytest.raises(InvalidArgumentError, match=rf"{tmp_path}.*/{name} is {what}"):
            await engine.create(rootfs=str(tmp_path), isolation="runc")
        async with engine.create(isolation="runc") as pod:
            with pytest.raises(InvalidArgumentError, match=rf"{tmp_path}.*/{name} is {what}"):
                await pod.containers.add(argv=["true"], rootfs=str(tmp_path))
        async with engine.create(rootfs=Rootfs.dir(tmp_path, readonly=True), isolation="runc"):
            pass
        (tmp_path / name).unlink()


@pytest.mark.parametrize("readonly", [False, True])
async def test_a_root_whose_etc_would_be_hidden_is_refused(engine: Engine, tmp_path: Path, readonly: bool) -> None:
    (tmp_path / "data").mkdir()
    rootfs = Rootfs.dir(tmp_path, readonly=readonly)
    for what in ("a symbolic link", "not a directory"):
        if what == "a symbolic link":
            (tmp_path / "etc").symlink_to("data")
        else:
            (tmp_path / "etc").touch()
        with pytest.raises(InvalidArgumentError, match=rf"{tmp_path}.*/etc is {what}"):
            await engine.create(rootfs=rootfs, isolation="runc")
        async with engine.create(isolation="runc") as pod:
            with pytest.raises(InvalidArgumentError, match=rf"{tmp_path}.*/etc is {what}"):
                await pod.containers.add(argv=["true"], rootfs=rootfs)
        (tmp_path / "etc").unlink()
    (tmp_path / "etc").mkdir()
    async with engine.create(rootfs=rootfs, isolation="runc"):
        pass


async def test_whose_ids_cannot_be_mapped_is_named(engine: Engine) -> None:
    with pytest.raises(UnavailableError, match="the ids of mount source '/proc' cannot be mapped"):
        await engine.create(mounts=[Mount.bind("/proc", "/mnt/p"), Mount.bind("/usr", "/p")], isolation="runc")
    with pytest.raises(UnavailableError, match="the ids of rootfs '/proc' cannot be mapped"):
        await engine.create(rootfs="/proc", isolation="runc")


async def test_a_container_has_this_machines_programs_in_a_sandbox_of_a_directory(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "mounted").mkdir()
    mounts = [Mount.bind(tmp_path / "mounted", "/mnt")]
    sandbox = await engine.create(isolation="runc", rootfs=tmp_path / "root", mounts=mounts)
    container = await sandbox.containers.add(rootfs="host", argv=["sh", "-c", "exit 3"])
    assert (await container.wait()).code == 3
