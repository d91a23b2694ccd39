"""Where the time from create to the first result goes: the library's own methods, timed from outside.

Each phase has the time that was spent in its methods and not in those of another phase, so that the phases add up to
the whole. The rest is what no phase has: the SDK's objects, the event loop, the exchange of output.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from benchmarks.cases import TRUE
from benchmarks.measure import Series
from unisandbox import Engine
from unisandbox.backends.runc.planner import PodPlanner
from unisandbox.backends.runc.verifying import Verifier
from unisandbox.engine.records import RecordStore
from unisandbox.host.cgroups.cgroup import Cgroup
from unisandbox.host.keeper import Keeper
from unisandbox.oci import starting, task
from unisandbox.oci.runtime import Runtime

_WARM_UPS: Final = 2
REST: Final = "rest"

# Phase, owner, names of its functions; a function that is not there any more is an error, never a phase of nothing.
_PHASES: Final[tuple[tuple[str, object, tuple[str, ...]], ...]] = (
    ("records on disk", RecordStore, ("write",)),
    ("cgroups", Cgroup, ("child", "allow_devices", "admit", "enter", "oom_kills", "remove")),
    ("keeper: guards, leases, pins", Keeper, ("guard", "lease", "hold")),
    ("keeper: namespaces and mounts", Keeper, ("job",)),
    ("bundle", PodPlanner, ("prepare",)),
    ("crun: begin", Keeper, ("spawn",)),
    ("crun: create", Keeper, ("wait_exit",)),
    ("verification", Verifier, ("verify",)),
    ("start by FIFO", Runtime, ("start",)),
    ("init: spawn and exec", starting, ("spawn",)),
    ("program to its end", task.OciTaskService, ("wait",)),
    ("clean up after it", task.OciTaskService, ("delete",)),
)
NAMES: Final = (*(name for name, _, _ in _PHASES), REST)


class _Clock:
    """Exclusive times of nested phases of one task."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        self.spent = dict.fromkeys(NAMES, 0.0)
        self._stack = [REST]
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.spent[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self._stack:  # nobody is measuring
            yield
            return
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def stop(self) -> dict[str, float]:
        self._charge()
        self._stack = []
        return {name: seconds * 1e3 for name, seconds in self.spent.items()}


def _timed(clock: _Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with clock.phase(name):
                return await function(*args, **kwargs)

        return coroutine

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(name):
            return function(*args, **kwargs)

    return plain


@contextlib.contextmanager
def _wrapped(clock: _Clock) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, owner, functions in _PHASES:
            for function in functions:
                original = getattr(owner, function)
                stack.callback(setattr, owner, function, original)
                setattr(owner, function, _timed(clock, name, original))
        yield


async def measure_phases(engine: Engine, rounds: int, advance: Callable[[], None]) -> dict[str, Series]:
    """Milliseconds of each phase of a default sandbox, from create to the first result of /bin/true."""
    clock = _Clock()
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with _wrapped(clock):
        for number in range(-_WARM_UPS, rounds):
            clock.reset()
            sandbox = await engine.create(rootfs="host")
            try:
                await sandbox.run(TRUE, check=True)
                spent = clock.stop()
            finally:
                await sandbox.remove()
            if number >= 0:
                for name, value in spent.items():
                    found[name].append(value)
            advance()
    return {name: Series(tuple(values)) for name, values in found.items()}
