"""What a sandbox, a container and a process shall be like: frozen, checked when made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final, Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import (
    is_at_most,
    is_of,
    is_one_of,
    is_positive,
    kernel_text,
    matches,
    several,
)
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.filesystem import Mount, Rootfs, mounts_of
from unisandbox.api.names import CAPABILITIES, check_isolation, check_name
from unisandbox.api.network import Dns, Network
from unisandbox.api.resources import Resources

DEFAULT_CAPABILITIES: Final[frozenset[str]] = frozenset(
    {
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    }
)
"""Docker's set without MKNOD, NET_RAW and AUDIT_WRITE. They count inside the sandbox's own user namespace."""

LONGEST_TTL: Final = 10 * 365 * 86400
"""Seconds; what the keeper takes."""


def _capabilities(names: Iterable[str]) -> frozenset[str]:
    if names is DEFAULT_CAPABILITIES:
        return DEFAULT_CAPABILITIES  # of every sandbox that does not say otherwise
    upper = [kernel_text(name, "capability").upper() for name in several(names, "capabilities")]
    wanted = frozenset(name if name.startswith("CAP_") else f"CAP_{name}" for name in upper)
    for name in wanted:
        if name not in CAPABILITIES:
            raise InvalidArgumentError(f"{name!r} is not a capability", hint="Source: capabilities(7).")
    return wanted


@attrs.frozen
@by_fields
class Security:
    """What holds processes inside, beyond the namespaces.

    Attributes:
        capabilities: the bounding set of every process; root inside has all of them, other users none.
        seccomp: "default" (our profile) or "unconfined".
        no_new_privileges: set-uid programs and file capabilities give nothing.
        devices: which may be opened: "usual" (null, zero, random, terminals and the like) or "all" of the host's, for
            what is trusted as the host itself.
    """

    capabilities: frozenset[str] = attrs.field(default=DEFAULT_CAPABILITIES, converter=_capabilities)
    seccomp: Literal["default", "unconfined"] = attrs.field(
        default="default", validator=is_one_of("default", "unconfined")
    )
    no_new_privileges: bool = attrs.field(default=True, validator=is_of(bool))
    devices: Literal["usual", "all"] = attrs.field(default="usual", validator=is_one_of("usual", "all"))


def _environment(value: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"env must map names to values, got {value!r}", hint="For example {'A': '1'}.")
    for name, text in value.items():
        kernel_text(text, f"environment variable {name!r}")
        if not kernel_text(name, "environment name") or "=" in name:
            raise InvalidArgumentError(f"environment name {name!r} must not be empty nor hold '='")
    return dict(value)


def _argv(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise InvalidArgumentError(
            f"a command is a list of words, got the string {value!r}",
            hint="Use ['sh', '-c', '...'] or sh('...') for a shell command.",
        )
    if not isinstance(value, Iterable) or isinstance(value, Mapping | Set | bytes):  # which have no order, or no words
        raise InvalidArgumentError(f"a command is a list of words, got {value!r}")
    words = tuple(kernel_text(word, "a command's word") for word in value)
    if not words or not words[0]:
        raise InvalidArgumentError("a command needs at least a program's name")
    return words


def _user(value: str | int | None) -> str | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[A-Za-z0-9_.$-]+(:[A-Za-z0-9_.$-]+)?", text) or text.startswith("-"):
        raise InvalidArgumentError(
            f"user {value!r} is not valid", hint="Use a name or number, and optionally ':' with a group."
        )
    return text


def _cwd(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not kernel_text(value, attribute.name).startswith("/"):
        raise InvalidArgumentError(f"{attribute.name} must be an absolute path, got {value!r}")


@attrs.frozen
@by_fields
class Terminal:
    """A terminal's size in characters."""

    rows: int = attrs.field(default=24, validator=[is_of(int), is_positive, is_at_most(0xFFFF)])
    columns: int = attrs.field(default=80, validator=[is_of(int), is_positive, is_at_most(0xFFFF)])


@attrs.frozen
@by_fields
class ProcessSpec:
    """A program to run.

    Attributes:
        argv: the program and its arguments; a name without "/" is looked for in the PATH of `env`.
        env: added to the container's environment.
        cwd: absolute path inside; None is the container's.
        user: name or number, optionally ":group"; None is the container's.
        terminal: give it a terminal of this size instead of three streams.
    """

    argv: tuple[str, ...] = attrs.field(converter=_argv)
    env: Mapping[str, str] = attrs.field(factory=dict, converter=_environment)
    cwd: str | None = attrs.field(default=None, validator=attrs.validators.optional(_cwd))
    user: str | None = attrs.field(default=None, converter=_user)
    terminal: Terminal | None = attrs.field(default=None, validator=is_of(Terminal, optional=True))


def _container_name(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    check_name(value, "container name")


@attrs.frozen
@by_fields
class ContainerSpec:
    """A container: a root file system and one main process; None as `process` is a container that only takes exec.

    Attributes:
        name: unique within the sandbox.
        process: the main process; when it ends the container ends.
        rootfs: None shares the sandbox's own root file system.
        resources: limits of this container below the sandbox's; None: only the sandbox's count.
        mounts: beside the sandbox's.
        own_mounts_only: with a rootfs of its own: without the sandbox's mounts.
        env, cwd, user: for every process in it that does not say otherwise; None is the sandbox's.
    """

    name: str = attrs.field(validator=_container_name)
    process: ProcessSpec | None = attrs.field(default=None, validator=is_of(ProcessSpec, optional=True))
    rootfs: Rootfs | None = attrs.field(default=None, validator=is_of(Rootfs, optional=True))
    resources: Resources | None = attrs.field(default=None, validator=is_of(Resources, optional=True))
    mounts: tuple[Mount, ...] = attrs.field(default=(), converter=mounts_of)
    env: Mapping[str, str] = attrs.field(factory=dict, converter=_environment)
    cwd: str | None = attrs.field(default=None, validator=attrs.validators.optional(_cwd))
    user: str | None = attrs.field(default=None, converter=_user)
    own_mounts_only: bool = attrs.field(default=False, validator=is_of(bool))

    def __attrs_post_init__(self) -> None:
        if self.own_mounts_only and self.rootfs is None:
            raise InvalidArgumentError(
                f"container {self.name!r} has the sandbox's files, and its mounts are among them",
                hint="Give it a rootfs of its own, or leave own_mounts_only= out.",
            )


def _hostname(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    # 64 bytes: __NEW_UTS_LEN of the kernel.
    if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}", kernel_text(value, "hostname")):
        raise InvalidArgumentError(f"hostname {value!r} is not valid", hint="Letters, digits, '-' and '.', at most 64.")


def _user_ids(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    ids = tuple(value) if isinstance(value, list | tuple) else ()
    if len(ids) != 2 or any(type(number) is not int or number <= 0 for number in ids) or sum(ids) >= 1 << 32:
        raise InvalidArgumentError(f"user_ids must be a first id of the host, not 0, and how many, got {value!r:.80}")
    return ids


def _cgroup_parent(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    # No part may be "." or "..": it becomes a part of paths.
    part = r"/[A-Za-z0-9_][A-Za-z0-9_.:@\\-]{0,199}"
    if value != "" and not matches(f"({part})+", value):
        raise InvalidArgumentError(
            f"cgroup_parent {value!r} is not valid",
            hint="An absolute path in the cgroup file system, such as '/pods/a'.",
        )


def _labels(value: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"labels and annotations map names to text, got {value!r}")
    for name, text in value.items():
        if not kernel_text(name, "name of a label"):
            raise InvalidArgumentError(f"the name of label {text!r} is empty")
        kernel_text(text, f"label {name!r}")
    return dict(value)


@attrs.frozen
@by_fields
class SandboxSpec:
    """What a sandbox shall be like.

    Attributes:
        isolation: a backend's name, or "auto".
        name: the user's name for it, unique among the engine's living sandboxes; None: only its id.
        rootfs: the files of the sandbox.
        resources: limits for all that runs in it.
        network: how it is connected.
        mounts: of the host, in every container.
        env, cwd, user: for every process that does not say otherwise.
        userns: "private" (a user namespace of its own) or "host" (root inside is the host's root).
        hostname: None: the first 12 characters of the id.
        sysctls: namespaced kernel settings (an allow-list).
        dns: /etc/resolv.conf; None: an empty one, a copy of the host's for network "host", or for network "user" one
            that leads to the host's first name server.
        hosts: more lines of /etc/hosts: name to address.
        security: capabilities, seccomp, no_new_privileges.
        share_pid: containers see each other's processes.
        ttl: seconds after which it is removed, at most ten years.
        labels: the user's own words; `status()` and `list()` tell them.
        annotations: for backends.
        cgroup_parent: the cgroup below which the sandbox's own is made, from the top of each hierarchy, as
            "/kubepods/pod1"; empty: the engine's own place. It is made when it is missing, and stays.
        user_ids: the host's ids that 0 and those after it are in a private user namespace: the first, and how many;
            None: a range of 65,536 that nobody else has. Those that engines lease, 0x70000000 to 0x7FFEFFFF, are
            refused. When a network namespace is given that belongs to a user namespace of its own, that one is the
            sandbox's, and must be as it is said here.
    """

    isolation: str = "auto"
    name: str | None = attrs.field(default=None)
    rootfs: Rootfs = attrs.field(factory=Rootfs.host, validator=is_of(Rootfs))
    resources: Resources = attrs.field(factory=Resources, validator=is_of(Resources))
    network: Network = attrs.field(factory=Network, validator=is_of(Network))
    mounts: tuple[Mount, ...] = attrs.field(default=(), converter=mounts_of)
    env: Mapping[str, str] = attrs.field(factory=dict, converter=_environment)
    cwd: str = attrs.field(default="/", validator=_cwd)
    user: str | None = attrs.field(default=None, converter=_user)
    userns: Literal["private", "host"] = attrs.field(default="private", validator=is_one_of("private", "host"))
    hostname: str | None = attrs.field(default=None, validator=_hostname)
    sysctls: Mapping[str, str] = attrs.field(factory=dict)
    dns: Dns | None = attrs.field(default=None, validator=is_of(Dns, optional=True))
    hosts: Mapping[str, str] = attrs.field(factory=dict)
    security: Security = attrs.field(factory=Security, validator=is_of(Security))
    share_pid: bool = attrs.field(default=False, validator=is_of(bool))
    ttl: float | None = attrs.field(default=None, validator=[is_positive, is_at_most(LONGEST_TTL)])
    labels: Mapping[str, str] = attrs.field(factory=dict, converter=_labels)
    annotations: Mapping[str, str] = attrs.field(factory=dict, converter=_labels)
    cgroup_parent: str = attrs.field(default="", validator=_cgroup_parent)
    user_ids: tuple[int, int] | None = attrs.field(default=None, converter=_user_ids)

    def __attrs_post_init__(self) -> None:
        check_isolation(self.isolation)
        if self.user_ids is not None and self.userns != "private":
            raise InvalidArgumentError("user_ids are of a private user namespace, and userns is 'host'")
        if self.name is not None:
            check_name(self.name)
        for field, given in (("sysctls", self.sysctls), ("hosts", self.hosts)):
            if not isinstance(given, Mapping):
                raise InvalidArgumentError(f"{field} must map names to text, got {given!r}")
        for name, value in self.sysctls.items():
            if not matches(r"[a-z0-9_]+([./][a-z0-9_-]+)+", name) or not isinstance(value, str):
                raise InvalidArgumentError(
                    f"sysctl {name!r} is not valid", hint="For example 'net.ipv4.ip_forward': '1'."
                )
            # The kernel reads one line, and says nothing of a second one. Source: proc_get_long, kernel/sysctl.c.
            if not matches(r"[ -~\t]*", value):
                raise InvalidArgumentError(f"sysctl {name!r} must be one line of printable text, got {value!r}")
        for host, address in self.hosts.items():
            if not matches(r"[A-Za-z0-9.-]+", host) or not matches(r"[0-9A-Fa-f.:]+", address):
                raise InvalidArgumentError(f"hosts entry {host!r}: {address!r} is not valid")
        targets = [mount.target for mount in self.mounts]
        if len(set(targets)) != len(targets):
            raise InvalidArgumentError(f"two mounts have the same target: {sorted(targets)}")
