"""Namespaces are made without processes, verified, set up, and vanish with their descriptors."""

from __future__ import annotations

import encodings.idna  # noqa: F401 (sockets import it when first used, when our files may be out of reach)
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.isolated import isolated, open_fds

from unisandbox.host import jobs, namespaces, syscalls

pytestmark = pytest.mark.root

ALL = ["user", "net", "ipc", "uts"]
MAP = [[0, 1_000_000, 65_536]]


def _step(**fields: object) -> dict[str, object]:
    return {"do": "namespaces", "kinds": ALL, "uid_map": MAP, "gid_map": MAP, **fields}


def _named(steps: list[dict[str, object]], given: list[int]) -> dict[str, int]:
    return jobs.run(steps, given)[1]


def _inside(fds: dict[str, int], look: Callable[[], object]) -> object:
    """What `look` sees in these namespaces, as root of them."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for kind in ("user", "net", "ipc", "uts"):
                if kind in fds:
                    syscalls.setns(fds[kind], namespaces.KINDS[kind])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            os.write(write_end, repr(look()).encode())
        except BaseException as error:
            os.write(write_end, repr(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    seen = os.read(read_end, 65536).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    return eval(seen)  # noqa: S307 (our own child's repr)


def test_namespaces_are_new_owned_and_leave_no_process(tmp_path: Path) -> None:
    def work(_: Path) -> object:
        own = namespaces.process_namespaces(os.getpid())
        before = open_fds()
        result, fds = jobs.run([_step()], [])
        inodes = result["steps"][0]["inodes"]  # type: ignore[index]
        for kind, fd in fds.items():
            assert namespaces.kind_of(fd) == kind
            assert namespaces.namespace_inode(fd) == inodes[kind] != own[kind]
            if kind != "user":
                assert namespaces.owner_userns_inode(fd) == inodes["user"]
            assert not os.get_inheritable(fd)
        assert namespaces.process_namespaces(os.getpid()) == own
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        for fd in fds.values():
            os.close(fd)
        assert open_fds() == before
        return sorted(fds)

    assert isolated(work, tmp_path) == sorted(ALL)


def test_what_was_wished_is_seen_inside_and_not_outside(tmp_path: Path) -> None:
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "11"}

    def look() -> object:
        values = {name: Path("/proc/sys", *name.split(".")).read_text().strip() for name in sysctls}
        with socket.create_server(("127.0.0.1", 0)) as server:  # lo is up: this can be reached
            socket.create_connection(server.getsockname(), timeout=5).close()
        names = [name for _, name in socket.if_nameindex()]
        return values, socket.gethostname(), os.uname().nodename, names, Path("/proc/sys/kernel/domainname").read_text()

    def work(_: Path) -> object:
        host = (socket.gethostname(), Path("/proc/sys/kernel/shm_rmid_forced").read_text())
        fds = _named([_step(hostname="box", domainname="nis", sysctls=sysctls)], [])
        assert _inside(fds, look) == (sysctls, "box", "box", ["lo"], "nis\n")
        assert (socket.gethostname(), Path("/proc/sys/kernel/shm_rmid_forced").read_text()) == host
        return os.geteuid()

    assert isolated(work, tmp_path) == 0


def test_loopback_stays_down_when_asked(tmp_path: Path) -> None:
    def look() -> object:
        with socket.socket() as sock:
            sock.settimeout(5)
            return sock.connect_ex(("127.0.0.1", 9)) != 111  # ECONNREFUSED would mean that it is up

    def work(_: Path) -> object:
        fds = _named([_step(loopback=False)], [])
        return _inside(fds, look)

    assert isolated(work, tmp_path) is True


def test_without_a_user_namespace_ours_owns_the_new_ones(tmp_path: Path) -> None:
    def work(_: Path) -> object:
        fds = _named([{"do": "namespaces", "kinds": ["uts", "ipc"], "hostname": "plain"}], [])
        assert namespaces.owner_userns_inode(fds["uts"]) == namespaces.namespace_inode("/proc/self/ns/user")
        return sorted(fds)

    assert isolated(work, tmp_path) == ["ipc", "uts"]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (_step(kinds=["user", "pid"]), "kinds must be"),
        (_step(kinds=[]), "kinds must be"),
        (_step(uid_map=None), "uid map"),
        (_step(uid_map=[[1, 1_000_000, 5]]), "must hold id 0"),
        (_step(uid_map=[[0, -1, 5]]), "row of an id map"),
        (_step(hostname="x" * 65), "64 bytes"),
        (_step(kinds=["user"], hostname="x"), "uts namespace"),
        (_step(sysctls={"vm.swappiness": "1"}), "belongs to no namespace"),
        (_step(sysctls={"kernel.hostname": "x"}), "belongs to no namespace"),
        (_step(kinds=["user", "uts"], sysctls={"net.ipv4.ip_forward": "1"}), "belongs to no namespace"),
        (_step(sysctls={"net.ipv4.no_such": "1"}), "no_such"),
        (_step(sysctls={"net/../kernel/panic": "1"}), "belongs to no namespace"),
        (_step(sysctls={"net.ipv4.ip_forward": "many"}), "ip_forward=many"),
        (_step(colour="blue"), "unknown field 'colour'"),
        ({"do": "conjure"}, "unknown step"),
        ({"kinds": ["user"]}, "'do' is missing"),
    ],
)
def test_a_wrong_wish_is_an_error_and_leaves_nothing(tmp_path: Path, step: dict[str, object], words: str) -> None:
    def work(_: Path) -> object:
        before = open_fds()
        with pytest.raises(jobs.StepError) as caught:
            jobs.run([step], [])
        assert open_fds() == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert os.geteuid() == os.getegid() == 0
        return str(caught.value)

    assert words in isolated(work, tmp_path)


def test_two_sandboxes_never_share_a_namespace(tmp_path: Path, count: Callable[[int], int]) -> None:
    def work(_: Path) -> object:
        seen: set[int] = set()
        held = []
        for _n in range(count(200)):
            fds = _named([_step()], [])
            held.append(fds)
            inodes = {os.fstat(fd).st_ino for fd in fds.values()}
            assert not inodes & seen
            seen |= inodes
        return len(seen) == 4 * len(held)

    assert isolated(work, tmp_path) is True


def test_a_file_is_not_taken_for_a_namespace(tmp_path: Path) -> None:
    with (tmp_path / "net:[4026531840]").open("w") as file, pytest.raises(OSError, match="no namespace"):
        namespaces.kind_of(file.fileno())
    with Path("/dev/null").open() as file, pytest.raises(OSError, match="no namespace"):
        namespaces.kind_of(file.fileno())


def test_a_bound_namespace_file_is_known_by_its_kind(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        fds = _named([_step()], [])
        target = where / "pin"
        target.touch()
        syscalls.mount(f"/proc/self/fd/{fds['net']}", str(target), None, syscalls.MS_BIND)
        fd = os.open(target, os.O_RDONLY)
        return namespaces.kind_of(fd), namespaces.namespace_inode(str(target)) == namespaces.namespace_inode(fds["net"])

    assert isolated(work, tmp_path) == ["net", True]


CABLE = {
    "do": "cable",
    "fd": 0,
    "peer": "net",
    "name": "eth0",
    "peer_name": "inner",
    "mtu": 9000,
    "address": "10.9.0.2",
    "peer_address": "10.9.0.1",
    "prefix": 30,
}


def test_a_cable_joins_two_networks_and_the_peer_is_the_way_out(tmp_path: Path) -> None:
    def work(_: Path) -> object:
        first = _named([_step()], [])
        second = _named([{"do": "namespaces", "kinds": ["net"]}, CABLE], [first["net"]])
        made: list[socket.socket] = []
        told: list[object] = []

        def there() -> None:
            made.append(socket.create_server(("10.9.0.1", 0)))

        def here() -> None:
            with socket.create_connection(made[0].getsockname(), timeout=5) as connection:
                told.append(connection.getsockname()[0])
            told.append([name for _, name in socket.if_nameindex()])
            told.append(Path("/proc/thread-self/net/route").read_text().split("\n")[1].split()[:3])

        namespaces.inside_network(second["net"], there)
        namespaces.inside_network(first["net"], here)
        made[0].close()
        return told

    # The gateway is 10.9.0.1, as the kernel writes it on this machine.
    gateway = f"{int.from_bytes(socket.inet_aton('10.9.0.1'), 'little'):08X}"
    assert isolated(work, tmp_path) == ["10.9.0.2", ["lo", "eth0"], ["eth0", "00000000", gateway]]


def test_a_cable_that_cannot_be_made_is_told_by_the_name_of_its_interface(tmp_path: Path) -> None:
    def work(_: Path) -> object:
        first = _named([_step()], [])
        before = open_fds()
        with pytest.raises(jobs.StepError) as caught:
            jobs.run([{"do": "namespaces", "kinds": ["net"]}, {**CABLE, "name": "lo"}], [first["net"]])
        assert open_fds() == before
        return [caught.value.do, caught.value.errno, caught.value.message]

    assert isolated(work, tmp_path) == ["cable", errno.EEXIST, "interface 'lo': File exists"]


def test_an_ended_process_is_in_no_namespace() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        namespaces.process_namespaces(pid)
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        namespaces.process_namespaces(pid)
