"""What several modules of these tests begin with."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.init_container import Container
from tests.keepers import cgroup_of_tests
from tests.plain_user import PlainUser, plain_user

from unisandbox import Engine, Sandbox
from unisandbox.host.init import binary_path

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
