"""Which service of systemd's a process ends with, told from what the kernel says of its cgroups."""

from __future__ import annotations

import pytest

from unisandbox.host.cgroups.hierarchy import Mount, memberships_in
from unisandbox.host.cgroups.service import service_in, ways_out

# As Debian, CentOS 7 and Ubuntu 20.04 print /proc/self/cgroup; shortened by hierarchies that systemd does not go by.
V2 = "0::/system.slice/web.service\n"
V1 = "4:memory:/system.slice/web.service\n1:name=systemd:/system.slice/web.service\n"
HYBRID = "4:memory:/system.slice\n1:name=systemd:/system.slice/web.service\n0::/system.slice/web.service\n"
INSTANCE = "0::/system.slice/system-web.slice/web@a.service/workers/1\n"
OF_A_USER = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service\n"
REMOVED = "0::/system.slice/web.service (deleted)\n"


@pytest.mark.parametrize(
    ("text", "service"),
    [
        (V2, "web.service"),
        (V1, "web.service"),
        (HYBRID, "web.service"),
        (INSTANCE, "web@a.service"),
        (OF_A_USER, "jupyter.service"),
        (REMOVED, "web.service"),
    ],
)
def test_a_process_of_a_service_ends_with_it(text: str, service: str) -> None:
    assert service_in(memberships_in(text)) == service


@pytest.mark.parametrize(
    "text",
    [
        "0::/\n",
        "0::/user.slice/user-0.slice/session-3.scope\n",
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1.scope\n",
        "0::/system.slice/docker-0123456789ab.scope\n",
        "0::/unisandbox.slice/unisandbox-x\n",
        # Only one hierarchy of many, and none by which systemd ends anything.
        "4:memory:/system.slice/web.service\n1:name=systemd:/\n0::/\n",
        "4:memory:/docker/0123456789ab\n",
    ],
)
def test_what_is_no_service_ends_with_none(text: str) -> None:
    assert service_in(memberships_in(text)) == ""


def test_the_ways_out_are_the_tops_of_the_hierarchies_that_systemd_goes_by() -> None:
    memory = Mount("/sys/fs/cgroup/memory", "/", frozenset({"rw", "memory"}), unified=False)
    systemd = Mount("/sys/fs/cgroup/systemd", "/", frozenset({"rw", "xattr", "name=systemd"}), unified=False)
    unified = Mount("/sys/fs/cgroup/unified", "/", frozenset(), unified=True)
    assert ways_out([memory, systemd, unified]) == (
        "/sys/fs/cgroup/systemd/cgroup.procs",
        "/sys/fs/cgroup/unified/cgroup.procs",
    )


def test_a_mount_that_shows_but_a_part_of_the_service_is_no_way_out() -> None:
    assert ways_out([Mount("/sys/fs/cgroup", "/system.slice/web.service", frozenset(), unified=True)]) == ()
