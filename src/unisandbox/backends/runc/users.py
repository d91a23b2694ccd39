"""What who has not the power of the host's root can have of this backend, and what is refused before anything is done.

An ordinary user, and root of a container. His keeper is root of a user namespace (`host.subordinate`), and his
sandboxes are below that one: with the ids that are subordinate to him, or where he has none with his own only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Final

import attrs

from unisandbox.api import Capabilities, Resources, Rootfs, SandboxSpec, UnavailableError, UnsupportedError
from unisandbox.backends.runc import overlays
from unisandbox.backends.runc.capabilities import CAPABILITIES, user_network
from unisandbox.backends.runc.rootfs import Layer
from unisandbox.host import subordinate
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.power import ids, standing
from unisandbox.host.power.remedies import as_root, who
from unisandbox.host.subordinate import Rows
from unisandbox.oci.users import Copied, Credentials, Inside, resolve_user

_REMEDY: Final = (
    "Use resources=Resources.unlimited() (on the command line --unlimited), start under"
    " `systemd-run --user --scope -p Delegate=yes` (cgroup v2), or run as root."
)
_UNLIMITED: Final = "Use resources=Resources.unlimited() (on the command line --unlimited)."
_NOTES: Final = (
    "not as root: root inside is this user outside, and all his sandboxes have the same ids below",
    "not as root: a bind mount shows files of this user as root's, and files of others as nobody's",
    "not as root: what sandboxes write is in memory, at most 1 GiB where it is limited",
)
_READONLY_DIRS: Final = (
    "not as root: before Linux 6.6 and without fuse-overlayfs a directory can be the root file system only with"
    " readonly=True"
)
_SERVED_DIRS: Final = (
    "not as root: before Linux 6.6 what is written to a directory that is the root file system goes through"
    " fuse-overlayfs, one process more for each; names there have at most 251 bytes and do not begin with '.wh.',"
    " paths have fewer than 4,096 bytes, and files no extended attributes"
)
_SINGLE: Final = (
    "without subordinate ids: all that is inside belongs to root, and is this user's outside; to run as another user or"
    " group is refused, to give a file to one fails inside, and there is no /home/user",
    "without subordinate ids: programs inside keep this user's further groups, shown as nobody's, and may open what"
    " these may open of what is mounted",
    "without subordinate ids: CAP_SYS_PTRACE is refused, since init belongs to root inside",
)
_NO_CGROUPS: Final = (
    "no cgroup is this user's to write: memory, processors and processes cannot be limited, and nothing is counted",
    "no cgroup is this user's to write: a program that has left its session and its parents outlives the end of its"
    " run, and ends with its container",
)


@functools.cache
def capabilities() -> Capabilities:
    """What can be had here by this user."""
    tree = Cgroups.detect("unisandbox-probe")
    single = ids.scarcity() is not None
    return attrs.evolve(
        CAPABILITIES,
        networks=frozenset({"none", "host"}) | user_network(),
        userns_host=False,
        host_devices=False,
        cgroup_parent=False,
        limits=CAPABILITIES.limits & tree.controllers,
        process_trees=bool(tree.places),
        writable_dirs=overlays.by_kernel() or not overlays.obstacle()[0],
        large_disks=False,
        own_ids=False,
        users=not single,
        pause="freezer" in tree.controllers,
        exact_exits="memory" in tree.controllers,
        notes=(*_NOTES, *_dirs_notes(), *_SINGLE * single, *_NO_CGROUPS * (not tree.places)),
    )


def _dirs_notes() -> tuple[str, ...]:
    if overlays.by_kernel():
        return ()
    return (_READONLY_DIRS if overlays.obstacle()[0] else _SERVED_DIRS,)


def check_sandbox(spec: SandboxSpec, cgroups: Cgroups, ids: tuple[Rows, Rows]) -> None:
    """Refuse what only root can have, or only who has more than one id, before anything is done.

    Args:
        spec, cgroups: what is asked for, and with which cgroups.
        ids: those of the keeper.

    Raises:
        UnsupportedError, UnavailableError: says what, and what to do.
    """
    if spec.userns == "host":
        raise UnsupportedError(
            "userns='host'",
            "runc",
            reason=f"{who()}, and without a user namespace nothing can be made",
            hint=f"Leave it out, or {as_root()}.",
        )
    if spec.user_ids is not None:
        raise UnsupportedError(
            "user_ids", "runc", reason=f"{who()}: its subordinate ids are used", hint="Leave them out."
        )
    if spec.network.kind == "namespace":
        raise UnsupportedError(
            "network 'namespace'",
            "runc",
            reason=f"{who()}, and the namespace belongs to others",
            hint=f"Use network='none' or 'host', or {as_root()}.",
        )
    check_rootfs(spec.rootfs)
    layer = Layer.of(spec.resources)
    if not layer.in_memory:
        raise UnsupportedError(
            f"a disk limit of {layer.size} bytes",
            "runc",
            reason=f"{who()}, and only root can mount a disk image",
            hint="At most half of the memory limit (without one 1 GiB) is kept in memory.",
        )
    check_resources(spec.resources, cgroups.missing)
    if subordinate.are_single(ids):
        _check_single(spec)


def _check_single(spec: SandboxSpec) -> None:
    check_user(spec.user)
    if "CAP_SYS_PTRACE" in spec.security.capabilities:
        reason, hint = _scarcity()
        raise UnsupportedError(
            "CAP_SYS_PTRACE",
            "runc",
            reason=f"{reason}: init belongs to root inside, who could reach into it",
            hint=f"Leave it out, or: {hint}",
        )


def check_user(user: str | None) -> None:
    """Refuse a user or group by number who is not root; names are looked up when there is somewhere to look.

    Raises:
        UnsupportedError: see `no_other`.
    """
    if any(part.isdecimal() and int(part) for part in (user or "").split(":")):
        raise no_other(user)


def root_as(inside: Inside | Copied, user: str) -> Credentials:
    """Root by whichever name the container's files give him.

    Raises:
        UnsupportedError: it is somebody else, or root in groups of others; see `no_other`.
        InvalidArgumentError: there is no such user.
    """
    check_user(user)
    found = resolve_user(inside, user, largest_id=2**32 - 2)
    if any((found.uid, found.gid, *found.groups)):
        raise no_other(user)
    return found


def no_other(user: str | None) -> UnsupportedError:
    """Why nobody but root can be in a sandbox, and what gives the user of this process a range of ids."""
    reason, hint = _scarcity()
    return UnsupportedError(
        f"user {user!r}", "runc", reason=f"{reason}, and that one is root inside", hint=f"Leave it out, or: {hint}"
    )


def _scarcity() -> tuple[str, str]:
    if scarcity := ids.scarcity():
        return f"{who()}, and this host has one id for it: {scarcity.reason}", scarcity.remedy
    # The keeper is older than the range.
    return f"{who()}, and its keeper has one id", "end this engine, and open it anew: there are subordinate ids now."


def check_rootfs(rootfs: Rootfs, release: str = "") -> None:
    """Refuse a directory that is to be written, where nothing can lay a layer over it; see `overlays`.

    Raises:
        UnsupportedError: says what to do.
    """
    if rootfs.kind != "dir" or rootfs.readonly or overlays.by_kernel(release):
        return
    why, remedy = overlays.obstacle()
    if why:
        raise UnsupportedError(
            "a directory as a root file system that can be written",
            "runc",
            reason=f"{who()}; below Linux 6.6 (this is {release or os.uname().release}) it takes fuse-overlayfs for"
            f" that, and {why}",
            hint=f"{remedy} Or use Rootfs.dir(path, readonly=True): /tmp, /run and /home can be written; or"
            f" {as_root()}.",
        )


def check_resources(resources: Resources, missing: Mapping[str, str]) -> None:
    """Refuse limits that no cgroup of this user's takes.

    Raises:
        UnavailableError: says which, why, and what to do.
    """
    wanted = {"memory": resources.memory, "pids": resources.pids, "cpu": resources.cpu}
    for name, value in wanted.items():
        if value is not None and name in missing:
            raise UnavailableError(
                f"resources.{name} cannot be limited here: {missing[name]}",
                # Then the reason has the other remedy.
                hint=_REMEDY if os.geteuid() and not standing.no_cgroup_is_given() else _UNLIMITED,
            )
