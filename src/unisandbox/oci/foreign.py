"""The config.json of an engine (containerd, iSulad): what of it a runtime is told, and what becomes a cgroup's limits.

A field that the runtime would not understand is refused; it is never left out without a word.
Source: opencontainers runtime-spec 1.3, config.md and config-linux.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from unisandbox.api import InvalidArgumentError, UnsupportedError
from unisandbox.api.task import RootMount
from unisandbox.host.cgroups import DeviceRule, Limits
from unisandbox.host.cgroups.limits import CPU_MIN
from unisandbox.oci.features import RuntimeProgram

Config = dict[str, Any]

# What came after runtime-spec 1.0, or no runtime here is known to honour.
_NEWER: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({"domainname", "vm", "zos", "windows", "solaris"}),
    "process": frozenset({"scheduler", "ioPriority", "execCPUAffinity"}),
    "linux": frozenset({"timeOffsets", "netDevices", "memoryPolicy", "intelRdt", "personality"}),
}
_NAMESPACES: Final = frozenset({"pid", "network", "mount", "ipc", "uts", "user", "cgroup"})
_PROPAGATION: Final = {"rshared": "shared", "rslave": "slave"}
_OTHER_PROPAGATION: Final = frozenset({"shared", "slave", "unbindable", "runbindable"})
IDMAP_OPTIONS: Final = frozenset({"idmap", "ridmap"})
"""See `idmap`."""
# Of a mount in the table of mounts, those that a container's own mount could lack.
_FLAGS: Final = frozenset({"ro", "nosuid", "nodev", "noexec"})
# Of attributes, those with an "r" before them count for what is mounted below, too; source: mount(8), and runtime-spec,
# config.md, Linux mount options.
_ATTRIBUTES: Final = frozenset(
    {"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "nosymfollow", "symfollow", "nodiratime"}
    | {"diratime", "relatime", "norelatime", "noatime", "atime", "strictatime", "nostrictatime"}
)
# The devices of every container (see the backend), and the console, which is a terminal of devpts.
_USUAL_DEVICES: Final = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None)})
_SHARES_PER_WEIGHT: Final = 1024 / 100  # the defaults of cgroup v1 and v2 mean the same
_UNLIMITED: Final = 1 << 62
_OOM_GROUP: Final = "memory.oom.group"
_NO_LIMITS: Final = Limits(swap=None)


def parse(text: str) -> Config:
    """An OCI config. Raises InvalidArgumentError when it is none."""
    try:
        config = json.loads(text)
        process = config["process"]
        usable = isinstance(process["args"], list) and isinstance(config["root"]["path"], str)
        lists = [config.get("mounts") or [], linux_of(config).get("namespaces") or []]
        usable = usable and all(isinstance(entry, dict) for entries in lists for entry in entries)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(f"this is no usable OCI config: {error!r}") from error
    if not usable:
        raise InvalidArgumentError("this is no usable OCI config: a part of it is not as specified")
    return config  # type: ignore[no-any-return]


def linux_of(config: Config) -> Config:
    """Its part for Linux, which may be missing."""
    linux = config.get("linux") or {}
    if not isinstance(linux, dict):
        raise InvalidArgumentError("this is no usable OCI config: 'linux' is no object")
    return linux


def check(config: Config, program: RuntimeProgram, *, all_devices: bool = False) -> None:
    """Refuse what this runtime cannot express, or what needs more of the host than a sandbox gives.

    Args:
        config: the whole.
        program: the runtime.
        all_devices: the sandbox may have devices of the host.

    Raises:
        UnsupportedError: names the field.
    """
    for place, names in _NEWER.items():
        part = config.get(place) or {} if place else config
        for name in sorted(names & {key for key, value in part.items() if value}):
            raise _refusal(f"{place}.{name}".lstrip("."), program)
    if linux_of(config).get("seccomp") and not program.features.seccomp:
        raise _refusal("linux.seccomp", program)
    for space in linux_of(config).get("namespaces") or []:
        if space.get("type") not in _NAMESPACES:
            raise _refusal(f"a namespace of type {space.get('type')!r}", program)
    for mount in config.get("mounts") or []:
        options = frozenset(mount.get("options") or [])
        where = f"mount {mount.get('destination')!r}"
        if idmap(mount) and not is_bind(mount):
            raise _refusal(f"{where} with mapped ids", program)
        if "rro" in options and not program.features.recursive_readonly:
            raise _refusal(f"{where} that is read-only with all below it", program)
        if other := sorted(options & _OTHER_PROPAGATION):
            raise UnsupportedError(f"{where} with propagation {other[0]!r}", "runc", alternatives=("rshared", "rslave"))
        if propagation(mount) != "private" and not is_bind(mount):
            raise UnsupportedError(f"{where} with rslave or rshared", "runc", reason="it shows nothing of the host")
    if (of_root := linux_of(config).get("rootfsPropagation")) not in {None, "", "private", "rprivate", *_PROPAGATION}:
        raise UnsupportedError(f"rootfs propagation {of_root!r}", "runc")
    if linux_of(config).get("devices") and not all_devices:
        raise UnsupportedError("devices of the host", "runc", reason="a sandbox has the usual ones only")


def _refusal(what: str, program: RuntimeProgram) -> UnsupportedError:
    return UnsupportedError(what, "runc", reason=f"{program.name} {program.version_text} is not known to honour it")


def parse_resources(text: str) -> Config:
    """An OCI object `linux.resources`. Raises InvalidArgumentError when it is none."""
    try:
        resources = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"this is no usable OCI object of resources: {error!r}") from error
    if not isinstance(resources, dict):
        raise InvalidArgumentError("this is no usable OCI object of resources")
    return resources


def limits(resources: Mapping[str, Any], now: Limits = _NO_LIMITS) -> Limits:
    """The limits of a container's own cgroup, but for `devices`.

    Args:
        resources: what of it is missing, or 0, is as it is `now`; a negative number is no limit.
        now: the limits that it has.

    Raises:
        UnsupportedError: a limit that cannot be set here; it is named.
    """
    known = {"memory", "cpu", "pids", "devices", "unified"}
    for name, value in resources.items():
        if name not in known and value:
            raise UnsupportedError(f"resources.{name}", "runc")
    memory, cpu, pids = (_part(resources, name) for name in ("memory", "cpu", "pids"))
    _check_part("memory", memory, {"limit", "swap", "checkBeforeUpdate"})
    _check_part("cpu", cpu, {"shares", "quota", "period"})
    _check_part("pids", pids, {"limit"})
    size = _limit(memory.get("limit"), now.memory)
    swap = now.swap
    if both := memory.get("swap"):
        # In OCI swap counts memory too.
        swap = _limit(both, None)
        if swap is not None and (size is None or swap < size):
            raise InvalidArgumentError(f"resources.memory.swap {both} is less than the memory limit {size}")
        swap = None if swap is None or size is None else swap - size
    shares = _limit(cpu.get("shares"), None)
    weight = None if shares is None else max(1, min(10_000, round(shares / _SHARES_PER_WEIGHT)))
    return Limits(
        memory=size,
        swap=swap,
        cpu=_cores(cpu, now.cpu),
        cpu_weight=weight if cpu.get("shares") else now.cpu_weight,
        pids=_limit(pids.get("limit"), now.pids),
        oom_group=_oom_group(resources, now.oom_group),
    )


def _oom_group(resources: Mapping[str, Any], now: bool) -> bool:
    """What a kubelet as it comes says of every container, on a host with cgroup v2."""
    unified = _part(resources, "unified")
    if other := sorted(unified.keys() - {_OOM_GROUP}):
        raise UnsupportedError(f"resources.unified.{other[0]}", "runc")
    value = unified.get(_OOM_GROUP, str(int(now)))
    if value not in ["0", "1"]:  # whatever it is
        raise InvalidArgumentError(f"resources.unified.{_OOM_GROUP} must be '0' or '1', got {value!r:.80}")
    return bool(value == "1")


def _cores(cpu: Mapping[str, Any], now: float | None) -> float | None:
    quota, period = cpu.get("quota"), cpu.get("period")
    if not quota:
        if period and now is not None:
            raise UnsupportedError("a change of resources.cpu.period without its quota", "runc")
        return now
    if period is not None and period < 0:
        raise InvalidArgumentError(f"resources.cpu.period must be > 0, got {period}")
    return None if quota < 0 else max(quota / (period or 100_000), CPU_MIN)


def _part(resources: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = resources.get(name) or {}
    if not isinstance(part, dict) or any(isinstance(value, int) and abs(value) > 1 << 64 for value in part.values()):
        raise InvalidArgumentError(f"resources.{name} is not as specified: {part!r:.80}")
    return part


def _check_part(name: str, part: Mapping[str, Any], known: set[str]) -> None:
    for key, value in part.items():
        if key not in known and value:
            raise UnsupportedError(f"resources.{name}.{key}", "runc")
        if key in known and value is not None and not isinstance(value, int):
            raise InvalidArgumentError(f"resources.{name}.{key} must be a number, got {value!r:.80}")


def _limit(value: int | None, now: int | None) -> int | None:
    if not value:
        return now
    return value if 0 < value < _UNLIMITED else None


def devices(resources: Mapping[str, Any]) -> list[DeviceRule] | None:
    """The devices that a container may use beyond the usual ones; None: all of the host.

    Raises:
        InvalidArgumentError: a rule that means nothing.
    """
    more: list[DeviceRule] = []
    rules = resources.get("devices") or []
    if not isinstance(rules, list):
        raise InvalidArgumentError(f"resources.devices is no list: {rules!r:.80}")
    for rule in rules:
        if not isinstance(rule, dict):
            raise InvalidArgumentError(f"a rule of resources.devices is no object: {rule!r:.80}")
        numbers, words = ([rule.get(name) for name in names] for names in (("major", "minor"), ("type", "access")))
        is_read = all(number is None or type(number) is int for number in numbers)
        if not is_read or not all(word is None or isinstance(word, str) for word in words):
            raise InvalidArgumentError(f"a rule of resources.devices is not as specified: {rule!r:.80}")
        major, minor = (None if rule.get(name) in {None, -1} else rule[name] for name in ("major", "minor"))
        if not rule.get("allow") or (major, minor) in _USUAL_DEVICES:
            continue
        kind = rule.get("type") or "a"
        if kind == "a" and major is None and minor is None:
            return None
        access = str(rule.get("access") or "rwm")
        # Rules say themselves what is wrong with them.
        more += [DeviceRule(each, major, minor, access) for each in ("c", "b") if kind in {each, "a"}]
        if kind not in {"a", "b", "c"}:
            raise InvalidArgumentError(f"a device is of type a, b or c, got {kind!r:.80}")
    return more


def binds(config: Config) -> Iterator[Config]:
    """The mounts that show something of the host."""
    return filter(is_bind, config.get("mounts") or [])


def taken_apart(mount: Config, below: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Config]:
    """A mount with `rbind` as one of its source alone and one for each mount below, which say the same together.

    Args:
        mount: as an engine says it, its source without symbolic links.
        below: what is mounted there: mount points, and what the table of mounts says of each.
    """
    options = [str(option) for option in mount.get("options") or []]
    yield {**mount, "options": ["bind" if option == "rbind" else option for option in options]}
    # One mount needs no recursion, which crun 1.8.1 takes for a directory's.
    attributes = [option[1:] for option in options if option[:1] == "r" and option[1:] in _ATTRIBUTES]
    propagated = [option for option in options if option in _PROPAGATION]
    is_mapped = idmap(mount) == "tree"
    ids: Config = {name: mount[name] for name in ("uidMappings", "gidMappings") if is_mapped and name in mount}
    for point, had in below:
        passes_on = any(word.startswith(("shared:", "master:")) for word in had)
        yield {
            "destination": os.path.normpath(f"{mount.get('destination')}/{os.path.relpath(point, mount['source'])}"),
            "type": "bind",
            "source": point,
            "options": [
                "bind",
                *(flag for flag in had if flag in _FLAGS),
                *attributes,
                *(propagated if passes_on else []),
                *["idmap"] * is_mapped,
            ],
            **ids,
        }


def names_ids(mount: Config) -> bool:
    """Whether a mount says which ids its files get."""
    return bool(mount.get("uidMappings") or mount.get("gidMappings"))


def idmap(mount: Config) -> Literal["", "mount", "tree"]:
    """What of a mount gets mapped ids: itself, or all below it, too. They are what it says, or the user namespace's."""
    options = set(mount.get("options") or [])
    if "ridmap" in options or (names_ids(mount) and "idmap" not in options):
        return "tree"
    return "mount" if "idmap" in options else ""


def has_ids(part: Config, first: int, count: int) -> bool:
    """Whether the ids of a mount (or the `linux` of a config) are of one row, from 0 inside to `first` outside."""
    row = {"containerID": 0, "hostID": first, "size": count}
    return all(part.get(name) == [row] for name in ("uidMappings", "gidMappings"))


def is_bind(mount: Config) -> bool:
    """Whether a mount shows something of the host."""
    return mount.get("type") == "bind" or bool({"bind", "rbind"} & set(mount.get("options") or []))


def propagation(mount: Config) -> str:
    """What becomes of mounts that are made later: "private", "slave" or "shared"."""
    return next((_PROPAGATION[option] for option in mount.get("options") or [] if option in _PROPAGATION), "private")


def overlay_op(
    mount: RootMount, ids: tuple[int, int] | None = None, attributes: Iterable[str] = ()
) -> dict[str, object]:
    """An overlay as an operation of a job, its `path` still missing.

    Args:
        mount: what an engine says.
        ids: the first id of the host, and how many, of the user namespace of whoever sees it.
        attributes: of the mount, beside what it says.

    Directories are named one by one there, so that no option is too long however many layers there are.

    Raises:
        UnsupportedError: an option that would be left out.
        InvalidArgumentError: a directory is missing or is none.
    """
    given: dict[str, str] = {}
    attributes = list(attributes)
    for option in mount.options:
        name, has_value, value = option.partition("=")
        if name in {"lowerdir", "upperdir", "workdir"} and has_value:
            given[name] = value
        elif option == "ro":
            attributes.append("readonly")
        elif option == "volatile":
            given[name] = "yes"
        elif name in {"uidmap", "gidmap"} and ids is not None and value == f"0:{ids[0]}:{ids[1]}":
            given[name] = value
        elif option not in {"rw", "index=off"}:  # "off" is what the kernel does unless it is built otherwise
            raise UnsupportedError(f"overlay option {option!r}", "runc")
    if "lowerdir" not in given or ("upperdir" in given) != ("workdir" in given):
        raise InvalidArgumentError("an overlay needs lowerdir, and upperdir and workdir together")
    if ("uidmap" in given) != ("gidmap" in given):
        raise InvalidArgumentError("an overlay has uidmap and gidmap, or none of them")
    op: dict[str, object] = {
        "op": "overlay",
        "idmap": "uidmap" in given,
        "lower": [_directory(path) for path in given["lowerdir"].split(":")],
        "attributes": attributes,
        "volatile": "volatile" in given,
    }
    if "upperdir" in given:
        op |= {"upper": _directory(given["upperdir"]), "work": _directory(given["workdir"])}
    return op


def _directory(path: str) -> str:
    """Without symbolic links, which operations refuse: whoever gives the path may have some in it."""
    real = os.path.realpath(path)
    if not os.path.isabs(path) or not os.path.isdir(real):
        raise InvalidArgumentError(f"layer {path!r} is no directory of this host")
    return real
