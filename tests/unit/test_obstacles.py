"""What keeps sandboxes from running here is named."""

from __future__ import annotations

import pytest

from unisandbox.host import syscalls
from unisandbox.host.power import obstacles, standing

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("label", "what", "reason"),
    [
        ("docker-default (enforce)\n", "apparmor", "AppArmor forbids mounts (profile docker-default)"),
        ("system_u:system_r:container_t:s0:c1,c2\0", "selinux", "SELinux forbids mounts"),
    ],
)
def test_a_security_module_is_named_when_it_refuses_a_mount(
    monkeypatch: pytest.MonkeyPatch, label: str, what: str, reason: str
) -> None:
    """Not on kernels of this test's machines: its answers are given."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(standing, "read", lambda _: label.rstrip("\0"))
    monkeypatch.setattr(syscalls, "mount", refuse)
    (found,) = obstacles.of_mounts()
    assert (found.what, found.reason.startswith(reason)) == (what, True)


def test_a_profile_that_allows_mounts_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "read", lambda _: "mine (enforce)")

    assert obstacles.of_mounts() == []
