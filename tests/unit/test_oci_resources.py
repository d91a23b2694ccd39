"""What an engine says of limits: when a container is made, and when they are changed."""

from __future__ import annotations

from typing import Any

import pytest

from unisandbox import InvalidArgumentError, UnsupportedError
from unisandbox.host.cgroups import Limits
from unisandbox.oci.foreign import limits, parse_resources

NOW = Limits(memory=64 << 20, swap=1 << 20, cpu=0.5, cpu_weight=50, pids=10)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, {}),
        ({"memory": {"limit": 0}, "cpu": {"quota": 0, "shares": 0}, "pids": {"limit": 0}}, {}),
        ({"memory": None, "cpu": {"shares": None}}, {}),
        ({"memory": {"limit": 32 << 20}}, {"memory": 32 << 20}),
        ({"memory": {"limit": 32 << 20, "swap": 40 << 20}}, {"memory": 32 << 20, "swap": 8 << 20}),
        ({"memory": {"swap": 80 << 20}}, {"swap": 16 << 20}),
        ({"memory": {"swap": -1}}, {"swap": None}),
        ({"memory": {"limit": -1}}, {"memory": None}),
        ({"cpu": {"quota": 150_000}}, {"cpu": 1.5}),
        ({"cpu": {"quota": 50_000, "period": 25_000}}, {"cpu": 2.0}),
        ({"cpu": {"quota": -1, "period": 100_000}}, {"cpu": None}),
        ({"cpu": {"shares": 1024}}, {"cpu_weight": 100}),
        ({"pids": {"limit": 20}}, {"pids": 20}),
        ({"pids": {"limit": -1}}, {"pids": None}),
        ({"unified": {"memory.oom.group": "1"}}, {"oom_group": True}),
    ],
)
def test_what_is_not_said_stays_and_a_negative_number_is_no_limit(
    resources: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = {name: getattr(NOW, name) for name in ("memory", "swap", "cpu", "cpu_weight", "pids")}
    assert limits(resources, NOW) == Limits(**{**given, **expected})


def test_a_container_that_nothing_is_said_of_has_no_limit() -> None:
    assert limits({"cpu": {"period": 100_000}}) == Limits(swap=None)


@pytest.mark.parametrize(
    ("resources", "kind"),
    [
        ({"cpu": {"period": 50_000}}, UnsupportedError),
        ({"cpu": {"cpus": "0-1"}}, UnsupportedError),
        ({"memory": {"reservation": 1}}, UnsupportedError),
        ({"blockIO": {"weight": 10}}, UnsupportedError),
        ({"memory": {"swap": 1 << 20}}, InvalidArgumentError),
        ({"memory": {"limit": -1, "swap": 1 << 20}}, InvalidArgumentError),
        ({"cpu": {"quota": 1000, "period": -1}}, InvalidArgumentError),
        ({"pids": {"limit": "many"}}, InvalidArgumentError),
        ({"pids": 7}, InvalidArgumentError),
        ({"unified": {"memory.high": "1"}}, UnsupportedError),
        ({"unified": {"memory.oom.group": "yes"}}, InvalidArgumentError),
    ],
)
def test_what_cannot_be_changed_or_means_nothing_is_refused(resources: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        limits(resources, NOW)


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "[" * 100_000])
def test_what_is_no_object_is_no_resources(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_resources(text)
