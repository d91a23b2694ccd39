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
_RUNTIME_DIR: Final = (
    "directories that all engines of a host share: empty ones, made and removed again by whoever comes"
)

# Where something is done and no point stands, each with its reason. Nothing else may be missing.
EXCEPTIONS: Final = {
    "engine: _end_process": _DOCTOR,
    "engine: _unmount": _DOCTOR,
    "engine: _unlink": _DOCTOR,
    "engine: _make_directory": _RUNTIME_DIR,
    "engine: _new_directory": "a temporary state directory that is empty: `unisandbox doctor` finds it by its name",
    "engine: remove_if_empty": _RUNTIME_DIR,
    "backends/runc: _try": _PROBE,
    "backends/runc: _remember": _PROBE,
    "oci: kill_tree": _KILL,
    "oci: _query": _PROBE,
    "oci: _end": _PROBE,
    "oci: release": _CALLERS,
    "oci: enter": _CALLERS,
    "oci: signal_member": _CALLERS,
    "oci: _write": _CALLERS,
    "oci: Runtime._simple": _VIEW,
    "oci: Runtime._call": _VIEW,
    "oci: RuntimeFiles.write": _VIEW,
    "oci: RuntimeFiles.unlink": _VIEW,
    "oci: listening": _VIEW,
    "host/cgroups: _evacuate": _V2,
    "host/cgroups: _kill_member": _V1,
    "host/cgroups: _write": _V1,
    "host/init: _pid_of": "signal 0 asks only",
    "host/init: _kill": _KILL,
    "host/keeper: Link._send": "the end of `tell` and `say`, which have the points",
    "host/keeper: open_state_dir": "the engine has made it before, with the points of `state.mkdir`",
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
