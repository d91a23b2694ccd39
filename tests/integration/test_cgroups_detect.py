"""Where cgroups can live: what is not there, not ours or not seen is said, with a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.cgroups import Cgroups

pytestmark = pytest.mark.root


@pytest.mark.parametrize("parent", ["", "relative", "/a/../b", "/.", "/a//b", "/a b", "/\n"])
def test_parents_that_are_no_paths_are_refused(parent: str) -> None:
    with pytest.raises(InvalidArgumentError, match="parent"):
        Cgroups.detect("unisandbox-x", parent=parent)


LOOK = """
import json
from unisandbox.host.cgroups import Cgroups
found = Cgroups.detect("unisandbox-x")
print(json.dumps([sorted(found.controllers), found.reasons()]))
"""


def look_after(*commands: str) -> tuple[list[str], list[str]]:
    """What is detected in a mount namespace of its own, in which `commands` were run."""
    script = " && ".join((*commands, 'exec "$0" -c "$1"'))
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, sys.executable, LOOK]
    controllers, reasons = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    return controllers, reasons


def test_inside_a_container_with_a_read_only_view_all_is_refused_with_the_reason() -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if "cgroup" in line]
    remounts = [f"mount -o remount,bind,ro {mount}" for mount in mounts if mount != "/sys/fs/cgroup"]
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        remounts = ["mount -o remount,bind,ro /sys/fs/cgroup"]
    # Whatever is around this test, a service say: what is seen is podman's container.
    controllers, reasons = look_after(*remounts, "mount -t tmpfs tmpfs /run", "touch /run/.containerenv")
    assert controllers == []
    (reason,) = reasons
    assert "/sys/fs/cgroup is mounted read-only; " in reason
    assert "podman run --privileged" in reason


def test_a_hierarchy_that_is_hidden_by_another_mount_is_missing_and_said_so() -> None:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("v2 has one hierarchy: without it there is nothing to look at")
    controllers, reasons = look_after("mount -t tmpfs none /sys/fs/cgroup/pids")
    assert "pids" not in controllers
    assert any("pids cgroup" in reason and "hidden by another mount" in reason for reason in reasons)


def test_a_hierarchy_mounted_in_another_cgroup_namespace_is_not_mistaken_for_ours() -> None:
    own = {line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    if own == {"/"}:
        pytest.skip("we are at the top: a new cgroup namespace looks the same")
    controllers, reasons = look_after('exec unshare --cgroup "$0" -c "$1"')
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        assert "memory" in controllers  # root still sees the whole tree there and uses its slice
        return
    assert "memory" not in controllers
    assert any("another cgroup namespace" in reason for reason in reasons)


def test_names_of_what_may_be_gone_are_known_without_making_anything() -> None:
    cgroups = Cgroups.detect("unisandbox-never-made")
    dirs = cgroups.dirs_of("s1")
    assert len(dirs) == len(cgroups.places)
    assert not any(Path(path).parent.exists() for path in dirs)
    with pytest.raises(InvalidArgumentError):
        cgroups.dirs_of("../s1")
