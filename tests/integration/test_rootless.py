"""The same library for a user who is not root: what he has, what he is refused, and what he is told."""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.plain_user import PlainUser, plain_user

from unisandbox.host.cgroups import Cgroups

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
# What root changes for a program, or what only those have whom root makes up: they have no cgroup to write.
by_root = pytest.mark.root


@pytest.fixture
def user() -> Iterator[PlainUser]:
    """A user who is not root; nothing of his engines is left after the test."""
    with plain_user() as user:
        yield user
        assert user.left() == []


@pytest.fixture(params=["with subordinate ids", "without"])
def any_user(request: pytest.FixtureRequest) -> Iterator[PlainUser]:
    """The same, and one who has no id but his own."""
    with plain_user(single=request.param == "without") as user:
        yield user
        assert user.left() == []


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


def _has_subtree() -> bool:
    return os.geteuid() != 0 and {"memory", "pids"} <= Cgroups.detect("unisandbox-x").controllers


@pytest.mark.skipif(KERNEL < (6, 6), reason="a directory can be written inside since Linux 6.6")
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
                        found.append(Path(entry.path, "cmdline").read_text().replace("\\0", " ").strip())
                    except OSError:
                        continue
            return sorted(line for line in found if line.startswith("sleep 98"))

        async with Engine.open() as engine:
            async with engine.create(resources=FREE) as sandbox:
                try:
                    await sandbox.sh("sleep 981 & (sleep 982 & wait) & (setsid sleep 983 &); sleep 984", timeout=1)
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


WITHOUT_CGROUPS = {
    "memory": ("{}", "resources.memory cannot be limited here"),
    "pids": ("dict(resources=Resources(memory=None))", "resources.pids cannot be limited here"),
    "cpu": ("dict(resources=Resources(memory=None, pids=None, cpu=0.5))", "resources.cpu cannot be limited here"),
}
NEVER = {
    "disk": ("dict(resources=Resources(memory=None, pids=None, disk='2G'))", "a disk limit of 2147483648 bytes"),
    "userns": ("dict(resources=FREE, userns='host')", "userns='host'"),
    "network": ("dict(resources=FREE, network='/proc/1/ns/net')", "network 'namespace'"),
}


def _refusals(user: PlainUser, asked: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What is said of each of these; nothing is done."""
    return user.run(
        f"""
        def files():
            # An engine makes its file of events and its directory of records when it first has to.
            own = ("events", "sandboxes")
            return sorted(str(path) for path in Path(HOME).glob("unisandbox*/**/*") if path.name not in own)

        async with Engine.open() as engine:
            for name, (options, _) in {asked!r}.items():
                before = files()
                try:
                    async with engine.create(isolation="runc", **eval(options)):
                        tell(**{{name: ["made", ""]}})
                except SandboxError as error:
                    tell(**{{name: [f"{{type(error).__name__}}: {{error.message}}", error.hint]}})
                assert files() == before, files()
        """
    )


def test_what_only_root_can_have_is_refused_with_a_remedy_before_anything_is_done(user: PlainUser) -> None:
    told = _refusals(user, NEVER)

    for name, (_, words) in NEVER.items():
        assert words in told[name][0], (name, told[name])
        assert told[name][0].startswith("UnsupportedError"), (name, told[name])
        assert told[name][1], name


@by_root
def test_limits_without_a_cgroup_are_refused_with_a_remedy_before_anything_is_done(user: PlainUser) -> None:
    told = _refusals(user, WITHOUT_CGROUPS)

    for name, (_, words) in WITHOUT_CGROUPS.items():
        assert words in told[name][0], (name, told[name])
        assert told[name][0].startswith("UnavailableError"), (name, told[name])
    assert "Resources.unlimited()" in told["memory"][1]


LOST = ["userns_host", "own_ids", "host_devices", "cgroup_parent", "large_disks"]
LOST += ["writable_dirs"] if KERNEL < (6, 6) else []
OF_CGROUPS = ["pause", "exact_exits", "process_trees"]
CAPABILITIES = f"""
        from unisandbox.backends.runc import backend
        claimed = backend.capabilities
        tell(limits=sorted(claimed.limits), users=claimed.users, networks=sorted(claimed.networks), notes=claimed.notes)
        tell(lost=[name for name in {LOST + OF_CGROUPS!r} if not getattr(claimed, name)])
        probe = await backend.probe(deep=True)
        tell(available=probe.available, reason=probe.reason, facts=dict(probe.facts), warnings=probe.warnings)
"""


@by_root
def test_the_capabilities_tell_what_is_lost(user: PlainUser) -> None:
    told = user.run(CAPABILITIES)

    # Where this machine has what the network "user" takes, he has it too.
    assert (told["limits"], [name for name in told["networks"] if name != "user"]) == ([], ["host", "none"])
    assert told["lost"] == LOST + OF_CGROUPS
    assert told["users"]
    assert any("root inside is this user outside" in note for note in told["notes"])
    assert not any("subordinate ids:" in note for note in told["notes"])
    assert not any("one user id" in warning for warning in told["warnings"])
    assert told["available"], told["reason"]
    assert "65537" in told["facts"]["user ids"]
    assert told["facts"]["without root"] == "; ".join(told["notes"])


@pytest.mark.skipif(not _has_subtree(), reason="no subtree of cgroup v2 has been delegated to this user")
def test_with_a_delegated_subtree_there_are_limits_and_nothing_of_cgroups_is_lost(user: PlainUser) -> None:
    told = user.run(CAPABILITIES)

    assert (told["limits"], told["lost"]) == (["cpu", "memory", "pids"], LOST)
    assert told["available"], told["reason"]
    assert not any("cgroup" in note for note in told["notes"])


# In the mount namespace of the program only, and on a directory that is there.
TEMPORARY = "T=/mnt; mount -t tmpfs none $T; chmod 755 $T"
SETTING = (
    "cp -r /proc/sys/kernel $T/kernel 2>/dev/null || true; chmod -R u+w $T/kernel; echo {} > $T/kernel/{};"
    " mount --bind $T/kernel /proc/sys/kernel"
)
OBSTACLES = {
    "kernel.unprivileged_userns_clone": SETTING.format(0, "unprivileged_userns_clone"),
    "kernel.apparmor_restrict_unprivileged_userns": SETTING.format(1, "apparmor_restrict_unprivileged_userns"),
    "user.max_user_namespaces": "echo 0 > $T/zero; mount --bind $T/zero /proc/sys/user/max_user_namespaces",
}


@by_root
@pytest.mark.parametrize("what", OBSTACLES)
def test_the_setting_that_forbids_it_is_named_with_its_remedy(user: PlainUser, what: str) -> None:
    told = user.run(
        """
        from unisandbox.backends.runc import backend
        probe = await backend.probe()
        tell(available=probe.available, reason=probe.reason, hint=probe.hint)
        try:
            async with Sandbox.create(isolation="runc", resources=FREE):
                tell(error="")
        except SandboxError as error:
            tell(error=str(error))
        """,
        setup=f"{TEMPORARY}; {OBSTACLES[what]}",
    )

    assert not told["available"]
    assert what in told["reason"]
    assert told["hint"]
    assert what in told["error"]


@by_root
def test_doctor_names_the_setting_and_the_remedy(user: PlainUser) -> None:
    told = user.run(
        """
        argv = [sys.executable, "-m", "unisandbox.cli", "doctor"]
        tell(doctor=subprocess.run(argv, capture_output=True, text=True).stdout)
        """,
        setup=f"{TEMPORARY}; {OBSTACLES['kernel.unprivileged_userns_clone']}",
    )

    cause, remedy = told["doctor"].split("runc: cannot run here\n")[1].splitlines()[:2]
    assert cause.startswith("  cause: ")
    assert "kernel.unprivileged_userns_clone is 0" in cause
    assert remedy == "  remedy: sysctl -w kernel.unprivileged_userns_clone=1"
    assert "kernel.unprivileged_userns_clone=0" in told["doctor"].split("user namespaces")[1].splitlines()[0]


@by_root
def test_what_newuidmap_says_is_told(user: PlainUser) -> None:
    words = "printf '#!/bin/sh\\necho it has its reasons >&2; exit 1' > $T/no; chmod 4755 $T/no"
    told = user.run(
        """
        try:
            async with Sandbox.create(isolation="runc", resources=FREE):
                tell(error="")
        except UnavailableError as error:
            tell(error=str(error))
        """,
        setup=f"{TEMPORARY}; {words}; mount --bind $T/no $(command -v newuidmap)",
    )

    assert "it has its reasons" in told["error"]


@by_root
def test_a_newuidmap_that_lacks_the_power_in_a_container_is_told_with_the_remedy(user: PlainUser) -> None:
    """In a container it is bound by what that has. With capabilities of its file it does without."""
    work = """
        try:
            async with Sandbox.create(isolation="runc", resources=FREE) as sandbox:
                tell(error="", text=(await sandbox.sh("id -u")).text)
        except UnavailableError as error:
            tell(error=str(error))
        """
    bounded = ["--bounding-set=-sys_admin"]
    told = user.run(work, more=bounded)
    if told["error"]:  # some are built to do without
        assert "setcap cap_setuid=ep newuidmap" in told["error"]

    setcap = shutil.which("setcap")
    if setcap is None:
        pytest.skip("setcap is not installed (apt install libcap2-bin)")
    copies = "".join(
        f"; cp $(command -v new{kind}idmap) $T/{kind}; chmod 755 $T/{kind}; {setcap} cap_set{kind}id=ep $T/{kind}"
        f"; mount --bind $T/{kind} $(command -v new{kind}idmap)"
        for kind in ("u", "g")
    )
    assert user.run(work, setup=TEMPORARY + copies, more=bounded) == {"error": "", "text": "0\n"}


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
        process = await sandbox.exec(["sleep", "987654"])
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


def test_what_belongs_to_other_ids_inside_is_of_his_subordinate_ids_outside(user: PlainUser) -> None:
    user.run(
        """
        work = Path(HOME, "shared")
        work.mkdir()
        mounts = [Mount.bind(str(work), "/mnt", readonly=False)]
        async with Engine.open() as engine, engine.create(resources=FREE, mounts=mounts) as sandbox:
            done = await sandbox.sh("touch /mnt/root /mnt/other && chown 5:6 /mnt/other")
            assert done.exit_code == 0, done.stderr
        """
    )

    root, other = ((user.home / "shared" / name).stat() for name in ("root", "other"))
    assert (root.st_uid, root.st_gid) == (user.uid, user.gid)
    assert (other.st_uid, other.st_gid) == (user.subordinate + 4, user.subordinate + 5)
    assert stat.S_ISREG(other.st_mode)


def test_files_of_other_users_inside_are_worked_with_as_their_root_would(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.sh("umask 077; mkdir -p ~/d; echo his > ~/d/f; chmod 0 ~/d/f", user="1000", check=True)
            home = "/home/user"
            tell(read=(await sandbox.files.read(f"{home}/d/f")).decode())
            await sandbox.files.write(f"{home}/d/f", "new")
            info = await sandbox.files.stat(f"{home}/d/f")
            tell(kept=[info.uid, info.gid, info.mode])
            await sandbox.files.write(f"{home}/roots", b"bytes \\xff")
            tell(made=(await sandbox.files.stat(f"{home}/roots")).uid)
            tell(listed=[info.name for info in await sandbox.files.list(home)])
            await sandbox.files.rename(f"{home}/roots", f"{home}/d/moved")
            os.chdir(HOME)
            await sandbox.files.download(f"{home}/d", "got")
            tell(got=sorted(os.listdir("got")), mode=os.stat("got/f").st_mode & 0o777, owner=os.stat("got/f").st_uid)
            await sandbox.files.remove(f"{home}/d", recursive=True)
            tell(left=await sandbox.files.exists(f"{home}/d"))
            try:
                await sandbox.files.read("/nowhere")
            except NotFoundError as error:
                tell(error=str(error))
        """
    )

    assert (told["read"], told["kept"], told["made"]) == ("his\n", [1000, 1000, 0], 0)
    assert (told["listed"], told["got"], told["left"]) == (["d", "roots"], ["f", "moved"], False)
    assert (told["mode"], told["owner"]) == (0, user.uid)
    assert told["error"] == "'/nowhere' does not exist"


def test_files_have_the_rights_of_root_inside_and_no_more(user: PlainUser) -> None:
    told = user.run(
        """
        async def tried(attempt):
            try:
                return ["done", await attempt]
            except FailedPreconditionError as error:
                return ["refused", error.message]

        for name, capabilities in (("usual", Security().capabilities), ("none", frozenset())):
            security = Security(capabilities=capabilities)
            async with Engine.open() as engine, engine.create(resources=FREE, security=security) as sandbox:
                await sandbox.sh("umask 077; mkdir ~/d; echo his > ~/d/f", user="1000", check=True)
                tell(**{
                    name: {
                        "inside": (await sandbox.run(["cat", "/home/user/d/f"])).exit_code,
                        "read": await tried(sandbox.files.exists("/home/user/d/f")),
                        "write": await tried(sandbox.files.write("/home/user/d/f", b"ours")),
                        "own": await tried(sandbox.files.write("/tmp/f", b"ours")),
                    }
                })
        """
    )

    usual, none = told["usual"], told["none"]
    assert (usual["inside"], usual["read"], usual["write"], usual["own"]) == (0, ["done", True], *[["done", None]] * 2)
    assert none["inside"] != 0
    assert (none["read"][0], none["write"][0], none["own"][0]) == ("refused", "refused", "done")


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


CLERKS = """
        def clerks():
            found = []
            for entry in os.scandir("/proc"):
                if entry.name.isdecimal():
                    try:
                        if b"clerking" in Path(entry.path, "cmdline").read_bytes():
                            found.append(int(entry.name))
                    except OSError:
                        continue
            return found
"""


def test_a_clerk_that_was_killed_is_told_once_and_replaced(user: PlainUser) -> None:
    told = user.run(
        CLERKS
        + """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.write("/tmp/a", "x")
            (clerk,) = clerks()
            os.kill(clerk, signal.SIGKILL)
            while clerks() == [clerk]:
                await anyio.sleep(0.01)
            try:
                await sandbox.files.read("/tmp/a")
            except SandboxError as error:
                tell(first=type(error).__name__, words=str(error))
            tell(second=(await sandbox.files.read("/tmp/a")).decode())
        """
    )

    assert (told["first"], told["second"]) == ("UnavailableError", "x")
    assert "ask again" in told["words"]


def test_what_finds_no_room_with_a_clerk_harms_nobody_else(user: PlainUser) -> None:
    told = user.run(
        """
        import resource
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.write("/tmp/a", "x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.sh("mkdir /tmp/d; cd /tmp/d; seq 9000 | xargs touch")
            for name, asked in (("list", lambda: sandbox.files.list("/tmp/d")),
                                ("write", lambda: sandbox.files.write("/tmp/b", bytes(2 << 20)))):
                try:
                    tell(**{name: len(await asked() or "")})
                except SandboxError as error:
                    tell(**{name: str(error)})
            await sandbox.files.write("/tmp/a", "x")
            tell(after=(await sandbox.files.read("/tmp/a")).decode())
        """
    )

    assert "finds no room: File too large" in told["list"]
    assert "finds no room: File too large" in told["write"]
    assert told["after"] == "x"


def test_what_is_no_path_and_no_mode_is_refused_as_with_root(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            found = []
            for asked in (lambda: sandbox.files.read(b"/x"), lambda: sandbox.files.read(Path("/x")),
                          lambda: sandbox.files.write("/q", b"", mode=b"x"), lambda: sandbox.files.rename("/a", None),
                          lambda: sandbox.files.upload(b"/etc/passwd", "/q")):
                try:
                    await asked()
                except SandboxError as error:
                    found.append(type(error).__name__)
            tell(found=found)
        """
    )

    assert told["found"] == ["InvalidArgumentError"] * 5
