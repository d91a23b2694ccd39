"""What several modules of these tests begin with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.cgroup_actors import PARENT, PATIENCE, Actor, Spawn, variants
from tests.command_line import CLI, SECONDS
from tests.detached import ids
from tests.init_container import Container
from tests.keepers import cgroup_of_tests
from tests.outside import World, world
from tests.plain_user import PlainUser, plain_user

from unisandbox import Engine, Sandbox
from unisandbox.host.cgroups import Cgroup, Cgroups, ending
from unisandbox.host.init import binary_path
from unisandbox.network import pasta

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    async with Engine.open() as opened:
        yield opened


@pytest.fixture
async def sandbox(engine: Engine) -> AsyncIterator[Sandbox]:
    async with engine.create(isolation="runc", rootfs="host") as made:
        yield made


@pytest.fixture
def cgroup() -> Iterator[str]:
    with cgroup_of_tests() as path:
        yield path


@pytest.fixture
def container() -> Iterator[Container]:
    with Container() as made:
        yield made


@pytest.fixture(params=["x86_64", "aarch64"])
def on_machine(request: pytest.FixtureRequest) -> Iterator[Container]:
    """Init of each machine, the other one's under qemu-user."""
    if request.param == platform.machine():
        with Container() as made:
            yield made
        return
    if request.param != "aarch64" or QEMU is None:
        pytest.skip(f"no qemu-user for {request.param} here (apt install qemu-user-static)")
    qemu = os.open(QEMU, os.O_PATH | os.O_CLOEXEC)
    try:
        with Container(program=qemu, args=("qemu", binary_path("aarch64"))) as made:
            made.emulated = True
            yield made
    finally:
        os.close(qemu)


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


@pytest.fixture(params=variants())
def cgroups(request: pytest.FixtureRequest) -> Iterator[Cgroups]:
    name = f"unisandbox-t{os.getpid()}"
    if request.param == "without unified tree":
        found = Cgroups.detect(name, use_unified=False)
    else:
        found = Cgroups.detect(name, parent=PARENT if request.param == "below a parent" else None)
    assert not found.reasons()
    yield found
    root = found.root()
    root.kill()
    assert root.remove(PATIENCE)
    if request.param == "below a parent":
        for place in found.places:
            assert ending.remove((os.path.dirname(place.parent),), PATIENCE)


@pytest.fixture
def root(cgroups: Cgroups) -> Cgroup:
    return cgroups.root()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    actors: list[Actor] = []

    def start(code: str) -> Actor:
        actors.append(Actor(code))
        return actors[-1]

    yield start
    for actor in actors:
        actor.close()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The state directory of the test's commands; what a failed test has left in it is removed."""
    path = tmp_path / "state"
    monkeypatch.setenv("UNISANDBOX_STATE", str(path))
    yield path
    if path.is_dir():
        subprocess.run([*CLI, "rm", "-f", *ids()], check=False, capture_output=True, timeout=SECONDS)


@pytest.fixture
def around() -> Iterator[World]:
    """A host with a world around it; skips where there is nothing to connect with."""
    if why := pasta.obstacle()[0]:
        pytest.skip(why)
    with world() as made:
        yield made
