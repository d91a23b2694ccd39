"""Closed by default: what a program finds when nobody has asked for anything."""

from __future__ import annotations

import os

import pytest

from unisandbox import Sandbox, UnsupportedError
from unisandbox.api import Capabilities
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs

pytestmark: pytest.MarkDecorator = pytest.mark.anyio
of_processes: pytest.MarkDecorator = pytest.mark.needs("processes")


def _table(status: str) -> dict[str, str]:
    return {line.split(":", 1)[0]: line.split(":", 1)[1].strip() for line in status.splitlines() if ":" in line}


@of_processes
@pytest.mark.parametrize("user", [None, "1000"])
async def test_a_process_has_few_rights(sandbox: Sandbox, capabilities: Capabilities, user: str | None) -> None:
    if user is not None and not capabilities.users:
        with pytest.raises(UnsupportedError):
            await sandbox.run(["true"], user=user)
        return
    status = _table((await sandbox.run(["cat", "/proc/self/status"], user=user)).text)

    # 0 chown, 1 dac_override, 3 fowner, 4 fsetid, 5 kill, 6 setgid, 7 setuid, 8 setpcap, 10 net_bind_service,
    # 18 sys_chroot, 31 setfcap. Source: include/uapi/linux/capability.h.
    at_most = sum(1 << n for n in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))
    for name in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(status[name], 16) & ~at_most == 0, name
    if user is not None:
        assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] in {"2", "0"}
    assert int((await sandbox.run(["cat", "/proc/self/oom_score_adj"])).text) > 0


async def test_nothing_but_the_standard_streams_is_open(sandbox: Sandbox, programs: Programs) -> None:
    assert (await sandbox.run(programs.descriptors())).text.split() == ["0", "1", "2"]
    assert (await sandbox.run(programs.descriptors(), input=b"x")).text.split() == ["0", "1", "2"]


@of_processes
async def test_exactly_the_standard_streams_are_open(sandbox: Sandbox) -> None:
    # 3 is the directory that is being listed.
    assert (await sandbox.run(["ls", "/proc/self/fd"])).text.split() == ["0", "1", "2", "3"]
    assert (await sandbox.run(["ls", "/proc/self/fd"], input=b"x")).text.split() == ["0", "1", "2", "3"]


async def test_nothing_of_the_host_is_in_the_environment(
    create: Create, programs: Programs, capabilities: Capabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISANDBOX_TEST_TOKEN", "secret")
    async with create(env={"MINE": "1"}) as sandbox:
        environment = dict(
            entry.split("=", 1)
            for entry in (await sandbox.run(programs.environment(), env={"HIS": "2"})).text.split("\0")
            if entry
        )

    if not capabilities.processes:
        environment.pop("PWD", None)  # where there is no working directory its name is all that there is
    assert {"PATH", "HOME", "LANG", "MINE", "HIS"} == set(environment)


@of_processes
async def test_the_network_is_its_own_and_empty(sandbox: Sandbox) -> None:
    interfaces = (await sandbox.sh("tail -n +3 /proc/net/dev")).text.splitlines()
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    ping = (
        "import socket as s; a = s.create_server(('127.0.0.1', 0)); s.create_connection(a.getsockname()); print('up')"
    )
    assert (await sandbox.run(["python3", "-c", ping])).text == "up\n"
    out = "import socket\ntry: socket.create_connection(('198.51.100.1', 80), 2)\nexcept OSError as e: print(e.errno)"
    assert (await sandbox.run(["python3", "-c", out])).text.strip() == "101"  # ENETUNREACH


@pytest.mark.needs("own_ids")
@of_processes
async def test_the_user_is_roots_shadow(sandbox: Sandbox) -> None:
    assert (await sandbox.sh("id -u; id -g")).text.split() == ["0", "0"]
    words = (await sandbox.run(["cat", "/proc/self/uid_map"])).text.split()
    assert words[0] == "0"
    assert int(words[1]) >= 65536, "root inside is a user of the host that nobody else is"


@of_processes
async def test_the_hostname_is_not_the_hosts(sandbox: Sandbox) -> None:
    name = (await sandbox.run(["cat", "/proc/sys/kernel/hostname"])).text.strip()

    assert name == sandbox.id[:12]
    assert name != os.uname().nodename


@of_processes
async def test_devices_are_the_usual_few(sandbox: Sandbox) -> None:
    names = set((await sandbox.run(["ls", "/dev"])).text.split())

    assert names <= {
        "console", "core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    }  # fmt: skip
    done = await sandbox.sh("echo x > /dev/null && head -c 4 /dev/zero | wc -c && head -c 4 /dev/urandom | wc -c")
    assert done.text.split() == ["4", "4"]


@pytest.mark.needs("rootfs:host", "processes")
async def test_the_base_cannot_be_written(create: Create) -> None:
    async with create(rootfs="host") as sandbox:
        for path in ("/x", "/usr/x", "/etc/x", "/bin/x", "/var/x", "/sys/x", "/proc/sys/kernel/x"):
            done = await sandbox.sh(f": > {path}")
            assert done.exit_code != 0, path
        for path in ("/tmp/x", "/run/x", "/home/x", "/dev/shm/x"):
            assert (await sandbox.sh(f": > {path}")).exit_code == 0, path


@pytest.mark.needs("rootfs:host", "processes")
async def test_nothing_of_the_users_can_be_seen(create: Create, capabilities: Capabilities) -> None:
    async with create(rootfs="host") as sandbox:
        assert (await sandbox.run(["ls", "-A", "/root/"])).text == ""
        assert set((await sandbox.run(["ls", "-A", "/home"])).text.split()) == {
            "root",
            *["user"] * capabilities.users,
        }
        assert set((await sandbox.run(["ls", "-A", "/etc"])).text.split()) <= {
            "alternatives", "group", "hostname", "hosts", "ld.so.cache", "localtime", "nsswitch.conf", "passwd",
            "resolv.conf", "ssl", "os-release",
        }  # fmt: skip
        listing = (await sandbox.sh("ls -A /var/lib /var/log /srv /opt /mnt /media /usr/local 2>/dev/null")).text
        # Those that are there are empty.
        assert set(listing.replace(":", "").split()) <= {"/media", "/mnt", "/opt", "/srv", "/usr/local"}


@of_processes
async def test_only_its_own_processes_are_seen(sandbox: Sandbox) -> None:
    listing = (await sandbox.sh("ls -d /proc/[0-9]*")).text.split()

    assert len(listing) <= 4
