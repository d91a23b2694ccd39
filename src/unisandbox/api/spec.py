"""What a sandbox, a container and a process shall be like: frozen, checked when made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import (
    is_at_least,
    is_at_most,
    is_of,
    is_one_of,
    is_positive,
    is_whole,
    kernel_text,
    matches,
    several,
)
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.names import CAPABILITIES, check_isolation, check_name
from unisandbox.api.units import GIB, MIB, parse_size

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

_DEFAULT_MEMORY: Final = 512 * MIB
_DEFAULT_PIDS: Final = 256
_LARGEST_DEFAULT_DISK: Final = GIB
LEAST_DISK: Final = 64 << 10
"""Bytes. What a sandbox itself writes there (/run/etc and a few directories) must fit."""
_MOST_PIDS: Final = 4 << 20  # PID_MAX_LIMIT of the kernel


def _words(values: Iterable[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else several(values, "a part of resolv.conf")


def _mounts(values: Iterable[Mount]) -> tuple[Mount, ...]:
    mounts = several(values, "mounts")
    for mount in mounts:
        if not isinstance(mount, Mount):
            raise InvalidArgumentError(
                f"mounts are Mount objects, got {mount!r}", hint="For example Mount.bind('/data', '/data')."
            )
    return mounts


# One function each, since type checkers take no closures as converters.
def _memory_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "memory")


def _disk_size(value: int | str | None) -> int | None:
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0 if value == 0 else None
    return parse_size(value, "disk")


def _mount_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "size of a mount")


@attrs.frozen
@by_fields
class Resources:
    """Limits of a sandbox or of one container in it. None means: not limited.

    Attributes:
        memory: bytes of memory, or "512M". Page cache and files in tmpfs count.
        swap: bytes of swap beyond `memory`, where the host counts swap; 0 is none.
        cpu: cores; 0.5 is half of one.
        cpu_seconds: seconds of processor time that one process may use, however long that takes; then it is ended with
            reason "cpu".
        pids: processes and threads at one time.
        disk: bytes that the writable layer may hold; 0, the default: half of the memory, at most 1 GiB (`disk_limit`).
            Up to half of the memory it is a tmpfs (charged to `memory`), above that a sparse file system image. It is
            the sandbox's, shared by its containers, and stays as long as the sandbox.
        nofile: open files of a process (RLIMIT_NOFILE).
        core: bytes of a core dump (RLIMIT_CORE).
    """

    memory: int | None = attrs.field(default=_DEFAULT_MEMORY, converter=_memory_size)
    swap: int | None = attrs.field(default=0, validator=is_whole)
    cpu: float | None = attrs.field(default=None, validator=is_positive)
    pids: int | None = attrs.field(default=_DEFAULT_PIDS, validator=[is_whole, is_positive, is_at_most(_MOST_PIDS)])
    disk: int | None = attrs.field(default=0, converter=_disk_size, validator=is_at_least(LEAST_DISK))
    nofile: int | None = attrs.field(default=4096, validator=[is_whole, is_positive])
    core: int | None = attrs.field(default=0, validator=is_whole)
    cpu_seconds: float | None = attrs.field(default=None, validator=is_positive)

    @property
    def disk_limit(self) -> int | None:
        """Bytes that `disk` comes to; None: not limited."""
        if self.disk != 0:
            return self.disk
        if self.memory is None:
            return _LARGEST_DEFAULT_DISK
        return min(max(self.memory // 2, LEAST_DISK), _LARGEST_DEFAULT_DISK)

    @classmethod
    def unlimited(cls) -> Resources:
        """No limit at all: only for what you trust, or for hosts that cannot limit."""
        return cls(memory=None, swap=None, cpu=None, pids=None, disk=None, nofile=None, core=None, cpu_seconds=None)


@attrs.frozen
@by_fields
class Rootfs:
    """What a container sees as its files. Make it by `host()`, `dir()` or `image()`.

    Attributes:
        kind: "host", "dir" or "image".
        path: the directory of kind "dir", absolute.
        ref: the image's reference of kind "image".
        readonly: nothing outside /tmp, /run, /home and the mounts can be written.
        local: kind "host" shows /usr/local too.
    """

    kind: Literal["host", "dir", "image"] = attrs.field(validator=is_one_of("host", "dir", "image"))
    path: str = ""
    ref: str = ""
    readonly: bool = attrs.field(default=False, validator=is_of(bool))
    local: bool = attrs.field(default=False, validator=is_of(bool))

    def __attrs_post_init__(self) -> None:
        if (self.kind == "dir") != kernel_text(self.path, "rootfs path").startswith("/"):
            raise InvalidArgumentError(f"rootfs of kind {self.kind!r} with path {self.path!r}: only 'dir' has one")
        if self.kind == "dir" and os.path.normpath(self.path).strip("/") == "":
            raise InvalidArgumentError(
                "'/' cannot be a sandbox's root directory",
                hint="Use Rootfs.host() for this machine's programs without its data.",
            )
        if (self.kind == "image") != bool(kernel_text(self.ref, "image reference")):
            raise InvalidArgumentError(f"rootfs of kind {self.kind!r} with ref {self.ref!r}: only 'image' has one")

    @classmethod
    def host(cls, *, local: bool = False) -> Rootfs:
        """A curated view of this machine's programs: /usr read-only, a synthesised /etc, nothing of the user's."""
        return cls(kind="host", readonly=True, local=local)

    @classmethod
    def dir(cls, path: str | os.PathLike[str], *, readonly: bool = False) -> Rootfs:
        """A directory: read-only, or with a private layer on top that takes the writes. It is never changed itself."""
        return cls(kind="dir", path=os.path.abspath(kernel_text(os.fspath(path), "path")), readonly=readonly)

    @classmethod
    def image(cls, ref: str) -> Rootfs:
        """An OCI image by reference. Reserved: backends that cannot unpack one raise UnsupportedError."""
        return cls(kind="image", ref=ref)

    @classmethod
    def parse(cls, value: Rootfs | str | os.PathLike[str]) -> Rootfs:
        """ "host", a path with a "/" in it, or a Rootfs. Other names are images."""
        if isinstance(value, Rootfs):
            return value
        if not isinstance(value, str | os.PathLike):
            raise InvalidArgumentError(f"rootfs must be a Rootfs, 'host' or a path, got {value!r}")
        text = kernel_text(os.fspath(value), "rootfs")
        if value == "host":
            return cls.host()
        if not text:
            raise InvalidArgumentError("rootfs is empty", hint="Use 'host' or a path with a '/' in it.")
        if "/" in text or not isinstance(value, str):
            return cls.dir(text)
        return cls.image(text)


@attrs.frozen
@by_fields
class Network:
    """How a sandbox is connected.

    Attributes:
        kind: "none" (only a loopback of its own), "host" (the host's own network), "namespace" (a given one).
        path: the network namespace of kind "namespace", e.g. /run/netns/blue.
    """

    kind: Literal["none", "host", "namespace"] = attrs.field(
        default="none", validator=is_one_of("none", "host", "namespace")
    )
    path: str = ""

    def __attrs_post_init__(self) -> None:
        if (self.kind == "namespace") != kernel_text(self.path, "network namespace path").startswith("/"):
            raise InvalidArgumentError(
                f"network of kind {self.kind!r} with path {self.path!r}: only 'namespace' has one, and it is absolute"
            )

    @classmethod
    def none(cls) -> Network:
        """Only a loopback interface of its own."""
        return cls()

    @classmethod
    def host(cls) -> Network:
        """The host's network: no isolation of the network at all."""
        return cls(kind="host")

    @classmethod
    def namespace(cls, path: str | os.PathLike[str]) -> Network:
        """A network namespace that somebody else made and keeps."""
        return cls(kind="namespace", path=os.fspath(path))

    @classmethod
    def parse(cls, value: Network | str) -> Network:
        """ "none", "host", or the absolute path of a network namespace."""
        if isinstance(value, Network):
            return value
        value = kernel_text(value, "network")
        if value == "none":
            return cls.none()
        if value == "host":
            return cls.host()
        if value.startswith("/"):
            return cls.namespace(value)
        raise InvalidArgumentError(f"network {value!r} is not known", hint="Use 'none', 'host' or a namespace's path.")


def _target(value: str) -> str:
    parts = [part for part in kernel_text(value, "mount target").split("/") if part not in {"", "."}]
    if not value.startswith("/") or ".." in parts:
        raise InvalidArgumentError(f"mount target must be an absolute path without '..', got {value!r}")
    if not parts:
        raise InvalidArgumentError("nothing can be mounted on '/'", hint="That is what `rootfs` is for.")
    if parts[0] in {"proc", "sys", "dev"}:
        raise InvalidArgumentError(
            f"nothing can be mounted on or below '/{parts[0]}', got {value!r}", hint="The runtime mounts its own there."
        )
    return "/" + "/".join(parts)


@attrs.frozen
@by_fields
class Mount:
    """A directory or file of the host, or a private tmpfs, inside. Always nosuid and nodev.

    Attributes:
        target: absolute path inside.
        source: absolute path on the host; empty for a tmpfs. Opened once, when the sandbox is made.
        readonly: cannot be written, nor anything mounted below it.
        size: bytes of a tmpfs.
        idmap: files of the host's root belong to the sandbox's root, and so on for all ids (one mount, not the disk).
    """

    target: str = attrs.field(converter=_target)
    source: str = ""
    readonly: bool = attrs.field(default=True, validator=is_of(bool))
    size: int | None = attrs.field(default=None, converter=_mount_size)
    idmap: bool = attrs.field(default=True, validator=is_of(bool))

    def __attrs_post_init__(self) -> None:
        kernel_text(self.source, "mount source")
        if self.source and not os.path.isabs(self.source):
            raise InvalidArgumentError(f"mount source must be absolute, got {self.source!r}")
        if self.source and self.size is not None:
            raise InvalidArgumentError(f"mount {self.target!r}: only a tmpfs (no source) has a size")

    @classmethod
    def bind(cls, source: str | os.PathLike[str], target: str, *, readonly: bool = True, idmap: bool = True) -> Mount:
        """A directory or file of the host."""
        absolute = os.path.abspath(kernel_text(os.fspath(source), "mount source"))
        return cls(target=target, source=absolute, readonly=readonly, idmap=idmap)

    @classmethod
    def tmpfs(cls, target: str, *, size: int | str = 64 * MIB) -> Mount:
        """A private file system in memory."""
        return cls(target=target, readonly=False, size=parse_size(size))


@attrs.frozen
@by_fields
class Dns:
    """What /etc/resolv.conf says. Source: resolv.conf(5)."""

    servers: tuple[str, ...] = attrs.field(default=(), converter=_words)
    search: tuple[str, ...] = attrs.field(default=(), converter=_words)
    options: tuple[str, ...] = attrs.field(default=(), converter=_words)

    def __attrs_post_init__(self) -> None:
        for word in (*self.servers, *self.search, *self.options):
            if not matches(r"[A-Za-z0-9_.:%-]+", word):
                raise InvalidArgumentError(f"{word!r} cannot stand in resolv.conf")


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
    if not isinstance(value, Iterable):
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
    mounts: tuple[Mount, ...] = attrs.field(default=(), converter=_mounts)
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
        dns: /etc/resolv.conf; None: an empty one, or a copy of the host's for network "host".
        hosts: more lines of /etc/hosts: name to address.
        security: capabilities, seccomp, no_new_privileges.
        share_pid: containers see each other's processes.
        ttl: seconds after which it is removed.
        labels: the user's own words, searchable.
        annotations: for backends.
        cgroup_parent: the cgroup below which the sandbox's own is made, from the top of each hierarchy, as
            "/kubepods/pod1"; empty: the engine's own place. It is made when it is missing, and stays.
        user_ids: the host's ids that 0 and those after it are in a private user namespace: the first, and how many;
            None: a range of 65,536 that nobody else has. When a network namespace is given that belongs to a user
            namespace of its own, that one is the sandbox's, and must be as it is said here.
    """

    isolation: str = "auto"
    name: str | None = attrs.field(default=None)
    rootfs: Rootfs = attrs.field(factory=Rootfs.host, validator=is_of(Rootfs))
    resources: Resources = attrs.field(factory=Resources, validator=is_of(Resources))
    network: Network = attrs.field(factory=Network, validator=is_of(Network))
    mounts: tuple[Mount, ...] = attrs.field(default=(), converter=_mounts)
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
    ttl: float | None = attrs.field(default=None, validator=is_positive)
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
        for host, address in self.hosts.items():
            if not matches(r"[A-Za-z0-9.-]+", host) or not matches(r"[0-9A-Fa-f.:]+", address):
                raise InvalidArgumentError(f"hosts entry {host!r}: {address!r} is not valid")
        targets = [mount.target for mount in self.mounts]
        if len(set(targets)) != len(targets):
            raise InvalidArgumentError(f"two mounts have the same target: {sorted(targets)}")
