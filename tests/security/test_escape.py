"""What somebody inside would try. Each attempt succeeds where its protection is taken away, so each test can fail."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import attrs
import pytest
from tests.security.attacks import (
    ALL_DEVICES,
    PRELUDE,
    WITH_OLD_RIGHTS,
    attack,
    attack_from_the_host,
    privileged,
    try_it,
    unfiltered,
    without_mount_flags,
)

from unisandbox import Engine, Mount, Rootfs
from unisandbox.api import DEFAULT_CAPABILITIES
from unisandbox.backends.runc import RuncBackend
from unisandbox.sandbox import SandboxOptions

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.root,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks name system calls by the numbers of x86_64"),
]


@attrs.frozen
class Attack:
    """A Python function's body that returns when it worked, and where it does work: options, or None for the host."""

    body: str
    where: SandboxOptions | None


ATTACKS: Final = {
    "mount a file system": Attack('call("mount", b"x", b"/tmp", b"tmpfs", 0, None)', privileged("SYS_ADMIN")),
    "make the base writable": Attack('call("mount", None, b"/", None, 32 | 4096, None)', None),
    "mount a hierarchy of cgroups": Attack(
        'kind, data = (b"cgroup", b"memory") if os.path.exists("/proc/cgroups") and "memory" in '
        'open("/proc/self/cgroup").read() else (b"cgroup2", None)\n    call("mount", b"x", b"/tmp", kind, 0, data)',
        privileged("SYS_ADMIN"),
    ),
    "unmount what masks": Attack(
        'masks = [line.split()[1] for line in open("/proc/mounts") if line.split()[1].startswith("/proc/")]\n'
        '    call("umount2", masks[0].encode(), 2)',
        privileged("SYS_ADMIN"),
    ),
    "set the core pattern": Attack(
        'path = "/proc/sys/kernel/core_pattern"\n    old = open(path).read()\n    open(path, "w").write(old)', None
    ),
    "load a module": Attack(
        # EINVAL would say that the kernel has looked at the (empty) module.
        'try:\n        syscall(175, b"", 0, b"")\n    except OSError as e:\n        if e.errno not in (errno.EINVAL, '
        "errno.ENOEXEC, errno.EFAULT): raise",
        None,
    ),
    "trigger sysrq": Attack('os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY))', None),
    "read the kernel's memory": Attack('os.read(os.open("/proc/kcore", os.O_RDONLY), 1) or os._exit(0)', None),
    "read the kernel's log": Attack('os.open("/dev/kmsg", os.O_RDONLY)', None),
    "make a device and open it": Attack(
        'os.mknod("/tmp/.unisandbox-kmsg", 0o20600, os.makedev(1, 11))\n    try:\n'
        '        os.open("/tmp/.unisandbox-kmsg", os.O_RDONLY)\n    finally:\n'
        '        os.unlink("/tmp/.unisandbox-kmsg")',
        None,
    ),
    "change a setting of the host in sysfs": Attack(
        'os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_WRONLY)', None
    ),
    "trace the first process": Attack(
        "syscall(101, 16, 1, 0, 0)\n    os.waitpid(1, 0x40000000)\n    syscall(101, 17, 1, 0, 0)", None
    ),
    "trace a process of another user": Attack(
        'child = subprocess.Popen(["sleep", "30"], user=1000)\n    try:\n        syscall(101, 16, child.pid, 0, 0)\n'
        "    finally:\n        child.kill()\n        child.wait()",
        unfiltered("SYS_PTRACE"),
    ),
    "use the kernel's keyrings": Attack('syscall(248, b"user", b"x", b"y", 1, ctypes.c_long(-3))', unfiltered()),
    "make a user namespace": Attack('call("unshare", 0x10000000)', unfiltered()),
    "use io_uring": Attack(
        # It is refused with EFAULT where it exists: there is no place for the answer.
        "try:\n        syscall(425, 1, None)\n    except OSError as e:\n        if e.errno != errno.EFAULT: raise",
        unfiltered(),
    ),
    "open a raw socket": Attack("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", unfiltered("NET_RAW")),
    "change the hostname": Attack('socket.sethostname("pwned")', unfiltered("SYS_ADMIN")),
    "be spared by the OOM killer": Attack('os.write(os.open("/proc/self/oom_score_adj", 1), b"-1")', None),
    "be killed later than others": Attack('os.write(os.open("/proc/self/oom_score_adj", 1), b"499")', None),
    "raise a hard limit": Attack(
        "import resource\n    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard + 1))",
        None,
    ),
    "become root by a set-uid program": Attack(
        "import shutil, tempfile\n    with tempfile.TemporaryDirectory() as d:\n        os.chmod(d, 0o755)\n"
        '        shutil.copy("/usr/bin/id", d + "/id")\n        os.chmod(d + "/id", 0o4755)\n'
        '        got = subprocess.run([d + "/id", "-u"], user=1000, group=1000, extra_groups=[], capture_output=True)\n'
        '        assert got.stdout == b"0\\n", got',
        None,
    ),
    "see the host's processes": Attack(
        'assert len([p for p in os.listdir("/proc") if p.isdigit()]) > 6, os.listdir("/proc")', None
    ),
    "see the host's users": Attack('assert open("/etc/shadow").read()', None),
    "see the host's logs": Attack('assert os.listdir("/var/log")', None),
}


def _may_set_limits() -> bool:
    """Whether root of this machine has CAP_SYS_RESOURCE: only then the kernel takes our oom_score_adj for a minimum."""
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(effective.split()[1], 16) & 1 << 24)


@pytest.mark.parametrize("name", ATTACKS)
async def test_it_is_held(engine: Engine, name: str) -> None:
    if name == "be killed later than others" and not _may_set_limits():
        pytest.skip("this machine's root lacks CAP_SYS_RESOURCE, so its own oom_score_adj is no minimum either")
    assert (await attack(engine, ATTACKS[name].body)).startswith("held: ")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("name", ATTACKS)
async def test_it_works_without_the_protection(engine: Engine, name: str) -> None:
    attempt = ATTACKS[name]
    if attempt.where is not None:
        got = await attack(engine, attempt.body, **attempt.where)
    else:
        got = attack_from_the_host(attempt.body)
    if got.startswith("held: ") and attempt.where is None:
        # This machine's own root may not do it either (a container, a locked kernel): then it proves nothing here.
        pytest.skip(f"also held outside of a sandbox: {got}")
    assert got == "escaped"


async def test_a_device_is_held_by_its_cgroup_alone(engine: Engine) -> None:
    """Also root of the host with the right to make devices cannot open them, where no mount forbids it."""
    body = ATTACKS["make a device and open it"].body.replace("/tmp/", "/dev/")

    assert "held: PermissionError(1" in await attack(engine, body, **privileged("MKNOD", "SYSLOG"))
    assert await attack(engine, body, **privileged("MKNOD", "SYSLOG", of=ALL_DEVICES)) == "escaped"


@contextlib.contextmanager
def _abstract_listener(name: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        yield


@pytest.mark.parametrize("userns", ["private", "host"])
async def test_no_device_of_the_host_is_given_to_a_sandbox(engine: Engine, userns: Literal["private", "host"]) -> None:
    """crun gives its container the streams that it is started with; the host's own /dev/null was among them."""
    before = os.stat("/dev/null")
    async with engine.create(rootfs="host", userns=userns, user="1000") as sandbox:
        container = await sandbox.containers.add(rootfs="host", argv=["true"], user="1000")
        await container.wait()
        for command in ("chmod 600 /dev/null", "chown 1000 /dev/null", "test -O /dev/null"):
            assert (await sandbox.sh(command, user="1000")).exit_code != 0, command
            if userns == "private":
                assert (await sandbox.sh(command, user="0")).exit_code != 0, command
    after = os.stat("/dev/null")
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


async def test_the_hosts_abstract_sockets_are_out_of_reach(engine: Engine) -> None:
    name = f"unisandbox-test-{secrets.token_hex(4)}"
    body = f'socket.socket(socket.AF_UNIX).connect("\\0{name}")'
    with _abstract_listener(name):
        assert "held: ConnectionRefusedError" in await attack(engine, body)
        assert await attack(engine, body, network="host") == "escaped"


async def test_the_hosts_tcp_ports_are_out_of_reach(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        body = f"socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 5)"
        assert "held: " in await attack(engine, body)
        assert await attack(engine, body, network="host") == "escaped"


async def test_a_file_of_the_hosts_root_cannot_be_read_by_root_inside(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "secret").chmod(0o600)
    mount = Mount.bind(tmp_path, "/mnt/d", idmap=False)
    body = 'open("/mnt/d/secret").read()'

    assert "held: PermissionError" in await attack(engine, body, mounts=[mount])
    assert await attack(engine, body, mounts=[mount], userns="host") == "escaped"


async def test_a_keeper_takes_no_orders_from_a_sandbox(tmp_path: Path) -> None:
    socket = f"{tmp_path}/state/keeper.sock"
    body = (
        "import json, socket\n"
        "    keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"    keeper.connect({socket!r})\n"
        '    keeper.send(json.dumps({"op": "hello", "id": 1, "after": 0}).encode())\n'
        "    if not keeper.recv(65536): raise ConnectionResetError"
    )

    async with Engine.open(tmp_path / "state") as engine:
        # Root inside is the user who started the keeper, as it always is without root.
        said = await attack(engine, body, mounts=[Mount.bind(tmp_path, str(tmp_path))], userns="host")
        assert "held: ConnectionResetError" in said or "held: BrokenPipeError" in said
        assert attack_from_the_host(body) == "escaped"


@pytest.fixture
def private_program() -> Iterator[Path]:
    """A file below /usr that only the host's root may read."""
    path = Path(f"/usr/lib/unisandbox-test-{secrets.token_hex(4)}")
    try:
        path.write_text("s")
    except OSError:
        pytest.skip("/usr is read-only here")
    path.chmod(0o600)
    yield path
    path.unlink()


async def test_only_what_everybody_may_read_is_read_below_usr(engine: Engine, private_program: Path) -> None:
    body = f'open("{private_program}").read()'

    assert "held: PermissionError" in await attack(engine, body)
    assert await attack(engine, body, userns="host") == "escaped"


async def test_a_read_only_mount_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    body = 'open("/mnt/d/x", "w").write("x")'

    assert "held: " in await attack(engine, body, mounts=[Mount.bind(tmp_path, "/mnt/d")])
    assert await attack(engine, body, mounts=[Mount.bind(tmp_path, "/mnt/d", readonly=False)]) == "escaped"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("runtime", ["crun", "runc", "youki"])
async def test_the_base_that_all_sandboxes_share_cannot_be_written_by_root_of_the_host(runtime: str) -> None:
    backend = RuncBackend(runtime)
    if not (await backend.probe()).available:
        pytest.skip(f"{runtime} is not installed")
    async with Engine.open(backends={"runc": backend}) as engine:
        for path in ("/x", "/etc/x"):
            body = f'open("{path}", "w")'
            async with engine.create(isolation="runc") as other:
                assert "held: OSError(30" in await attack(engine, body, userns="host")
                assert (await other.run(["test", "-e", path])).exit_code == 1
            body = without_mount_flags("/", f'{body}\n    os.unlink("{path}")')
            assert await attack(engine, body, **privileged("SYS_ADMIN")) == "escaped"


async def test_the_root_of_a_shared_pid_namespace_cannot_be_written_by_root_of_the_host(engine: Engine) -> None:
    options = privileged("SYS_PTRACE", "SYS_ADMIN", share_pid=True)
    body = 'root = os.open("/proc/1/root", os.O_RDONLY | os.O_DIRECTORY)\n    open(f"/proc/self/fd/{root}/x", "w")'
    enter = 'call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)'

    assert "held: OSError(30" in await attack(engine, body, **options)
    body = without_mount_flags("/", 'open("/x", "w")')
    assert await attack(engine, f"{enter}\n    {body}", **options) == "escaped"


@pytest.mark.parametrize("userns", ["private", "host"])
async def test_no_root_directory_gives_devices_or_rights(
    engine: Engine, tmp_path: Path, userns: Literal["private", "host"]
) -> None:
    (tmp_path / "usr").mkdir()
    for name in ("bin", "lib", "lib64"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    usr = Mount.bind("/usr", "/usr")
    for flag in ("ST_NODEV", "ST_NOSUID"):
        body = f'assert not os.statvfs("/").f_flag & os.{flag}'
        for rootfs in (Rootfs.host(), Rootfs.dir(tmp_path), Rootfs.dir(tmp_path, readonly=True)):
            mounts = [usr] if rootfs.kind == "dir" else []
            assert "held: AssertionError" in await attack(engine, body, rootfs=rootfs, mounts=mounts, userns=userns)
        assert await attack(engine, without_mount_flags("/", body), **privileged("SYS_ADMIN")) == "escaped"


@pytest.fixture
def treacherous(tmp_path: Path) -> Mount:
    """A directory with a device and a set-uid program in it."""
    os.mknod(tmp_path / "kmsg", 0o20666, os.makedev(1, 11))
    (tmp_path / "kmsg").chmod(0o666)
    shutil.copy("/usr/bin/id", tmp_path / "id")
    (tmp_path / "id").chmod(0o4755)
    tmp_path.chmod(0o755)
    return Mount.bind(tmp_path, "/mnt/d", readonly=False)


async def test_what_is_mounted_cannot_give_devices(engine: Engine, treacherous: Mount) -> None:
    options = privileged("SYS_ADMIN", "SYSLOG", of=ALL_DEVICES, mounts=[treacherous])
    body = 'os.open("/mnt/d/kmsg", os.O_RDONLY)'

    assert "held: PermissionError(13" in await attack(engine, body, **options)
    assert await attack(engine, without_mount_flags("/mnt/d", body), **options) == "escaped"


async def test_what_is_mounted_cannot_give_rights(engine: Engine, treacherous: Mount) -> None:
    options = privileged("SYS_ADMIN", of=WITH_OLD_RIGHTS, mounts=[treacherous])
    body = (
        'got = subprocess.run(["/mnt/d/id", "-u"], user=1000, group=1000, extra_groups=[], capture_output=True)\n'
        '    assert got.stdout == b"0\\n", got'
    )

    assert "held: AssertionError" in await attack(engine, body, **options)
    assert await attack(engine, without_mount_flags("/mnt/d", body), **options) == "escaped"


async def test_no_magic_link_of_proc_leads_to_the_host(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    body = (
        'found = [p for p in os.listdir("/proc") if p.isdigit() for link in ("root", "cwd", *(f"fd/{n}" for n in '
        f'range(32))) if os.path.exists(f"/proc/{{p}}/{{link}}{tmp_path}/secret")]\n    assert found'
    )

    assert "held: " in await attack(engine, body)
    assert await attack(engine, body, mounts=[Mount.bind(tmp_path, str(tmp_path))]) == "escaped"


async def test_an_open_file_of_the_host_process_is_not_handed_on(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    fd = os.open(tmp_path / "secret", os.O_RDONLY)
    body = (
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in range(3, 1024) if os.path.islink(f'/proc/self/fd/{n}')]\n"
        "    assert any('secret' in link for link in links), links"
    )
    try:
        # The worst case: somebody has made it inheritable on purpose.
        os.set_inheritable(fd, True)
        async with engine.create(isolation="runc") as sandbox:
            assert await try_it(sandbox, body) == "held: AssertionError([])"
            for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():  # noqa: ASYNC240
                assert not [link for link in _links(pid) if "secret" in link]
        done = subprocess.run(  # noqa: ASYNC221
            [sys.executable, "-c", PRELUDE.replace("{body}", body)], close_fds=False, capture_output=True, check=True
        )
        assert done.stdout == b"escaped\n"
    finally:
        os.close(fd)


def _links(pid: str) -> list[str]:
    return [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]


async def test_a_link_as_output_brings_no_file_of_the_host(engine: Engine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    async with engine.create(isolation="runc") as sandbox:
        await sandbox.run(["ln", "-s", str(secret), "/tmp/report"], check=True)
        await sandbox.files.download("/tmp/report", tmp_path / "report")
        # What a copy by name would have brought.
        assert Path(os.readlink(tmp_path / "report")).read_text() == "s"  # noqa: ASYNC240
        with pytest.raises(Exception, match="does not exist"):
            await sandbox.files.read("/tmp/report")


CORE_LIMIT: Final = """
import asyncio, resource, sys
from unisandbox import Resources, Sandbox
resource.setrlimit(resource.RLIMIT_CORE, (0, int(sys.argv[1])))
async def main():
    async with Sandbox.create(resources=Resources(memory=None, pids=None)) as sandbox:
        code = "import resource; print(*resource.getrlimit(resource.RLIMIT_CORE))"
        print((await sandbox.run(["python3", "-c", code])).text, end="")
asyncio.run(main())
"""


@pytest.mark.parametrize(("hosts_own", "inside"), [("-1", "1 1\n"), ("0", "0 0\n")])
def test_what_crashes_gives_its_memory_to_no_program_of_the_host(hosts_own: str, inside: str) -> None:
    """With a limit of 0 the kernel starts what core_pattern names after a bar, as the host's root; with 1 it does not.

    Tried in a virtual machine: the pattern is the whole machine's.
    """
    if int(hosts_own) and resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("this machine allows no cores")
    argv = [sys.executable, "-c", CORE_LIMIT, hosts_own]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stdout) == (0, inside), done.stderr


async def test_the_filter_holds_for_every_user_and_every_child(engine: Engine) -> None:
    body, child = ATTACKS["use the kernel's keyrings"].body, ["sh", "-c", '"$@"; exit $?', "sh"]
    async with (
        engine.create(isolation="runc") as sandbox,
        engine.create(**unfiltered()) as other,
    ):
        for user in (None, "1000"):
            assert "held: PermissionError(1" in await try_it(sandbox, body, user=user, by=child)
            assert await try_it(other, body, user=user, by=child) == "escaped"


async def test_rights_inside_are_those_that_were_asked_for_and_no_other(engine: Engine) -> None:
    # Exactly DEFAULT_CAPABILITIES. Source: include/uapi/linux/capability.h.
    usual = sum(1 << n for n in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))
    script = "sh -c 'grep -E CapBnd:\\|NoNewPrivs: /proc/self/status'"
    more = attrs.evolve(WITH_OLD_RIGHTS, capabilities=DEFAULT_CAPABILITIES | {"CAP_SYS_ADMIN"})
    async with (
        engine.create(isolation="runc") as sandbox,
        engine.create(isolation="runc", security=more) as other,
    ):
        for user in (None, "1000"):
            _, bound, _, held = (await sandbox.sh(script, user=user)).text.split()
            assert (int(bound, 16), held) == (usual, "1")
            _, bound, _, held = (await other.sh(script, user=user)).text.split()
            assert (int(bound, 16), held) == (usual | 1 << 21, "0")
