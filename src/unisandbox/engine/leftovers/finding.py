"""What is left over, in an order in which it can be removed. Finding changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import attrs

from unisandbox.api import short_name
from unisandbox.engine.leftovers.traces import HostTraces, Traces, homeless, is_private, short_of, subdirectories
from unisandbox.engine.leftovers.verdicts import Verdict, holder_of, verdict_of, verdict_of_directory
from unisandbox.engine.records import RecordStore
from unisandbox.engine.runtime_directory import has_unused_leases
from unisandbox.engine.state_files import SANDBOXES, has_records
from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import leases

Kind = Literal[
    "keeper",
    "state",
    "record",
    "later",
    "stray",
    "process",
    "cgroup",
    "loop",
    "mount",
    "image",
    "directory",
    "file",
    "link",
]

_SHORT: Final = re.compile(r"[a-z2-7]{10}")


@attrs.frozen
class Leftover:
    """One thing with our mark that no living engine has.

    Attributes:
        kind: "keeper": one that waits for an owner and has no sandboxes, or one whose state directory is gone; "state":
            a state directory with records, whose keeper is gone; "record": one that cannot be used, of an engine that
            lives; "later": one that a later version has written, of such an engine; "stray": a cgroup or disk image of
            such a one, of which no record speaks. All else is a thing of an engine that has ended.
        what: which one: a path, or a process's number and name.
        engine_id: whose it was; "" when that is not known, or it was shared.
        why: why it is left over, and if it cannot be removed here, why not and what to do.
        removable: `remove` may be tried.
        state_dir: of its engine, where that is known; an engine can be opened on it.
        paths: the directories of a cgroup in all hierarchies.
        process: pid and start time of a process.
    """

    kind: Kind
    what: str
    engine_id: str
    why: str
    removable: bool = True
    state_dir: str = ""
    paths: tuple[str, ...] = ()
    process: tuple[int, int] = (0, 0)


def find() -> list[Leftover]:
    """Everything of this user's engines that is left over, in an order in which it can be removed. Changes nothing."""
    host = HostTraces.look()
    found: list[Leftover] = []
    for engine_id in sorted(host.engines):
        found += _of_engine(host, engine_id)
    return [*found, *_unproven(host), *_without_engine(host), *_shared(host)]


def _of_engine(host: HostTraces, engine_id: str) -> list[Leftover]:
    """What one engine has left; while it lives a keeper that nobody needs or reaches, and what no record speaks of."""
    engine = host.of(engine_id)
    unreachable = homeless(host.keepers.get(engine_id, ()))
    if unreachable is not None:
        why = "its state directory was removed: nobody can reach it any more. What runs under it ends with it"
        return [Leftover("keeper", str(unreachable[0]), engine_id, why, process=unreachable)]
    verdict = verdict_of(host, engine_id)
    if verdict.state == "living":
        return [*_idle_keeper(host, engine_id, engine), *_of_living(engine_id, engine)]
    if verdict.state == "dead" and not engine.temporary and engine.state_dir and has_records(engine.state_dir):
        return [
            *_things(engine_id, _unrecorded(engine_id, engine), verdict),
            Leftover(
                "state",
                engine.state_dir,
                engine_id,
                f"{verdict.why}; it has records of sandboxes. Open an engine on it, which takes them over or"
                " cleans up after them",
                removable=False,
                state_dir=engine.state_dir,
            ),
        ]
    return _things(engine_id, engine, verdict)


def _idle_keeper(host: HostTraces, engine_id: str, engine: Traces) -> list[Leftover]:
    holder = holder_of(engine.state_dir) if engine.state_dir else None
    if holder is None or holder.owner or holder.policy != "keep" or has_records(engine.state_dir):
        return []
    if holder.keeper not in host.keepers.get(engine_id, ()):
        return []
    why = "it waits for an owner and has no sandboxes. Open an engine on its state directory and close it"
    return [Leftover("keeper", str(holder.keeper), engine_id, why, removable=False, state_dir=engine.state_dir)]


def _of_living(engine_id: str, engine: Traces) -> list[Leftover]:
    """What no record of a living engine speaks of. Who makes a sandbox has written its record before all else."""
    if engine.temporary or not engine.state_dir:
        return []
    records = RecordStore(os.path.join(engine.state_dir, SANDBOXES), durable=False).read_all(repair=False)
    found: list[tuple[Kind, str, str]] = []
    for bad in records.damaged:
        if bad.later:
            why = f"{bad.reason}. What it describes may be at work: use that version, or end its engine"
            found.append(("later", bad.path, why))
        else:
            found.append(("record", bad.path, f"it cannot be used: {bad.reason}. What it described is freed with it"))
    unrecorded = _unrecorded(engine_id, engine)
    why = "its engine lives, and no record speaks of it"
    # Looked at again: the record of a sandbox that is removed is the last that goes.
    found += [("stray", path, why) for path in (*unrecorded.cgroups, *unrecorded.images) if os.path.lexists(path)]
    return [
        Leftover(kind, what, engine_id, why, removable=False, state_dir=engine.state_dir) for kind, what, why in found
    ]


def _unproven(host: HostTraces) -> list[Leftover]:
    """Cgroups with the name of an engine's; that name may be a user's own word."""
    why = (
        "nothing but its name says that it was an engine's. If you know that it was, end what is in it and remove it, "
        "what is below it first: rmdir"
    )
    return [Leftover("cgroup", path, "", why, removable=False, paths=(path,)) for path in host.unproven]


def _without_engine(host: HostTraces) -> list[Leftover]:
    """Temporary state directories that never came to an engine."""
    found = []
    for path in host.unnamed:
        verdict = verdict_of_directory(path)
        if verdict.state != "living":
            removable = verdict.state == "dead"
            found.append(Leftover("directory", path, "", verdict.why, removable=removable, state_dir=path))
    return found


def _shared(host: HostTraces) -> list[Leftover]:
    """The file of leased numbers, when nobody leases any."""
    if not is_private(host.runtime) or not has_unused_leases(host.runtime):
        return []
    return [Leftover("file", os.path.join(host.runtime, leases.NAME), "", "no engine leases numbers in it")]


def _things(engine_id: str, engine: Traces, verdict: Verdict) -> list[Leftover]:
    """Everything of one engine, processes first and the way to its state last."""
    listed: list[tuple[Kind, str, tuple[str, ...], tuple[int, int]]] = []
    # One cgroup has a directory in every hierarchy.
    for name in sorted(set(map(os.path.basename, engine.cgroups))):
        paths = tuple(path for path in engine.cgroups if os.path.basename(path) == name)
        listed += [("process", f"{pid} ({comm})", paths, (pid, started)) for pid, started, comm in _members(paths)]
        listed.append(("cgroup", paths[0], paths, (0, 0)))
    listed += [("loop", f"/dev/loop{number} on {path}", (), (0, 0)) for number, path in engine.loops]
    # Mounts may lie upon each other, and in each other.
    listed += [("mount", path, (), (0, 0)) for path in reversed(engine.mounts)]
    listed += [("image", path, (), (0, 0)) for path in engine.images]
    directories = [engine.work_dir, engine.state_dir if engine.temporary else ""]
    listed += [("directory", path, (), (0, 0)) for path in directories if path]
    if engine.pointer:
        listed.append(("link", engine.pointer, (), (0, 0)))
    return [
        Leftover(
            kind,
            what,
            engine_id,
            verdict.why,
            removable=verdict.state == "dead",
            state_dir=engine.state_dir,
            paths=paths,
            process=process,
        )
        for kind, what, paths, process in listed
    ]


def _unrecorded(engine_id: str, engine: Traces) -> Traces:
    """What an engine with records has, and none of them speaks of."""
    # Before the records: of an engine that lives sandboxes come, and these have a record first.
    below = [(name, f"{cgroup}/{name}") for cgroup in engine.cgroups for name in subdirectories(cgroup)]
    store = RecordStore(os.path.join(engine.state_dir, SANDBOXES), durable=False)
    if any(not bad.later for bad in store.read_all(repair=False).damaged):
        return Traces(engine.state_dir)  # any of it may be what a damaged one spoke of
    recorded = {short_name(engine_id, sandbox_id) for sandbox_id in store.ids()}
    return Traces(
        engine.state_dir,
        cgroups=[path for name, path in below if _SHORT.fullmatch(name) and name not in recorded],
        images=[path for path in engine.images if short_of(path) not in recorded],
        loops=[(number, path) for number, path in engine.loops if short_of(path) not in recorded],
    )


def _members(cgroups: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Pid, start time and name of the processes in and below cgroups."""
    for pid in sorted(set().union(*map(ending.pids, cgroups)) - {0}):  # 0: not in our pid namespace
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                yield pid, pidfds.start_time(pid), file.read().rstrip("\n")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
