"""The points at which a process may be killed: all that the source has, and what a story does when it reaches one.

Most are the host's own. A keeper, its workers and those that run its guards have points of their own (`WITHIN`), at
which a keeper of `struck` kills whoever is to die: itself, the host, or both.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import anyio
import attrs
from tests.crash.struck import passed

import unisandbox
from unisandbox import Engine
from unisandbox.host import boundary, jobs, mount_operations
from unisandbox.host.keeper import protocol

Victim = Literal["host", "keeper", "both"]

# Requests that change nothing in the keeper: it is the same whether it dies before or after one of them.
ASKING: Final = frozenset(
    {
        *("hello", "clients", "exit_of", "exits_after", "events_after", "held", "notes", "ring_read", "take"),
        *("lock_holder", "cancel_wait"),
    }
)
# Those that are answered later, by something else than the taking up of the request.
ANSWERED_LATER: Final = frozenset({"spawn", "job"})
# How long a keeper may take to come to the request at which it is to die (seconds).
_STRIKE_SECONDS: Final = 5.0

SOURCE = Path(unisandbox.__path__[0])
# How the names of points end that a keeper, or a process that it has forked, comes to by itself.
WITHIN: Final = ", within the keeper"
# What runs there only: to what else the keeper imports, a host may come as well.
_KEEPERS_OWN: Final = ("host/keeper", "host/jobs.py")


def names_in_source() -> frozenset[str]:
    """Every name that is given to `reached`, "*" being each thing that may stand there; and the moments of requests."""
    found: set[str] = {moment for request in _requests() for moment in moments(request)}
    keepers = modules_of_the_keeper()
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "reached":
                name = node.args[0]
                assert isinstance(name, ast.Constant) and isinstance(name.value, str), f"{path}: no literal"  # noqa: PT018
                names = _expanded(name.value)
                if module not in keepers or not str(module).startswith(_KEEPERS_OWN):
                    found |= names
                if module in keepers:
                    found |= {name + WITHIN for name in names}
    return frozenset(found)


def _expanded(name: str) -> set[str]:
    if "*" not in name:
        return {name}
    families = {
        "keeper.*": _requests(),
        "step.*": set(jobs.STEPS),
        "mount.*": set(mount_operations.OPERATIONS),
        "guard.*": set(protocol.GUARD_KINDS),
    }
    return {name.replace("*", each) for each in families[name.partition(" ")[2]]}


@functools.cache
def modules_of_the_keeper() -> frozenset[Path]:
    """What its process imports of ours, below `SOURCE`."""
    found: set[Path] = set()
    left = [Path("host/keeper/server.py")]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
            left += [path for node in tree.body for path in _imported(node) if (SOURCE / path).is_file()]
    return frozenset(found)


def _imported(node: ast.stmt) -> list[Path]:
    """What a statement at the top of a module may import: what it takes from a package may be a module itself."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("unisandbox."):
        return []
    _, *parts = (node.module or "").split(".")
    return [Path(*parts).with_suffix(".py"), *(Path(*parts, f"{alias.name}.py") for alias in node.names)]


def moments(request: str) -> tuple[str, ...]:
    """The names of the points at which a keeper may die in the middle of this request."""
    if request in ASKING:
        return ()
    return (*([f"begun keeper.{request}"] if request in ANSWERED_LATER else []), f"done keeper.{request}")


def _requests() -> set[str]:
    """What a keeper may be asked for: the keys of its table."""
    tree = ast.parse((SOURCE / "host/keeper/server.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "attr", "") == "_requests":
            assert isinstance(node.value, ast.Dict)
            return {str(getattr(key, "value", "")) for key in node.value.keys}
    raise AssertionError("the keeper has no table of requests")


@attrs.frozen(order=True)
class Point:
    """One moment of a story.

    Attributes:
        story, step: where in it.
        name: of the boundary.
        nth: which time it is reached in this step, from 1.
    """

    story: str
    step: str
    name: str
    nth: int

    @property
    def is_inside(self) -> bool:
        """Whether it lies in the keeper, in the middle of a request."""
        return self.name.startswith(("begun ", "done "))

    @property
    def is_within(self) -> bool:
        """Whether a keeper, or a process that it has forked, comes to it by itself."""
        return self.name.endswith(WITHIN)

    def __str__(self) -> str:
        return f"{self.story}/{self.step}: {self.name} (no. {self.nth})"


@attrs.define
class Stage:
    """Where a story is played: it says what it promises before and after each step, and is killed at one point.

    Attributes:
        place: a directory for it; the engine's state is in `place/state`.
        policy: of the engine.
        target: where to kill; None: nowhere, and every point is told.
        victim: whom.
        step: which one is played.
        reached: the points so far.
        killed: the target was reached.
        engines: what the story has opened, to be closed in this order.
    """

    place: str
    policy: Literal["stop", "keep"]
    story: str
    target: Point | None = None
    victim: Victim = "host"
    step: str = ""
    reached: list[Point] = attrs.field(factory=list)
    killed: bool = False
    engines: list[Engine] = attrs.field(factory=list)
    _counts: dict[tuple[str, str], int] = attrs.field(factory=dict)
    _cuts: dict[str, anyio.CancelScope] = attrs.field(factory=dict)
    _is_armed: bool = False
    _heard_within: int = 0

    @property
    def state_dir(self) -> str:
        """Of its engine."""
        return f"{self.place}/state"

    @property
    def wish(self) -> str:
        """The file by which a keeper of `tests.crash.struck` is told when who is to die."""
        return f"{self.place}/strike"

    def say(self, **words: object) -> None:
        """Promise something; it is known to whoever comes after this process, whatever happens to it."""
        with open(f"{self.place}/promises", "ab", buffering=0) as file:
            file.write(json.dumps(words).encode() + b"\n")

    @contextlib.contextmanager
    def at(self, step: str) -> Iterator[None]:
        """Play a step."""
        self.step = step
        self.say(step=step)
        self._hear_within(None)
        if self.target is not None and self.target.step == step and self.target.is_within:
            self._arm(self.target.name.removesuffix(WITHIN), self.target.nth)
        boundary.watch(self._hear)
        try:
            yield
        finally:
            boundary.watch(None)
            self._hear_within(step)
            if self._is_armed:
                self._see_it_die()
        if self.target is not None and self.target.step == step and not self.killed:
            self.say(missed=True)
            self._kill()  # this time the step went by without that point: some are looks at what takes its time

    @contextlib.contextmanager
    def cut_at(self, name: str) -> Iterator[None]:
        """Cancel what is done when this point is first reached."""
        with anyio.CancelScope() as scope:
            self._cuts[name] = scope
            yield
        self._cuts.pop(name, None)

    def _hear(self, name: str, of: str) -> None:
        name = name.replace("*", of)
        self._pass(name, of)
        request = name.removeprefix("before keeper.")
        for moment in moments(request) if request != name else ():
            self._pass(moment, of)
        scope = self._cuts.pop(name, None)
        if scope is not None:
            scope.cancel()

    def _pass(self, name: str, of: str) -> None:
        nth = self._counts[self.step, name] = self._counts.get((self.step, name), 0) + 1
        point = Point(self.story, self.step, name, nth)
        if name == "before state.engine_id":
            self.say(directory=of)  # a private engine's has a name that nobody else knows
        if self.target is None:
            self.reached.append(point)
        elif point == self.target and point.is_inside:
            self._arm(name.replace("keeper.", ""), 1)
        elif point == self.target:
            self._kill()

    def _hear_within(self, step: str | None) -> None:
        """What the keeper has come by since the last time; None: it is of no step."""
        if self.target is not None or not os.path.exists(passed(self.wish)):
            return
        with open(passed(self.wish), encoding="ascii") as file:
            names = file.read().splitlines()
        for name in names[self._heard_within :] if step is not None else ():
            self._pass(name + WITHIN, "")
        self._heard_within = len(names)

    def _arm(self, moment: str, nth: int) -> None:
        """Somebody shall die when the keeper comes to this moment for the nth time from now on."""
        self.killed = self._is_armed = True
        self.say(killed=self.victim)
        with open(f"{self.wish}.new", "w", encoding="ascii") as file:
            json.dump({"moment": moment, "nth": nth, "victim": self.victim, "host": os.getpid()}, file)
        os.rename(f"{self.wish}.new", self.wish)

    def _see_it_die(self) -> None:
        """Whatever its client has noticed: an answer may not have been waited for."""
        self._is_armed = False
        end = time.monotonic() + _STRIKE_SECONDS
        while os.path.exists(self.wish) and time.monotonic() < end:
            time.sleep(0.002)
        if os.path.exists(self.wish):
            self.say(missed=True)
            os.unlink(self.wish)
        self._strike()

    def _kill(self) -> None:
        self.killed = True
        self.say(killed=self.victim)
        self._strike()

    def _strike(self) -> None:
        """Whoever is to die is dead afterwards, if he was not before."""
        if self.victim != "host":
            kill_keeper(self.state_dir)
        if self.victim != "keeper":
            os.kill(os.getpid(), signal.SIGKILL)


def kill_keeper(state_dir: str) -> None:
    """SIGKILL for the keeper of a state directory, if there is one; it is dead afterwards."""
    with _keeper_of(state_dir) as pidfd:
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 10.0)


def see_keeper_die(state_dir: str) -> None:
    """Wait for the end of a keeper that is being killed: whoever strikes both cannot strike them at the same time."""
    with _keeper_of(state_dir) as pidfd:
        if pidfd is not None:
            select.select([pidfd], [], [], 10.0)


@contextlib.contextmanager
def _keeper_of(state_dir: str) -> Iterator[int | None]:
    """A pidfd of it; None when there is none any more."""
    pidfd = -1
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int(json.loads(Path(state_dir, "lock").read_text(encoding="ascii"))["keeper"])
        pidfd = os.pidfd_open(pid) if pid else -1
    try:
        yield pidfd if pidfd >= 0 else None
    finally:
        if pidfd >= 0:
            os.close(pidfd)
