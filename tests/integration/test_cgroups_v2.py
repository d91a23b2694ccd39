"""Where cgroups of an engine go on a v2 host: delegated subtrees, the slice of root, parents that hold processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unisandbox.api.errors import UnavailableError
from unisandbox.host.cgroups import Cgroups, Limits, ending

TOP = "/sys/fs/cgroup"
PARENT = f"/unisandbox-test-{os.getpid()}.slice"
TEST = f"{TOP}{PARENT}"
NAME = f"unisandbox-t{os.getpid()}"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists(f"{TOP}/cgroup.controllers"), reason="this host has no pure cgroup v2"),
]

# Enters the cgroup argv[1], then looks: so that the question is asked from there.
LOOK = """
import json, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write("0")
from unisandbox.host.cgroups import Cgroups
found = Cgroups.detect("unisandbox-x")
print(json.dumps([[place.parent for place in found.places], sorted(found.controllers), found.reasons()]))
"""


@pytest.fixture
def test_slice() -> Iterator[str]:
    os.mkdir(TEST)
    yield TEST
    ending.kill((TEST,))
    assert ending.remove((TEST,), 30)


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


def look_from(directory: str) -> tuple[list[str], list[str], list[str]]:
    done = subprocess.run([sys.executable, "-c", LOOK, directory], stdout=subprocess.PIPE, check=True)
    parents, controllers, reasons = json.loads(done.stdout)
    return parents, controllers, reasons


def test_root_without_a_free_subtree_gets_the_slice(test_slice: str) -> None:
    parents, controllers, reasons = look_from(test_slice)
    assert parents == [f"{TOP}/unisandbox.slice"]
    assert controllers == ["cpu", "cpuacct", "devices", "freezer", "memory", "pids"]
    assert reasons == []


@pytest.mark.parametrize("mark", ["user.delegate", "trusted.delegate"])
def test_a_delegated_subtree_without_processes_is_used(test_slice: str, mark: str) -> None:
    os.setxattr(test_slice, mark, b"1")
    os.mkdir(f"{test_slice}/own")
    assert look_from(f"{test_slice}/own")[0] == [test_slice]


def test_a_delegated_cgroup_with_processes_is_left_as_it_is(test_slice: str) -> None:
    os.setxattr(test_slice, "user.delegate", b"1")
    assert look_from(test_slice)[0] == [f"{TOP}/unisandbox.slice"]


def test_a_parent_with_processes_gives_no_limits_and_says_why(test_slice: str, sleeper: int) -> None:
    Path(test_slice, "cgroup.procs").write_text(str(sleeper))
    found = Cgroups.detect(NAME, parent=PARENT)
    assert set(found.missing) == {"memory", "pids", "cpu"}
    assert "holds processes" in found.reasons()[0]
    root = found.root()
    with pytest.raises(UnavailableError, match="holds processes"):
        root.child("c1", limits=Limits(pids=5))
    # What needs no controller works.
    cgroup = root.child("c1").child("p1", for_process=True)
    cgroup.enter(sleeper)
    cgroup.kill()
    assert root.remove(30)


def test_on_word_the_processes_of_a_parent_make_room(test_slice: str, sleeper: int) -> None:
    Path(test_slice, "cgroup.procs").write_text(str(sleeper))
    found = Cgroups.detect(NAME, parent=PARENT, make_room=True)
    assert found.reasons() == []
    root = found.root()
    assert Path(test_slice, "unisandbox-host", "cgroup.procs").read_text().split() == [str(sleeper)]
    assert root.child("c1", limits=Limits(pids=5, memory=64 << 20, cpu=1)).limits().pids == 5
    assert root.remove()
    # Who asks from the leaf afterwards finds the same place.
    assert look_from(f"{test_slice}/unisandbox-host")[0] == [test_slice]


def test_the_delegated_cgroup_of_a_service_can_be_the_parent() -> None:
    own = Path("/proc/self/cgroup").read_text().strip().removeprefix("0::")
    if own == "/":
        pytest.skip("this process is in the root cgroup")
    members = Path(f"{TOP}{own}/cgroup.procs").read_text().split()
    root = Cgroups.detect(NAME, parent=own, make_room=True).root()
    try:
        assert root.child("c1", limits=Limits(pids=5)).limits().pids == 5
    finally:
        assert root.remove()
        Path(f"{TOP}{own}/cgroup.subtree_control").write_text("-memory -pids -cpu")
        for pid in members:
            if os.path.exists(f"/proc/{pid}"):
                Path(f"{TOP}{own}/cgroup.procs").write_text(pid)
        assert ending.remove((f"{TOP}{own}/unisandbox-host",), 30)


def test_the_slice_goes_with_the_last_engine() -> None:
    one, two = (Cgroups.detect(f"{NAME}-{number}").root() for number in (1, 2))
    home = os.path.dirname(one.dirs[0])
    assert home.endswith("/unisandbox.slice")
    assert one.remove()
    assert two.child("c1", limits=Limits(pids=5)).limits().pids == 5
    assert two.remove()
    others = [entry.name for entry in os.scandir(home) if entry.is_dir()] if os.path.isdir(home) else []
    assert others or not os.path.exists(home)


def test_a_cgroup_that_holds_processes_says_why_it_can_have_no_children(sleeper: int) -> None:
    root = Cgroups.detect(NAME).root()
    cgroup = root.child("c1")
    cgroup.enter(sleeper)
    try:
        with pytest.raises(OSError, match="processes are in it") as caught:
            cgroup.child("p1", limits=Limits(memory=64 << 20), for_process=True)
        assert caught.value.errno == errno.EBUSY
        assert cgroup.children() == ()
    finally:
        root.kill()
        assert root.remove(30)
