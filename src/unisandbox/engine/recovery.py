"""What an engine does about the sandboxes that a former one has left: adopt them, free what is left, or only tell.

There are two cases. The former engine's keeper runs on (policy "keep"): what it held lives, and can be adopted. Or it
is gone, by its policy, a crash or a reboot: then nothing lives that is of use, and what is left is freed by its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final, Literal

import anyio

from unisandbox.api import (
    DamagedRecord,
    RecoveryAction,
    RecoveryReport,
    SandboxError,
    SandboxRecovered,
    short_name,
)
from unisandbox.engine.left import Left
from unisandbox.engine.locks import locked
from unisandbox.engine.record import Record, this_process
from unisandbox.engine.records import Records
from unisandbox.engine.state_files import is_engine_id
from unisandbox.engine.telling import tell_recovered
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroups, ending, hierarchy, patience
from unisandbox.host.removal import remove_tree

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore

# Notes of the keeper: what an owner has found half made or half removed, and only reported, by id.
_LEFT: Final = "engine/left/"
# A lock of the keeper's: one at a time frees what no record speaks of.
_UNRECORDED: Final = "engine/unrecorded"
_logger: Final = logging.getLogger("unisandbox.engine")
_KILL_SECONDS = 2.0
_REMOVE_SECONDS = 5.0
_POLL = 0.005


class Recovery:
    """One recovery.

    Args:
        core: of the engine that is being opened; it owns the keeper.
        is_new: the keeper was started for it; nothing of a former one lives.
        on_recover: see `Engine.open`.
        everywhere: where the engine's cgroups are is not known.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        is_new: bool,
        on_recover: Literal["adopt", "stop", "report"],
        everywhere: bool = False,
    ) -> None:
        self._core = core
        self._is_new = is_new
        self._on_recover = on_recover
        self._everywhere = everywhere
        self._found: list[SandboxRecovered] = []

    async def run(self, *, former: Cgroups | None) -> RecoveryReport:
        """Do it.

        Args:
            former: where the cgroups of the former engine were, when that may be elsewhere than ours are now.
        """
        core = self._core
        repair = self._on_recover != "report"
        # Looked at before the records: who makes one of these has written the record first.
        images = self._images()
        records = core.records.read_all(repair=repair)
        # Without any record there was nothing: a new directory is not worth a look at all cgroups of the host.
        everywhere = bool(records.damaged) or (self._everywhere and bool(records.records))
        if self._is_new and repair:
            await self._end_all(self._places(former, everywhere=everywhere))
        for record in sorted(records.records, key=lambda record: record.created_at):
            await self._recover(record)
        if repair:
            # For the same reason before the ids.
            strays = {} if self._is_new else await self._strays(former, everywhere=everywhere)
            lives = {short_name(core.host.engine_id, sandbox_id) for sandbox_id in core.records.ids()}
            known = {short_name(core.host.engine_id, record.sandbox_id) for record in records.records}
            for short in sorted(strays.keys() - lives - known):
                await self._free_stray(short, strays[short])
            for short in sorted(images.keys() - lives):
                self._unlink(images[short])
            if not self._is_new:
                await core.host.keeper.drop(prefix=_LEFT)
        for found in self._found:
            tell_recovered(core.events, found.sandbox_id, found.action, found.reason)
        return RecoveryReport(
            keeper="new" if self._is_new else "adopted",
            sandboxes=tuple(self._found),
            damaged=_told(records),
            rebooted=any(record.boot_id != core.boot_id for record in records.records),
        )

    async def free_unrecorded(self) -> RecoveryReport:
        """Set aside the records that are damaged, and free what none speaks of, while others use the engine.

        For one that has attached: no owner may come for a long time. What is being made is left alone: whoever makes it
        has written its record before. So are the records of a later version, and what they describe.

        Raises:
            DeadlineExceededError: another process has been at this for long.
        """
        core, host = self._core, self._core.host
        async with locked(host.keeper, _UNRECORDED, "what no record speaks of"):
            images, strays = self._images(), await self._strays(None, everywhere=True)
            records = core.records.read_all(alone=False)
            lives = {short_name(host.engine_id, sandbox_id) for sandbox_id in core.records.ids()}
            for short in sorted(strays.keys() - lives):
                await self._free_stray(short, strays[short])
            for short in sorted(images.keys() - lives):
                self._unlink(images[short])
        return RecoveryReport("attached", tuple(self._found), _told(records))

    def _tell(self, record: Record, action: RecoveryAction, reason: str) -> None:
        self._found.append(
            SandboxRecovered(record.sandbox_id, record.name, record.backend, action, reason, record.generation)
        )

    async def _recover(self, record: Record) -> None:
        core = self._core
        if self._on_recover == "report":
            core.left[record.sandbox_id] = Left(record)
            if _is_halfway(record):
                core.host.keeper.notes.write_now(f"{_LEFT}{record.sandbox_id}", "")
            self._tell(record, "left", "it is only to be reported" + ("" if self._is_new else "; its keeper runs on"))
            return
        try:
            client = core.host.keeper.hello.client
            ours = record._replace(generation=record.generation + 1, owner=this_process(), client=client)
            entry = await core.take_in(ours)
        except SandboxError as error:
            core.left[record.sandbox_id] = Left(record, error.message, error.hint, lived=not self._is_new)
            self._tell(record, "failed", error.message)
            return
        try:
            lives = not self._is_new and await entry.sharing.adopt()
            if entry.removed and not entry.expired:
                return  # by another process, in order
            if lives and self._on_recover == "adopt":
                self._tell(entry.record, "adopted", "its keeper ran on")
                return
            reason = "it was to be stopped" if lives else self._why(record)
            entry.recovered = reason
            await entry.remove()
            self._tell(entry.record, "removed", reason)
        except Exception as error:  # whatever is wrong with this one, the others are recovered
            core.drop(entry)
            why, hint = f"{error!r}; the log says where", ""
            if isinstance(error, SandboxError):
                why, hint = error.message, error.hint
            else:
                _logger.exception("sandbox %s could not be recovered", record.sandbox_id)
            core.left[record.sandbox_id] = Left(record, why, hint, lived=not self._is_new)
            self._tell(record, "failed", why)

    def _why(self, record: Record) -> str:
        """Why it cannot be adopted."""
        if record.boot_id != self._core.boot_id:
            return "the machine was started anew"
        if record.phase == "creating":
            return "its creation was cut"
        if record.phase == "removing":
            return "its removal was cut"
        if self._is_new:
            return "its keeper has ended, and with it what ran in it"
        if record.expires_at is not None:
            return "its ttl was over"
        return "its keeper holds nothing of it any more"

    def _places(self, former: Cgroups | None, *, everywhere: bool) -> set[str]:
        """The engine's own cgroups, in which those of its sandboxes are.

        Args:
            former: see `run`.
            everywhere: also those below a parent that a sandbox has chosen. Usually its record tells which.
        """
        host = self._core.host
        places = {
            f"{place.parent}/{tree.name}" for tree in (former or host.cgroups, host.cgroups) for place in tree.places
        }
        if everywhere:
            from unisandbox.engine.leftovers.traces import engine_cgroups  # hardly ever needed

            places |= {path for engine_id, path in engine_cgroups() if engine_id == host.engine_id}
        return places

    async def _strays(self, former: Cgroups | None, *, everywhere: bool) -> dict[str, list[str]]:
        """The directories of the cgroups of what is there, by short names; see `_places`.

        Where there are no cgroups it is known by what the keeper holds of it.
        """
        found = _children(self._places(former, everywhere=everywhere))
        if not self._core.host.cgroups.places:
            names = {name.partition("/")[0] for name in await self._core.host.keeper.held()}
            found |= {name: [] for name in names if is_engine_id(name)}
        return found

    async def _end_all(self, places: set[str]) -> None:
        """No process of the former engine may live on: its keeper is gone, so nobody would tell how it ended."""
        children = _children(places)
        dirs = [directory for found in children.values() for directory in found]
        # And what runtimes have made for them beside the former keeper, if it was where the new one is.
        try:
            beside = hierarchy.directories_of(self._core.host.keeper.pid)
        except ProcessLookupError:
            self._core.check_keeper()
            raise
        shorts = [short for short in children if is_engine_id(short)]  # anything else here is not ours to know by
        dirs += [path for above in beside for short in shorts for path in hierarchy.below(above, f"{short}-")]
        await patience.kill(dirs, _KILL_SECONDS)
        await patience.remove(dirs, _REMOVE_SECONDS)
        for place in places - self._places(None, everywhere=False):
            ending.remove_leaf(place)

    def _images(self) -> dict[str, str]:
        """Paths of disk images by short names of sandboxes: one has a name only until it is mounted, or for good when
        that was cut."""
        host = self._core.host
        mark, found = f"unisandbox-{host.engine_id}-", {}
        with os.scandir(host.disk_dir) as entries:
            for entry in entries:
                if not entry.name.startswith(mark):
                    continue
                short, _, suffix = entry.name[len(mark) :].partition(".")
                # Or a directory in the place of one, where nothing may be mounted.
                if (suffix == "img" and entry.is_file(follow_symlinks=False)) or (
                    suffix == "files" and entry.is_dir(follow_symlinks=False)
                ):
                    found[short] = entry.path
        return found

    @staticmethod
    def _unlink(image: str) -> None:
        reached("before image.unlink", image)
        if os.path.isdir(image):
            remove_tree(image)
        else:
            with contextlib.suppress(FileNotFoundError):  # it went with its sandbox
                os.unlink(image)
        reached("after image.unlink", image)

    async def _free_stray(self, short: str, dirs: Sequence[str]) -> None:
        """Free what no record speaks of: one was damaged."""
        host = self._core.host
        await patience.kill(dirs, _KILL_SECONDS)
        # The keeper knows by its guards what else there is. Its numbers are free when all that had them is gone.
        await host.keeper.expirations.set(f"{short}/", 0)
        with anyio.move_on_after(_REMOVE_SECONDS):
            while f"{short}/" not in host.keeper.expirations.known:
                await host.keeper.clients()  # with each answer comes what is new
                await anyio.sleep(_POLL)
            await host.keeper.drop([f"ids/{short}"])
        self._found.append(
            SandboxRecovered("", None, "", "removed", f"no readable record speaks of what was found as {short!r}")
        )


async def recover_attached(core: EngineCore) -> RecoveryReport:
    """What one that has attached does: free what was cut, and tell which records cannot be used.

    These stay, and so does what they describe: another version of this library may be at work with them. An owner that
    comes frees it, or (but for what a later version has written) `Recovery.free_unrecorded`.
    """
    records = core.records.read_all(repair=False)
    return RecoveryReport("attached", await _free_cut(core, records), _told(records))


async def _free_cut(core: EngineCore, records: Records) -> tuple[SandboxRecovered, ...]:
    """Free what a process that is gone has left half made or half removed, while the keeper ran on.

    For one that has attached: nobody who opens the directory as its owner may come for a long time. What an owner has
    only reported stays.
    """
    halfway = [record for record in records.records if _is_halfway(record)]
    if not halfway:
        return ()
    found: list[SandboxRecovered] = []
    # After the records: whoever has written one was connected before.
    connected = await core.host.keeper.clients()
    left = await core.host.keeper.notes.read(_LEFT)
    for record in halfway:
        if record.client in connected or f"{_LEFT}{record.sandbox_id}" in left:
            continue
        cut = "creation" if record.phase == "creating" else "removal"
        action: RecoveryAction = "removed"
        reason = f"its {cut} was cut when process {record.owner[0]} ended"
        try:
            entry = await core.take_in(record)
            entry.recovered = reason
            if not await entry.sharing.free_cut():
                continue  # another process was quicker
        except SandboxError as error:
            action, reason = "failed", error.message
        found.append(
            SandboxRecovered(record.sandbox_id, record.name, record.backend, action, reason, record.generation)
        )
    return tuple(found)


def _told(records: Records) -> tuple[DamagedRecord, ...]:
    return tuple(DamagedRecord(bad.path, bad.reason, bad.kept_as, bad.later) for bad in records.damaged)


def _is_halfway(record: Record) -> bool:
    """Whether it is being made or removed, or that was cut."""
    return record.phase not in {"ready", "stopped"}


def _children(places: Collection[str]) -> dict[str, list[str]]:
    """The directories of the cgroups of sandboxes, by their names."""
    found: dict[str, list[str]] = {}
    for place in places:
        with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found.setdefault(entry.name, []).append(entry.path)
    return found
