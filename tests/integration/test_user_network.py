"""Networks in user mode: the outside is reached, the host's loopback is not, the helper lives as its sandbox does."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest
from tests.outside import HOST, NAMED, OUTSIDE, World, world
from tests.plain_user import plain_user
from tests.programs import program
from tests.user_networks import ATTACK, HELPERS, TUN, ended, main, one, told

from unisandbox import Engine, Network, UnsupportedError
from unisandbox.backends.runc import RuncBackend
from unisandbox.backends.runc.capabilities import roots_capabilities
from unisandbox.network import pasta

pytestmark = pytest.mark.root


def test_tcp_and_udp_reach_what_is_outside(around: World) -> None:
    with around.server(around.outside, OUTSIDE):
        words = one(
            around,
            f"tell(tcp=await inside(sandbox, \"print(tcp('{OUTSIDE}'))\"))",
            f"tell(udp=await inside(sandbox, \"print(udp('{OUTSIDE}', 'hello'))\"))",
            "tell(warnings=(await sandbox.status()).warnings)",
        )

    # What is outside sees the host.
    assert (words["tcp"], words["udp"]) == (f"seen {HOST}", "seen hello")
    assert (words["warnings"], words["left"]) == ([], [])


def test_sys_shows_the_interfaces_of_the_sandbox_and_cannot_be_written(around: World) -> None:
    words = one(
        around,
        "tell(shown=(await sandbox.sh('ls /sys/class/net')).text.split())",
        "tell(written=(await sandbox.sh('echo 1400 > /sys/class/net/eth0/mtu')).stderr.decode())",
    )

    assert (words["shown"], "Read-only" in words["written"]) == (["eth0", "lo"], True)


TRANSFER = """
import hashlib, os
sent = os.urandom(1 << 20) * 16
with socket.create_connection(("198.51.100.2", 7002)) as s:
    s.sendall(b"%d\\n" % len(sent))
    s.sendall(sent)
    print(hashlib.sha256(s.makefile("rb").read()).digest() == hashlib.sha256(sent).digest())
"""


def test_what_is_large_arrives_whole_in_both_directions(around: World) -> None:
    with around.server(around.outside, OUTSIDE):
        words = one(
            around,
            f"tell(same=await inside(sandbox, {TRANSFER!r}))",
        )

    assert words["same"] == "True"


def test_the_network_is_there_when_the_sandbox_is_told_ready(around: World) -> None:
    body = f"""
    async with Engine.open() as engine:
        for _ in range(10):
            async with engine.create(network="user") as sandbox:
                tell(answer=await inside(sandbox, "print(tcp('{OUTSIDE}'))"))
    tell(done=True)
    """
    with around.server(around.outside, OUTSIDE), program(main(body), wrapper=around.enter) as host:
        assert [host.heard()["answer"] for _ in range(10)] == [f"seen {HOST}"] * 10


def test_names_are_asked_of_the_hosts_name_server(around: World) -> None:
    lookup = "import socket; print(socket.gethostbyname('there.example'))"
    with around.server(around.outside, OUTSIDE) as server:
        words = one(
            around,
            f'tell(address=await inside(sandbox, "{lookup}"))',
            "tell(said=(await sandbox.sh('cat /etc/resolv.conf')).text)",
        )

        assert words["address"] == NAMED
        assert words["said"] == f"nameserver {pasta.NAME_SERVER}\n"
        assert server.heard() == ["udp", OUTSIDE, "query"]


def test_a_name_server_on_the_hosts_loopback_is_asked_for_names_too(around: World) -> None:
    around.resolv_conf.write_text("nameserver 127.0.0.53\n")
    with around.server(around.host, "127.0.0.53") as server:
        words = one(around, "tell(address=await inside(sandbox, \"print(socket.gethostbyname('there.example'))\"))")

        assert words["address"] == NAMED
        assert server.heard() == ["udp", "127.0.0.53", "query"]


def test_names_are_asked_of_the_server_that_the_spec_says(around: World) -> None:
    body = f"""
    dns = Dns(servers=("{OUTSIDE}",))
    async with Engine.open() as engine, engine.create(network="user", dns=dns) as sandbox:
        tell(said=(await sandbox.sh("cat /etc/resolv.conf")).text)
        tell(address=await inside(sandbox, "print(socket.gethostbyname('there.example'))"))
    tell(done=True)
    """
    with around.server(around.outside, OUTSIDE):
        words = told(around, body)

    assert (words["said"], words["address"]) == (f"nameserver {OUTSIDE}\n", NAMED)


@pytest.mark.parametrize("capabilities", ["", "NET_ADMIN,NET_RAW"])
def test_the_loopback_of_the_host_is_not_reached(around: World, capabilities: str) -> None:
    body = f"""
    from unisandbox import Security
    from unisandbox.api.spec import DEFAULT_CAPABILITIES
    security = Security(capabilities=DEFAULT_CAPABILITIES | set({capabilities.split(",") if capabilities else []!r}))
    async with Engine.open() as engine, engine.create(network="user", security=security) as sandbox:
        await inside(sandbox, {ATTACK!r})
        tell(outside=await inside(sandbox, "print(udp('{OUTSIDE}', 'last'))"))
    tell(done=True)
    """
    loopback = around.server(around.host, "127.0.0.1,127.0.0.9,::1")
    with loopback as server, around.server(around.outside, OUTSIDE):
        words = told(around, body)
        around.run(around.host, "socket.socket(2, 2).sendto(b'own', ('127.0.0.1', 7000))")

        assert words["outside"] == "seen last"
        assert server.heard() == ["udp", "127.0.0.1", "own"], "nothing has come from inside before that"


def test_nothing_reaches_in(around: World) -> None:
    body = """
    async with Engine.open() as engine, engine.create(network="user") as sandbox:
        server = "s = socket.create_server(('0.0.0.0', 7001)); print('up', flush=True); s.accept()"
        async with sandbox.exec(["python3", "-c", "import socket; " + server]) as process:
            await process.stdout.receive()
            tell(own=await inside(sandbox, "s = socket.create_connection(('10.0.2.2', 7001)); print('own')"))
        async with sandbox.exec(["python3", "-c", "import socket; " + server]) as process:
            await process.stdout.receive()
            tell(up=True)
            while not Path(sys.argv[1]).exists():
                await anyio.sleep(0.01)
    tell(done=True)
    """
    mark = Path(f"/tmp/tried-{os.getpid()}")
    with program(main(body), str(mark), wrapper=around.enter) as host:
        assert host.heard() == {"own": "own"}
        assert host.heard() == {"up": True}
        try:
            for where in (around.host, around.outside):
                for address in ("127.0.0.1", HOST):
                    code = f"s = socket.socket(); s.settimeout(10); print(s.connect_ex(('{address}', 7001)))"
                    assert around.run(where, code) == "111\n", (where, address)
        finally:
            mark.touch()
        assert host.heard() == {"done": True}
        mark.unlink()


def test_two_sandboxes_do_not_see_each_other(around: World) -> None:
    body = f"""
    async with Engine.open() as engine, engine.create(network="user") as a, engine.create(network="user") as b:
        server = "import socket; s = socket.create_server(('0.0.0.0', 7001)); print('up', flush=True); s.accept()"
        async with a.exec(["python3", "-c", server]) as process:
            await process.stdout.receive()
            addresses = ("127.0.0.1", "10.0.2.2", "10.0.2.1", "10.0.2.6")
            for address in addresses:
                tell(**{{address: await inside(b, f"print(tcp({{address!r}}, 7001))")}})
        tell(a=await inside(a, "print(tcp('{OUTSIDE}'))"), b=await inside(b, "print(tcp('{OUTSIDE}'))"))
        tell(helpers=len(helpers()))
    tell(done=True)
    """
    with around.server(around.outside, OUTSIDE):
        words = told(around, body)

    refused = "ConnectionRefusedError"
    assert [words[address] for address in ("127.0.0.1", "10.0.2.2", "10.0.2.1", "10.0.2.6")] == [refused] * 4
    assert (words["a"], words["b"], words["helpers"]) == (f"seen {HOST}", f"seen {HOST}", 2)


def test_the_helper_has_nothing_of_the_host_but_its_network(around: World) -> None:
    words = one(
        around,
        "[pid] = helpers()",
        "fields = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())",
        "tell(status={name: value.strip() for name, value in fields.items()})",
        "tell(files=os.listdir(f'/proc/{pid}/root'))",
        "tell(user=os.stat(f'/proc/{pid}/ns/user').st_ino, net=os.stat(f'/proc/{pid}/ns/net').st_ino)",
        "tell(namespaces=dict((await sandbox.status()).namespaces), host=os.stat('/proc/self/ns/net').st_ino)",
        "tell(env=Path(f'/proc/{pid}/environ').read_bytes().decode().split(chr(0))[:-1])",
        "tell(fds=sorted(os.readlink(f'/proc/{pid}/fd/{n}').split(':')[0] for n in os.listdir(f'/proc/{pid}/fd')))",
    )

    assert (words["status"]["Seccomp"], words["status"]["NoNewPrivs"], words["files"]) == ("2", "1", [])
    # Of its own user namespace's: that is the sandbox's.
    assert words["user"] == words["namespaces"]["user"]
    assert int(words["status"]["CapEff"], 16) & ~(1 << 10 | 1 << 21) == 0
    assert words["net"] == words["host"]
    assert {line.partition("=")[0] for line in words["env"]} == {"PATH", "LC_ALL"}
    assert not {name for name in words["fds"] if name.startswith("/") and name not in {"/dev/net/tun", "/dev/null"}}


DIES = """
async with Engine.open(sys.argv[1], policy=sys.argv[2]) as engine:
    sandbox = await engine.create(network="user", name="w")
    await sandbox.run(["true"])
    tell(keeper=engine._core.host.keeper.pid, helpers=helpers())
    await anyio.sleep_forever()
"""


@pytest.mark.parametrize("killed", ["host", "keeper", "both"])
def test_a_helper_ends_with_its_engine_whoever_is_killed(around: World, tmp_path: Path, killed: str) -> None:
    with program(main(DIES), str(tmp_path / "state"), "stop", wrapper=around.enter) as host:
        words = host.heard()
        [helper] = words["helpers"]
        pidfds = [os.pidfd_open(helper), os.pidfd_open(words["keeper"])]
        try:
            if killed in {"keeper", "both"}:
                os.kill(words["keeper"], signal.SIGKILL)
            if killed in {"host", "both"}:
                host.kill()
            assert ended(pidfds[0]), "the helper goes on"
            host.kill()
            assert ended(pidfds[1])
        finally:
            for fd in pidfds:
                os.close(fd)
    # What is left of the others is removed by the next one; the fixture of every test looks whether it is.
    body = "async with Engine.open(sys.argv[1]) as engine:\n    tell(done=len(await engine.list()))"
    told(around, body, str(tmp_path / "state"))


CUT = """
from unisandbox.host.boundary import watch
state, policy, point, victim = sys.argv[1:]
async with Engine.open(state, policy=policy) as engine:
    keeper = engine._core.host.keeper.pid
    def hook(name, of):
        if name == point:
            # It executes itself once more as it begins, and has no command line meanwhile.
            while name == "after network.start" and not helpers():
                time.sleep(0.001)
            tell(helpers=helpers())
            if victim != "host":
                end = os.pidfd_open(keeper)
                os.kill(keeper, signal.SIGKILL)
                if victim == "keeper":
                    select.select([end], [], [])  # what is killed a moment after the creation has not cut it
                os.close(end)
            if victim != "keeper":
                os.kill(os.getpid(), signal.SIGKILL)
    watch(hook)
    try:
        await engine.create(network="user", name="w")
    except UnavailableError as error:
        tell(error=str(error))
    watch(None)
"""


@pytest.mark.parametrize("policy", ["stop", "keep"])
@pytest.mark.parametrize("victim", ["host", "keeper", "both"])
@pytest.mark.parametrize("point", ["before network.start", "after network.start"])
def test_a_start_that_is_cut_leaves_no_helper(
    around: World, tmp_path: Path, point: str, victim: str, policy: str
) -> None:
    state = str(tmp_path / "state")
    with program(main(CUT), state, policy, point, victim, wrapper=around.enter) as host:
        assert len(host.heard()["helpers"]) == (1 if point.startswith("after") else 0)
        if victim == "keeper":
            assert "keeper" in host.heard()["error"]
        host.finish()
    body = """
    async with Engine.open(sys.argv[1]) as engine:
        tell(listed=[status.state for status in await engine.list()], left=helpers())
    tell(done=helpers())
    """
    words = told(around, body, state)

    assert (words["listed"], words["left"], words["done"]) == ([], [], [])


def test_a_kept_sandbox_keeps_its_network_and_its_helper(around: World, tmp_path: Path) -> None:
    body = f"""
    async with Engine.open(sys.argv[1], policy="keep") as engine:
        sandbox = await engine.get("w")
        tell(helpers=helpers(), warnings=(await sandbox.status()).warnings)
        tell(answer=await inside(sandbox, "print(tcp('{OUTSIDE}'))"))
        await sandbox.remove()
        tell(left=helpers())
    tell(done=True)
    """
    with around.server(around.outside, OUTSIDE):
        with program(main(DIES), str(tmp_path / "state"), "keep", wrapper=around.enter) as host:
            before = host.heard()["helpers"]
            host.kill()
        words = told(around, body, str(tmp_path / "state"))

    assert (words["helpers"], words["warnings"], words["answer"]) == (before, [], f"seen {HOST}")
    assert words["left"] == []


def test_a_helper_ends_when_the_time_of_its_sandbox_is_over(around: World) -> None:
    body = """
    async with Engine.open() as engine:
        sandbox = await engine.create(network="user", ttl=8)
        [helper] = helpers()
        pidfd = os.pidfd_open(helper)
        with anyio.fail_after(30):
            await anyio.wait_readable(pidfd)
        os.close(pidfd)
        tell(left=helpers())
    tell(done=True)
    """
    assert told(around, body)["left"] == []


def test_a_memory_limit_below_what_the_helper_takes_is_told(around: World) -> None:
    body = """
    async with Engine.open() as engine:
        try:
            await engine.create(network="user", resources=Resources(memory="8M"))
        except unisandbox.InvalidArgumentError as error:
            tell(error=str(error), left=helpers(), listed=len(await engine.list()))
    tell(done=True)
    """
    words = told(around, body)

    assert "memory limit" in words["error"]
    assert (words["left"], words["listed"]) == ([], 0)


def test_without_its_helper_a_sandbox_goes_on_and_its_status_tells(around: World) -> None:
    words = one(
        around,
        "[helper] = helpers()",
        "pidfd = os.pidfd_open(helper)",
        "os.kill(helper, 9)",
        "await anyio.wait_readable(pidfd)",
        "os.close(pidfd)",
        "status = await sandbox.status()",
        "tell(state=status.state, warnings=status.warnings, code=(await sandbox.sh('exit 3')).exit_code)",
        f"tell(tcp=await inside(sandbox, \"print(tcp('{OUTSIDE}'))\"))",
    )

    assert (words["state"], words["code"]) == ("ready", 3)
    assert "network helper" in words["warnings"][0]
    assert "create it anew" in words["warnings"][0]
    assert words["tcp"] in {"OSError", "TimeoutError"}
    assert words["left"] == []


def test_a_stopped_sandbox_has_its_network_when_it_is_started_again(around: World) -> None:
    with around.server(around.outside, OUTSIDE):
        words = one(
            around,
            "await sandbox.run(['true'])",
            "await sandbox.stop()",
            "await sandbox.start()",
            f"tell(tcp=await inside(sandbox, \"print(tcp('{OUTSIDE}'))\"))",
        )

    assert words["tcp"] == f"seen {HOST}"


def test_a_host_without_a_way_out_is_told_and_nothing_is_left() -> None:
    if why := pasta.obstacle()[0]:
        pytest.skip(why)
    body = """
    async with Engine.open() as engine:
        try:
            await engine.create(network="user")
        except SandboxError as error:
            tell(error=str(error), hint=error.hint, left=helpers(), listed=len(await engine.list()))
    tell(done=True)
    """
    with world(way_out=False) as around:
        words = told(around, body)

    if "error" not in words:
        pytest.skip("this pasta is content without a way out, as later ones are")
    assert "pasta has ended: " in words["error"]
    assert "default route" in words["hint"]
    assert (words["left"], words["listed"]) == ([], 0)


def test_an_ordinary_user_is_told_that_his_host_has_no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(way_out=False) as around, plain_user() as user:
        command = user.command
        monkeypatch.setattr(user, "command", lambda argv, **_: [*around.enter, *command(argv, setup=TUN)])
        words = user.run(
            f"""
{textwrap.dedent(HELPERS)}
async with Engine.open() as engine:
    try:
        await engine.create(resources=FREE, network="user")
    except SandboxError as error:
        tell(error=str(error), left=helpers(), listed=len(await engine.list()))
"""
        )

    if not words:
        pytest.skip("this pasta is content without a way out, as later ones are")
    assert "pasta has ended: " in words["error"]
    assert (words["left"], words["listed"]) == ([], 0)


def test_the_device_of_the_helper_is_for_nobody_else(around: World) -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tops = [words[1] for words in mounts if words[2] == "cgroup" and "devices" in words[3].split(",")]
    if not tops:
        pytest.skip("what is allowed can be read on cgroup v1 only")
    words = one(
        around,
        "lines = Path(f'/proc/{helpers()[0]}/cgroup').read_text().splitlines()",
        "place = next(line for line in lines if ':devices:' in line).split(':')[2]",
        f"tell(rules=Path('{tops[0]}' + place, 'devices.list').read_text())",
    )

    assert "c 1:3 rwm" in words["rules"]
    assert "10:200" not in words["rules"]


@pytest.mark.anyio
async def test_without_pasta_it_is_refused_by_the_name_of_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pasta, "PATH", str(tmp_path))
    roots_capabilities.cache_clear()
    try:
        async with Engine.open() as engine:
            with pytest.raises(UnsupportedError, match="pasta is not installed") as caught:
                await engine.create(network=Network.user())
            assert await engine.list() == []
        assert "apt install passt" in caught.value.hint
        assert "user" not in RuncBackend().capabilities.networks
        assert "apt install passt" in (await RuncBackend().probe()).facts["network 'user'"]
    finally:
        roots_capabilities.cache_clear()


@pytest.mark.anyio
async def test_it_is_claimed_where_pasta_is() -> None:
    if why := pasta.obstacle()[0]:
        pytest.skip(why)
    assert "user" in RuncBackend().capabilities.networks
    assert "pasta" in (await RuncBackend().probe()).facts["network 'user'"]


@pytest.mark.anyio
async def test_without_a_user_namespace_of_its_own_it_is_refused() -> None:
    if why := pasta.obstacle()[0]:
        pytest.skip(why)
    async with Engine.open() as engine:
        with pytest.raises(UnsupportedError, match="userns='host'"):
            await engine.create(network="user", userns="host")
