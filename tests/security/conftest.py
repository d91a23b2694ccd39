"""What all tests of attacks have."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from unisandbox import Engine


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[Engine]:
    async with Engine.open() as opened:
        yield opened
