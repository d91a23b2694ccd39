"""Which backend "auto" means, and what is refused for one that cannot hold it."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from unisandbox import Engine, InvalidArgumentError, Resources, UnavailableError, UnsupportedError
from unisandbox.api import Capabilities, Probe, Sandboxer
from unisandbox.engine.choice import probe_all
from unisandbox.engine.registry import GROUP, Registry
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


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        ({"a": 3}, "'a' is no backend: it has no name"),
        ({"a": None}, "'a' is no backend"),
        ({"a": Files}, "'a' is no backend: it has no name"),
        ({3: Files("a", 1)}, "isolation 3 is not valid"),
        ({"a/b": Files("a/b", 1)}, "isolation 'a/b' is not valid"),
        ({"a": Files("b", 1)}, "'a' is no backend: it calls itself 'b'"),
    ],
    ids=["number", "none", "class", "number-as-name", "path-as-name", "another-name"],
)
async def test_what_is_no_backend_is_refused_when_the_engine_is_opened(backends: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        await Engine.open(backends=backends)
    with pytest.raises(InvalidArgumentError, match=words):
        Registry(backends)


async def test_an_installed_backend_that_is_none_is_named_and_keeps_no_other_from_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry({"good": Files("good", 1, "host")})
    monkeypatch.setattr(registry, "_points", {"broken": EntryPoint("broken", "json:dumps", GROUP)})
    probes = {probe.backend: probe for probe in await probe_all(registry)}
    assert {name: probe.available for name, probe in probes.items()} == {"broken": False, "good": True}
    assert "it has no name" in probes["broken"].reason
    assert "unisandbox[" not in probes["broken"].hint, "it is somebody else's"
    with pytest.raises(UnavailableError, match="broken"):
        registry.get("broken")
