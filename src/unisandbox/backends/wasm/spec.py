"""What a guest is to be and how it ended. Named tuples: each process of a guest defines them anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from unisandbox.backends.wasm.budget import Budget, CpuRate
from unisandbox.backends.wasm.trampoline import MOST_DESCRIPTORS

if TYPE_CHECKING:
    from unisandbox.backends.wasm.disk import Disk

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

EndReason = Literal["exited", "signaled", "trap", "oom", "cpu", "fuel"]


class Preopen(NamedTuple):
    """A directory of the host that a guest sees.

    Attributes:
        path: on the host; opened when the guest starts (`/proc/self/fd/N` for a held directory).
        target: the guest's absolute path of it.
        writable: False: nothing in it can be changed.
        counted: what is written in it is counted in the guest's `disk`, if it has one.
    """

    path: str
    target: str
    writable: bool = False
    counted: bool = True


class GuestLimits(NamedTuple):
    """What a guest may use.

    Attributes:
        memory: bytes for the linear memories of all guests of its sandbox; None: 4 GiB for each memory.
        cpu_seconds: seconds of processor time of its thread, after which it ends ("cpu").
        cpu: rate of processor time, shared by all guests of its sandbox.
        fuel: wasmtime's count of instructions, after which it ends ("fuel"); the domain must have `fuel=True`.
        files: descriptors that it may have open, its streams and directories with them; never more than
            `MOST_DESCRIPTORS`.
        table_elements: for each table, 8 bytes each; tables are not counted in `memory`.
        tables: of the module.
        memories: of the module.
    """

    memory: Budget | None = None
    cpu_seconds: float | None = None
    cpu: CpuRate | None = None
    fuel: int | None = None
    files: int = MOST_DESCRIPTORS
    table_elements: int = 100_000
    tables: int = 16
    memories: int = 16


class GuestSpec(NamedTuple):
    """What to run.

    Attributes:
        argv: with the program's name first.
        env: its whole environment.
        preopens: in this order.
        stdin, stdout, stderr: file descriptors; they are the guest's own once `start` has returned, closed when it ends
            or closes them. None: an empty input, an output that is thrown away.
        limits: what it may use.
        cwd: told to it as PWD, and by nothing else: preview 1 has no working directory.
        disk: what it writes in its directories is counted there before; None: the kernel bounds it.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = _NOTHING
    preopens: Sequence[Preopen] = ()
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    limits: GuestLimits = GuestLimits()
    cwd: str = "/"
    disk: Disk | None = None


class GuestEnd(NamedTuple):
    """How a guest ended.

    Attributes:
        code: 0-255.
        reason: why.
        signal: 9, 15, ... when it was killed, 13 when it wrote to an output that nobody reads any more; else None.
        detail: the trap's name and the Wasm backtrace.
        cpu_seconds: processor time of its thread.
        ended_at: seconds since the epoch.
    """

    code: int
    reason: EndReason = "exited"
    signal: int | None = None
    detail: str = ""
    cpu_seconds: float = 0.0
    ended_at: float = 0.0
