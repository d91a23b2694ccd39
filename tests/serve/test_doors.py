"""Who may come to the sockets, and where they may lie."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import attrs
import pytest
from tests.serve.client import Engine, shared

from unisandbox.api import (
    FailedPreconditionError,
    InvalidArgumentError,
)
from unisandbox.engine.runtime_directory import runtime_directory
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import is_trusted, serving

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def test_only_we_can_reach_the_sockets(engine: Engine, config: ServeConfig) -> None:
    started = await engine.run_pod(linux=shared())
    for path in (config.socket, started.address.removeprefix("ttrpc+unix://")):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) == 0o700


async def test_a_peer_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        os.chmod(tmp_path / "s", 0o666)
        os.chmod(tmp_path, 0o755)
        listener.listen()
        for uid in (0, 12345):
            child = os.fork()
            if not child:
                try:
                    os.chdir(tmp_path)  # what is above it lets nobody else in
                    os.setuid(uid)
                    with socket.socket(socket.AF_UNIX) as peer:
                        peer.connect("s")
                        peer.recv(1)
                finally:
                    os._exit(0)
            listener.settimeout(20)
            connection, _ = listener.accept()
            with connection:
                assert is_trusted(connection) == (uid == 0)
            os.waitpid(child, 0)  # noqa: ASYNC222 (it has nothing left to do)


async def test_a_directory_that_others_can_enter_is_refused(config: ServeConfig) -> None:
    Path(config.socket).parent.mkdir(mode=0o755)
    with pytest.raises(FailedPreconditionError, match="nobody else may enter"):
        async with serving(config):
            pass


async def test_a_directory_belongs_to_one_server_whatever_its_root(
    engine: Engine, config: ServeConfig, tmp_path: Path
) -> None:
    await engine.run_pod(linux=shared())
    directory = os.path.dirname(config.socket)
    for name in ("s.sock", "other.sock"):
        second = attrs.evolve(config, root=str(tmp_path / "other"), socket=f"{directory}/{name}")
        there = sorted(os.listdir(directory))
        with pytest.raises(FailedPreconditionError, match="is used by another server"):
            async with serving(second):
                pass
        assert sorted(os.listdir(directory)) == there
    assert (await engine.status()).state == "SANDBOX_READY"


async def test_the_directory_that_all_engines_share_is_no_place_for_the_socket(config: ServeConfig) -> None:
    wrong = attrs.evolve(config, socket=f"{runtime_directory()}/s.sock")
    with pytest.raises(InvalidArgumentError, match="shared by all engines"):
        async with serving(wrong):
            pass
