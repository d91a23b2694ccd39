"""A directory that an ordinary user's sandbox writes inside, where a program has to serve that and not the kernel.

On a later Linux than that it is tried all the same, by what decides there.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.plain_user import PlainUser, by_root, has_subtree, plain_user

from unisandbox.backends.runc import overlays

# Long, for a machine that is emulated; what must not hang ends far sooner.
SECONDS = 60

BEGIN = """
from unisandbox.backends.runc import overlays
from unisandbox.host import boundary
overlays.SINCE = (99, 0)
ROOT = HOME + "/root"
# All that a program may have over files.
POWERS = frozenset({"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP"})
OPTIONS = dict(rootfs=ROOT, mounts=[Mount.bind("/usr", "/usr")], isolation="runc")

def helpers():
    # Of this user's engines.
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\\0")
            if line[0].endswith(b"/fuse-overlayfs") and os.stat(f"/proc/{name}").st_uid == os.getuid():
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found

"""


@pytest.fixture(params=["with subordinate ids", "without"])
def user(request: pytest.FixtureRequest, anyio_backend: str) -> Iterator[PlainUser]:
    """An ordinary user who has a root directory of his own, with this machine's programs when /usr is mounted there."""
    if why := overlays.obstacle()[0]:
        pytest.skip(why)
    with plain_user(single=request.param == "without") as user:
        user.loop = anyio_backend
        root = user.home / "root"
        for name in ("etc", "usr", "deep/er", "other"):
            (root / name).mkdir(parents=True)
        (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nbob:x:7:8::/home/bob:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\nbob:x:8:\nmore:x:9:bob\n")
        (root / "deep/er/file").write_text("lower")
        (root / "other/file").write_text("lower")
        for name in ("bin", "lib", "lib64", "sbin"):
            if Path(f"/{name}").is_symlink():
                (root / name).symlink_to(os.readlink(f"/{name}"))
        for path in (root, *root.rglob("*")):
            os.chown(path, user.uid, user.gid, follow_symlinks=False)
        before = _tree(root)
        yield user
        assert _tree(root) == before
        assert user.left() == []


def _tree(root: Path) -> list[tuple[str, int, int, bytes]]:
    found = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((str(path), status.st_mode, status.st_uid, content))
    return found


def _work(text: str) -> str:
    return BEGIN + textwrap.dedent(text)


def _resources(more: str = "") -> str:
    return f"Resources({'' if has_subtree() else 'memory=None, pids=None, '}{more})"


def _heard(process: Any) -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], SECONDS)[0])


def test_a_directory_is_written_inside_and_is_not_changed(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                tell(helpers=len(helpers()), state=(await sandbox.status()).state)
                async def sh(script):
                    done = await sandbox.sh(script)
                    return done.text.split() if done.exit_code == 0 else [done.exit_code, done.stderr.decode()]
                tell(hidden=await sh("rm -r /deep && mkdir /deep && ls -A /deep && stat -c %u:%g:%a /deep"))
                tell(new=await sh("echo new > /deep/file && cat /deep/file && rm /deep/file && ls -A /deep"))
                tell(moved=await sh("mv /other /another && ls /another && cat /another/file && ls -d /other || true"))
                tell(linked=await sh("cd /another && ln file hard && ln -s file soft && stat -c %h file && cat soft"))
                tell(made=await sh("printf '#!/bin/sh\\necho ran' > /p && chmod 755 /p && /p && mkfifo /f"))
                tell(replaced=await sh("echo x > /another/file && cat /another/hard && truncate -s 0 /another/file"))
                tell(mount=await sh("grep ' / / ' /proc/self/mountinfo | cut -d' ' -f6"))
                tell(device=await sh("mknod /n c 1 3 2>/dev/null || echo refused"))
            tell(left=helpers())
            """
        )
    )

    assert told["helpers"] == 1
    assert (told["hidden"], told["new"]) == (["0:0:755"], ["new"])
    assert told["moved"] == ["file", "lower"]
    assert (told["linked"], told["made"], told["replaced"]) == (["2", "lower"], ["ran"], ["x"])
    assert {"rw", "nosuid", "nodev"} <= set(told["mount"][0].split(","))
    assert told["device"] == ["refused"]
    assert told["left"] == []


def test_its_files_can_be_worked_with_from_outside(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                await sandbox.files.write("/deep/up", b"data")
                tell(inside=(await sandbox.sh("cat /deep/up; rm -r /other; echo more > /made; chmod 600 /made")).text)
                tell(names=[info.name for info in await sandbox.files.list("/deep")])
                tell(gone=await sandbox.files.exists("/other"), made=(await sandbox.files.read("/made")).decode())
                await sandbox.files.upload(ROOT + "/deep", "/copied")
                await sandbox.files.remove("/deep", recursive=True)
                tell(copied=(await sandbox.sh("cat /copied/er/file; ls -d /deep")).text)
            """
        )
    )

    assert (told["inside"], told["names"]) == ("data", ["er", "up"])
    assert (told["gone"], told["made"], told["copied"]) == (False, "more\n", "lower")


def test_programs_run_as_users_of_its_files(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                tell(root=(await sandbox.sh("id -u; echo $HOME", user="root")).text.split())
                async def says(user):
                    try:
                        return (await sandbox.sh("id -u; id -G; echo $HOME; cat /deep/er/file", user=user)).text.split()
                    except SandboxError as error:
                        return type(error).__name__
                tell(bob=await says("bob"), nobody=await says("carl"))
                await sandbox.sh("echo carl:x:12:12::/:/bin/sh >> /etc/passwd")
                tell(carl=await says("carl"))
            """
        )
    )

    single = user.subordinate < 0
    assert told["root"] == ["0", "/"]
    assert told["bob"] == ("UnsupportedError" if single else ["7", "8", "9", "/home/bob", "lower"])
    assert told["nobody"] == "InvalidArgumentError"
    assert told["carl"] == ("UnsupportedError" if single else ["12", "12", "/", "lower"])


def test_names_are_shorter_and_some_cannot_be_used(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            script = (
                "import os\\nfor name in ('a' * 251, 'a' * 252, '.wh.a'):\\n"
                " try: open('/' + name, 'w').close(); os.unlink('/' + name); print(0)\\n"
                " except OSError as error: print(error.errno)"
            )
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                tell(errors=(await sandbox.run(["python3", "-c", script])).text.split())
                script = "import os; os.setxattr('/other/file', 'user.x', b'1')"
                tell(attribute=(await sandbox.run(["python3", "-c", script])).stderr.decode())
            from unisandbox.backends.runc import backend
            tell(notes=[note for note in backend.capabilities.notes if "251 bytes" in note and "'.wh.'" in note])
            """
        )
    )

    assert told["errors"] == ["0", str(errno.ENAMETOOLONG), str(errno.EINVAL)]
    assert "Operation not supported" in told["attribute"]
    assert len(told["notes"]) == 1


def test_what_is_written_is_bounded_and_refused_at_once(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            options = OPTIONS | dict(resources={_resources("disk='4M'")})
            async with Engine.open() as engine, engine.create(**options) as sandbox:
                tell(empty=(await sandbox.metrics()).disk_bytes)
                done = await sandbox.sh("dd if=/dev/zero of=/big bs=64k count=200 && echo fits")
                tell(code=done.exit_code, err=done.stderr.decode())
                metrics = await sandbox.metrics()
                tell(full=metrics.disk_bytes, limit=metrics.disk_limit_bytes)
                # What a file has taken is free when the kernel has told the helper that nobody has it any more.
                script = "rm /big && until echo x > /small; do :; done && cat /small"
                tell(again=(await sandbox.sh(script, timeout={SECONDS})).text)
            """
        )
    )

    assert told["code"] != 0
    assert "No space left on device" in told["err"]
    assert told["empty"] < 1 << 20 < told["full"] <= told["limit"] == 4 << 20
    assert told["again"] == "x\n"


def test_a_container_may_have_another_directory_of_its_own(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(resources={_resources()}) as sandbox:
                before = helpers()
                own = dict(rootfs=Rootfs.dir(ROOT), mounts=[Mount.bind("/usr", "/usr")])
                containers = []
                for name in ("a", "b"):
                    script = f"rm -r /deep && echo {{name}} > /name && cat /name && sleep 100"
                    containers.append(await sandbox.containers.add(name=name, argv=["sh", "-c", script], **own))
                for container in containers:
                    while not (said := await container.logs()):
                        await anyio.sleep(0.05)
                    tell(**{{container.name: said.decode()}})
                tell(before=len(before), helpers=len(helpers()))
                await containers[0].remove()
                tell(one=len(helpers()))
                tell(other=(await containers[1].status()).state)
            tell(left=helpers())
            """
        )
    )

    assert (told["a"], told["b"]) == ("a\n", "b\n")
    assert (told["before"], told["helpers"], told["one"], told["other"]) == (0, 2, 1, "running")
    assert told["left"] == []


def test_the_helper_has_little_of_the_host(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                [pid] = helpers()
                fields = dict(line.split(":", 1) for line in Path(f"/proc/{{pid}}/status").read_text().splitlines())
                tell(status={{name: value.strip() for name, value in fields.items()}})
                tell(net=os.stat(f"/proc/{{pid}}/ns/net").st_ino, host=os.stat("/proc/self/ns/net").st_ino)
                keeper = engine._core.host.keeper.pid
                tell(keeper=[os.stat(f"/proc/{{who}}/ns/user").st_ino for who in (pid, keeper)])
                tell(mnt=[os.stat(f"/proc/{{who}}/ns/mnt").st_ino for who in (pid, keeper)])
                tell(env=Path(f"/proc/{{pid}}/environ").read_bytes().decode().split(chr(0))[:-1])
                links = [os.readlink(f"/proc/{{pid}}/fd/{{n}}") for n in os.listdir(f"/proc/{{pid}}/fd")]
                tell(fds=sorted(link.split(":")[0].removeprefix(HOME) for link in links))
            """
        )
    )

    # chown, dac_override, dac_read_search, fowner, fsetid, mknod, setfcap
    assert int(told["status"]["CapBnd"], 16) & ~(0b11111 | 1 << 27 | 1 << 31) == 0
    assert told["status"]["NoNewPrivs"] == "1"
    assert told["net"] != told["host"]
    assert (len(set(told["keeper"])), len(set(told["mnt"]))) == (1, 2)
    assert {line.partition("=")[0] for line in told["env"]} == {"PATH", "LC_ALL"}
    own = {"/dev/null", "/dev/fuse", "pipe"}
    assert {name.rpartition("/")[2] for name in told["fds"] if name not in own} <= {"base", "upper", "work"}


def test_when_the_helper_is_killed_it_is_told_and_nothing_hangs(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine:
                sandbox = await engine.create(**OPTIONS, resources={_resources()})
                other = await engine.create(**OPTIONS, resources={_resources()})
                process = await sandbox.exec(["sh", "-c", "read x; cat /deep/er/file; echo $?; read x"], stdin="pipe")
                names = {{name: None for name in helpers()}}
                [pid] = [helper.pid for helper in engine._core.sandboxers["runc"]._get(sandbox.id).pod.layers.values()]
                tell(before=(await sandbox.status()).warnings)
                os.kill(pid, signal.SIGKILL)
                with anyio.fail_after({SECONDS}):
                    while not (warnings := (await sandbox.status()).warnings):
                        await anyio.sleep(0.01)
                    tell(warnings=warnings, pid=pid)
                    await process.stdin.send(b"go\\n")
                    tell(seen=(await process.stdout.receive()).decode())
                    for name, does in (("read", sandbox.files.read("/deep/er/file")), ("run", sandbox.sh("true"))):
                        try:
                            done = await does
                            tell(**{{name: done.exit_code}})
                        except SandboxError as error:
                            tell(**{{name: type(error).__name__}})
                    tell(other=(await other.sh("cat /deep/er/file")).text)
                    await sandbox.stop()
                    tell(code=(await process.wait()).code)
                    await sandbox.remove()
                    tell(after=(await other.sh("cat /deep/er/file")).text, left=len(helpers()))
            tell(none=helpers())
            """
        )
    )

    assert told["before"] == []
    assert f"fuse-overlayfs (process {told['pid']}), has ended" in told["warnings"][0]
    assert told["seen"] != "lower0\n"
    assert told["read"] not in {0, "lower"}
    assert told["run"] != 0
    assert (told["other"], told["after"], told["code"] > 128) == ("lower", "lower", True)
    assert (told["left"], told["none"]) == (1, [])


@pytest.mark.parametrize("then", ["stop", "remove", "files", "close"])
def test_a_helper_that_was_stopped_hangs_nobody_whom_the_engine_serves(user: PlainUser, then: str) -> None:
    told = user.run(
        _work(
            f"""
            with anyio.fail_after({2 * SECONDS}):
                async with Engine.open() as engine:
                    sandbox = await engine.create(**OPTIONS, resources={_resources()})
                    script = "echo up; read x; echo now; cat /deep/er/file"
                    process = await sandbox.exec(["sh", "-c", script], stdin="pipe")
                    assert await process.stdout.receive() == b"up\\n"
                    [pid] = helpers()
                    os.kill(pid, signal.SIGSTOP)
                    await process.stdin.send(b"go\\n")
                    assert await process.stdout.receive() == b"now\\n"
                    begun = time.monotonic()
                    if {then!r} == "stop":
                        await sandbox.stop()
                        await sandbox.remove()
                    elif {then!r} == "remove":
                        await sandbox.remove()
                    elif {then!r} == "files":
                        tell(read=(await sandbox.files.read("/deep/er/file")).decode())
                        tell(out=(await process.stdout.receive()).decode(), code=(await process.wait()).code)
                tell(left=helpers(), seconds=time.monotonic() - begun)
            """
        )
    )

    assert told["left"] == []
    assert told["seconds"] < SECONDS / 2
    if then == "files":
        assert (told["read"], told["out"], told["code"]) == ("lower", "lower", 0)


def test_files_of_one_sandbox_wait_for_no_helper_of_another_that_was_stopped_meanwhile(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            from unisandbox.backends.runc.pod import Pod
            async with Engine.open() as engine:
                async with (
                    engine.create(**OPTIONS, resources={_resources()}) as stopped,
                    engine.create(**OPTIONS, resources={_resources()}) as other,
                ):
                    [helper] = engine._core.sandboxers["runc"]._get(stopped.id).pod.layers.values()
                    await other.files.read("/deep/er/file")
                    wake = Pod.wake
                    Pod.wake = lambda pod: os.kill(helper.pid, signal.SIGSTOP)
                    with anyio.move_on_after(1) as scope:
                        await stopped.files.read("/other/file")
                    Pod.wake = wake
                    with anyio.fail_after({SECONDS}):
                        read = await other.files.read("/deep/er/file")
                    tell(waited=scope.cancelled_caught, read=read.decode())
            """
        )
    )

    assert told == {"waited": True, "read": "lower"}


# What the helper still knows by a path when a link to somewhere outside has taken that.
LINKS = """
import os, shutil, struct, sys
outside = sys.argv[1]

def attempt(act, *args, **options):
    try:
        act(*args, **options)
    except OSError:
        pass

os.makedirs("/new/deep")
os.mkdir("/new/moved")
for name in ("/new/file", "/new/moved/file", "/new/deep/file"):
    open(name, "w").close()
names = ("/deep", "/new/deep", "/new/file", "/other/file", "/new/moved")
opened = [os.open(name, os.O_RDONLY if os.path.isdir(name) else os.O_RDWR) for name in names]
os.rename("/new/moved", "/new/gone")
for name in names[:4]:
    shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
for name in names:
    os.symlink(outside + "/file" if name.endswith("file") else outside, name)
for fd in opened:
    attempt(os.setxattr, fd, "user.mark", b"1")
    attempt(os.fchmod, fd, 0o777)
    attempt(os.utime, fd, (1, 1))
    attempt(os.ftruncate, fd, 0)
    attempt(os.write, fd, b"mark")
    attempt(os.mkdir, "mark", dir_fd=fd)
    attempt(os.unlink, "file", dir_fd=fd)
    attempt(os.rename, "file", "mark", src_dir_fd=fd, dst_dir_fd=fd)
for name in names:
    attempt(os.setxattr, name, "security.mark", b"1", follow_symlinks=False)
    # A capability of a file as the kernel takes it; source: struct vfs_cap_data, include/uapi/linux/capability.h.
    attempt(os.setxattr, name, "security.capability", struct.pack("<5I", 0x2000001, 1, 0, 0, 0), follow_symlinks=False)
    # Before Linux 6.6 the mode of a link can be asked to be changed.
    link = os.open(name, os.O_PATH | os.O_NOFOLLOW)
    attempt(os.chmod, f"/proc/self/fd/{link}", 0o777)
    attempt(os.utime, f"/proc/self/fd/{link}", (1, 1))
    attempt(os.chown, f"/proc/self/fd/{link}", 0, 0)
    attempt(os.truncate, f"/proc/self/fd/{link}", 0)
    os.close(link)
    attempt(os.chown, name, 0, 0, follow_symlinks=False)
    attempt(os.utime, name, (1, 1), follow_symlinks=False)
    attempt(os.link, name, "/hard" + name.replace("/", "-"), follow_symlinks=False)
print(*[name for name in names if os.path.exists(name)])
"""


def test_the_helper_follows_no_link_out_of_the_layers(user: PlainUser) -> None:
    outside = user.home / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "file").write_text("mine")
    for path in (outside, *outside.rglob("*")):
        os.chown(path, user.uid, user.gid)

    def seen() -> list[Any]:
        found = [(path, path.lstat(), os.listxattr(path)) for path in (outside, *sorted(outside.rglob("*")))]
        return [(str(path), status.st_mode, status.st_mtime_ns, names) for path, status, names in found]

    before = seen()
    told = user.run(
        _work(
            f"""
            options = OPTIONS | dict(resources={_resources()}, security=Security(capabilities=POWERS))
            async with Engine.open() as engine, engine.create(**options) as sandbox:
                done = await sandbox.run(["python3", "-c", {LINKS!r}, {str(outside)!r}])
                tell(code=done.exit_code, error=done.stderr.decode(), reached=done.text)
            """
        )
    )

    assert (told["code"], told["error"], told["reached"]) == (0, "", "\n")
    assert seen() == before
    assert (outside / "file").read_text() == "mine"


DIES = f"""
engine = await Engine.open(HOME + "/state", policy=POLICY)
sandbox = await engine.create(**OPTIONS, name="w", resources={_resources()})
await sandbox.sh("rm -r /deep; echo kept > /made")
[helper] = helpers()
tell(keeper=engine._core.host.keeper.pid, helper=helper, host=os.getpid())
await anyio.sleep_forever()
"""


@pytest.mark.parametrize("killed", ["host", "keeper", "both"])
def test_a_helper_ends_with_its_engine_whoever_is_killed(user: PlainUser, killed: str) -> None:
    with user.start(_work("POLICY = 'stop'\n" + DIES)) as process:
        told = _heard(process)
        pidfds = [os.pidfd_open(told["helper"]), os.pidfd_open(told["keeper"])]
        try:
            if killed in {"keeper", "both"}:
                os.kill(told["keeper"], signal.SIGKILL)
            if killed in {"host", "both"}:
                process.kill()
            assert _ended(pidfds[0]), "the helper goes on"
            process.kill()
            assert _ended(pidfds[1])
        finally:
            for fd in pidfds:
                os.close(fd)
    # What is left of the others is removed by the next one.
    after = "async with Engine.open(HOME + '/state') as engine:\n    tell(done=len(await engine.list()))"
    assert user.run(_work(after)) == {"done": 0}


def test_a_kept_sandbox_keeps_its_files_and_their_helper(user: PlainUser) -> None:
    with user.start(_work("POLICY = 'keep'\n" + DIES)) as process:
        told = _heard(process)
        process.kill()
    again = user.run(
        _work(
            """
            async with Engine.open(HOME + "/state", policy="keep") as engine:
                sandbox = await engine.get("w")
                tell(helpers=helpers(), warnings=(await sandbox.status()).warnings)
                tell(out=(await sandbox.sh("cat /made; ls -d /deep; echo more > /more")).text)
                tell(files=(await sandbox.files.read("/more")).decode())
                tell(user=(await sandbox.sh("id -u", user="root")).text)
                await sandbox.remove()
                tell(left=helpers())
            async with Engine.open(HOME + "/state", policy="stop"):
                pass
            """
        )
    )

    assert (again["helpers"], again["warnings"]) == ([told["helper"]], [])
    assert (again["out"], again["files"], again["user"]) == ("kept\n", "more\n", "0\n")
    assert again["left"] == []


@pytest.mark.parametrize("policy", ["stop", "keep"])
@pytest.mark.parametrize("victim", ["host", "keeper", "both"])
@pytest.mark.parametrize("point", ["before layer.start", "after layer.start"])
def test_a_start_that_is_cut_leaves_no_helper(user: PlainUser, point: str, victim: str, policy: str) -> None:
    with user.start(
        _work(
            f"""
            async with Engine.open(HOME + "/state", policy={policy!r}) as engine:
                keeper = engine._core.host.keeper.pid
                def hook(name, of):
                    if name == {point!r}:
                        # It executes itself more than once as it begins.
                        while name == "after layer.start" and not helpers():
                            time.sleep(0.001)
                        tell(helpers=len(helpers()))
                        if {victim!r} != "host":
                            end = os.pidfd_open(keeper)
                            os.kill(keeper, signal.SIGKILL)
                            if {victim!r} == "keeper":
                                import select
                                select.select([end], [], [])
                            os.close(end)
                        if {victim!r} != "keeper":
                            os.kill(os.getpid(), signal.SIGKILL)
                boundary.watch(hook)
                try:
                    await engine.create(**OPTIONS, name="w", resources={_resources()})
                except SandboxError as error:
                    tell(error=str(error))
                boundary.watch(None)
            """
        )
    ) as process:
        assert _heard(process) == {"helpers": int(point.startswith("after"))}
        if victim == "keeper":
            assert "keeper" in _heard(process)["error"]
        process.wait(SECONDS)
    told = user.run(
        _work(
            """
            async with Engine.open(HOME + "/state") as engine:
                tell(listed=[status.state for status in await engine.list()], left=helpers())
            tell(done=helpers())
            """
        )
    )

    assert told == {"listed": [], "left": [], "done": []}


@pytest.mark.skipif(not has_subtree(), reason="no subtree of cgroup v2 has been delegated to this user")
def test_a_paused_container_pauses_no_helper(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine, engine.create(**OPTIONS, resources={_resources()}) as sandbox:
                await sandbox.sh("echo x > /made")
                await sandbox.pause()
                with anyio.fail_after({SECONDS}):
                    tell(read=(await sandbox.files.read("/made")).decode())
                    await sandbox.resume()
                    tell(run=(await sandbox.sh("cat /made")).text)
                    await sandbox.pause()
                    await sandbox.remove()
            tell(left=helpers())
            """
        )
    )

    assert (told["read"], told["run"], told["left"]) == ("x\n", "x\n", [])


@pytest.mark.skipif(not has_subtree(), reason="no subtree of cgroup v2 has been delegated to this user")
def test_what_is_written_counts_as_memory_and_a_program_that_wants_too_much_is_killed_alone(user: PlainUser) -> None:
    told = user.run(
        _work(
            """
            options = OPTIONS | dict(resources=Resources(memory="128M", disk="32M"))
            async with Engine.open() as engine, engine.create(**options) as sandbox:
                before = (await sandbox.metrics()).memory_bytes
                await sandbox.sh("dd if=/dev/zero of=/big bs=1M count=24")
                tell(more=(await sandbox.metrics()).memory_bytes - before)
                done = await sandbox.run(["python3", "-c", "x = bytearray(1 << 30)"])
                tell(reason=done.exit.reason, warnings=(await sandbox.status()).warnings)
                tell(size=(await sandbox.sh("stat -c %s /big")).text)
            """
        )
    )

    assert told["more"] >= 24 << 20
    assert (told["reason"], told["warnings"], told["size"]) == ("oom", [], f"{24 << 20}\n")


@by_root
def test_without_the_program_it_is_refused_by_the_name_of_its_package(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            overlays.PATH = HOME
            from unisandbox.backends.runc import backend
            probe = await backend.probe()
            tell(claimed=backend.capabilities.writable_dirs, fact=probe.facts["directories that are written"])
            tell(notes=[note for note in backend.capabilities.notes if "fuse-overlayfs" in note])
            try:
                async with Engine.open() as engine:
                    await engine.create(**OPTIONS, resources={_resources()})
            except UnsupportedError as error:
                tell(error=error.message, hint=error.hint)
            """
        )
    )

    assert not told["claimed"]
    assert "fuse-overlayfs is not installed" in told["fact"]
    assert "readonly=True" in told["notes"][0]
    assert "fuse-overlayfs is not installed" in told["error"]
    assert "apt install fuse-overlayfs" in told["hint"]


def test_it_is_claimed_where_the_program_is(user: PlainUser) -> None:
    told = user.run(
        _work(
            """
            from unisandbox.backends.runc import backend
            probe = await backend.probe()
            tell(claimed=backend.capabilities.writable_dirs, fact=probe.facts["directories that are written"])
            """
        )
    )

    assert told["claimed"]
    assert told["fact"].endswith("/fuse-overlayfs")


def test_a_helper_that_does_not_begin_is_told_with_its_words(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            programs = Path(HOME, "programs")
            programs.mkdir()
            for name in ("unshare", "setpriv"):
                (programs / name).symlink_to(f"/usr/bin/{{name}}")
            (programs / "fuse-overlayfs").write_text("#!/bin/sh\\necho it cannot be >&2")
            (programs / "fuse-overlayfs").chmod(0o755)
            overlays.PATH = str(programs)
            async with Engine.open() as engine, engine.create(resources={_resources()}) as other:
                try:
                    await engine.create(**OPTIONS, resources={_resources()})
                except SandboxError as error:
                    tell(error=f"{{type(error).__name__}}: {{error.message}}")
                own = dict(rootfs=Rootfs.dir(ROOT), mounts=[Mount.bind("/usr", "/usr")])
                for name in ("first", "again"):
                    try:
                        await other.containers.add(name="a", argv=["true"], **own)
                    except SandboxError as error:
                        tell(**{{name: f"{{type(error).__name__}}: {{error.message}}"}})
                overlays.PATH = "/usr/bin"
                container = await other.containers.add(name="a", argv=["true"], **own)
                tell(listed=len(await engine.list()), code=(await container.wait()).code)
            """
        )
    )

    for name in ("error", "first", "again"):
        assert told[name].startswith("BackendError: "), told[name]
        assert "fuse-overlayfs has ended: it cannot be" in told[name]
    assert (told["listed"], told["code"]) == (1, 0)


def test_a_version_that_serves_extended_attributes_is_refused(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            overlays_command = overlays.command
            overlays.command = lambda below, *, device: [
                word.replace(",noacl,noxattrs=1", "") for word in overlays_command(below, device=device)
            ]
            async with Engine.open() as engine:
                try:
                    await engine.create(**OPTIONS, resources={_resources()})
                except SandboxError as error:
                    tell(error=f"{{type(error).__name__}}: {{error.message}}")
            tell(left=helpers())
            """
        )
    )

    assert "extended attributes are served" in told["error"]
    assert told["left"] == []


def test_a_helper_ends_when_the_time_of_its_sandbox_is_over(user: PlainUser) -> None:
    told = user.run(
        _work(
            f"""
            async with Engine.open() as engine:
                sandbox = await engine.create(**OPTIONS, resources={_resources()}, ttl=5)
                [helper] = helpers()
                pidfd = os.pidfd_open(helper)
                with anyio.fail_after({SECONDS}):
                    await anyio.wait_readable(pidfd)
                os.close(pidfd)
                tell(left=helpers())
            """
        )
    )

    assert told["left"] == []
