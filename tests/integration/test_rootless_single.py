"""The same for a user to whom no ids are subordinate: his own is the only one, and what that costs is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.plain_user import PlainUser, plain_user


@pytest.fixture
def user() -> Iterator[PlainUser]:
    """A user without subordinate ids; nothing of his engines is left after the test."""
    with plain_user(single=True) as user:
        yield user
        assert user.left() == []


@pytest.mark.parametrize("runtime", ["crun", "runc", "youki"])
def test_every_runtime_does_with_one_id(user: PlainUser, runtime: str) -> None:
    if shutil.which(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    told = user.run(
        f"""
        from unisandbox.backends.runc import RuncBackend
        async with Engine.open(backends={{"runc": RuncBackend({runtime!r})}}) as engine:
            async with engine.create(resources=FREE, network="host") as sandbox:
                done = await sandbox.sh("id -u; ls /dev/pts; cat > /dev/null; exit 7", input=b"in")
                tell(run=[done.exit_code, done.text.split()])
                async with sandbox.exec(["stat", "-c", "%u:%g", "/dev/pts/0"], tty=True) as process:
                    tell(tty=(await process.stdout.receive()).decode().strip(), code=(await process.wait()).code)
        """
    )

    assert told == {"run": [7, ["0", "ptmx"]], "tty": "0:0", "code": 0}


def test_two_sandboxes_with_the_same_id_do_not_reach_each_other(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as one, engine.create(resources=FREE) as two:
            await one.files.write("/tmp/secret", "his")
            async with one.exec(["sleep", "43219"]) as process:
                seen = await two.sh("ls /tmp; grep -l 4321[9] /proc/[0-9]*/cmdline")
                tell(seen=seen.text, killed=(await two.sh(f"kill {process.pid}")).exit_code)
        """
    )

    assert (told["seen"], told["killed"] != 0) == ("", True)


def test_another_user_inside_is_refused_with_the_way_to_a_range(user: PlainUser) -> None:
    told = user.run(
        """
        async def refused(name, attempt):
            try:
                await attempt()
                tell(**{name: ["done", "", ""]})
            except SandboxError as error:
                tell(**{name: [type(error).__name__, error.message, error.hint]})

        async def made(**options):
            async with engine.create(isolation="runc", resources=FREE, **options):
                pass

        async with Engine.open() as engine:
            await refused("sandbox", lambda: made(user="1000"))
            await refused("group", lambda: made(user="0:5"))
            async with engine.create(resources=FREE) as sandbox:
                for name in ("1000", "user", "nobody", "root:tty", "0:7"):
                    await refused(name, lambda: sandbox.run(["true"], user=name))
                adding = dict(rootfs="host", argv=["true"])
                await refused("container", lambda: sandbox.containers.add(user="1000", **adding))
                tell(after=(await sandbox.run(["id", "-u"])).text)
        """
    )

    assert told.pop("after") == "0\n"
    assert len(told) == 8
    for name, (kind, message, hint) in told.items():
        assert kind == "UnsupportedError", (name, message)
        assert "this host has one id for it: this user has 0 subordinate uids" in message, name
        assert "usermod --add-subuids " in hint, name


def test_files_inside_are_all_roots_and_outside_all_his(user: PlainUser) -> None:
    told = user.run(
        """
        work = Path(HOME, "work")
        work.mkdir()
        (work / "in").write_text("mine")
        mounts = [Mount.bind(str(work), "/mnt", readonly=False), Mount.bind("/etc/passwd", "/others")]
        async with Engine.open() as engine, engine.create(resources=FREE, mounts=mounts) as sandbox:
            done = await sandbox.sh("stat -c %u:%g /mnt/in /others; echo out > /mnt/out; chown 5 /mnt/out; ls /home")
            tell(seen=done.text.split(), said=done.stderr.decode())
            await sandbox.files.write("/tmp/a", "from outside")
            await sandbox.sh("mkdir /tmp/d; echo inside > /tmp/d/b; chmod 0 /tmp/d/b")
            tell(text=(await sandbox.run(["cat", "/tmp/a"])).text)
            tell(locked=(await sandbox.files.read("/tmp/d/b")).decode())
            info = await sandbox.files.stat("/tmp/d/b")
            tell(ids=[info.uid, info.gid, info.mode])
            await sandbox.files.download("/tmp/d", HOME + "/d")
            os.chmod(HOME + "/d/b", 0o600)
            await sandbox.files.upload(HOME + "/d", "/tmp/e")
            tell(copied=(await sandbox.run(["cat", "/tmp/e/b"])).text)
            await sandbox.files.remove("/tmp/e", recursive=True)
            tell(left=[info.name for info in await sandbox.files.list("/tmp")])
        """
    )

    assert told["seen"] == ["0:0", "65534:65534", "root"]
    assert "Invalid argument" in told["said"]
    status = (user.home / "work/out").stat()
    assert (status.st_uid, status.st_gid) == (user.uid, user.gid)
    assert (told["text"], told["locked"], told["copied"]) == ("from outside", "inside\n", "inside\n")
    assert (told["ids"], told["left"]) == ([0, 0, 0], ["a", "d"])


def test_files_are_copied_whatever_has_become_of_the_working_directory(user: PlainUser) -> None:
    told = user.run(
        """
        Path(HOME, "file").write_text("mine")
        os.mkdir(HOME + "/gone")
        os.chdir(HOME + "/gone")
        os.rmdir(HOME + "/gone")
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.upload(HOME + "/file", "/tmp/file")
            tell(read=(await sandbox.files.read("/tmp/file")).decode())
            try:
                await sandbox.files.upload("file", "/tmp/file")
            except SandboxError as error:
                tell(relative=type(error).__name__)
        """
    )

    assert told == {"read": "mine", "relative": "NotFoundError"}


def test_files_have_the_rights_of_root_inside_also_where_all_is_his(user: PlainUser) -> None:
    told = user.run(
        """
        async def tried(attempt):
            try:
                return [(await attempt).decode()]
            except FailedPreconditionError:
                return []

        for name, capabilities in (("usual", Security().capabilities), ("none", frozenset())):
            security = Security(capabilities=capabilities)
            async with Engine.open() as engine, engine.create(resources=FREE, security=security) as sandbox:
                await sandbox.sh("echo his > /tmp/f; chmod 0 /tmp/f", check=True)
                inside = (await sandbox.run(["cat", "/tmp/f"])).text
                tell(**{name: [inside, await tried(sandbox.files.read("/tmp/f"))]})
        """
    )

    assert (told["usual"], told["none"]) == (["his\n", ["his\n"]], ["", []])


@pytest.mark.root
def test_further_groups_of_the_user_stay_with_programs_inside(user: PlainUser) -> None:
    path = user.home / "of-the-group"
    path.write_text("for the group")
    os.chown(path, 0, user.groups[0])
    path.chmod(0o040)
    told = user.run(
        """
        mounts = [Mount.bind(HOME + "/of-the-group", "/given")]
        async with Engine.open() as engine, engine.create(resources=FREE, mounts=mounts) as sandbox:
            tell(groups=(await sandbox.sh("grep Groups /proc/self/status")).text.split())
            tell(read=(await sandbox.run(["cat", "/given"])).text, files=(await sandbox.files.read("/given")).decode())
            left = await sandbox.run(["python3", "-c", "import os; os.setgroups([])"])
            tell(left=left.stderr.decode())
        """
    )

    assert told["groups"] == ["Groups:", "65534"]
    assert (told["read"], told["files"]) == ("for the group", "for the group")
    assert "PermissionError" in told["left"]


def test_power_over_processes_is_refused_and_without_it_root_inside_does_not_reach_init(user: PlainUser) -> None:
    told = user.run(
        """
        usual = Security().capabilities
        async with Engine.open() as engine:
            try:
                async with engine.create(resources=FREE, security=Security(capabilities=usual | {"CAP_SYS_PTRACE"})):
                    tell(refused="")
            except UnsupportedError as error:
                tell(refused=error.message, hint=error.hint)
            power = Security(capabilities=usual | {"CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH", "CAP_SYS_RESOURCE"})
            async with engine.create(resources=FREE, security=power, share_pid=True) as sandbox:
                await sandbox.containers.add(rootfs="host", argv=["sleep", "61"])
                names = ("mem", "environ", "root/etc", "fd/3", "exe")
                tries = "; ".join(f"cat $init/{name} >/dev/null 2>&1 && echo $init/{name}" for name in names)
                inits = "$(for d in /proc/[0-9]*; do grep -qx init $d/comm && echo $d; done)"
                tell(inits=len((await sandbox.sh(f"echo {inits}")).text.split()))
                tell(reached=(await sandbox.sh(f"for init in {inits}; do {tries}; done")).text.split())
        """
    )

    assert "CAP_SYS_PTRACE" in told["refused"]
    assert "init belongs to root inside" in told["refused"]
    assert "usermod --add-subuids" in told["hint"]
    assert told["inits"] == 3
    assert told["reached"] == []


def test_init_is_executed_by_whoever_may_not_read_it_and_so_cannot_be_reached_from_its_first_instruction_on(
    user: PlainUser,
) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.run(["true"])
            host = engine._core.host
            [config] = Path(host.keeper.outside(host.work_dir)).glob("*/b/*/config.json")
            tell(given=json.loads(config.read_text())["process"]["capabilities"])

        # What that is worth: root of a namespace looks at a program of his own in the same one, which he may only
        # execute. Nobody has CAP_SYS_PTRACE there.
        import shutil
        from unisandbox.host import subordinate, syscalls
        from unisandbox.host.power import ids
        PTRACE, OVERRIDE, READ_SEARCH = 1 << 19, 1 << 1, 1 << 2
        program = shutil.copy("/bin/sleep", HOME + "/program")
        os.chmod(program, 0o111)
        subordinate.enter(*ids.maps())
        syscalls.prctl(24, 19)  # PR_CAPBSET_DROP
        effective, permitted, _ = syscalls.capget()
        syscalls.capset(effective & ~PTRACE, permitted & ~PTRACE, 0)
        for name, without in (("by_one_who_may_read", 0), ("by_one_who_may_not", OVERRIDE | READ_SEARCH)):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
            if pid == 0:
                syscalls.capset(effective & ~PTRACE & ~without, permitted & ~PTRACE, 0)
                os.execv(program, ["program", "60"])
            os.close(writer)
            os.read(reader, 1)  # the end of it says that the program runs
            os.close(reader)
            try:
                tell(**{name: os.readlink(f"/proc/{pid}/exe") == program})
            except PermissionError:
                tell(**{name: False})
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        """
    )

    reading = {"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"}
    assert not reading & {*told["given"]["effective"]}
    assert "CAP_DAC_OVERRIDE" in told["given"]["permitted"]
    assert (told["by_one_who_may_read"], told["by_one_who_may_not"]) == (True, False)


CAPABILITIES = """
        from unisandbox.backends.runc import backend
        claimed = backend.capabilities
        probe = await backend.probe(deep=True)
        tell(users=claimed.users, own_ids=claimed.own_ids, notes=claimed.notes)
        tell(available=probe.available, reason=probe.reason, facts=dict(probe.facts), warnings=probe.warnings)
"""


def test_capabilities_and_probe_tell_what_one_id_costs_and_what_gives_more(user: PlainUser) -> None:
    told = user.run(CAPABILITIES)

    assert (told["users"], told["own_ids"]) == (False, False)
    for loss in ("another user or group is refused", "further groups", "CAP_SYS_PTRACE is refused"):
        assert any(note.startswith("without subordinate ids: ") and loss in note for note in told["notes"]), loss
        assert loss in told["facts"]["without root"]
    assert told["available"], told["reason"]
    assert told["facts"]["user ids"] == "1: this user's own"
    [warning] = [warning for warning in told["warnings"] if "one user id only" in warning]
    assert "this user has 0 subordinate uids" in warning
    assert "Remedy: usermod --add-subuids" in warning


TEMPORARY = "T=/mnt; mount -t tmpfs none $T; chmod 755 $T"
WITHOUT = {
    "newuidmap and newgidmap are not installed": ("mount --bind /dev/null $(command -v newuidmap)", (), "uidmap"),
    "this user has 0 subordinate gids": (": > $T/none; mount --bind $T/none /etc/subgid", (), "usermod"),
    "this user has 10 subordinate uids": (
        "echo plain:300000:10 > $T/few; mount --bind $T/few /etc/subuid",
        (),
        "usermod --add-subuids 300010-365545",
    ),
    "no_new_privs": ("", ("--no-new-privs",), "NoNewPrivileges=no"),
    "newgidmap is not set-uid and has no capabilities": (
        "cp $(command -v newgidmap) $T/copy; chmod 755 $T/copy; mount --bind $T/copy $(command -v newgidmap)",
        (),
        "chmod u+s",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("why", WITHOUT)
def test_whoever_cannot_have_a_range_has_one_id_and_is_told_why(why: str) -> None:
    setup, more, remedy = WITHOUT[why]
    with plain_user() as user:
        told = user.run(
            CAPABILITIES
            + """
        async with Sandbox.create(isolation="runc", resources=FREE) as sandbox:
            tell(map=(await sandbox.run(["cat", "/proc/self/uid_map"])).text.split())
""",
            setup=f"{TEMPORARY}; {setup}" if setup else "",
            more=more,
        )
        assert user.left() == []

    assert told["available"], told["reason"]
    assert told["map"] == ["0", "0", "1"]
    [warning] = [warning for warning in told["warnings"] if "one user id only" in warning]
    assert why in warning
    assert remedy in warning


# Root of a user namespace of 65,536 ids, as in a container, becomes whatever is given.
CONTAINER = """
import os, sys
from unisandbox.host import syscalls
reading, writing = os.pipe()
target, child = os.getpid(), os.fork()
if child == 0:
    os.read(reading, 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{target}/{kind}_map", "w") as file:
            file.write("0 0 65536")
    os._exit(0)
syscalls.unshare(syscalls.CLONE_NEWUSER)
os.write(writing, b".")
assert os.waitpid(child, 0)[1] == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
IN_IT = """
import anyio, json
from unisandbox import Resources, Sandbox
from unisandbox.backends.runc import backend
async def main():
    probe = await backend.probe()
    async with Sandbox.create(isolation="runc", resources=Resources.unlimited(), network="host") as sandbox:
        ids = (await sandbox.run(["cat", "/proc/self/uid_map"])).text.split()
    print(json.dumps({"map": ids, "warnings": probe.warnings}))
anyio.run(main)
"""


@pytest.mark.root
def test_a_range_that_is_not_in_the_namespace_of_this_process_is_none() -> None:
    with plain_user() as user:  # 200,000 and what follows are subordinate to him
        become = user.command(["python3", "-c", IN_IT])
        argv = [sys.executable, "-c", CONTAINER, *become]
        done = subprocess.run(argv, env=user.environment(), capture_output=True, timeout=60, check=False, text=True)
        assert user.left() == []

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["map"] == ["0", "0", "1"]
    [warning] = [warning for warning in told["warnings"] if "one user id only" in warning]
    assert "subordinate uids of this user (/etc/subuid) are not in the user namespace of this process" in warning


def test_doctor_names_what_is_lost_with_one_id(user: PlainUser) -> None:
    told = user.run(
        """
        argv = [sys.executable, "-m", "unisandbox.cli", "doctor"]
        tell(doctor=subprocess.run(argv, capture_output=True, text=True).stdout)
        """
    )

    said = told["doctor"].split("\nrunc: ")[1]
    assert "warning: one user id only" in said
    assert "user ids: 1: this user's own" in said
    assert "without subordinate ids: programs inside keep this user's further groups" in said


@pytest.mark.root
@pytest.mark.timeout(1800)
def test_the_contract_holds_with_one_id(user: PlainUser, pytestconfig: pytest.Config) -> None:
    """The conformance tests as that user: with --long all of them, else those of the usual settings."""
    name = "unisandbox.conformance" + ("" if pytestconfig.getoption("--long") else ".test_defaults")
    done = user.pytest("--backend", "runc", "-k", "not trio", "--pyargs", name, timeout=1700)

    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert " passed" in done.stdout
