"""Backends by name, found through the entry point group `unisandbox.backends`; none is imported before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from unisandbox.api import Capabilities, InvalidArgumentError, Probe, Sandboxer, UnavailableError
from unisandbox.api.names import check_isolation
from unisandbox.host.services import Host

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "unisandbox.backends"
_HOW: Final = "docs/backends.md says what a backend consists of."
_PARTS: Final = ("name", "capabilities", "rank", "probe", "open")


class Backend(Protocol):
    """What an entry point of the group gives: a backend that is not open yet.

    Attributes:
        name: as users write it in `isolation=`.
        capabilities: what it can do where it runs.
        rank: "auto" takes the available backend with the highest rank, of those that have such a root file system.
    """

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def rank(self) -> int: ...

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here: in under 50 ms from cheap facts, or by really running something (`deep`)."""
        ...

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine. Called once per engine, on first use; may wait, but must not block."""
        ...


class Registry:
    """The backends of one engine: those installed, and those that were handed over."""

    def __init__(self, given: Mapping[str, Backend] | None = None) -> None:
        if not isinstance(given, Mapping | None):
            raise InvalidArgumentError(f"backends must map names to backends, got {given!r:.80}")
        for name, backend in (given or {}).items():
            if why_not := _why_none(backend, check_isolation(name)):
                raise InvalidArgumentError(f"{name!r} is no backend: {why_not}", hint=_HOW)
        self._given: dict[str, Backend] = dict(given or {})
        self._points: dict[str, EntryPoint] | None = None

    def names(self) -> list[str]:
        """Every name that `get` knows."""
        return sorted({*self._given, *self._entry_points()})

    def get(self, name: str) -> Backend:
        """The backend of that name, imported now.

        Raises:
            InvalidArgumentError: there is none.
            UnavailableError: it is installed but cannot be loaded, e.g. its extra is missing, or is none.
        """
        if name in self._given:
            return self._given[name]
        point = self._entry_points().get(name)
        if point is None:
            raise InvalidArgumentError(
                f"isolation {name!r} is not known", hint=f"Installed backends: {', '.join(self.names()) or 'none'}."
            )
        try:
            backend: Backend = point.load()
        except Exception as error:  # a stranger's module may do anything; the others are there all the same
            why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise UnavailableError(
                f"backend {name!r} is installed but cannot be loaded: {why}", hint=_remedy(point)
            ) from error
        if why_not := _why_none(backend, name):
            raise UnavailableError(
                f"backend {name!r} is installed but is none: {why_not}", hint=f"{_remedy(point)} {_HOW}"
            )
        self._given[name] = backend
        return backend

    def remedy(self, name: str) -> str:
        """What to do about an installed backend that does not work; "" for one that was handed over."""
        point = self._entry_points().get(name)
        return "" if point is None else _remedy(point)

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._points is None:
            # A quarter of the time that importing the engine takes, and not needed by every process.
            from importlib.metadata import entry_points

            self._points = {point.name: point for point in entry_points(group=GROUP)}
        return self._points


def _remedy(point: EntryPoint) -> str:
    if point.dist is not None and point.dist.name == "unisandbox":
        return f"Its Python packages come with: pip install 'unisandbox[{point.name}]'."
    return f"It comes from {_package(point)}: mend or uninstall that."


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"the package {point.dist.name!r}"


def _why_none(backend: object, name: str) -> str:
    """Why this is no backend of that name; "" when it is one."""
    for part in _PARTS:
        if not hasattr(backend, part):
            return f"it has no {part}"
    own = getattr(backend, "name", "")
    return "" if own == name else f"it calls itself {own!r}"
