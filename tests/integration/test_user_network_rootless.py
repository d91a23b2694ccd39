"""Networks in user mode of an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import textwrap
from collections.abc import Iterator

import pytest
from tests.outside import HOST, NAMED, OUTSIDE, World
from tests.plain_user import PlainUser, plain_user
from tests.user_networks import ATTACK, HELPERS, TUN, ended

pytestmark = pytest.mark.root


@pytest.fixture(params=["with", "without"])
def user(around: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainUser]:
    """An ordinary user on that host, with subordinate ids and without, who may open the tun device."""
    with plain_user(single=request.param == "without") as user:
        command = user.command

        def entered(argv: list[str], *, setup: str = "", more: tuple[str, ...] = ()) -> list[str]:
            return [*around.enter, *command(argv, setup=TUN + setup, more=more)]

        monkeypatch.setattr(user, "command", entered)
        yield user
        assert user.left() == []


def test_an_ordinary_user_has_it_too(around: World, user: PlainUser) -> None:
    with around.server(around.host, "127.0.0.1,127.0.0.9,::1") as loopback, around.server(around.outside, OUTSIDE):
        words = user.run(
            f"""
{textwrap.dedent(HELPERS)}
async with Engine.open() as engine, engine.create(resources=FREE, network="user") as sandbox:
    tell(tcp=await inside(sandbox, "print(tcp('{OUTSIDE}'))"))
    tell(udp=await inside(sandbox, "print(udp('{OUTSIDE}', 'hello'))"))
    tell(address=await inside(sandbox, "print(socket.gethostbyname('there.example'))"))
    await inside(sandbox, {ATTACK!r})
    from unisandbox.backends.runc import backend
    tell(helpers=len(helpers()), claimed="user" in backend.capabilities.networks)
tell(left=helpers())
"""
        )
        around.run(around.host, "socket.socket(2, 2).sendto(b'own', ('127.0.0.1', 7000))")
        assert loopback.heard() == ["udp", "127.0.0.1", "own"]

    assert (words["tcp"], words["udp"], words["address"]) == (f"seen {HOST}", "seen hello", NAMED)
    assert (words["helpers"], words["claimed"], words["left"]) == (1, True, [])


@pytest.mark.parametrize("killed", ["host", "keeper", "both"])
def test_an_ordinary_users_helper_ends_with_his_engine(around: World, user: PlainUser, killed: str) -> None:
    work = f"""
{textwrap.dedent(HELPERS)}
engine = await Engine.open(HOME + "/state")
sandbox = await engine.create(resources=FREE, network="user")
tell(keeper=engine._core.host.keeper.pid, helpers=helpers(), host=os.getpid())
await anyio.sleep_forever()
"""
    with user.start(work) as process:
        try:
            assert process.stdout is not None
            words = json.loads(process.stdout.readline())
            [helper] = words["helpers"]
            pidfds = [os.pidfd_open(helper), os.pidfd_open(words["keeper"])]
            if killed in {"keeper", "both"}:
                os.kill(words["keeper"], signal.SIGKILL)
            if killed in {"host", "both"}:
                os.kill(words["host"], signal.SIGKILL)
            assert ended(pidfds[0]), "the helper goes on"
            os.kill(words["host"], signal.SIGKILL)
            assert ended(pidfds[1])
            for fd in pidfds:
                os.close(fd)
        finally:
            process.kill()
    user.run('async with Engine.open(HOME + "/state") as engine:\n    tell(done=True)\n')
    shutil.rmtree(user.home / "state", ignore_errors=True)


def test_an_ordinary_users_kept_sandbox_keeps_its_helper(around: World, user: PlainUser) -> None:
    work = f"""
{textwrap.dedent(HELPERS)}
engine = await Engine.open(HOME + "/state", policy="keep")
sandbox = await engine.create(resources=FREE, network="user", name="w")
tell(helpers=helpers(), host=os.getpid())
await anyio.sleep_forever()
"""
    with user.start(work) as process:
        try:
            assert process.stdout is not None
            before = json.loads(process.stdout.readline())
            os.kill(before["host"], signal.SIGKILL)
        finally:
            process.kill()
    with around.server(around.outside, OUTSIDE):
        words = user.run(
            f"""
{textwrap.dedent(HELPERS)}
async with Engine.open(HOME + "/state") as engine:
    sandbox = await engine.get("w")
    tell(helpers=helpers(), answer=await inside(sandbox, "print(tcp('{OUTSIDE}'))"))
    await sandbox.remove()
    tell(left=helpers())
"""
        )
    shutil.rmtree(user.home / "state", ignore_errors=True)

    assert (words["helpers"], words["answer"], words["left"]) == (before["helpers"], f"seen {HOST}", [])
