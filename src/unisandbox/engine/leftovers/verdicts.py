"""Whether an engine lives, by its state directory's lock and its keeper: "unsure" on any doubt."""

from __future__ import annotations

import os
import time
from typing import Final, Literal

import attrs

from unisandbox.engine.leftovers.traces import HostTraces
from unisandbox.engine.state import unlocked
from unisandbox.host import pidfd as pidfds
from unisandbox.host import small_files
from unisandbox.host.keeper.protocol import LOCK_NAME
from unisandbox.host.keeper.starting import LOCK_BYTES, LockHolder, holder_in

# Seconds. Opening an engine takes milliseconds from its first directory to the lock.
_YOUNG: Final = 60.0
# Source: PROC_PID_INIT_INO, include/linux/proc_ns.h: the pid namespace of the machine, from which all are seen.
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC


@attrs.frozen
class Verdict:
    """Whether it lives, and why that is said."""

    state: Literal["living", "dead", "unsure"]
    why: str = ""


def verdict_of(host: HostTraces, engine_id: str) -> Verdict:
    """Whether an engine lives."""
    engine = host.of(engine_id)
    if engine_id in host.keepers:
        return Verdict("living")
    if engine.state_dir:
        return verdict_of_directory(engine.state_dir)
    if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
        return Verdict(
            "unsure",
            "its state directory is not known here, and a keeper in another pid namespace could not be seen;"
            " look again from the host",
        )
    if any(map(_is_young, engine.everything())):
        return Verdict("unsure", f"it changed within the last {_YOUNG:g} s; look again later")
    return Verdict("dead", "no keeper of its engine runs")


def verdict_of_directory(path: str) -> Verdict:
    """Whether the engine of a state directory lives."""
    with unlocked(path, wait=0.0) as unused:
        if not unused:
            return Verdict("living")
        holder = holder_of(path)
    if holder is None:
        if _is_young(path):
            return Verdict("unsure", f"it changed within the last {_YOUNG:g} s and had no keeper yet; look again later")
        return Verdict("dead", "its engine never had a keeper")
    if pidfds.lives(holder.owner, holder.start_time):
        return Verdict(
            "unsure",
            f"its keeper has ended, but process {holder.owner}, which opened the engine, lives: it cleans up when it"
            " closes the engine or ends",
        )
    return Verdict("dead", "its engine's process and keeper have ended")


def holder_of(state_dir: str) -> LockHolder | None:
    """Who had the lock last; None when nobody ever had."""
    try:
        holder = holder_in(small_files.read(os.path.join(state_dir, LOCK_NAME), LOCK_BYTES)[0])
    except (FileNotFoundError, small_files.NotARegularFileError, small_files.TooLargeError):
        return None
    return holder if holder.keeper else None  # killed before it was written: there was no keeper


def _is_young(path: str) -> bool:
    try:
        return time.time() - os.lstat(path).st_mtime < _YOUNG
    except FileNotFoundError:
        return False
