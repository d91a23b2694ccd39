"""Which cgroup hierarchies this host has, where we are in them, and where we may make cgroups of our own.

Looks only; makes and changes nothing.
Source: cgroups(7), cgroup_namespaces(7), proc_pid_mountinfo(5); systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import attrs

from unisandbox.api.errors import InvalidArgumentError, UnavailableError
from unisandbox.host.cgroups import devices, files
from unisandbox.host.power import standing

Version = Literal["v1", "hybrid", "v2"]

CONTROLLERS: Final = ("memory", "pids", "cpu", "devices", "cpuacct", "freezer")
"""What we use. On v2 `devices` is a BPF program, `cpuacct` and `freezer` are part of every cgroup."""
V2_CONTROLLERS: Final = ("memory", "pids", "cpu")
"""Those that v2 must be told to switch on."""
SLICE: Final = "unisandbox.slice"
"""Where root's cgroups are on a v2 host that gave us no subtree: at the top, beside systemd's own slices."""

HOST_LEAF: Final = "unisandbox-host"
"""Where the processes that stood in our way are moved, on word (v2, `make_room`)."""

_TOP: Final = "/sys/fs/cgroup"
_COMPONENT: Final = re.compile(r"[A-Za-z0-9_@:\\-][A-Za-z0-9_@:.\\-]{0,254}")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A mounted hierarchy: `directory` shows the cgroup that /proc/PID/cgroup calls `root`."""

    directory: str
    root: str
    controllers: frozenset[str]
    unified: bool
    nsdelegate: bool = False
    """cgroup2 only: a cgroup namespace is a border that no process, nor its birth, may cross."""

    def find(self, path: str) -> str | None:
        """The directory of the cgroup that /proc/PID/cgroup calls `path`; None when it is not below this mount."""
        root = self.root.rstrip("/")
        if ".." in path.split("/") or not (path + "/").startswith(root + "/"):
            return None
        directory = self.directory + path[len(root) :].rstrip("/")
        return directory if os.path.exists(f"{directory}/cgroup.procs") else None

    def name(self, directory: str) -> str:
        """The inverse: what /proc/PID/cgroup says of processes in `directory`."""
        return self.root.rstrip("/") + directory[len(self.directory) :] or "/"


@attrs.frozen(eq=False, repr=False)
class Place:
    """A hierarchy that we use: `parent` is the directory (it may not exist yet) below which the engine's own one is."""

    controllers: tuple[str, ...]
    mount: Mount
    parent: str

    @property
    def key(self) -> str:
        """The name of this hierarchy in /proc/PID/cgroup: one of its controllers, or "unified"."""
        return "unified" if self.mount.unified else self.controllers[0]


class Layout(NamedTuple):
    """What was found: places in the order in which cgroups are made, and for each missing controller why."""

    version: Version
    places: tuple[Place, ...]
    missing: Mapping[str, str]
    occupied: str | None = None
    """v2: the parent, when it holds processes that must move into a leaf before it can have children with limits."""


def read_mounts() -> list[Mount]:
    """The mounted cgroup hierarchies of our mount namespace, also those hidden under another mount."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
            if kind in ("cgroup", "cgroup2"):
                root, directory = (_ESCAPE.sub(lambda m: chr(int(m[1], 8)), fields[i]) for i in (3, 4))
                names = frozenset() if kind == "cgroup2" else frozenset(options.split(","))
                nsdelegate = kind == "cgroup2" and "nsdelegate" in options.split(",")
                mounts.append(Mount(directory, root, names, kind == "cgroup2", nsdelegate))
    return mounts


def memberships(pid: int | str = "self") -> dict[str, str]:
    """The cgroups of a process: controller (or "unified") -> path.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb", buffering=0) as file:
            return memberships_in(file.read().decode(errors="surrogateescape"))
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} does not exist") from None


def memberships_in(text: str) -> dict[str, str]:
    """The same of the contents of such a file."""
    found = {}
    for line in text.splitlines():
        number, names, path = line.split(":", 2)
        # A v2 cgroup that was removed while a process is in it has this mark.
        path = path.removesuffix(" (deleted)")
        if number == "0" and not names:
            found["unified"] = path
        for name in names.split(",") if names else ():
            found[name] = path
    return found


def directories_of(pid: int) -> tuple[str, ...]:
    """The cgroups that a process is in, of all the hierarchies that are mounted here.

    Raises:
        ProcessLookupError: there is no such process.
    """
    own = memberships(pid)
    found: list[str] = []
    for mount in read_mounts():
        key = "unified" if mount.unified else next(iter(mount.controllers & own.keys()), "")
        directory = mount.find(own[key]) if key in own else None
        if directory is not None:
            found.append(directory)
    return tuple(found)


def below(directory: str, prefix: str) -> list[str]:
    """The cgroups in this one whose names begin so; none where it is gone."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        found = (entry for entry in entries if entry.name.startswith(prefix))
        return [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    return []


def detect(parent: str | None, *, use_unified: bool, make_room: bool) -> Layout:
    """Find our places.

    Args:
        parent: path of the parent cgroup from the top of each hierarchy ("/pods"); None: see the room's rules.
        use_unified: False pretends that a hybrid host has no cgroup2 tree.
        make_room: on v2, whether the processes of the parent may be moved into a leaf of it.

    Raises:
        InvalidArgumentError: `parent` is not a cgroup path.
        UnavailableError: no cgroup file system is mounted.
    """
    if parent is not None:
        check_parent(parent)
    mounts = read_mounts()
    own = memberships()
    legacy = {name for mount in mounts if not mount.unified for name in mount.controllers & set(CONTROLLERS)}
    unified = [mount for mount in mounts if mount.unified]
    if legacy:
        return _detect_v1(mounts, own, parent, unified=use_unified)
    if unified:
        return _detect_v2(unified, own, parent, make_room=make_room)
    raise UnavailableError(
        "cgroups cannot be used: no cgroup file system is mounted",
        hint="Mount it (mount -t cgroup2 cgroup2 /sys/fs/cgroup), or give the container access to it.",
    )


def check_parent(parent: str) -> str:
    """Return `parent` when it is an absolute cgroup path without surprises."""
    parts = parent.strip("/").split("/")
    if not parent.startswith("/") or (parent != "/" and not all(_COMPONENT.fullmatch(part) for part in parts)):
        raise InvalidArgumentError(
            f"cgroup parent {parent!r} is not valid",
            hint="Give a path from the top of the hierarchy, such as /pods or /my.slice/app.service.",
        )
    return parent


def _detect_v1(mounts: Sequence[Mount], own: Mapping[str, str], parent: str | None, *, unified: bool) -> Layout:
    missing: dict[str, str] = {}
    places: list[Place] = []
    # The unified tree ends, freezes and measures cpu times: with it, two hierarchies less are needed.
    tree = _place_v1([m for m in mounts if m.unified], own.get("unified"), parent, "unified")
    hybrid = unified and isinstance(tree, Place) and _has_kill(tree)
    wanted: tuple[str, ...] = CONTROLLERS
    if hybrid:
        wanted = tuple(name for name in CONTROLLERS if name not in ("cpuacct", "freezer"))
    for name in wanted:
        found = _place_v1([m for m in mounts if name in m.controllers], own.get(name), parent, name)
        if isinstance(found, str):
            missing[name] = found
            continue
        same = [i for i, place in enumerate(places) if place.mount.directory == found.mount.directory]
        if same:  # cpu,cpuacct in one hierarchy
            places[same[0]] = attrs.evolve(places[same[0]], controllers=(*places[same[0]].controllers, name))
        else:
            places.append(found)
    if hybrid and isinstance(tree, Place):
        places.append(attrs.evolve(tree, controllers=("cpuacct", "freezer")))
    return Layout("hybrid" if hybrid else "v1", tuple(places), missing)


def _has_kill(place: Place) -> bool:
    """Whether the kernel has cgroup.kill (Linux 5.14); the root cgroup has no such file, any other shows it."""
    if os.path.exists(f"{place.parent}/cgroup.kill"):
        return True
    return standing.kernel() >= (5, 14)


def _place_v1(mounts: Sequence[Mount], own: str | None, parent: str | None, name: str) -> Place | str:
    """Our place in one hierarchy, or why there is none."""
    if not mounts or own is None:
        return f"the {name} hierarchy is not mounted; mount it: mount -t cgroup -o {name} {name} /sys/fs/cgroup/{name}"
    for mount in mounts:
        directory = mount.find(own) if parent is None else _join(mount.directory, parent)
        if directory is None or not os.path.exists(f"{mount.directory}/cgroup.procs"):
            continue
        if not _writable(_existing(directory)):
            return _not_writable(name, directory)
        return Place((name,), mount, directory)
    return (
        f"our {name} cgroup {own!r} is not seen at {mounts[0].directory} "
        "(mounted in another cgroup namespace, or hidden by another mount); mount the hierarchy again, or give a parent"
    )


def _detect_v2(mounts: Sequence[Mount], own: Mapping[str, str], parent: str | None, *, make_room: bool) -> Layout:
    mount = next((m for m in mounts if os.path.exists(f"{m.directory}/cgroup.procs")), None)
    if mount is None:
        raise UnavailableError(
            f"cgroups cannot be used: the cgroup2 file system at {mounts[0].directory} is hidden by another mount",
            hint="Unmount what lies over it, or start outside this mount namespace.",
        )
    if parent is not None:
        directory: str | None = _join(mount.directory, parent)
    else:
        directory = _choose_v2(mount, mount.find(own.get("unified", "/")))
    if directory is None and _read_only(mount.directory):
        return Layout("v2", (), dict.fromkeys(CONTROLLERS, _not_writable("cgroup2", mount.directory)))
    if directory is None:
        why = (
            f"no cgroup below {mount.directory} was delegated to us; "
            "start under `systemd-run --user --scope -p Delegate=yes`, as root, or give a cgroup parent of ours"
        )
        return Layout("v2", (), dict.fromkeys(CONTROLLERS, why))
    base = _existing(directory)
    # All that are in the root of a container's cgroup namespace are the container's, and nobody else will move them.
    make_room = make_room or (parent is None and base == mount.directory and _is_ours_alone(base))
    if not _writable(base):
        return Layout("v2", (), dict.fromkeys(CONTROLLERS, _not_writable("cgroup2", base)))
    missing: dict[str, str] = {}
    occupied = base if is_occupied(base) else None
    there = set(files.read(base, "cgroup.controllers").split())
    on = set(files.read(base, "cgroup.subtree_control").split())
    for name in V2_CONTROLLERS:
        if name not in there:
            missing[name] = (
                f"{base} does not have the {name} controller; "
                f"switch it on above (echo +{name} > .../cgroup.subtree_control; systemd: Delegate={name})"
            )
        elif name not in on and occupied is not None and not make_room:
            missing[name] = (
                f"{base} holds processes, and cgroup v2 gives no controllers to cgroups below such a one; "
                "give a parent without processes (systemd: DelegateSubgroup=), or allow to move them (make_room)"
            )
    try:
        os.close(devices.load(()))
    except OSError as error:
        missing["devices"] = (
            f"no BPF device program can be loaded ({os.strerror(error.errno or 0)}); CAP_BPF and CAP_NET_ADMIN needed"
        )
    usable = tuple(name for name in CONTROLLERS if name not in missing)
    return Layout("v2", (Place(usable, mount, directory),), missing, occupied if make_room else None)


def _choose_v2(mount: Mount, own: str | None) -> str | None:
    """The parent when none was given: a free delegated subtree above us, as root the top, else our own cgroup."""
    above = list(_upwards(own, mount.directory)) if own is not None else []
    delegated = [directory for directory in above if _is_delegated(directory)]
    if own is not None and os.path.basename(own) == HOST_LEAF:
        delegated.insert(0, os.path.dirname(own))  # an engine before us has made room there
    for directory in delegated:
        if _writable(directory) and not is_occupied(directory):
            return directory
    if is_root(mount.directory) and _writable(mount.directory):
        return f"{mount.directory}/{SLICE}"
    for directory in (*delegated, *above[:1]):
        if _writable(directory):
            return directory
    return None


def _upwards(directory: str, top: str) -> Iterator[str]:
    while True:
        yield directory
        if len(directory) <= len(top):
            return
        directory = os.path.dirname(directory)


def _is_delegated(directory: str) -> bool:
    """Whether systemd gave this subtree away. Only root sees the trusted mark; user units have the other."""
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:  # not there, not supported, not for us to see: all mean no
            continue
    return False


def is_root(directory: str) -> bool:
    """Whether this is the root of the whole v2 hierarchy (not of a namespace): it alone has no type."""
    return not os.path.exists(f"{directory}/cgroup.type")


def is_occupied(directory: str) -> bool:
    """Whether processes are in this very cgroup, so that v2 refuses controllers below (the root may have both)."""
    return not is_root(directory) and bool(files.read(directory, "cgroup.procs"))


def _is_ours_alone(directory: str) -> bool:
    """Whether this is not the root of all, and every process in it is one that we see by a number."""
    return not is_root(directory) and "0" not in files.read(directory, "cgroup.procs").split()


def _writable(directory: str) -> bool:
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=True)


def _existing(directory: str) -> str:
    """The directory itself, or the nearest above that exists."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    return directory


def _join(top: str, path: str) -> str:
    return f"{top}/{path.strip('/')}".rstrip("/")


def _not_writable(name: str, directory: str) -> str:
    # All that say the same are told once.
    what = _TOP if standing.no_cgroup_is_given() else f"{directory} ({name})"
    reason = "is mounted read-only" if _read_only(directory) else "is not ours to write"
    # An ordinary user, whose container this may be, has none of v1 to give away.
    if _read_only(directory) and (name == "cgroup2" or not standing.is_inside()):
        from unisandbox.host.power import remedies  # seldom needed

        return f"{what} {reason}; {remedies.remedy_within(['cgroups'])}"
    root = "root" if os.geteuid() else "root of the host"
    return (
        f"{what} {reason}; run as {root}, give a cgroup parent that we may write, "
        "or start the surrounding container with a writable cgroup file system"
    )


def _read_only(directory: str) -> bool:
    return bool(os.statvfs(_existing(directory)).f_flag & os.ST_RDONLY)
