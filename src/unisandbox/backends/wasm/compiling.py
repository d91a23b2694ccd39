"""Compiles modules in children of the keeper: bounded in memory and time, ended by a cancellation or a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import attrs

from unisandbox.api import BackendError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from unisandbox.api.units import GIB, MIB
from unisandbox.backends.wasm.compiler import INVALID
from unisandbox.backends.wasm.places import Place, place_in
from unisandbox.backends.wasm.programs import Program
from unisandbox.host import bytecode
from unisandbox.host.cgroups import Cgroup, Limits
from unisandbox.host.keeper import Guard, SpawnFailed
from unisandbox.host.services import Host

_COMPILER: Final = str(Path(__file__).with_name("compiler.py"))
_CLEANING_SECONDS: Final = 10.0
_PIDS: Final = 16
_PROCESSORS: Final = os.cpu_count() or 1
_THREADS: Final = min(_PROCESSORS, 4)
_SHORT_SECONDS: Final = 2.0
"""What takes longer gives its place to the next in line: most modules are compiled in a fraction of that."""

_NOT_EXECUTABLE: Final = 126  # as a shell says it
_LOG_BYTES: Final = 4096


@attrs.frozen
class CompileLimits:
    """What the compilation of one module may use.

    Attributes:
        memory: bytes. CPython's 26 MB take 1.2 GB, since every access to memory is checked by code of its own.
        seconds: from its start to its end. CPython takes 25 s of processor time.
        artefact: bytes of machine code.
    """

    memory: int = 2 * GIB
    seconds: float = 120.0
    artefact: int = 512 * MIB

    @property
    def cpu_seconds(self) -> int:
        """Of processor time: what all its threads can use in `seconds`, so it only ends one that nobody waits for."""
        return math.ceil(self.seconds * _THREADS) + 1


class _TooLongError(Exception):
    """It was ended, since its short place is over and no long one is free."""


class Compiler:
    """Compiles for one engine, as many modules at once as there are processors.

    Half of the places are for two seconds. What takes longer goes on in one of the others; when none of these is free,
    it is ended, and begun again when its turn there has come. So modules that take long wait for each other alone.
    """

    def __init__(self, host: Host, settings: Mapping[str, bool], limits: CompileLimits) -> None:
        """Args: settings: what `config.configuration` is called with."""
        self._host = host
        self._settings = dict(settings)
        self._limits = limits
        self._long = anyio.Semaphore(max(_PROCESSORS // 2, 1))
        self._short = anyio.Semaphore(max(_PROCESSORS - _PROCESSORS // 2, 1))

    async def compile(self, program: Program) -> int:
        """Compile a module, binary or text: a memfd of the artefact, the caller's to close, written for the last time.

        Raises:
            InvalidArgumentError: it is no valid module, was changed, or takes too much memory; exit code 126.
            DeadlineExceededError: it takes longer than the limit.
            BackendError, UnavailableError: no compiler can be started.
        """
        fds: list[int] = []
        try:
            for name in ("module", "artefact", "messages"):
                fds.append(os.memfd_create(name, os.MFD_CLOEXEC))  # noqa: PERF401 (those made so far are closed)
            await program.copy(fds[0])
            label = repr(program.path)
            status, oom = await self._in_turn(fds, label)
            said = os.pread(fds[2], _LOG_BYTES, 0).decode(errors="replace").strip()
            judge(status, said, label, self._limits, oom=oom)
            return fds.pop(1)
        finally:
            for fd in fds:
                os.close(fd)

    async def _in_turn(self, fds: list[int], label: str) -> tuple[int, bool]:
        """See `_run`."""
        with contextlib.suppress(_TooLongError):
            async with place_in(self._short) as place:
                return await self._run(fds, label, place)
        async with place_in(self._long):
            return await self._run(fds, label, None)

    async def _run(self, fds: list[int], label: str, short: Place | None) -> tuple[int, bool]:
        """The compiler's wait status, and whether the kernel ended it for memory.

        Args:
            fds: the compiler's own descriptors 0 to 2.
            label: what to call the module.
            short: a place that it may not keep for long.

        Raises:
            _TooLongError: no other place is free.
        """
        # A compiler that was ended before has used them.
        os.lseek(fds[0], 0, os.SEEK_SET)
        for fd in fds[1:]:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        host = self._host
        # Where there is none, it still ends with the keeper, as every program of the keeper's does.
        root = host.cgroups.root() if host.cgroups.places else host.cgroups.nowhere()
        bounded = "memory" in host.cgroups.controllers
        limits = Limits(memory=self._limits.memory, pids=_PIDS if "pids" in host.cgroups.controllers else None)
        limits = limits if bounded else attrs.evolve(limits, memory=None)
        name = f"wasm-{secrets.token_hex(4)}"
        dirs = root.predict(name, limits=limits)
        guards = [Guard(f"engine/{name}/dirs", "rmdir_cgroup", dirs), Guard(f"engine/{name}/kill", "kill_cgroup", dirs)]
        await host.keeper.guard(guards)
        cgroup: Cgroup | None = None
        try:
            cgroup = root.child(name, limits=limits)
            with anyio.move_on_after(self._limits.seconds):
                status = await self._spawn(name, cgroup, fds, short, bounded=bounded)
                return status, bounded and cgroup.oom_kills() > 0
        except SpawnFailed as error:
            raise BackendError(f"cannot compile {label}: no process can be started: {error.strerror}") from error
        finally:
            if cgroup is not None:
                cgroup.kill()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
                while cgroup is not None and not cgroup.remove():
                    await anyio.sleep(0.002)  # the kernel frees the process a moment after its end; no event tells
                if host.keeper.alive:
                    await host.keeper.unguard([guard.name for guard in guards])
        raise DeadlineExceededError(
            f"{label} was not compiled within {self._limits.seconds:g} s; the compiler was ended",
            hint="It is made to be slow, or this machine is busy. Give the backend a larger compile_seconds=.",
        )

    async def _spawn(self, name: str, cgroup: Cgroup, fds: list[int], short: Place | None, *, bounded: bool) -> int:
        if not sys.executable:
            raise UnavailableError("cannot compile: this program does not know its Python interpreter (sys.executable)")
        request = {
            "paths": [path for path in sys.path if os.path.isabs(path)],
            "settings": self._settings,
            "cpu_seconds": self._limits.cpu_seconds,
            "bytes": self._limits.artefact,
            "memory": 0 if bounded else self._limits.memory,
        }
        # Nothing of the caller's environment: it may hold secrets. A Python outside of the system's directories may
        # need this one to find its own library.
        env = {variable: os.environ[variable] for variable in ("LD_LIBRARY_PATH",) if variable in os.environ}
        env["RAYON_NUM_THREADS"] = str(_THREADS)
        keeper = self._host.keeper
        spawned = await keeper.spawn(
            name,
            [sys.executable, "-I", *bytecode.options(), _COMPILER, json.dumps(request)],
            env=env,
            cgroup_procs=cgroup.entry,
            fds=fds,
        )
        try:
            if short is not None:
                with anyio.move_on_after(_SHORT_SECONDS):
                    return (await keeper.wait_exit(spawned.pid, spawned.start_time)).status
                if not short.move(self._long):
                    raise _TooLongError
            return (await keeper.wait_exit(spawned.pid, spawned.start_time)).status
        finally:
            # However that ended: a compiler that nobody waits for is of no use.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(spawned.pidfd, signal.SIGKILL)
            os.close(spawned.pidfd)


def judge(status: int, said: str, label: str, limits: CompileLimits, *, oom: bool) -> None:
    """What the compiler's wait status means.

    Raises:
        InvalidArgumentError: it is no valid module, or takes more memory than the limit; exit code 126.
        DeadlineExceededError: it takes more processor time than the limit.
        BackendError: the compiler has ended otherwise than by success.
    """
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return
    if code == INVALID:
        raise InvalidArgumentError(f"{label} is no valid module: {said}", exit_code=_NOT_EXECUTABLE)
    if code == -signal.SIGXCPU:
        raise DeadlineExceededError(
            f"{label} was not compiled within {limits.cpu_seconds} s of processor time",
            hint="It is made to be slow. Give the backend a larger compile_seconds=.",
        )
    if oom or "MemoryError" in said or "memory allocation of" in said:
        raise InvalidArgumentError(
            f"{label} cannot be compiled within {limits.memory} bytes of memory",
            hint="Give the backend a larger compile_memory=.",
            exit_code=_NOT_EXECUTABLE,
        )
    raise BackendError(f"the compiler of {label} ended with {code}", log=said)
