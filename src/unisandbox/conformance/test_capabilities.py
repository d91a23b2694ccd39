"""What a backend does not claim is refused before anything happened."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from unisandbox import Engine, Event, InvalidArgumentError, Mount, Resources, Sandbox, Security, UnsupportedError
from unisandbox.api import Capabilities, Rootfs
from unisandbox.conformance.conftest import Create
from unisandbox.conformance.programs import Programs
from unisandbox.conformance.selection import Candidate, options
from unisandbox.sandbox import SandboxOptions

pytestmark: pytest.MarkDecorator = pytest.mark.anyio

ASKED: dict[str, SandboxOptions] = {
    "rootfs:image": {"rootfs": "debian"},
    "rootfs:dir": {"rootfs": Rootfs.dir("/usr", readonly=True)},
    "rootfs:dir writable_dirs": {"rootfs": "/usr"},
    "rootfs:host": {"rootfs": "host"},
    "networks:host": {"network": "host"},
    "userns_host": {"userns": "host"},
    "users": {"user": "1000"},
    "seccomp": {"security": Security()},
    "host_mounts": {"mounts": [Mount.bind("/usr", "/mnt")]},
    "shared_pid": {"share_pid": True},
    "ttl": {"ttl": 60.0},
}


def _claims(capabilities: Capabilities, need: str) -> bool:
    from unisandbox.conformance.selection import claims

    return all(claims(capabilities, name) for name in need.split())


@pytest.mark.parametrize("need", ASKED)
async def test_what_is_not_claimed_is_refused_and_what_is_claimed_works(
    engine: Engine, create: Create, capabilities: Capabilities, backend: Candidate, need: str, rootfs: str
) -> None:
    asked: SandboxOptions = {**ASKED[need]}
    if need.startswith("rootfs:dir") and rootfs != "host":
        # That of this run: a backend may copy it, which the machine's programs are too many for.
        asked["rootfs"] = Rootfs.dir(rootfs, readonly=need == "rootfs:dir")
    if _claims(capabilities, need):
        async with create(**asked) as sandbox:
            assert (await sandbox.status()).state == "ready"
        return
    with pytest.raises(UnsupportedError) as caught:
        await create(**asked)
    assert caught.value.backend == backend.name
    assert await engine.list() == []
    assert [event async for event in _so_far(engine)] == []


async def test_what_a_process_or_container_cannot_have_is_refused(
    sandbox: Sandbox, capabilities: Capabilities, rootfs: str, programs: Programs
) -> None:
    await sandbox.run(programs.nothing())
    asked: dict[str, Callable[[], Awaitable[object]]] = {
        "tty": lambda: sandbox.exec(programs.nothing(), tty=True),
        "containers": lambda: sandbox.containers.add(argv=programs.nothing(), name="second", rootfs=rootfs),
        "pause": sandbox.pause,
    }
    for need, ask in asked.items():
        if not _claims(capabilities, need):
            with pytest.raises(UnsupportedError):
                await ask()
    # And nothing has changed by that.
    assert [status.name for status in (await sandbox.status()).containers] == ["main"]
    assert await sandbox.processes() == []
    assert (await sandbox.run(programs.nothing())).exit_code == 0


async def test_a_sandbox_of_another_process_is_used_or_refused(
    state: Path, backend: Candidate, rootfs: str, capabilities: Capabilities, programs: Programs
) -> None:
    async with Engine.open(state) as owner, Engine.attach(state) as other:
        sandbox = await owner.create(**(options(backend, rootfs) | {"name": "w"}))
        assert [status.id for status in await other.list()] == [sandbox.id]
        if capabilities.attach:
            assert (await (await other.get("w")).run(programs.exits(3))).exit_code == 3
        else:
            with pytest.raises(UnsupportedError):
                await (await other.get("w")).run(programs.exits(3))
        # Whatever the other one tried, the owner's is as it was.
        assert (await sandbox.run(programs.exits(4))).exit_code == 4


async def _so_far(engine: Engine) -> AsyncIterator[Event]:
    await engine.close()
    async for event in engine.events():
        yield event


@pytest.fixture
def network_namespace() -> Iterator[str]:
    """The path of a network namespace that this test has made."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo made; exec sleep 600"], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"made\n":
            pytest.skip("no network namespace can be made here")
        yield f"/proc/{child.pid}/ns/net"
        child.kill()


@pytest.mark.needs("networks:namespace", "processes")
async def test_a_given_network_is_joined(create: Create, network_namespace: str) -> None:
    async with create(network=network_namespace) as sandbox:
        inside = (await sandbox.run(["readlink", "/proc/self/ns/net"])).text.strip()

        assert inside == _link(network_namespace) != _link("/proc/self/ns/net")
        assert (await sandbox.status()).namespaces["net"] == int(inside[5:-1])


@pytest.mark.needs("networks:namespace", "processes", "shared_pid")
async def test_a_given_network_is_joined_where_containers_share_their_processes(
    create: Create, network_namespace: str
) -> None:
    async with create(network=network_namespace, share_pid=True) as sandbox:
        inside = (await sandbox.run(["readlink", "/proc/self/ns/net"])).text.strip()
        assert inside == _link(network_namespace)


def _link(path: str) -> str:
    return str(Path(path).readlink())


@pytest.mark.needs("networks:namespace")
async def test_the_hosts_own_network_is_not_given_by_its_path(create: Create) -> None:
    with pytest.raises(InvalidArgumentError):
        await create(network="/proc/self/ns/net")


async def test_a_network_in_user_mode_is_refused_where_it_is_not_claimed(
    engine: Engine, create: Create, capabilities: Capabilities, backend: Candidate
) -> None:
    if _claims(capabilities, "networks:user"):
        pytest.skip("it is claimed")
    with pytest.raises(UnsupportedError) as caught:
        await create(network="user")
    assert caught.value.backend == backend.name
    assert await engine.list() == []


@pytest.mark.needs("networks:user", "processes")
async def test_a_network_in_user_mode_reaches_out_and_not_the_hosts_loopback(create: Create) -> None:
    address = _own_address()
    if not address or shutil.which("bash", path="/usr/bin:/bin") is None:
        pytest.skip("this host has no way out itself, or no bash to try it with")
    with socket.create_server((address, 0)) as outer, socket.create_server(("127.0.0.1", 0)) as loopback:
        async with create(network="user") as sandbox:
            ask = "exec 3<>/dev/tcp/{}/{}"
            ports = outer.getsockname()[1], loopback.getsockname()[1]
            assert (await sandbox.run(["bash", "-c", ask.format(address, ports[0])])).exit_code == 0
            for place in ("127.0.0.1", "localhost"):
                assert (await sandbox.run(["bash", "-c", ask.format(place, ports[1])])).exit_code != 0
            assert "nameserver" in (await sandbox.run(["cat", "/etc/resolv.conf"])).text
            assert (await sandbox.status()).warnings == ()
        loopback.setblocking(False)
        with pytest.raises(BlockingIOError):
            loopback.accept()


def _own_address() -> str:
    """The address by which this host goes out; empty when it does not. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(asking.getsockname()[0])


@pytest.mark.needs("limits:memory")
async def test_updates_are_done_or_refused(create: Create, capabilities: Capabilities) -> None:
    async with create(resources=Resources(memory="64M", disk="16M")) as sandbox:
        if capabilities.update:
            await sandbox.update(Resources(memory="128M", disk="16M"))
            assert (await sandbox.metrics()).memory_limit_bytes == 128 << 20
        else:
            with pytest.raises(UnsupportedError):
                await sandbox.update(Resources(memory="128M", disk="16M"))
            assert (await sandbox.metrics()).memory_limit_bytes in {None, 64 << 20}


async def test_an_annotation_that_nobody_knows_is_not_ignored(create: Create) -> None:
    with pytest.raises(UnsupportedError):
        await create(annotations={"no.such/annotation": "1"})


async def test_the_probe_is_quick_and_says_why(backend: Candidate) -> None:
    import time

    assert backend.backend is not None
    took = []
    for _ in range(5):
        begun = time.monotonic()
        probe = await backend.backend.probe()
        took.append(time.monotonic() - begun)

    assert min(took) < 0.5, "the promise is 50 ms; a loaded machine may hold up some, and not each by ten times that"
    assert probe.available
    assert probe.backend == backend.name
    assert not probe.hint or probe.warnings


async def test_explain_creates_nothing(engine: Engine, backend: Candidate) -> None:
    choice = await engine.explain(isolation=backend.name)

    assert choice.backend == backend.name
    assert choice.because
    assert await engine.list() == []
