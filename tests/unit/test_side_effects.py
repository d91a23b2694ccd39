"""Every side effect of an engine's life has a point at which the crash matrix kills (`tests/crash`)."""

from __future__ import annotations

from typing import Final

from tests.crash.effects import without_point

_DOCTOR: Final = "`unisandbox doctor --fix` alone does it, by names; cut, it is asked for again"
_PROBE: Final = "a look at what this host can do: it touches nothing of a sandbox"
_CALLERS: Final = "those who call it, in other modules, have the points"
_KILL: Final = "a kill and no more: it is where whoever comes after a crash begins as well"
_V1: Final = "only on pure cgroup v1, where no cgroup can be killed as one: a kill, member by member"
_V2: Final = "only on v2 without a delegated parent; each move has the points of `cgroup.write`"
_REMOVAL: Final = "one step of the removal of a tree, which has the points"
_VIEW: Final = "in the keeper's own file system, which goes with it"
_BIRTH: Final = "the keeper before it takes its first request: nothing of it is anybody's yet"
_GOES: Final = "it ends with the keeper, or with the worker, which dies with that"
_ANSWER: Final = "a word of the keeper to its clients, or within it"
_SPAWN: Final = "a part of the request that starts a program, which has moments of its own"
_STEP: Final = "a part of a step or a mount operation of a job, which has the points"
_RUNTIME_DIR: Final = (
    "directories that all engines of a host share: empty ones, made and removed again by whoever comes"
)

# Where something is done and no point stands, each with its reason. Nothing else may be missing.
EXCEPTIONS: Final = {
    "engine: _end_keeper": _DOCTOR,
    "engine: _end_process": _DOCTOR,
    "engine: _unmount": _DOCTOR,
    "engine: _unlink": _DOCTOR,
    "engine: _make_directory": _RUNTIME_DIR,
    "engine: Clerk._send": "work with files, which a cut leaves as it leaves that of `files` without a clerk",
    "engine: _free_names": "names of an engine that was killed before it had anything: the next engine sweeps them",
    "engine: make": "a temporary state directory that is empty: the next engine that needs one sweeps it",
    "engine: remove_if_empty": _RUNTIME_DIR,
    "backends/runc: _try": _PROBE,
    "backends/runc: _remember": _PROBE,
    "oci: kill_tree": _KILL,
    "oci: _query": _PROBE,
    "oci: _end": _PROBE,
    "oci: release": _CALLERS,
    "oci: enter": _CALLERS,
    "oci: _write": _CALLERS,
    "oci: Runtime._simple": _VIEW,
    "oci: Runtime._call": _VIEW,
    "oci: RuntimeFiles.write": _VIEW,
    "oci: RuntimeFiles.unlink": _VIEW,
    "oci: RuntimeFiles.unlink_pid_file": _VIEW,
    "oci: listening": _VIEW,
    "host/helper.py: Helper.kill": _KILL,
    "host/helper.py: Helper.clear": _KILL,
    "host/helper.py: Helper.wake": "lets go on what somebody else has stopped: nothing comes of it but that",
    "host/cgroups: _evacuate": _V2,
    "host/cgroups: mark": "goes with its cgroup; one that is cut before it is known by the engine's pointer",
    "host/cgroups: _kill_member": _V1,
    "host/cgroups: _write": _V1,
    "host/init: _pid_of": "signal 0 asks only",
    "host/init: _kill": _KILL,
    "host/keeper: Link._send": "the end of `tell` and `say`, which have the points",
    "host/keeper: open_state_dir": "the engine has made it before, with the points of `state.mkdir`",
    "host/keeper: leave_inheritance": _BIRTH,
    "host/keeper: enter": _BIRTH,
    "host/keeper: own_mount_namespace": _GOES,
    "host/keeper: _job": _ANSWER,
    "host/keeper: _fork": _GOES,
    "host/keeper: Connections._accept": _ANSWER,
    "host/keeper: Connections._flush": _ANSWER,
    "host/keeper: Connections._send_expirations": _ANSWER,
    "host/keeper: Events.end": "the numbers of a keeper that has told nothing",
    "host/keeper: Family.cancel_spawn": _KILL,
    "host/keeper: Family._know": _KILL,
    "host/keeper: Family.kill_all": _KILL,
    "host/keeper: _end_group": _KILL,
    "host/keeper: Guards.start": _KILL,
    "host/keeper: Guards._in_child": _ANSWER,
    "host/keeper: Launcher.run": _SPAWN,
    "host/keeper: Launch.start": _SPAWN,
    "host/keeper: _carry": _SPAWN,
    "host/keeper: note": "the keeper's log, for people",
    "host/keeper: send": _ANSWER,
    "host/keeper: Server._end_if_idle": _CALLERS,
    "host/keeper: main": _ANSWER,
    "host/keeper: View.leave": "in a mount namespace of a process that runs guards, which goes with it",
    "host/keeper: _kill": _KILL,
    "host/keeper: _umount": _STEP,
    "host/keeper: Workers.begin": _ANSWER,
    "host/keeper: Workers.kill": _KILL,
    "host/jobs.py: _unmount": _STEP,
    "host/jobs.py: _give": _STEP,
    "host/jobs.py: _make_directory": _STEP,
    "host/mount_operations.py: _op_mkdir": _STEP,
    "host/mounts.py: new_mount": _STEP,
    "host/mounts.py: idmap": _STEP,
    "host/mounts.py: detach": _STEP,
    "host/namespaces.py: create": _KILL,
    "host/namespaces.py: _clone_as_root_of": _GOES,
    "host/namespaces.py: _fork_into": _GOES,
    "host/namespaces.py: _in_child": _GOES,
    "host/namespaces.py: _write": _STEP,
    "host/namespaces.py: _write_sysctl": _STEP,
    "host/tree.py: Tree.mkdir": _STEP,
    "host/tree.py: Tree.file": _STEP,
    "host/tree.py: Tree.symlink": _STEP,
    "host/tree.py: Tree.bind": _STEP,
    "host/tree.py: Tree.overlay": _STEP,
    "host/tree.py: Tree.restrict": _STEP,
    "host/tree.py: Tree._make_mount_point": _STEP,
    "host/tree.py: Tree._attach": _STEP,
    "host/tree.py: _own": _STEP,
    "host/tree.py: _overlay_mount_old": _STEP,
    "host/keeper: finish_child": "the child that the keeper has left behind: it ends by itself",
    "host/removal.py: removing": _REMOVAL,
    "host/removal.py: _Emptying._remove": _REMOVAL,
    "host/removal.py: _Emptying._leave": _REMOVAL,
}


def test_every_side_effect_has_a_point_at_which_the_crash_matrix_kills() -> None:
    missing = {name: does for name, does in without_point().items() if name not in EXCEPTIONS}
    assert missing == {}, "put `host.boundary.reached` before and after it, or say here why not"


def test_what_is_excepted_is_there() -> None:
    assert sorted(set(EXCEPTIONS) - set(without_point())) == [], "these have a point by now, or are gone"
