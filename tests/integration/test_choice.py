"""Which backend "auto" means, and what is refused for one that cannot hold it."""

from __future__ import annotations

import pytest

from unisandbox import Engine, Resources, UnavailableError, UnsupportedError
from unisandbox.api import Capabilities, Probe, Sandboxer
from unisandbox.host.services import Host

pytestmark = [pytest.mark.anyio, pytest.mark.root]


class Files:
    """A backend with root file systems of some kinds, that nobody opens."""

    def __init__(self, name: str, rank: int, *kinds: str) -> None:
        self.name = name
        self.rank = rank
        self.capabilities = Capabilities(isolation="none", rootfs=frozenset(kinds))

    async def probe(self, *, deep: bool = False) -> Probe:
        return Probe(self.name, available=True, deep=deep)

    async def open(self, host: Host) -> Sandboxer:
        raise UnavailableError(f"{self.name} is only looked at, on {host.engine_id}")


async def test_auto_takes_what_has_such_files() -> None:
    backends = {b.name: b for b in (Files("images", 1000, "image"), Files("directories", 900, "dir"))}
    async with Engine.open(backends=backends) as engine:
        assert (await engine.explain(rootfs="busybox")).backend == "images"
        assert (await engine.explain(rootfs="/srv")).backend == "directories"
        assert (await engine.explain(rootfs="host")).backend not in backends


async def test_no_backend_with_such_files_is_said() -> None:
    async with Engine.open() as engine:
        with pytest.raises(UnsupportedError, match="image"):
            await engine.explain(rootfs="busybox")


async def test_a_limit_that_a_backend_does_not_know_is_refused_before_anything_is_done() -> None:
    limits = Resources(cpu_seconds=1)
    async with Engine.open() as engine:
        with pytest.raises(UnsupportedError, match="cpu_seconds"):
            await engine.create(isolation="runc", resources=limits)
        assert await engine.list() == []
        async with engine.create(isolation="runc") as sandbox:
            with pytest.raises(UnsupportedError, match="cpu_seconds"):
                await sandbox.update(limits)
            with pytest.raises(UnsupportedError, match="cpu_seconds"):
                await sandbox.containers.add(argv=["true"], resources=limits)
            assert [c.name for c in await sandbox.containers.list()] == []
