"""The tree of cgroups of one engine: where it is in each hierarchy, and what can be done with it on this host."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

import attrs

from unisandbox.api.errors import InvalidArgumentError, UnavailableError
from unisandbox.api.names import check_name
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import ending, files, hierarchy, marks, v1, v2
from unisandbox.host.cgroups.cgroup import Cgroup
from unisandbox.host.cgroups.hierarchy import Layout, Place, Version

_MKDIR_TRIES = 10


class Cgroups:
    """Where one engine's cgroups are, and what can be done with them on this host."""

    def __init__(self, name: str, layout: Layout) -> None:
        """Use `detect`."""
        self.name: str = check_name(name, "cgroup name")
        self._layout = layout
        self.version: Version = layout.version
        self.missing: Mapping[str, str] = dict(layout.missing)
        """For each controller that cannot be used: why, and what would help."""
        self.controllers: frozenset[str] = frozenset(c for place in layout.places for c in place.controllers)

    @classmethod
    def detect(
        cls, name: str, *, parent: str | None = None, make_room: bool = False, use_unified: bool = True
    ) -> Cgroups:
        """Look where an engine's cgroups can live. Changes nothing.

        Args:
            name: of the engine's own cgroup, below the parent.
            parent: path of the parent cgroup from the top of each hierarchy. Default: on v1 and hybrid hosts our own
                cgroup of each hierarchy; on v2 the nearest delegated cgroup above us that holds no processes, as root
                /unisandbox.slice, else our own cgroup.
            make_room: on v2, move the processes of a parent that holds some into a leaf below it (inside a container
                there is no other way to limits).
            use_unified: False pretends that a hybrid host has no cgroup2 tree.

        Raises:
            InvalidArgumentError: `name` or `parent` is not valid.
            UnavailableError: no cgroup file system is here at all. Anything less is in `missing`.
        """
        return cls(name, hierarchy.detect(parent, use_unified=use_unified, make_room=make_room))

    def placed(self, parents: Mapping[str, str]) -> Cgroups:
        """The same with parents that an engine had before, by `Place.key`; those that are not named stay."""
        places = tuple(attrs.evolve(place, parent=parents.get(place.key, place.parent)) for place in self.places)
        return Cgroups(self.name, self._layout._replace(places=places))

    def below(self, parent: str) -> Cgroups:
        """The same below another parent, by its path from the top of each hierarchy that we see; "": this one."""
        if not parent:
            return self
        return self.placed({place.key: place.mount.directory + parent for place in self.places})

    def leave(self) -> None:
        """Remove the engine's own cgroup, unless somebody is in it or below it."""
        for place in self.places:
            ending.remove_leaf(f"{place.parent}/{self.name}")

    @property
    def places(self) -> tuple[Place, ...]:
        """The hierarchies in use, in the order in which directories are made."""
        return self._layout.places

    @property
    def namespaces_are_borders(self) -> bool:
        """Whether a process in a cgroup namespace of its own cannot have children in cgroups outside of it.

        Source: mount option nsdelegate, Documentation/admin-guide/cgroup-v2.rst; systemd mounts with it.
        """
        return any(place.mount.nsdelegate for place in self.places)

    def reasons(self) -> list[str]:
        """What cannot be done here and why, one sentence each; empty when all is well."""
        grouped: dict[str, list[str]] = {}
        for controller, why in self.missing.items():
            grouped.setdefault(why, []).append(controller)
        return [f"cgroup {', '.join(names)}: {why}" for why, names in grouped.items()]

    def root(self) -> Cgroup:
        """The engine's own cgroup, made when it is not there yet.

        Raises:
            UnavailableError: no hierarchy can be used, with the reasons.
            OSError: the kernel refused.
        """
        if not self.places:
            raise UnavailableError("cgroups cannot be used here", hint="; ".join(self.reasons()))
        for place in self.places:
            directory = f"{place.parent}/{self.name}"
            if self.version == "v2":
                self._make_v2(directory, [c for c in hierarchy.V2_CONTROLLERS if c in self.controllers])
            else:
                self._make_v1(directory, place)
            marks.mark(directory)
        return self._cgroup("", {place: f"{place.parent}/{self.name}" for place in self.places})

    def nowhere(self) -> Cgroup:
        """What stands for the engine's own cgroup where no hierarchy can be used (`places` is empty).

        It and all below it have no directories: they take no limit, count nothing, and end nobody
        (`Cgroup.holds_processes`).
        """
        return self._cgroup("", {})

    def find(self, path: str) -> Cgroup:
        """The cgroup of this relative path ("s1/c1"; "" is the engine's), which may have been made by another process.

        Where no hierarchy can be used it is one as `nowhere` gives.

        Raises:
            FileNotFoundError: it is in no hierarchy.
        """
        for part in path.split("/") if path else ():
            check_name(part, "cgroup name")
        if not self.places:
            return self._cgroup(path, {})
        relative = f"{self.name}/{path}".rstrip("/")
        there = {place: f"{place.parent}/{relative}" for place in self.places}
        return self._existing(path, there)

    def dirs_of(self, name: str) -> tuple[str, ...]:
        """Where the cgroup of this name below the engine's has its directories, or would have; makes none.

        For the ending of what may be gone: `root` would make the engine's own anew, after everybody has left.
        """
        check_name(name, "cgroup name")
        return tuple(f"{place.parent}/{self.name}/{name}" for place in self.places)

    def _existing(self, path: str, there: Mapping[Place, str]) -> Cgroup:
        own = {place: directory for place, directory in there.items() if os.path.isdir(directory)}
        if not own:
            raise FileNotFoundError(errno.ENOENT, f"cgroup {self.name}/{path} does not exist")
        inherited = {}
        for place, directory in there.items():
            above = os.path.dirname(directory)
            if place not in own and path and os.path.isdir(above):
                inherited[place] = above
        return self._cgroup(path, own, inherited)

    def _cgroup(self, path: str, own: Mapping[Place, str], inherited: Mapping[Place, str] | None = None) -> Cgroup:
        return Cgroup(self, path, own, inherited or {})

    def _make_v1(self, directory: str, place: Place) -> None:
        _make_shared(directory)
        v1.prepare_root(directory, place.controllers)

    def _make_v2(self, directory: str, controllers: Sequence[str]) -> None:
        """Make a directory that has `controllers`, with what is above it."""
        above = os.path.dirname(directory)
        for left in reversed(range(_MKDIR_TRIES)):
            try:
                if self._layout.occupied == above:
                    _evacuate(above)
                there = files.read_optional(above, "cgroup.controllers")
                if there is None or not set(controllers) <= set(there.split()):
                    self._make_v2(above, controllers)
                v2.enable(above, controllers)
                _make_shared(directory)
            except FileNotFoundError:
                # Another engine, which closed, removed the slice between two of our steps.
                if not left:
                    raise
            else:
                return

    def clean_up(self) -> None:
        """Remove the slice that we made, unless somebody else is in it."""
        for place in self.places:
            if os.path.basename(place.parent) == hierarchy.SLICE:
                ending.remove_leaf(place.parent)


def open_existing(tree: Cgroups, dirs: Sequence[str]) -> Cgroup:
    """The cgroup that has these directories (`Cgroup.dirs`), made by a process that may be gone; some may be missing.

    Raises:
        InvalidArgumentError: a directory is not below a parent of `tree`.
        FileNotFoundError: none of them is there.
    """
    relative = set()
    for directory in dirs:
        place = next((p for p in tree.places if directory.startswith(f"{p.parent}/{tree.name}")), None)
        if place is None:
            raise InvalidArgumentError(f"{directory} is not a cgroup of {tree.name}")
        relative.add(directory[len(f"{place.parent}/{tree.name}") :].strip("/"))
    if len(relative) != 1:
        raise InvalidArgumentError(f"{', '.join(dirs)} are not one cgroup")
    return tree.find(relative.pop())


def _make_shared(directory: str) -> None:
    """The engine's own directory, which all its processes make when it is missing."""
    reached("before cgroup.mkdir", directory)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    reached("after cgroup.mkdir", directory)


def _evacuate(directory: str) -> None:
    """Move the processes of a v2 cgroup into a leaf below it."""
    if not hierarchy.is_occupied(directory):
        return
    leaf = f"{directory}/{hierarchy.HOST_LEAF}"
    os.makedirs(leaf, mode=0o755, exist_ok=True)
    for _ in range(_MKDIR_TRIES):
        for pid in files.read(directory, "cgroup.procs").split():
            try:
                files.write(leaf, "cgroup.procs", pid)
            except ProcessLookupError:
                continue  # it ended meanwhile
        if not hierarchy.is_occupied(directory):
            return
    raise OSError(errno.EBUSY, f"cannot empty cgroup {directory}: processes keep coming into it")
