"""Opening an engine: as the owner of a state directory, or beside one that has it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Final, Literal

import anyio

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    RecoveryReport,
    UnavailableError,
)
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.closing import abandon
from unisandbox.engine.core import EngineCore
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import StateDirectory, check_directory
from unisandbox.host.cgroups import Cgroups, service
from unisandbox.host.cgroups.hierarchy import SLICE
from unisandbox.host.keeper import Keeper, KeeperWaitsError
from unisandbox.host.keeper.records import Policy
from unisandbox.host.services import Host

# A note of a keeper that its first owner has done with what former keepers had left, and how long that may take
# (seconds): five hundred sandboxes take some of them.
_RECOVERED: Final = "engine/recovered"
_RECOVERY_SECONDS: Final = 60.0
_RECOVERED_POLL: Final = 0.01
# How often to look again for a keeper that has lost its owner while we waited for it.
_TRIES: Final = 3


async def open_engine(
    directory: str | os.PathLike[str] | None = None,
    *,
    policy: Policy = "stop",
    on_recover: Literal["adopt", "stop", "report"] = "adopt",
    backends: Mapping[str, Backend] | None = None,
) -> EngineCore:
    """Open an engine on a state directory, or on a temporary one that vanishes with it.

    Raises:
        FailedPreconditionError: another engine owns the directory; its process is named. Or policy "keep", and what is
            kept would end with the systemd service that this process is in.
        UnavailableError: this host cannot carry an engine.
        BackendError: the directory cannot be used.
    """
    if policy not in {"stop", "keep"}:
        raise InvalidArgumentError(f"policy must be 'stop' or 'keep', got {policy!r}")
    if on_recover not in {"adopt", "stop", "report"}:
        raise InvalidArgumentError(f"on_recover must be 'adopt', 'stop' or 'report', got {on_recover!r}")
    if directory is None and policy == "keep":
        raise InvalidArgumentError(
            "policy 'keep' needs a state directory of your own",
            hint="Give one: a temporary one cannot be found again.",
        )
    state = StateDirectory.prepare(directory)
    try:
        cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}", parent=_cgroup_parent(policy))
        keeper, is_new = await _own_keeper(state, _hidden(cgroups), policy)
    except FailedPreconditionError:
        state.discard()  # not waiting: the directory is another engine's
        raise
    except OSError as error:
        state.discard(wait=CLEANING_SECONDS)
        place = f" ({os.fspath(error.filename)})" if error.filename else ""
        raise BackendError(
            f"cannot open an engine on {state.path}: {error.strerror or error}{place}",
            hint="It must be a directory that this user can write, on a disk with free space.",
        ) from error
    except BaseException:
        state.discard(wait=CLEANING_SECONDS)
        raise
    former = state.cgroup_parents()
    if not is_new:
        cgroups = cgroups.placed(former)
    core = EngineCore(_host(state, keeper, cgroups), state, Registry(backends), owner=True, policy=keeper.hello.policy)
    core.removes_own = policy == "stop"
    try:
        await keeper.guard(state.guards(cgroups))
        if not state.temporary:
            from unisandbox.engine.recovery import Recovery

            recovery = Recovery(core, is_new=is_new, on_recover=on_recover)
            core.recovery = await recovery.run(former=cgroups.placed(former) if is_new else None)
            if is_new and core.left:
                await keeper.unguard(state.kept_for_records())
            state.tidy()
            state.keep_cgroup_parents({place.key: place.parent for place in cgroups.places})
            keeper.note_now(_RECOVERED, "")
            # Last: an opening that fails leaves what was kept as it was.
            if on_recover != "report" and core.policy != policy:
                await keeper.set_policy(policy)
                core.policy = policy
    except BaseException:
        abandon(core)
        raise
    return core


async def attach_engine(
    directory: str | os.PathLike[str], *, backends: Mapping[str, Backend] | None = None
) -> EngineCore:
    """Use the sandboxes of an engine that is open on this directory, or was kept there, beside its owner.

    What a process that is gone has left half made or half removed is freed; see `recovery`.

    Raises:
        UnavailableError: none is: open one.
        FailedPreconditionError: others could write into the directory.
        BackendError: the directory cannot be used.
    """
    path = os.fspath(directory)
    try:
        check_directory(path)
        keeper = await Keeper.attach(path)
    except OSError as error:
        raise BackendError(
            f"cannot use the state directory {path!r}: {error.strerror}",
            hint="It must be a directory that this user can read and write.",
        ) from error
    try:
        await _recovered(keeper)
        state = StateDirectory.prepare(directory, attached=True)
        cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}").placed(state.cgroup_parents())
        host = _host(state, keeper, cgroups)
    except BaseException:
        keeper.abandon()
        raise
    core = EngineCore(host, state, Registry(backends), owner=False, policy=keeper.hello.policy)
    try:
        from unisandbox.engine.recovery import free_cut

        core.recovery = RecoveryReport("attached", await free_cut(core))
    except BaseException:
        abandon(core)
        raise
    return core


async def _recovered(keeper: Keeper) -> None:
    """Wait for the owner's recovery: before that, records speak of what has died with a former keeper.

    Raises:
        UnavailableError: the owner has ended in the middle of it, or does not come to its end.
    """
    deadline = anyio.current_time() + _RECOVERY_SECONDS
    while _RECOVERED not in await keeper.notes(_RECOVERED):
        if not keeper.hello.owner_pid or anyio.current_time() > deadline:
            raise UnavailableError(
                f"the engine on {keeper.state_dir} has not recovered what a former one had left",
                hint="Open it with Engine.open().",
            )
        await anyio.sleep(_RECOVERED_POLL)  # a note has no event


async def _own_keeper(state: StateDirectory, hide: tuple[str, ...], policy: Policy) -> tuple[Keeper, bool]:
    """A keeper that this process owns, and whether it is a new one: a former engine may have left its own.

    Args:
        state: of the engine.
        hide: see `Keeper.start`.
        policy: of a new keeper.
    """
    for left in reversed(range(_TRIES)):
        # None may be there, it may be about to end, or have an owner: `start` waits, or says who.
        with contextlib.suppress(UnavailableError, FailedPreconditionError):
            if not state.temporary:
                return await Keeper.attach(state.path, own=True), False
        try:
            return await Keeper.start(state.path, workdir=state.work_dir, hide=hide, policy=policy), True
        except KeeperWaitsError:
            if not left:
                raise
            # It was just beginning when its owner was killed, and has come up since.
    raise AssertionError("the loop returns or raises")


def _host(state: StateDirectory, keeper: Keeper, cgroups: Cgroups) -> Host:
    return Host(
        engine_id=state.engine_id,
        state_dir=state.path,
        disk_dir=state.disk_dir,
        work_dir=state.work_dir,
        keeper=keeper,
        cgroups=cgroups,
        shared=not state.temporary,
    )


def _cgroup_parent(policy: Policy) -> str | None:
    """Where the cgroups of a new engine go, when it is not for `Cgroups.detect` to choose.

    What is kept goes on when the service stops that we are in. By then systemd has removed all cgroups below the
    service's own that have no process, such as those of a sandbox in which nothing runs.
    """
    return f"/{SLICE}" if policy == "keep" and service.service_of() else None


def _hidden(cgroups: Cgroups) -> tuple[str, ...]:
    # crun refuses a host with both cgroup versions mounted; what it cannot see it cannot refuse.
    return ("/sys/fs/cgroup/unified",) if cgroups.version == "hybrid" else ()
