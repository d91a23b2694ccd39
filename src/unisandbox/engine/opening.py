"""Opening an engine: as the owner of a state directory, or beside one that has it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Final, Literal, cast

import anyio

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from unisandbox.engine import state_files
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.closing import abandon
from unisandbox.engine.core import EngineCore
from unisandbox.engine.registry import Backend, Registry
from unisandbox.engine.state import StateDirectory, check_directory, path_of, unusable
from unisandbox.host.cgroups import Cgroups, service
from unisandbox.host.cgroups.hierarchy import SLICE
from unisandbox.host.keeper import Keeper, KeeperElsewhereError, KeeperVersionError, KeeperWaitsError
from unisandbox.host.keeper.protocol import SOCKET_NAME
from unisandbox.host.keeper.records import Policy
from unisandbox.host.services import Host

OnRecover = Literal["adopt", "stop", "report"]

# A note of a keeper that its first owner has done with what former keepers had left: it says where the engine's cgroups
# are. And how long that may take (seconds): five hundred sandboxes take some of them.
_RECOVERED: Final = "engine/recovered"
_RECOVERY_SECONDS: Final = 60.0
_RECOVERED_POLL: Final = 0.01
# Where systemd and others mount the tree of v2 beside those of v1.
_UNIFIED: Final = "/sys/fs/cgroup/unified"
# File descriptors that an opening needs, with some to spare; what sandboxes that are adopted need is not counted.
_DESCRIPTORS: Final = 16
# How often to look again for a keeper that has lost its owner while we waited for it.
_TRIES: Final = 3


async def open_engine(
    directory: str | os.PathLike[str] | None = None,
    *,
    policy: Policy = "stop",
    on_recover: OnRecover = "adopt",
    backends: Mapping[str, Backend] | None = None,
) -> EngineCore:
    """Open an engine on a state directory, or on a temporary one that vanishes with it.

    Raises:
        FailedPreconditionError: another engine owns the directory; its process is named. Or policy "keep", and what is
            kept would end with the systemd service that this process is in.
        UnavailableError: this host cannot carry an engine, or the keeper there is of another version of this library.
        BackendError: the directory cannot be used.
    """
    if policy not in ("stop", "keep"):
        raise InvalidArgumentError(f"policy must be 'stop' or 'keep', got {policy!r}")
    if on_recover not in ("adopt", "stop", "report"):
        raise InvalidArgumentError(f"on_recover must be 'adopt', 'stop' or 'report', got {on_recover!r}")
    if directory is None and policy == "keep":
        raise InvalidArgumentError(
            "policy 'keep' needs a state directory of your own",
            hint="Give one: a temporary one cannot be found again.",
        )
    registry = Registry(backends)
    _check_descriptors()
    living = None if directory is None else await _living(os.fspath(directory))
    try:
        # It knows by what name all is found that it holds, also when the directory says something else by now.
        state = StateDirectory.prepare(directory, work_dir="" if living is None else _work_dir(living))
        try:
            return await _open_on(state, living, registry, policy, on_recover)
        finally:
            state.unclaim()
    except BaseException:
        if living is not None:
            living.abandon()  # again, if we have come to own it
        raise


async def _open_on(
    state: StateDirectory, living: Keeper | None, registry: Registry, policy: Policy, on_recover: OnRecover
) -> EngineCore:
    try:
        cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}", parent=_cgroup_parent(policy))
        keeper, is_new = await _own_keeper(state, living, cgroups, policy)
    except FailedPreconditionError:
        state.discard()  # not waiting: the directory is another engine's
        raise
    except OSError as error:
        state.discard(wait=CLEANING_SECONDS)
        raise _cannot_open(state, error) from error
    except BaseException:
        state.discard(wait=CLEANING_SECONDS)
        raise
    try:
        noted = await _cgroup_parents(state, keeper, is_new=is_new)
    except BaseException as error:
        keeper.abandon(wait=CLEANING_SECONDS if is_new else 0.0)
        state.discard()
        if isinstance(error, OSError):
            raise _cannot_open(state, error) from error
        raise
    former = noted or {}
    if not is_new:
        cgroups = cgroups.placed(former)
    core = EngineCore(_host(state, keeper, cgroups), state, registry, owner=True, policy=keeper.hello.policy)
    core.removes_own = policy == "stop"
    try:
        state.point_again()
        if not is_new:
            await keeper.guard(state.guards(cgroups))
        if not state.temporary:
            from unisandbox.engine.recovery import Recovery

            is_lost = noted is None or not all(map(os.path.isdir, former.values()))
            recovery = Recovery(core, is_new=is_new, on_recover=on_recover, everywhere=is_lost)
            core.recovery = await recovery.run(former=cgroups.placed(former) if is_new else None)
            if is_new and core.left:
                await keeper.unguard(state.kept_for_records())
            state_files.tidy(state.path)
            parents = {place.key: place.parent for place in cgroups.places}
            state_files.keep_cgroup_parents(state.path, parents, on_disk=state.durable)
            keeper.notes.write_now(_RECOVERED, json.dumps(parents))
            # Last: an opening that fails leaves what was kept as it was.
            if on_recover != "report" and core.policy != policy:
                await keeper.set_policy(policy)
                core.policy = policy
    except OSError as error:
        abandon(core)
        raise _cannot_open(state, error) from error
    except BaseException:
        abandon(core)
        raise
    return core


async def attach_engine(
    directory: str | os.PathLike[str], *, backends: Mapping[str, Backend] | None = None
) -> EngineCore:
    """Use the sandboxes of an engine that is open on this directory, or was kept there, beside its owner.

    What a process that is gone has left half made or half removed is freed; see `recovery`, which also tells of records
    that cannot be used.

    Raises:
        InvalidArgumentError: it cannot be a path.
        UnavailableError: none is: open one.
        FailedPreconditionError: others could write into the directory.
        BackendError: the directory cannot be used.
    """
    path, registry = path_of(directory), Registry(backends)
    _check_descriptors()
    try:
        check_directory(path)
        keeper = await Keeper.attach(path)
    except OSError as error:
        raise unusable(path, error) from error
    try:
        await _recovered(keeper)
        state = StateDirectory.prepare(directory, attached=True, work_dir=_work_dir(keeper))
        parents = await _cgroup_parents(state, keeper, is_new=False)
        cgroups = Cgroups.detect(f"unisandbox-{state.engine_id}").placed(parents or {})
        host = _host(state, keeper, cgroups)
    except OSError as error:
        keeper.abandon()
        raise _cannot_open(state, error) from error
    except BaseException:
        keeper.abandon()
        raise
    core = EngineCore(host, state, registry, owner=False, policy=keeper.hello.policy)
    try:
        from unisandbox.engine.recovery import recover_attached

        core.recovery = await recover_attached(core)
    except OSError as error:
        abandon(core)
        raise _cannot_open(state, error) from error
    except BaseException:
        abandon(core)
        raise
    return core


def _check_descriptors() -> None:
    """See that there are some left, while nothing is made: without any, nothing could be undone either."""
    taken: list[int] = []
    try:
        while len(taken) < _DESCRIPTORS:
            taken += os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(
            f"an engine needs {_DESCRIPTORS} open files more than this process has: {error.strerror}",
            hint="Close some, or raise the limit (ulimit -n).",
        ) from error
    finally:
        for fd in taken:
            os.close(fd)


def _cannot_open(state: StateDirectory, error: OSError) -> BackendError:
    place = f" ({os.fspath(error.filename)})" if error.filename else ""
    return BackendError(
        f"cannot open an engine on {state.path}: {error.strerror or error}{place}",
        hint="It must be a directory that this user can write, on a disk with free space.",
    )


async def _living(directory: str) -> Keeper | None:
    """The keeper that runs for a state directory; None when none does.

    Raises:
        KeeperVersionError: there is one that this version of the library cannot talk to.
        KeeperElsewhereError: there is one in another pid namespace.
    """
    # There is none, or what is wrong with the directory is said by whoever prepares it.
    with contextlib.suppress(FailedPreconditionError, OSError, ValueError):
        os.lstat(os.path.join(directory, SOCKET_NAME))
        check_directory(directory)
        try:
            return await Keeper.attach(directory)
        except (KeeperElsewhereError, KeeperVersionError):
            raise
        except UnavailableError:
            pass
    return None


def _work_dir(keeper: Keeper) -> str:
    work_dir = keeper.hello.workdir
    return work_dir if state_files.is_engine_id(os.path.basename(work_dir)) else ""


async def _cgroup_parents(state: StateDirectory, keeper: Keeper, *, is_new: bool) -> dict[str, str] | None:
    """Where the cgroups of the engine are, or those of the former one are left; None when nobody knows."""
    noted = "" if is_new or state.temporary else await keeper.notes.find(_RECOVERED) or ""
    if noted:
        return cast("dict[str, str]", json.loads(noted))
    return state_files.cgroup_parents(state.path)


async def _recovered(keeper: Keeper) -> None:
    """Wait for the owner's recovery: before that, records speak of what has died with a former keeper.

    Raises:
        UnavailableError: the owner has ended in the middle of it, or does not come to its end.
    """
    deadline = anyio.current_time() + _RECOVERY_SECONDS
    while await keeper.notes.find(_RECOVERED) is None:
        if not keeper.hello.owner_pid or anyio.current_time() > deadline:
            raise UnavailableError(
                f"the engine on {keeper.state_dir} has not recovered what a former one had left",
                hint="Open it with Engine.open().",
            )
        await anyio.sleep(_RECOVERED_POLL)  # a note has no event


async def _own_keeper(
    state: StateDirectory, living: Keeper | None, cgroups: Cgroups, policy: Policy
) -> tuple[Keeper, bool]:
    """A keeper that this process owns, and whether it is a new one: a former engine may have left its own.

    Args:
        state: of the engine.
        living: the keeper that was found there, if one was.
        cgroups: of the engine, when the keeper is new.
        policy: of a new keeper.
    """
    for left in reversed(range(_TRIES)):
        # None may be there, it may be about to end, or have an owner: `start` waits, or says who.
        with contextlib.suppress(UnavailableError, FailedPreconditionError):
            if living is not None:
                found, living = living, None
                return await _owned(found), False
            if not state.temporary:
                return await Keeper.attach(state.path, own=True), False
        try:
            keeper = await Keeper.start(
                state.path,
                workdir=state.work_dir,
                hide=_hidden(cgroups),
                policy=policy,
                guards=state.guards(cgroups),
            )
            return keeper, True
        except KeeperWaitsError:
            if not left:
                raise
            # It was just beginning when its owner was killed, and has come up since.
    raise AssertionError("the loop returns or raises")


async def _owned(keeper: Keeper) -> Keeper:
    try:
        await keeper.own()
    except BaseException:
        keeper.abandon()
        raise
    return keeper


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
    is_hybrid = cgroups.version == "hybrid" or not cgroups.places
    return (_UNIFIED,) if is_hybrid and os.path.isdir(_UNIFIED) else ()
