"""The end of an engine: in order, beside sandboxes that live on, or at once without an event loop."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import anyio

from unisandbox.api import SandboxError, UnavailableError
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.entry import Entry
from unisandbox.host.cgroups import ending
from unisandbox.host.keeper import LockTimeoutError

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore

# Guards whose failure means nothing: another engine uses the directory that all share.
_MAY_FAIL: Final = frozenset({"engine/runtime", "engine/slice"})
_LEAVING: Final = "leaving"


async def close(core: EngineCore) -> None:
    """End this engine. Repeating is harmless, and so is a fork of the process that has it.

    The owner with policy "stop" removes every sandbox, ends the keeper and leaves nothing. With "keep", and for one
    that has attached, the sandboxes live on; the keeper ends when there is none.

    Raises:
        FailedPreconditionError: it is used in the event loop of another thread.
    """
    if core.loop.is_of_fork:
        return
    core.loop.check()
    try:
        core.closing.acquire_nowait()  # no checkpoint: one who was cancelled closes, too
    except anyio.WouldBlock:
        await core.closing.acquire()
    try:
        if core.closed:
            return
        if core.owner and core.policy == "stop":
            await _end(core)
        else:
            await _detach(core)
    finally:
        core.closing.release()


async def _end(core: EngineCore) -> None:
    errors: list[SandboxError] = []
    try:
        async with contextlib.AsyncExitStack() as stack:
            if core.host.shared and not core.host.keeper.alive:
                await stack.enter_async_context(core.regaining.alone())
            await _end_all(core, errors)
    except UnavailableError:
        # The keeper is dead; its mounts, pins and runtimes went with it. Or all is another engine's by now. Or the
        # directory is not there: the keeper knows what it has.
        errors = []
    finally:
        core.closed = True
        core.events.close()
        _sweep(core)
    if errors:
        raise errors[0]


async def _end_all(core: EngineCore, errors: list[SandboxError]) -> None:
    await core.refresh()
    core.closed = True
    async with anyio.create_task_group() as group:
        for entry in core.entries():
            group.start_soon(_remove, entry, errors)
    with anyio.CancelScope(shield=True):
        await core.events.finish()
        report = await core.host.keeper.close(run_guards=True)
    if not set(report.failed) - _MAY_FAIL:
        errors.clear()
        core.forget_others()


async def _detach(core: EngineCore) -> None:
    ended = False
    try:
        if core.owner and core.removes_own:  # beside what was only to be reported, which is kept
            async with anyio.create_task_group() as group:
                for entry in core.entries():
                    group.start_soon(_remove, entry, [])
        async with anyio.create_task_group() as group:
            for entry in core.entries():
                group.start_soon(entry.cleaning.catch_up)
        with anyio.CancelScope(shield=True):
            await core.refresh()  # what has expired is nothing to stay for
            core.closed = True
            await core.events.finish()
            if not core.records.ids():
                # One after the other, and each until its connection ends: of several that leave at once, the last
                # one finds itself alone. Should one take long, the keeper will see by itself that it is not needed.
                with contextlib.suppress(LockTimeoutError):
                    await core.host.keeper.locks.lock(_LEAVING, timeout=CLEANING_SECONDS)
                    if not core.records.ids():
                        ended = await core.host.keeper.retire()
    except UnavailableError:
        # It is dead already; the next one to open the directory cleans up. Or that was moved: whoever opens it where it
        # is now goes on.
        pass
    finally:
        core.closed = True
        core.events.close()
        _let_go(core)
        if ended:
            core.directory.discard()
        core.gone = True


def _let_go(core: EngineCore) -> None:
    """Close what this process holds. The connection first: what is closed after it is not closed for others."""
    core.host.keeper.abandon()
    if core.clerk is not None:
        core.clerk.close()
    core.close_streams()
    for sandboxer in core.sandboxers.values():
        sandboxer.abandon()


def abandon(core: EngineCore) -> None:
    """Close without an event loop: the keeper runs the guards (policy "stop"), and its end is waited for."""
    if core.closed:
        return
    core.closed = True
    core.events.close()
    if not core.owner or core.policy == "keep":
        _let_go(core)
        core.gone = True
        return
    for entry in core.entries():
        with contextlib.suppress(SandboxError, OSError):  # the keeper's guards kill what this could not
            entry.kill_now()
    _sweep(core)


def _sweep(core: EngineCore) -> None:
    """Whatever happened before: no process, cgroup or directory of the engine stays. Synchronous.

    But for what another engine on the directory has made since: the cgroup, and all names, are its own then.
    """
    core.close_streams()
    for sandboxer in core.sandboxers.values():
        sandboxer.abandon()
    if core.clerk is not None:
        core.clerk.close()
    core.host.keeper.abandon(wait=CLEANING_SECONDS)
    with contextlib.suppress(UnavailableError):
        regained = core.regaining.try_now() if core.host.shared else None
        try:
            _remove_cgroup(core)
            if regained is not None:
                core.directory.discard_now()
            else:
                core.directory.discard()
        finally:
            if regained is not None:
                regained.close()
    core.gone = True


def _remove_cgroup(core: EngineCore) -> None:
    dirs = [f"{place.parent}/{core.host.cgroups.name}" for place in core.host.cgroups.places]
    # What was only to be reported is in there, too, if anything of it lives.
    if not core.left and any(os.path.isdir(directory) for directory in dirs):
        ending.kill(dirs)
        ending.remove(dirs, CLEANING_SECONDS)


async def _remove(entry: Entry, errors: list[SandboxError]) -> None:
    try:
        await entry.remove()
    except SandboxError as error:
        errors.append(error)  # the others are removed all the same; the keeper's guards take care of this one
