"""A server in the test's own process, and an engine that uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.serve.client import Engine, engine_at

from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import Server, serving


@pytest.fixture
def anyio_backend() -> str:
    """grpclib knows asyncio only."""
    return "asyncio"


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return ServeConfig(root=str(tmp_path / "root"), socket=str(tmp_path / "run/s.sock"))


@pytest.fixture
async def server(config: ServeConfig) -> AsyncIterator[Server]:
    async with serving(config) as server:
        yield server
        for entry in server.pods.core.entries():
            await entry.remove()


@pytest.fixture
async def engine(server: Server, config: ServeConfig, tmp_path: Path) -> AsyncIterator[Engine]:
    async with engine_at(config.socket, tmp_path) as engine:
        yield engine
