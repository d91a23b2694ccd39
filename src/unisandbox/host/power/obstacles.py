"""What keeps this process from namespaces and mounts, as far as it is seen without a change to anything.

Source: mount_too_revealing() in fs/namespace.c; security_sb_mount() in path_mount(), which is asked before capabilities
are; user_namespaces(7).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from unisandbox.host import syscalls
from unisandbox.host.power import ids, remedies, standing
from unisandbox.host.power.remedies import Confined, Obstacle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SWITCH: Final = "/proc/sys/kernel/unprivileged_userns_clone"
_APPARMOR: Final = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
_NAMESPACES: Final = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
)
_NO_FLAG: Final = 1  # of the low byte, which in clone() is the signal
# Directories that the kernel keeps empty for others to be mounted there: nothing is hidden by that. Source: users of
# proc_create_mount_point, register_sysctl_mount_point and sysfs_create_mount_point.
_EMPTY: Final = {
    "proc": frozenset({"/fs/nfsd", "/openprom", "/sys/fs/binfmt_misc", "/xen"}),
    "sysfs": frozenset({
        "/firmware/efi/efivars", "/fs/bpf", "/fs/cgroup", "/fs/fuse/connections", "/fs/pstore", "/fs/resctrl",
        "/fs/selinux", "/fs/smackfs", "/kernel/config", "/kernel/debug", "/kernel/security", "/kernel/tracing",
    }),
}  # fmt: skip


def no_user_namespaces() -> Obstacle | None:
    """Why this host makes no user namespaces, for nobody."""
    most = standing.user_namespaces()
    if most < 0:
        otherwise = ", or run it as root" if os.geteuid() else ""
        return Obstacle("this kernel has no user namespaces", f"Use a kernel with CONFIG_USER_NS{otherwise}.")
    if most == 0:
        return Obstacle("user namespaces are off (user.max_user_namespaces is 0)", remedies.USER_NAMESPACES)
    return None


def of_user_namespaces() -> Obstacle | None:
    """What keeps who is not the host's root from any user namespace that he can use."""
    if none := no_user_namespaces():
        return none
    if standing.read(_SWITCH) == "0" and not standing.may_mount():
        return Obstacle(
            "only root may make user namespaces (kernel.unprivileged_userns_clone is 0)",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        )
    if standing.read(_APPARMOR) == "1" and not standing.label():
        return Obstacle(
            "AppArmor leaves nothing to user namespaces of ordinary programs"
            " (kernel.apparmor_restrict_unprivileged_userns is 1)",
            "Give this Python an AppArmor profile with the rule 'userns,', or"
            " sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        )
    if os.geteuid():
        return None  # he has one id at least
    return remedies.of_all(_of_mapping()) or ids.shortage()


def of_power_in_them(forbidden: Sequence[Confined]) -> Obstacle | None:
    """What keeps who is not the host's root from a user namespace in which he has what sandboxes take.

    Args:
        forbidden: what he may not have although he is root there; see `of_namespaces`.
    """
    unmapped = _of_mapping()
    if not unmapped and (obstacle := of_user_namespaces()):
        return obstacle
    return remedies.of_all([*unmapped, *forbidden, *masked()])


def _of_mapping() -> list[Confined]:
    missing = standing.unmapped_without()
    return [Confined("mapping", f"without {', '.join(missing)} no ids can be mapped")] if missing else []


def of_namespaces() -> list[Confined]:
    """What keeps this process from namespaces of its own, with mounts in them, whatever capabilities it has there."""
    return [*_of_calls(), *of_mounts()]


def of_lookups() -> list[Confined]:
    """What keeps this process from looking files up where a stranger has named them."""
    return _filtered({"openat2": _open_nothing})


def _of_calls() -> list[Confined]:
    # They leave nothing, and anybody may do so: only a filter has an objection.
    harmless: dict[str, Callable[[], object]] = {"unshare": _ask_for_namespaces, "openat2": _open_nothing}
    if standing.may_mount():
        harmless["mount"] = lambda: syscalls.mount("none", "", "tmpfs")  # there is no such place
        harmless["pivot_root"] = lambda: syscalls.pivot_root("", "")
    return _filtered(harmless)


def _filtered(harmless: Mapping[str, Callable[[], object]]) -> list[Confined]:
    name = _forbidden_of(harmless)
    return [Confined("seccomp", f"a filter of system calls (seccomp) forbids {name}")] if name else []


def _forbidden_of(harmless: Mapping[str, Callable[[], object]]) -> str:
    """The first of these calls that a filter forbids; whoever may make it is refused nothing but wrong arguments."""
    for name, call in harmless.items():
        try:
            call()
        except OSError as error:
            if error.errno in standing.FILTERED:
                return name
    return ""


def _ask_for_namespaces() -> None:
    """Unshare none of them, with a flag that does not exist: the kernel says so first, a filter sees only the others.

    Source: check_unshare_flags() in kernel/fork.c; seccomp_restrict_namespaces() of systemd.
    """
    syscalls.unshare(0)
    syscalls.unshare(_NAMESPACES | _NO_FLAG)


def _open_nothing() -> None:
    """A filter cannot look into the arguments of this call; systemd's RestrictSUIDSGID forbids it altogether."""
    os.close(syscalls.openat2(-1, "/", os.O_PATH))


def forbidden_inside() -> str:
    """The first call that a filter forbids in a user namespace of one's own; "" for none that is seen.

    Enters namespaces: only for a process that ends after it.
    """
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
    except OSError:
        return ""  # it may not be a filter that does not want it
    harmless: dict[str, Callable[[], object]] = {
        "mount": lambda: syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE),
        "pivot_root": lambda: syscalls.pivot_root("", ""),
        "sethostname": lambda: syscalls.sethostname("a"),
        "setns": lambda: syscalls.setns(-1),
        "umount2": lambda: syscalls.umount("", 0),
    }
    return _forbidden_of(harmless)


def of_mounts() -> list[Confined]:
    """What keeps this process from mounts, although it has the capability."""
    label = standing.label()
    if not label:
        return []
    try:
        # The option is no option, so that nothing is ever mounted.
        syscalls.mount("none", "/", "tmpfs", 0, "unisandbox=nothing")
    except OSError as error:
        if error.errno == errno.EACCES:
            profile = label.partition(" (")[0]
            if ":" in label:
                return [Confined("selinux", f"SELinux forbids mounts ({label})")]
            return [Confined("apparmor", f"AppArmor forbids mounts (profile {profile})")]
    return []


def masked() -> list[Confined]:
    """Whether a user namespace may have no /proc and /sys of its own, since something is hidden in all that we see."""
    table = standing.mounts()
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys")):
        hidden = _hidden(table, kind)
        if hidden is not None:
            why = f"{hidden} is masked or read-only" if hidden else f"no whole {place} is mounted"
            return [Confined("masked", f"{why}, and so the kernel lets no user namespace mount {place}")]
    return []


def _hidden(table: list[list[str]], kind: str) -> str | None:
    """What is mounted over a part of the mounts of this kind: the kernel wants one that is whole. None: one is."""
    covers = ""
    for fields in table:
        number, root, directory = fields[0], fields[3], fields[4]
        if root != "/" or standing.kind_of(fields) != kind:
            continue
        over = [
            child[4]
            for child in table
            if child[1] == number and child[4][len(directory.rstrip("/")) :] not in _EMPTY[kind]
        ]
        if not over:
            return None
        covers = covers or sorted(over)[0]
    return covers
