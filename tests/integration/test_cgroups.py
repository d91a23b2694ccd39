"""The promises of host.cgroups, with real processes on whatever hierarchy this host has.

Each test runs where an engine's cgroups are by default, below a parent given by word, and, on a hybrid host, as if
there were no unified tree.
"""

from __future__ import annotations

import errno
import os
import select
import tempfile
import time
from pathlib import Path

import attrs
import pytest
from tests.cgroup_actors import PATIENCE, Spawn, until

from unisandbox.api.errors import FailedPreconditionError, UnavailableError
from unisandbox.host.cgroups import Cgroup, Cgroups, Limits, ending

pytestmark = pytest.mark.root

MIB = 1 << 20


def hog(mib: int) -> str:
    return f"x = b'x' * ({mib} << 20); print('held'); sys.stdin.readline()"


# --- limits


def test_oom_kill_by_the_container_limit_is_counted_at_the_process(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("s1").child("c1", limits=Limits(memory=16 * MIB))
    victim, bystander = container.child("p1", for_process=True), container.child("p2", for_process=True)
    small, large = spawn("sys.stdin.readline()"), spawn(hog(64))
    bystander.enter(small.pid)
    victim.enter(large.pid)
    large.go()
    assert large.wait() == -9
    assert victim.oom_kills() == 1
    assert (bystander.oom_kills(), container.oom_kills(), root.oom_kills()) == (0, 0, 0)


def test_who_watches_memory_is_woken_by_a_kill_below_and_finds_it_counted(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1", limits=Limits(memory=16 * MIB))
    victim = container.child("p1", for_process=True)
    notice, _ = container.watch_oom()
    try:
        assert not select.select([notice], [], [], 0)[0]
        large = spawn(hog(64))
        victim.enter(large.pid)
        large.go()
        assert select.select([notice], [], [], PATIENCE)[0]
        assert large.wait() == -9
        assert victim.oom_kills() == 1
        victim.remove()
        assert container.oom_counter is not None
        is_v2 = "memory.events" in container.oom_counter[0]
        assert container.oom_kills_below() == (1 if is_v2 else None), "also when the victim's cgroup is gone"
    finally:
        os.close(notice)


def test_oom_kill_by_the_limit_of_a_process(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1")
    cgroup = container.child("p1", limits=Limits(memory=16 * MIB), for_process=True)
    actor = spawn(hog(64))
    cgroup.enter(actor.pid)
    actor.go()
    assert actor.wait() == -9
    assert cgroup.oom_kills() == cgroup.stats().oom_kills == 1
    assert container.oom_kills() == 0


def test_page_cache_that_can_be_given_back_is_told_apart(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1")
    with tempfile.TemporaryFile(dir="/var/tmp") as file:  # on a disk: what is in a tmpfs cannot be given back
        if _is_in_memory(file.fileno()):
            pytest.skip("/var/tmp is no disk here")
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        writer = spawn(f"f = open({path!r}, 'wb'); f.write(b'x' * {20 * MIB}); f.flush(); os.fsync(f); {hog(8)}")
        container.child("p1", for_process=True).enter(writer.pid)
        writer.go()
        assert writer.line() == "held"

        def is_told() -> bool:
            stats = container.stats()
            assert stats.memory_bytes is not None
            assert stats.memory_inactive_file_bytes is not None
            return 10 * MIB < stats.memory_inactive_file_bytes < stats.memory_bytes - 8 * MIB

        until(is_told)  # the kernel adds up what its processors have counted every two seconds: mm/memcontrol.c


def _is_in_memory(fd: int) -> bool:
    """Whether the kernel keeps no disk for a file: its device has no number of a disk's. Source: proc(5), mountinfo."""
    device = os.fstat(fd).st_dev
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        mounts = [line.split(" - ") for line in file]
    return any(
        place.split()[2] == f"{os.major(device)}:{os.minor(device)}" and kind.split()[0] in {"tmpfs", "ramfs"}
        for place, kind in mounts
    )


def test_all_of_a_group_are_killed_for_memory_with_one(root: Cgroup, spawn: Spawn) -> None:
    limits = Limits(memory=16 * MIB, oom_group=True)
    if Cgroups.detect("unisandbox-none").version != "v2":
        with pytest.raises(UnavailableError, match="needs cgroup v2"):
            root.child("c1", limits=limits)
        return
    container = root.child("c1", limits=limits)
    assert container.limits() == limits
    victim, bystander = container.child("p1", for_process=True), container.child("p2", for_process=True)
    small, large = spawn("sys.stdin.readline()"), spawn(hog(64))
    bystander.enter(small.pid)
    victim.enter(large.pid)
    large.go()
    assert (large.wait(), small.wait()) == (-9, -9)
    # The kernel counts the one that it has chosen once more, with the group.
    assert min(victim.oom_kills(), bystander.oom_kills()) >= 1, "each knows why it ended"
    container.set_limits(Limits(memory=16 * MIB))
    assert not container.limits().oom_group


def test_a_kill_of_ours_is_no_oom_kill(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1", limits=Limits(memory=64 * MIB)).child("p1", for_process=True)
    actor = spawn(hog(4))
    cgroup.enter(actor.pid)
    actor.go()
    assert actor.line() == "held"
    cgroup.kill()
    assert actor.wait() == -9
    assert cgroup.oom_kills() == 0


def test_oom_kills_of_a_removed_cgroup_is_an_error_and_not_zero(root: Cgroup) -> None:
    cgroup = root.child("c1")
    assert cgroup.remove()
    with pytest.raises(FileNotFoundError, match="c1"):
        cgroup.oom_kills()


def test_pids_limit_refuses_fork(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1", limits=Limits(pids=5))
    cgroup = container.child("p1", for_process=True)
    actor = spawn(
        "n = 0\ntry:\n  while True:\n    if os.fork() == 0:\n      time.sleep(1000)\n    n += 1\n"
        "except BlockingIOError:\n  print(n)\nsys.stdin.readline()"
    )
    cgroup.enter(actor.pid)
    actor.go()
    assert actor.line() == "4"
    assert len(cgroup.pids()) == 5
    stats = container.stats()
    assert (stats.pids, stats.pids_limit) == (5, 5)
    cgroup.kill()


def test_cpu_quota_throttles_and_time_is_counted(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1", limits=Limits(cpu=0.2))
    cgroup = container.child("p1", for_process=True)
    actor = spawn("while time.process_time() < 0.3:\n  pass\nprint('done'); sys.stdin.readline()")
    cgroup.enter(actor.pid)
    actor.go()
    assert actor.line() == "done"
    stats = container.stats()
    assert stats.throttled_periods is not None
    assert stats.throttled_periods > 0
    assert stats.throttled_seconds is not None
    assert stats.throttled_seconds > 0
    assert stats.cpu_seconds is not None
    assert 0.1 < stats.cpu_seconds < 10
    of_process = cgroup.stats().cpu_seconds
    assert of_process is None or 0.1 < of_process <= container.stats().cpu_seconds  # type: ignore[operator]


def test_limits_are_read_back_from_the_kernel(root: Cgroup) -> None:
    limits = Limits(memory=32 * MIB, cpu=1.5, cpu_weight=40, pids=7)
    cgroup = root.child("c1", limits=limits)
    # Where swap is not accounted for there is nothing to read.
    assert attrs.evolve(cgroup.limits(), swap=0) == limits
    assert cgroup.stats().memory_limit_bytes == 32 * MIB


def test_a_cgroup_without_limits_has_none(root: Cgroup) -> None:
    found = root.child("c1").limits()
    assert (found.memory, found.cpu, found.cpu_weight, found.pids) == (None, None, None, None)


@pytest.mark.parametrize(
    "after",
    [
        Limits(memory=64 * MIB, swap=8 * MIB, cpu=0.5, cpu_weight=1000, pids=100),
        Limits(memory=8 * MIB, cpu=0.1, pids=2),
        Limits(memory=256 * MIB, swap=None),
        Limits(),
    ],
    ids=["raised", "lowered", "swap unlimited", "taken away"],
)
def test_limits_can_be_changed_while_processes_run(root: Cgroup, spawn: Spawn, after: Limits) -> None:
    container = root.child("c1", limits=Limits(memory=32 * MIB, cpu=0.3, cpu_weight=50, pids=10))
    actor = spawn(hog(2))
    container.child("p1", for_process=True).enter(actor.pid)
    actor.go()
    assert actor.line() == "held"
    container.set_limits(after)
    found = container.limits()
    assert attrs.evolve(found, swap=0) == attrs.evolve(after, swap=0)
    if after.memory is not None and found.swap is not None:
        assert found.swap == after.swap
    assert actor.process.poll() is None


def test_a_memory_limit_below_what_is_in_use_is_refused_and_kills_nobody(root: Cgroup, spawn: Spawn) -> None:
    before = Limits(memory=128 * MIB, pids=10)
    container = root.child("c1", limits=before)
    actor = spawn(hog(32))
    container.child("p1", for_process=True).enter(actor.pid)
    actor.go()
    assert actor.line() == "held"
    with pytest.raises(OSError, match="are in use") as caught:
        container.set_limits(Limits(memory=8 * MIB, pids=20))
    assert caught.value.errno == errno.EBUSY
    assert attrs.evolve(container.limits(), swap=0) == before
    assert actor.process.poll() is None


def test_what_happens_below_counts_above(root: Cgroup, spawn: Spawn) -> None:
    sandbox = root.child("s1")
    cgroup = sandbox.child("c1").child("p1", for_process=True)
    actor = spawn(hog(24))
    cgroup.enter(actor.pid)
    actor.go()
    assert actor.line() == "held"
    stats = sandbox.stats()
    assert stats.memory_bytes is not None
    assert stats.memory_bytes > 24 * MIB
    assert stats.memory_peak_bytes is None or stats.memory_peak_bytes > 24 * MIB
    assert stats.pids == 1
    assert sandbox.pids() == (actor.pid,)


@pytest.mark.parametrize("controller", ["memory", "cpu", "pids"])
def test_a_limit_that_cannot_be_had_is_refused_before_anything_is_made(cgroups: Cgroups, controller: str) -> None:
    layout = cgroups._layout._replace(missing={controller: "it is not there; mount it"})
    poor = Cgroups(cgroups.name, layout).root()
    limits = {"memory": Limits(memory=MIB), "cpu": Limits(cpu=1), "pids": Limits(pids=5)}[controller]
    with pytest.raises(UnavailableError, match=rf"{controller} limit .* cannot be set\. it is not there; mount it"):
        poor.child("c1", limits=limits)
    assert not any(os.path.lexists(directory) for directory in poor.predict("c1"))
    there = poor.child("c2")
    with pytest.raises(UnavailableError, match=controller):
        there.set_limits(limits)


def test_a_process_cgroup_refuses_a_limit_that_it_has_no_directory_for(root: Cgroup) -> None:
    cgroup = root.child("c1").child("p1", for_process=True)
    if len(root.dirs) == 1:
        pytest.skip("v2 has one directory for everything")
    with pytest.raises(FailedPreconditionError, match="pids"):
        cgroup.set_limits(Limits(pids=5))


def test_a_child_that_fails_leaves_nothing(root: Cgroup) -> None:
    if len(root.dirs) == 1:
        pytest.skip("v2 accepts any cpu limit below another")
    parent = root.child("s1", limits=Limits(cpu=0.5))
    with pytest.raises(OSError, match="more cpu than the one above"):
        parent.child("c1", limits=Limits(cpu=1.0))
    assert parent.children() == ()


# --- ending


def test_a_fork_bomb_ends_at_once(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1", limits=Limits(pids=40))
    cgroup = container.child("p1", for_process=True)
    actor = spawn("while True:\n  try:\n    os.fork()\n  except OSError:\n    pass")
    cgroup.enter(actor.pid)
    actor.go()
    until(lambda: len(cgroup.pids()) >= 30)
    cgroup.kill()
    assert actor.wait() == -9
    until(lambda: not container.pids())
    assert container.remove(PATIENCE)


def test_kill_also_ends_processes_that_are_in_one_hierarchy_only(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1")
    actors = [spawn("sys.stdin.readline()") for _ in cgroup.dirs]
    for actor, directory in zip(actors, cgroup.dirs, strict=True):
        Path(directory, "cgroup.procs").write_text(str(actor.pid))
    cgroup.kill()
    assert [actor.wait() for actor in actors] == [-9] * len(actors)


def test_kill_ends_a_whole_tree_and_nothing_beside_it(root: Cgroup, spawn: Spawn) -> None:
    sandbox, other = root.child("s1"), root.child("s2").child("p", for_process=True)
    inside, outside = spawn("sys.stdin.readline()"), spawn("sys.stdin.readline()")
    sandbox.child("c1").child("p1", for_process=True).enter(inside.pid)
    other.enter(outside.pid)
    sandbox.kill()
    assert inside.wait() == -9
    assert outside.process.poll() is None
    sandbox.kill()  # again: fine


def test_kill_with_a_timeout_returns_when_all_are_gone(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1").child("p1", for_process=True)
    actor = spawn("for _ in range(5):\n  os.fork()\nprint('forked')\ntime.sleep(1000)")
    cgroup.enter(actor.pid)
    actor.go()
    until(lambda: len(cgroup.pids()) == 32)
    ending.kill(cgroup.dirs, PATIENCE)
    assert cgroup.pids() == ()
    ending.kill(("/sys/fs/cgroup/unisandbox-never-was",), PATIENCE)


def test_remove_says_no_while_a_process_is_there(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1").child("p1", for_process=True)
    actor = spawn("sys.stdin.readline()")
    cgroup.enter(actor.pid)
    assert not cgroup.remove()
    assert cgroup.exists()
    cgroup.kill()
    actor.wait()
    assert cgroup.remove(PATIENCE)
    assert not cgroup.exists()
    assert cgroup.remove()  # again: fine


def test_remove_takes_what_is_below_with_it(root: Cgroup) -> None:
    top = root.child("s1")
    for name in ("c1", "c2"):
        top.child(name).child("p1", for_process=True)
    assert top.remove()
    assert root.children() == ()


def test_remove_touches_nothing_that_is_not_a_cgroup(root: Cgroup, tmp_path: Path) -> None:
    cgroup = root.child("c1")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").touch()
    (tmp_path / "link").symlink_to(cgroup.dirs[0])
    with pytest.raises(OSError, match="is not a cgroup"):
        ending.remove((str(tmp_path / "dir"),))
    with pytest.raises(OSError, match="link"):
        ending.remove((str(tmp_path / "link"),))
    assert cgroup.exists()
    assert (tmp_path / "dir" / "file").exists()


# --- freezing


def test_frozen_processes_do_not_run_until_thawed(root: Cgroup, spawn: Spawn) -> None:
    container = root.child("c1")
    actor = spawn("while True:\n  pass")
    container.child("p1", for_process=True).enter(actor.pid)
    actor.go()
    spent = Path(f"/proc/{actor.pid}/schedstat")

    def runs() -> bool:
        before = spent.read_text().split()[0]
        time.sleep(0.05)
        return spent.read_text().split()[0] != before

    until(runs)
    assert not container.is_frozen
    until(container.freeze)
    assert not runs()
    assert container.is_frozen
    until(container.freeze)  # again: fine
    container.thaw()
    until(runs)
    assert not container.is_frozen
    container.thaw()
    container.kill()


def test_what_is_frozen_can_be_killed(root: Cgroup, spawn: Spawn) -> None:
    sandbox = root.child("s1")
    container = sandbox.child("c1")
    actor = spawn("while True:\n  pass")
    container.child("p1", for_process=True).enter(actor.pid)
    actor.go()
    until(container.freeze)
    sandbox.kill()
    assert actor.wait() == -9


def test_a_process_that_enters_a_frozen_cgroup_is_frozen_and_can_be_killed(root: Cgroup, spawn: Spawn) -> None:
    cgroup = root.child("c1").child("p1", for_process=True)
    until(cgroup.freeze)
    actor = spawn("print('ran')")
    cgroup.enter(actor.pid)
    actor.go()
    assert cgroup.pids() == (actor.pid,)
    cgroup.kill()
    assert actor.wait() == -9
