"""A bundle of an engine (containerd, iSulad) as a container of guests: what of its config means something to a guest.

What holds programs of this machine is not looked at: capabilities, system call filters, AppArmor and SELinux, hidden
paths, namespaces, and what goes first when memory runs out. A guest has none of what they take away, and the process
that it runs in is held by its sandbox. Neither is it shown what only such programs have: /proc, /sys and /dev. Of all
else a field that cannot be honoured is refused, and so is one that is not known.
Source: opencontainers runtime-spec 1.3, config.md and config-linux.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import attrs

from unisandbox.api import (
    ContainerSpec,
    CreateTask,
    ExecTask,
    InvalidArgumentError,
    Mount,
    ProcessSpec,
    Rootfs,
    RootMount,
    UnsupportedError,
)
from unisandbox.backends.wasm.process.capabilities import NAME
from unisandbox.backends.wasm.process.interior import GUEST
from unisandbox.oci import foreign

_USED: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({"ociVersion", "process", "root", "mounts", "linux", "hostname", "annotations"}),
    "process": frozenset({"args", "env", "cwd", "user", "terminal", "consoleSize"}),
    "process.user": frozenset({"uid", "gid", "additionalGids", "username"}),
    "root": frozenset({"path", "readonly"}),
    "linux": frozenset({"resources", "uidMappings", "gidMappings", "cgroupsPath"}),
}
_OF_PROGRAMS: Final[Mapping[str, frozenset[str]]] = {
    "process": frozenset({"capabilities", "noNewPrivileges", "apparmorProfile", "selinuxLabel", "oomScoreAdj"}),
    "linux": frozenset({"namespaces", "seccomp", "maskedPaths", "readonlyPaths", "mountLabel"}),
}
"""What only holds programs of this machine."""

_IDMAP: Final = {"mount": "idmap", "tree": "ridmap"}
_KERNEL_FILES: Final = frozenset({"proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "tmpfs"})
_OF_THE_KERNEL: Final = ("/proc", "/sys", "/dev")
_OF_MOUNTS: Final = frozenset({"destination", "type", "source", "options", "uidMappings", "gidMappings"})
# A guest opens no device and executes no program of this machine, which is what "exec", "noexec" and "suid" are about.
_OPTIONS: Final = frozenset(
    {"bind", "rbind", "private", "rprivate", "ro", "rro", "rw", "nosuid", "suid", "nodev", "noexec", "exec"}
)


class Bundle(NamedTuple):
    """What a container is made of.

    Attributes:
        container: as its sandbox knows it; its root file system is named, and mounted from `rootfs`.
        rootfs: its root file system.
        mounts: in it.
        limits: the text of an OCI object `linux.resources`; empty: none.
    """

    container: ContainerSpec
    rootfs: tuple[RootMount, ...]
    mounts: tuple[RootMount, ...]
    limits: str


def bundle_of(request: CreateTask, user_ids: tuple[int, int] | None) -> Bundle:
    """What is asked for, without doing anything.

    Args:
        request: with `config`.
        user_ids: the host's first id and how many, of the sandbox's user namespace; None: it has the host's.

    Raises:
        UnsupportedError: a field that a guest cannot have; it is named.
        InvalidArgumentError: the config is none.
    """
    config = foreign.parse(request.config)
    linux = foreign.linux_of(config)
    if request.terminal:
        raise _refusal("tty")
    _check_fields({"": config, "process": config["process"], "root": config["root"], "linux": linux})
    _check_ids(linux, user_ids)
    process, user = _process(config["process"])
    root = os.path.join(request.bundle, config["root"]["path"])
    if len(request.rootfs) > 1 or any(mount.target for mount in request.rootfs):
        raise _refusal("a root file system of several mounts")
    rootfs = request.rootfs or (RootMount("bind", root, ("rbind",)),)
    if config["root"].get("readonly"):
        rootfs = tuple(attrs.evolve(mount, options=(*mount.options, "ro")) for mount in rootfs)
    container = ContainerSpec(
        request.container_id, process=process, rootfs=Rootfs.dir(root), user=user, own_mounts_only=True
    )
    mounts = [_mount(mount, request.bundle, user_ids) for mount in config.get("mounts") or []]
    limits = limits_text(linux.get("resources") or {})
    return Bundle(container, rootfs, tuple(mount for mount in mounts if mount is not None), limits)


def process_of(request: ExecTask, container: ContainerSpec) -> ProcessSpec:
    """One more process of a container that was made of a bundle.

    Raises:
        UnsupportedError: a field that a guest cannot have, or another user than the container's; it is named.
        InvalidArgumentError: the process object is none.
    """
    try:
        given = json.loads(request.oci_process)
        usable = isinstance(given["args"], list)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(f"this is no usable OCI process object: {error!r}") from error
    if not usable:
        raise InvalidArgumentError("this is no usable OCI process object: 'args' is no list")
    _check_fields({"process": given})
    process, user = _process(given)
    if user != container.user:
        raise _refusal(f"user {user!r} of a process in a container of user {container.user!r}")
    return process


def limits_text(resources: Any) -> str:
    """The text of an OCI object `linux.resources` without its devices, which no guest could open.

    Raises:
        UnsupportedError: a limit, or a device, that a container of guests cannot have.
    """
    if not isinstance(resources, dict):
        raise InvalidArgumentError("this is no usable OCI config: linux.resources is no object")
    more = foreign.devices(resources)
    if more is None or more:
        raise _refusal("access to devices")
    resources = {name: value for name, value in resources.items() if name != "devices"}
    if foreign.limits(resources).pids is not None:
        raise _refusal("resources.pids of one container", "the threads of a guest's process would count")
    return json.dumps(resources) if any(resources.values()) else ""


def _refusal(what: str, reason: str = "") -> UnsupportedError:
    return UnsupportedError(what, NAME, reason=reason, hint="Leave it out, or use isolation='runc'.")


def _check_fields(parts: Mapping[str, Any]) -> None:
    """Refuse what is neither used nor of programs alone."""
    user = parts["process"].get("user") or {}
    for place, part in {**parts, "process.user": user}.items():
        if not isinstance(part, dict):
            raise InvalidArgumentError(f"this is no usable OCI config: {place!r} is no object")
        known = _USED[place] | _OF_PROGRAMS.get(place, frozenset())
        for name in sorted(name for name, value in part.items() if value and name not in known):
            raise _refusal(f"{place}.{name}".lstrip("."))
    if parts["process"].get("terminal"):
        raise _refusal("tty")


def _check_ids(linux: foreign.Config, user_ids: tuple[int, int] | None) -> None:
    mapped = bool(linux.get("uidMappings") or linux.get("gidMappings"))
    if mapped != (user_ids is not None) or (user_ids is not None and not foreign.has_ids(linux, *user_ids)):
        raise InvalidArgumentError("a bundle must have the user ids of its sandbox")


def _process(given: Mapping[str, Any]) -> tuple[ProcessSpec, str]:
    """A process, and the user that its files are touched as."""
    env: dict[str, str] = {}
    entries = given.get("env") or []
    if not isinstance(entries, list):
        raise InvalidArgumentError(f"process.env is no list: {entries!r:.80}")
    for entry in entries:
        name, has_value, value = entry.partition("=") if isinstance(entry, str) else ("", "", "")
        if not has_value:
            raise InvalidArgumentError(f"process.env has an entry without '=': {entry!r:.80}")
        env[name] = value
    process = ProcessSpec(given["args"], env=env, cwd=given.get("cwd") or "/")
    user = given.get("user") or {}
    uid, gid, more = user.get("uid", 0), user.get("gid", 0), user.get("additionalGids") or []
    if not isinstance(more, list) or any(type(number) is not int for number in (uid, gid, *more)):
        raise InvalidArgumentError(f"process.user is not as specified: {user!r:.80}")
    if uid and set(more) - {gid}:
        raise _refusal("supplementary groups of another user than root")
    return process, f"{uid}:{gid}"


def _mount(mount: Mapping[str, Any], bundle: str, user_ids: tuple[int, int] | None) -> RootMount | None:
    """What a guest sees of a mount; None: nothing, since it is of programs of this machine."""
    target, kind, source = (mount.get(name) or "" for name in ("destination", "type", "source"))
    options = _options(mount)
    where = f"mount {target!r:.200}"
    if not all(isinstance(text, str) for text in (target, kind, source)):
        raise InvalidArgumentError(f"{where} is not as specified")
    if not target.startswith("/"):
        raise InvalidArgumentError(f"{where} has no absolute path")
    is_bind = kind == "bind" or bool({"bind", "rbind"} & set(options))
    if unknown := sorted(name for name, value in mount.items() if value and name not in _OF_MOUNTS):
        raise _refusal(f"{where} with {unknown[0]!r}")
    if not is_bind:
        if kind in _KERNEL_FILES and _is_below(target, _OF_THE_KERNEL):
            return None
        raise _refusal(f"{where} of type {kind!r}")
    idmap = foreign.idmap(dict(mount))
    if idmap and (user_ids is None or (foreign.names_ids(dict(mount)) and not _same_ids(mount, user_ids))):
        raise _refusal(f"{where} with other ids than the sandbox's")
    if unknown := sorted(set(options) - _OPTIONS - foreign.IDMAP_OPTIONS):
        raise _refusal(f"{where} with option {unknown[0]!r}")
    if not source:
        raise InvalidArgumentError(f"{where} says no source")
    checked = Mount.bind(os.path.join(bundle, source), GUEST + target)
    if checked.target == GUEST:
        raise InvalidArgumentError(f"{where} hides the root file system")
    means = ["rbind" if "rbind" in options else "bind"]
    access = [option for option in options if option in {"ro", "rro", "rw"}]
    means += ["ro"] * (access[-1:] not in [[], ["rw"]])
    means += [_IDMAP[idmap]] if idmap else []
    return RootMount("bind", checked.source, tuple(means), checked.target.removeprefix(GUEST))


def _options(mount: Mapping[str, Any]) -> Sequence[str]:
    options = mount.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InvalidArgumentError(f"options of a mount are not as specified: {options!r:.80}")
    return options


def _same_ids(mount: Mapping[str, Any], user_ids: tuple[int, int]) -> bool:
    return foreign.has_ids(dict(mount), *user_ids)


def _is_below(path: str, places: Sequence[str]) -> bool:
    normal = os.path.normpath(path)
    return any(normal == place or normal.startswith(f"{place}/") for place in places)
