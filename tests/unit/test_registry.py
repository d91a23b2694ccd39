"""Backends of strangers: one that is at fault is told, and keeps nobody from the others."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from unisandbox.api import Capabilities, Probe, Sandboxer, SandboxSpec, UnavailableError
from unisandbox.engine.choice import choose, probe_all
from unisandbox.engine.registry import Registry
from unisandbox.host.services import Host

pytestmark = pytest.mark.anyio


class Good:
    name = "good"
    rank = 100
    capabilities: ClassVar = Capabilities(isolation="none", rootfs=frozenset({"host"}))

    async def probe(self, *, deep: bool = False) -> Probe:
        return Probe("good", available=True, reason="it can")

    async def open(self, host: Host) -> Sandboxer:
        raise AssertionError("to choose one opens none")


class Faulty(Good):
    name = "faulty"

    async def probe(self, *, deep: bool = False) -> Probe:
        raise KeyError("of a stranger")


async def test_a_backend_whose_probe_fails_is_told_and_keeps_nobody_from_the_others() -> None:
    registry = Registry({"good": Good(), "faulty": Faulty()})
    probes = {probe.backend: probe for probe in await probe_all(registry)}
    assert not probes["faulty"].available
    assert "KeyError: 'of a stranger'" in probes["faulty"].reason
    backend, _ = await choose(registry, SandboxSpec())
    assert backend.name == "good"
    with pytest.raises(UnavailableError, match="KeyError"):
        await choose(registry, SandboxSpec(isolation="faulty"))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("other = 1", "AttributeError: .*'backend'"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
async def test_a_package_that_cannot_be_loaded_is_named_and_keeps_nobody_from_the_others(
    module: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "strangers_package-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-package\nVersion: 1\n")
    name = f"strangers_{tmp_path.name}"  # none that another test has imported
    (facts / "entry_points.txt").write_text(f"[unisandbox.backends]\nstrange = {name}:backend\n")
    (tmp_path / f"{name}.py").write_text(module + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry({"good": Good()})
    with pytest.raises(UnavailableError, match=says) as caught:
        registry.get("strange")
    assert "strangers-package" in caught.value.hint
    probes = {probe.backend: probe for probe in await probe_all(registry)}
    assert not probes["strange"].available
    assert probes["good"].available
