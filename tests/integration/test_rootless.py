"""The same library for a user who is not root: what he has."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest
from tests.plain_user import PlainUser, by_root

from unisandbox.backends.runc import overlays


def test_programs_run_with_exact_ends_and_streams(any_user: PlainUser) -> None:
    told = any_user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            done = await sandbox.run(["/bin/sh", "-c", "cat; echo err >&2; exit 7"], input=b"in")
            tell(run=[done.exit_code, done.text, done.stderr.decode()])
            tell(signal=(await sandbox.sh("kill -9 $$")).exit.signal)
            async with sandbox.exec(["cat"], stdin="pipe") as process:
                await process.stdin.send(b"x")
                tell(echo=(await process.stdout.receive()).decode())
                tell(killed=(await process.kill()).signal)
            async with sandbox.exec(["tty"], tty=True) as process:
                tell(tty=(await process.wait()).code)
            tell(roots=[(await sandbox.run(["id", "-u"], user=name)).text for name in (None, "0", "root:root")])
        """
    )

    assert told["run"] == [7, "in", "err\n"]
    assert (told["signal"], told["echo"], told["killed"], told["tty"]) == (9, "x", 9, 0)
    assert told["roots"] == ["0\n"] * 3


def test_programs_may_run_as_other_users_inside(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            tell(ids=(await sandbox.run(["id", "-u"], user="1000")).text + (await sandbox.sh("id -g", user="0:7")).text)
        """
    )

    assert told["ids"] == "1000\n7\n"


def test_it_is_fenced_in_as_roots_are(any_user: PlainUser) -> None:
    told = any_user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            lines = (await sandbox.run(["cat", "/proc/self/status"])).text.splitlines()
            tell(status={name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
            tell(net=(await sandbox.run(["ls", "/sys/class/net"])).text.split())
            tell(maps=(await sandbox.sh("cat /proc/self/uid_map /proc/self/gid_map")).text.split())
            status = await sandbox.status()
            own = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in status.namespaces}
            tell(shared=[kind for kind, inode in status.namespaces.items() if inode == own[kind]])
            tell(kinds=sorted(status.namespaces))
            tell(write=(await sandbox.sh("touch /usr/x || touch /etc/x || mknod /tmp/n b 8 0")).exit_code)
            tell(masked=(await sandbox.sh("cat /proc/keys /proc/timer_list")).text)
            async with sandbox.exec(["sleep", "60"]) as process:
                tell(host=Path(f"/proc/{process.pid}/status").read_text().split("Uid:")[1].split()[:4])
        """
    )

    single = any_user.subordinate < 0
    assert (told["status"]["NoNewPrivs"], told["status"]["Seccomp"]) == ("1", "2")
    # That they stay where there is but one id is a loss with a test of its own.
    assert told["status"]["Groups"].split() == ["65534"] * len(any_user.groups) * single
    assert not int(told["status"]["CapEff"], 16) & (1 << 21 | 1 << 19 | 1 << 12)  # SYS_ADMIN, SYS_PTRACE, NET_ADMIN
    assert (told["net"], told["shared"], told["kinds"]) == (["lo"], [], ["ipc", "net", "user", "uts"])
    assert told["maps"] == (["0", "0", "1"] if single else ["0", "0", "1", "1", "1", "65535"]) * 2
    assert told["write"] != 0
    assert told["masked"] == ""
    assert told["host"] == [str(any_user.uid)] * 4


def test_files_are_read_written_and_owned(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.write("/tmp/a", "from outside")
            tell(inside=(await sandbox.run(["cat", "/tmp/a"])).text)
            await sandbox.sh("mkdir /tmp/d; echo inside > /tmp/d/b; chown 1000:7 /tmp/d/b")
            tell(outside=(await sandbox.files.read("/tmp/d/b")).decode())
            info = await sandbox.files.stat("/tmp/d/b")
            tell(ids=[info.uid, info.gid], root=(await sandbox.files.stat("/tmp/a")).uid)
            await sandbox.files.download("/tmp/d", HOME + "/d")
            await sandbox.files.upload(HOME + "/d", "/tmp/e")
            tell(copied=(await sandbox.run(["cat", "/tmp/e/b"])).text)
            await sandbox.files.remove("/tmp/e", recursive=True)
            tell(left=[info.name for info in await sandbox.files.list("/tmp")])
        """
    )

    assert (told["inside"], told["outside"], told["copied"]) == ("from outside", "inside\n", "inside\n")
    assert (told["ids"], told["root"], told["left"]) == ([1000, 7], 0, ["a", "d"])


def test_his_own_directories_can_be_mounted(user: PlainUser) -> None:
    told = user.run(
        """
        work = Path(HOME, "work")
        work.mkdir()
        (work / "in").write_text("mine")
        mounts = [Mount.bind(str(work), "/mnt", readonly=False)]
        async with Engine.open() as engine, engine.create(resources=FREE, mounts=mounts) as sandbox:
            tell(seen=(await sandbox.sh("stat -c %u /mnt/in; cat /mnt/in; echo out > /mnt/out")).text.split())
        """
    )

    assert told["seen"] == ["0", "mine"]
    assert (user.home / "work/out").stat().st_uid == user.uid


def _root_of(user: PlainUser) -> Path:
    """A root directory of his own, with this machine's programs when /usr is mounted there."""
    root = user.home / "root"
    for name in ("etc", "usr", "deep"):
        (root / name).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "deep/file").write_text("lower")
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path(f"/{name}").is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    for path in (root, *root.rglob("*")):
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
    return root


@pytest.mark.skipif(
    not overlays.by_kernel() and overlays.obstacle()[0] != "", reason="nothing here lays a layer over it"
)
def test_a_directory_of_his_own_can_be_the_root_and_is_not_changed(any_user: PlainUser) -> None:
    root = _root_of(any_user)
    told = any_user.run(
        f"""
        options = dict(rootfs={str(root)!r}, mounts=[Mount.bind("/usr", "/usr")], resources=FREE)
        async with Engine.open() as engine, engine.create(**options) as sandbox:
            script = "rm -r /deep && mkdir /deep && echo upper > /deep/new && ls /deep && stat -c %u /deep"
            done = await sandbox.sh(script)
            tell(root=done.text.split(), why=done.stderr.decode())
        """
    )

    assert told["root"] == ["new", "0"], told["why"]
    assert (root / "deep/file").read_text() == "lower"


def test_a_directory_of_his_own_can_be_a_root_that_is_only_read(any_user: PlainUser) -> None:
    root = _root_of(any_user)
    told = any_user.run(
        f"""
        mounts = [Mount.bind("/usr", "/usr")]
        rootfs = Rootfs.dir({str(root)!r}, readonly=True)
        async with Engine.open() as engine, engine.create(rootfs=rootfs, mounts=mounts, resources=FREE) as sandbox:
            done = await sandbox.sh("cat /deep/file; touch /tmp/x && echo -n ' written'; touch /deep/x")
            tell(seen=done.text, code=done.exit_code, why=done.stderr.decode())
        """
    )

    assert told["seen"] == "lower written", told["why"]
    assert "Read-only" in told["why"]


def test_the_network_of_the_host_is_there_when_it_is_asked_for(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE, network="host") as sandbox:
            tell(inside=(await sandbox.run(["readlink", "/proc/self/ns/net"])).text.strip())
            tell(here=os.readlink("/proc/self/ns/net"))
        """
    )

    assert told["inside"] == told["here"]


def test_containers_have_roots_of_their_own_and_may_share_processes(any_user: PlainUser) -> None:
    told = any_user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE, share_pid=True) as sandbox:
            added = await sandbox.containers.add(rootfs="host", argv=["sleep", "61"])
            tell(seen=(await sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\\\0' ' '")).text)
            await sandbox.stop(grace=0)
            await sandbox.start()
            tell(again=(await sandbox.run(["true"])).exit_code)
        """
    )

    assert "sleep 61" in told["seen"]
    assert told["again"] == 0


@by_root
def test_a_timeout_ends_what_the_run_started_and_the_end_of_the_sandbox_all(user: PlainUser) -> None:
    told = user.run(
        """
        def ours():
            found = []
            for entry in os.scandir("/proc"):
                if entry.name.isdecimal():
                    try:
                        words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace")
                        found.append(words.replace("\\0", " ").strip())
                    except OSError:
                        continue
            return sorted(line for line in found if line.startswith("sleep 98"))

        async with Engine.open() as engine:
            async with engine.create(resources=FREE) as sandbox:
                try:
                    await sandbox.sh("sleep 981 & (sleep 982 & wait) & (setsid sleep 983 &); sleep 984", timeout=5)
                except SandboxError as error:
                    tell(error=str(error))
                # Without cgroups nobody has waited for the last breath of each.
                with anyio.move_on_after(10):
                    while len(ours()) > 1:
                        await anyio.sleep(0.01)
                tell(after=ours())
            tell(end=ours())
        """
    )

    assert "did not end within" in told["error"]
    # That one has left its parents, and there is no cgroup to find it by: a loss that the capabilities tell of.
    assert told["after"] == ["sleep 983"]
    assert told["end"] == []


def test_root_inside_with_power_over_processes_does_not_reach_init(user: PlainUser) -> None:
    told = user.run(
        """
        power = Security(capabilities=Security().capabilities | {"CAP_SYS_PTRACE", "CAP_SYS_ADMIN"})
        async with Engine.open() as engine, engine.create(resources=FREE, security=power) as sandbox:
            names = ("mem", "environ", "root/etc", "fd/3", "exe")
            tries = "; ".join(f"cat /proc/1/{name} >/dev/null 2>&1 && echo {name}" for name in names)
            tell(reached=(await sandbox.sh(tries)).text.split())
            await sandbox.sh("kill -9 1; kill -9 -1")
            tell(lives=(await sandbox.run(["true"])).exit_code)
        """
    )

    assert told["reached"] == []
    assert told["lives"] == 0


def _heard(process: subprocess.Popen[bytes]) -> bytes:
    said = process.stdout
    assert said is not None
    assert select.select([said], [], [], 300)[0], "it was silent for five minutes"
    return said.readline()


def test_a_killed_host_process_leaves_nothing(any_user: PlainUser) -> None:
    with any_user.start(
        """
        engine = await Engine.open()
        sandbox = await engine.create(resources=FREE)
        process = await sandbox.exec(["sleep", "432187"])
        tell(keeper=engine._core.host.keeper.pid, pid=process.pid)
        await anyio.sleep_forever()
        """
    ) as process:
        import json

        told = json.loads(_heard(process))
        pidfds = [os.pidfd_open(told[name]) for name in ("keeper", "pid")]
        try:
            process.kill()
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], 30)[0]
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


def test_kept_sandboxes_are_adopted_and_go_on(any_user: PlainUser) -> None:
    state = any_user.home / "state"
    with any_user.start(
        f"""
        engine = await Engine.open({str(state)!r}, policy="keep")
        sandbox = await engine.create(name="w", resources=FREE)
        process = await sandbox.exec(["sh", "-c", "read line; echo $line; exit 9"], stdin="pipe")
        tell(pid=process.pid, id=process.id)
        await anyio.sleep_forever()
        """
    ) as process:
        import json

        told = json.loads(_heard(process))
        process.send_signal(signal.SIGKILL)
    again = any_user.run(
        f"""
        async with Engine.open({str(state)!r}, policy="stop") as engine:
            sandbox = await engine.get("w")
            [process] = [process for process in await sandbox.processes() if process.id == {told["id"]!r}]
            tell(pid=process.pid)
            await process.stdin.send(b"hello\\n")
            tell(out=(await process.stdout.receive()).decode(), code=(await process.wait()).code)
            await sandbox.remove()
        """
    )

    assert again == {"pid": told["pid"], "out": "hello\n", "code": 9}


def test_the_command_line_runs_keeps_and_removes_sandboxes(any_user: PlainUser) -> None:
    told = any_user.run(
        """
        def cli(*words):
            argv = [sys.executable, "-m", "unisandbox.cli", *words]
            done = subprocess.run(argv, capture_output=True, text=True)
            return [done.returncode, done.stdout, done.stderr]

        tell(run=cli("run", "--unlimited", "--", "sh", "-c", "id -u; exit 3"))
        tell(began=cli("run", "-d", "--unlimited", "--name", "w", "--", "sh", "-c", "echo said; sleep 100"))
        tell(exec=cli("exec", "w", "echo", "more"), ps=cli("ps"), logs=cli("logs", "w"))
        tell(rm=cli("rm", "-f", "w"), after=cli("ps", "-a"))
        """
    )

    assert told["run"][:2] == [3, "0\n"], told["run"]
    assert told["began"][0] == 0, told["began"]
    assert (told["exec"][1], told["logs"][1]) == ("more\n", "said\n")
    assert " w " in told["ps"][1]
    assert told["rm"][0] == 0, told["rm"]
    assert " w " not in told["after"][1]


@by_root
def test_the_command_line_names_the_option_to_do_without_limits(user: PlainUser) -> None:
    told = user.run(
        """
        argv = [sys.executable, "-m", "unisandbox.cli", "run", "--", "true"]
        done = subprocess.run(argv, capture_output=True, text=True)
        tell(code=done.returncode, err=done.stderr)
        """
    )

    assert told["code"] == 125
    assert "--unlimited" in told["err"]


def test_a_process_that_is_killed_as_it_starts_is_told_by_its_end_and_not_by_what_its_files_refuse(
    user: PlainUser,
) -> None:
    told = user.run(
        """
        import signal
        from unisandbox.host.init.spawn import _set_oom_score_adj
        pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
        pidfd = os.pidfd_open(pid)
        _set_oom_score_adj(pid, pidfd, 500)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        try:
            os.close(os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY))
        except PermissionError:
            tell(refused=True)
        _set_oom_score_adj(pid, pidfd, 500)
        os.close(pidfd)
        os.waitpid(pid, 0)
        """
    )

    assert told == {"refused": True}


@by_root
@pytest.mark.timeout(1800)
def test_the_contract_holds(user: PlainUser, pytestconfig: pytest.Config) -> None:
    """The conformance tests as that user: with --long all of them, else those of the usual settings and of ends."""
    modules = ("test_defaults", "test_exits") if not pytestconfig.getoption("--long") else ("",)
    names = [f"unisandbox.conformance.{module}".rstrip(".") for module in modules]
    done = user.pytest("--backend", "runc", "-k", "not trio", "--pyargs", *names, timeout=1700)

    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert " passed" in done.stdout
