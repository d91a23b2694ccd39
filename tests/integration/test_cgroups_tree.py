"""The tree of cgroups: how processes come into it, which devices they reach there, and who may make and remove what."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cgroup_actors import ANYTHING, PATIENCE, Actor, Spawn

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.cgroups import Cgroup, Cgroups, DeviceRule, Limits, open_existing

pytestmark = pytest.mark.root


# --- devices

DEVICES = """
import errno
def attempt(what, *args):
    try:
        r = what(*args)
        if isinstance(r, int):
            os.close(r)
        return 'ok'
    except OSError as e:
        return errno.errorcode[e.errno]
print(attempt(os.open, '/dev/null', os.O_RDWR), attempt(os.open, '/dev/zero', os.O_RDONLY),
      attempt(os.open, '/dev/zero', os.O_RDWR), attempt(os.open, '/dev/full', os.O_RDONLY),
      attempt(os.mknod, {node!r}, 0o20600, os.makedev(1, 5)), attempt(os.mknod, {block!r}, 0o60600, os.makedev(7, 99)))
sys.stdin.readline()
"""


def devices_seen(cgroup: Cgroup, spawn: Spawn, tmp_path: Path) -> str:
    node, block = tmp_path / "node", tmp_path / "block"
    actor = spawn(DEVICES.format(node=str(node), block=str(block)))
    cgroup.enter(actor.pid)
    actor.go()
    seen = actor.line()
    actor.go()
    actor.wait()
    for path in (node, block):
        path.unlink(missing_ok=True)
    return seen


def test_devices_are_denied_but_those_that_are_allowed(root: Cgroup, spawn: Spawn, tmp_path: Path) -> None:
    free, bound = root.child("c1").child("p1", for_process=True), root.child("c2")
    bound.allow_devices([DeviceRule("c", 1, 3, "rw"), DeviceRule("c", 1, 5, "r")])
    assert devices_seen(free, spawn, tmp_path) == "ok ok ok ok ok ok"
    held = bound.child("p1", for_process=True)
    assert devices_seen(held, spawn, tmp_path) == "ok ok EPERM EPERM EPERM EPERM"


def test_no_device_at_all(root: Cgroup, spawn: Spawn, tmp_path: Path) -> None:
    bound = root.child("c1")
    bound.allow_devices([])
    cgroup = bound.child("p1", for_process=True)
    assert devices_seen(cgroup, spawn, tmp_path) == "EPERM EPERM EPERM EPERM EPERM EPERM"


def test_device_rules_replace_earlier_ones(root: Cgroup, spawn: Spawn, tmp_path: Path) -> None:
    bound = root.child("c1")
    bound.allow_devices([])
    bound.allow_devices(ANYTHING)
    bound.allow_devices([DeviceRule("c", 1, None, "rm"), DeviceRule("b", None, 99, "m")])
    cgroup = bound.child("p1", for_process=True)
    assert devices_seen(cgroup, spawn, tmp_path) == "EPERM ok EPERM ok ok ok"


# --- the tree


def test_enter_moves_into_every_hierarchy_and_is_verified(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("s1").child("c1").child("p1", for_process=True)
    actor = spawn("sys.stdin.readline()")
    cgroup.enter(actor.pid)
    for procs in cgroup.procs:
        assert str(actor.pid) in Path(procs).read_text().split()
    cgroup.enter(actor.pid)  # again: fine
    actor.close()
    with pytest.raises(ProcessLookupError):
        cgroup.enter(actor.pid)


def test_a_process_enters_by_itself(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1").child("p1", for_process=True)
    actor = spawn(
        f"for path in {cgroup.entry!r}:\n  with open(path, 'w') as file:\n    file.write('0')\n"
        "print('in'); sys.stdin.readline()"
    )
    actor.go()
    assert actor.line() == "in"
    for path in cgroup.procs:
        assert str(actor.pid) in Path(path).read_text().split()


BORN = """
import ctypes, errno, struct
directory = os.open({clone_into!r}, os.O_RDONLY | os.O_DIRECTORY)
tasks = [os.open(path, os.O_WRONLY) for path in {tasks!r}]
if {uid}:
    os.setresgid({uid}, {uid}, {uid})
    os.setresuid({uid}, {uid}, {uid})
# struct clone_args: flags (CLONE_INTO_CGROUP), ..., exit_signal, ..., cgroup. clone3 is 435 on every machine.
args = struct.pack("=11Q", 1 << 33, 0, 0, 0, 17, 0, 0, 0, 0, 0, directory)
pid = ctypes.PyDLL(None, use_errno=True).syscall(435, args, ctypes.c_size_t(len(args)))
if pid < 0:
    assert ctypes.get_errno() == errno.EACCES
    print("refused")
    os._exit(0)
if pid == 0:
    for file in tasks:
        os.write(file, b"0")
    print(os.getpid())
    sys.stdin.readline()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("uid", [0, 100_000])
def test_a_process_can_be_born_in_a_cgroup_that_admits_its_user(root: Cgroup, spawn: Spawn, uid: int) -> None:
    container = root.child("c1")
    init, cgroup = container.child("init", for_process=True), container.child("p1", for_process=True)
    if cgroup.clone_into is None:
        pytest.skip("pure v1 has no CLONE_INTO_CGROUP")

    def start() -> Actor:
        code = BORN.format(clone_into=cgroup.clone_into, tasks=cgroup.tasks, uid=uid)
        actor = spawn(code)
        init.enter(actor.pid)
        actor.go()
        return actor

    if uid:
        assert start().line() == "refused"
        container.admit(uid)
        cgroup.admit(uid)
    actor = start()
    child = int(actor.line())
    assert cgroup.pids() == (child,)
    for path in cgroup.procs:
        assert str(child) in Path(path).read_text().split()
    actor.go()
    assert actor.line() == "7"


def test_predict_tells_the_directories_before_they_are_made(root: Cgroup) -> None:
    foreseen = root.predict("c1"), root.predict("p1", for_process=True)
    assert not any(os.path.lexists(directory) for directories in foreseen for directory in directories)
    made = root.child("c1"), root.child("p1", for_process=True)
    assert foreseen == (made[0].dirs, made[1].dirs)
    assert all(os.path.isdir(directory) for cgroup in made for directory in cgroup.dirs)


def test_a_second_child_of_one_name_is_refused_and_harms_the_first_not(root: Cgroup) -> None:
    first = root.child("c1", limits=Limits(pids=5))
    with pytest.raises(FileExistsError):
        root.child("c1", limits=Limits(pids=6))
    assert first.limits().pids == 5


def test_of_many_that_make_one_cgroup_exactly_one_wins(root: Cgroup, count: Callable[[int], int]) -> None:
    for round_ in range(count(100)):
        won: list[Cgroup] = []
        barrier = threading.Barrier(4)

        def make(name: str, won: list[Cgroup] = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with contextlib.suppress(FileExistsError):
                won.append(root.child(name, limits=Limits(pids=5)))

        threads = [threading.Thread(target=make, args=(f"c{round_}",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert won[0].limits().pids == 5
        assert won[0].remove()


def test_the_rest_of_a_removal_that_was_cut_short_is_no_obstacle(root: Cgroup) -> None:
    if len(root.dirs) == 1:
        pytest.skip("v2 has one directory for everything")
    os.mkdir(root.predict("c1")[-1])
    cgroup = root.child("c1", limits=Limits(pids=3))
    assert all(os.path.isdir(directory) for directory in cgroup.dirs)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a\n", "x" * 77, "cgroup.procs", "memory.max"])
def test_names_that_are_no_names_are_refused(root: Cgroup, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        root.child(name)
    with pytest.raises(InvalidArgumentError):
        root.predict(name)
    assert root.children() == ()


def test_a_successor_finds_ends_and_removes_what_was_left(cgroups: Cgroups, root: Cgroup, spawn: Spawn) -> None:
    made = root.child("s1").child("c1", limits=Limits(pids=9)).child("p1", for_process=True)
    actor = spawn("sys.stdin.readline()")
    made.enter(actor.pid)
    successor = Cgroups(cgroups.name, cgroups._layout)
    assert successor.find("").children() == ("s1",)
    assert successor.find("s1/c1").limits().pids == 9
    found = open_existing(successor, made.dirs)
    assert (found.path, found.dirs, found.procs) == (made.path, made.dirs, made.procs)
    assert found.pids() == (actor.pid,)
    successor.find("s1").kill()
    assert actor.wait() == -9
    assert successor.find("s1").remove(PATIENCE)
    with pytest.raises(FileNotFoundError, match="s1"):
        successor.find("s1")
    with pytest.raises(InvalidArgumentError):
        successor.find("../s1")
    with pytest.raises(InvalidArgumentError):
        open_existing(successor, ("/sys/fs/cgroup/memory",))


def test_detection_and_reading_change_nothing_and_the_root_is_made_on_demand(cgroups: Cgroups) -> None:
    directories = [f"{place.parent}/{cgroups.name}" for place in cgroups.places]
    assert not any(os.path.exists(directory) for directory in directories)
    assert list(cgroups.root().dirs) == directories
    assert cgroups.root().exists()  # twice: fine
