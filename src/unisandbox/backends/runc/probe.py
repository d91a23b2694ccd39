"""Whether sandboxes of namespaces can run on this host, and what is missing.

The cheap answer looks at facts and at the cached verdict of a deep one that succeeded. The deep one runs a real
sandbox in a child process with a deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import Probe, SandboxError
from unisandbox.backends.runc import overlays, users
from unisandbox.host import subordinate
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.pidfd import has_ended
from unisandbox.host.power import ids, obstacles, remedies, standing, trial
from unisandbox.host.power.remedies import Obstacle
from unisandbox.network import pasta
from unisandbox.oci.features import RuntimeProgram, losses, pick_runtime

DEEP_SECONDS: Final = 30.0
# mount_setattr(2) with idmapped mounts came with 5.12.
_OLDEST_KERNEL: Final = (5, 12)
_LARGEST_ANSWER: Final = 1 << 16

# Runs in a process of its own: an engine, a sandbox, one program.
_TRIAL: Final = """
import anyio, json, sys
async def main():
    import unisandbox
    from unisandbox.host import syscalls
    # Else its keeper is left to our parent, and nobody reaps it where that is no PID 1 that does.
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    try:
        from unisandbox.backends.runc import RuncBackend
        async with unisandbox.Engine.open(backends={"runc": RuncBackend(sys.argv[1] or None)}) as engine:
            limited = {"memory", "pids"} <= RuncBackend().capabilities.limits
            resources = unisandbox.Resources() if limited else unisandbox.Resources(memory=None, pids=None)
            async with engine.create(rootfs="host", isolation="runc", resources=resources) as sandbox:
                done = await sandbox.run(["/bin/true"])
        answer = {"ok": done.exit_code == 0, "reason": f"a sandbox ran /bin/true: exit code {done.exit_code}"}
    except unisandbox.SandboxError as error:
        answer = {"ok": False, "reason": error.message, "hint": error.hint}
    print(json.dumps(answer))
anyio.run(main)
"""


async def probe(*, deep: bool = False, runtime: str | None = None) -> Probe:
    """See `Backend.probe`."""
    await anyio.lowlevel.checkpoint()
    facts: dict[str, str] = {"kernel": os.uname().release}
    warnings: list[str] = []
    found = [obstacle async for obstacle in _obstacles(facts, warnings, runtime)]
    if found:
        return Probe(
            backend="runc",
            available=False,
            reason=found[0].reason,
            hint=found[0].remedy,
            facts=facts,
            warnings=tuple(warnings),
        )
    cache = _cache_file(await pick_runtime(runtime))
    verdict = await _try(runtime) if deep else _remembered(cache)
    if deep and verdict is not None and verdict["ok"] is True:
        # Only a success is a fact: what failed once (a full disk, a busy machine) must not be refused from then on.
        _remember(cache, verdict)
    if verdict is None:
        return Probe(
            backend="runc",
            available=True,
            reason=f"{facts['runtime']} found, nothing forbids it",
            facts=facts,
            warnings=tuple(warnings),
        )
    return Probe(
        backend="runc",
        available=verdict["ok"] is True,
        reason=str(verdict.get("reason", "")),
        hint=str(verdict.get("hint", "")),
        facts=facts,
        deep=deep,
        warnings=tuple(warnings),
    )


async def _obstacles(facts: dict[str, str], warnings: list[str], runtime: str | None) -> AsyncIterator[Obstacle]:
    if sys.platform != "linux":
        yield Obstacle(f"it needs Linux, this is {sys.platform}", "Run it on Linux.")
        return
    if standing.kernel() < _OLDEST_KERNEL:
        yield Obstacle(f"it needs Linux 5.12, this is {os.uname().release}", remedies.NEWER_KERNEL)
    forbidden = await trial.of_namespaces()
    if standing.lacking():
        if obstacle := obstacles.of_power_in_them(forbidden):
            yield obstacle._replace(reason=f"as {_who()}: {obstacle.reason}")
        else:
            facts["without root"] = "; ".join(users.capabilities().notes)
            facts["directories that are written"] = overlays.fact()
            if scarcity := ids.scarcity():
                facts["user ids"] = "1: this user's own"
                warnings.append(
                    f"one user id only, so no users but root inside, who keeps this user's groups: {scarcity.reason}."
                    f" Remedy: {scarcity.remedy}"
                )
            else:
                uids, _ = ids.maps()
                facts["user ids"] = f"{subordinate.count(uids)}: this user's own and subordinate ones"
    elif obstacle := remedies.of_all(forbidden):
        yield obstacle
    elif hidden := remedies.of_all(obstacles.masked()):
        warnings.append(f"only userns='host' works: {hidden.reason}. Remedy: {hidden.remedy}")
    try:
        program = await pick_runtime(runtime)
        facts["runtime"] = f"{program.name} {program.version_text} ({program.path})"
        warnings.extend(
            f"not with {program.name} {program.version_text}: {loss}. Remedy: apt install crun"
            for loss in losses(program)
        )
    except SandboxError as error:
        yield Obstacle(error.message, error.hint)
    most = standing.user_namespaces()
    facts["user namespaces"] = f"max {most}" if most >= 0 else "not in this kernel"
    if none := obstacles.no_user_namespaces():
        warnings.append(f"only userns='host' works: {none.reason}. Remedy: {none.remedy}")
    why, remedy = pasta.obstacle()
    facts["network 'user'"] = f"not here: {why}. {remedy}" if why else f"by pasta ({pasta.program()})"
    try:
        cgroups = Cgroups.detect("unisandbox-probe")
    except SandboxError as error:
        yield Obstacle(error.message, error.hint)
        return
    facts["cgroups"] = f"{cgroups.version}, controllers {', '.join(sorted(cgroups.controllers)) or 'none'}"
    warnings.extend(cgroups.reasons())


def _who() -> str:
    lacking = standing.lacking()
    return lacking if os.geteuid() == 0 else f"user id {os.geteuid()}"


async def _try(runtime: str | None) -> dict[str, object]:
    """Run the trial in a child; whatever it does, an answer comes within the deadline."""
    begun = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(  # noqa: ASYNC221 (it does not block: vfork until the exec)
            sys.executable,
            [sys.executable, "-P", "-c", _TRIAL, runtime or ""],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, null, 2),
            ],
            setsigmask=(),
        )
    finally:
        os.close(writer)
        os.close(null)
    pidfd = os.pidfd_open(pid)
    said = b""
    try:
        os.set_blocking(reader, False)
        with anyio.move_on_after(DEEP_SECONDS):
            while True:
                await anyio.wait_readable(reader)
                piece = os.read(reader, _LARGEST_ANSWER)
                if not piece or len(said) > _LARGEST_ANSWER:
                    break
                said += piece
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        has_ended(pidfd, 5.0)
        with contextlib.suppress(ChildProcessError):  # the host program reaps its children itself
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # noqa: ASYNC222 (it is dead)
        os.close(pidfd)
        os.close(reader)
    try:
        answer = json.loads(said)
    except ValueError:
        waited = time.monotonic() - begun
        return {
            "ok": False,
            "reason": f"a trial sandbox gave no readable answer ({len(said)} bytes after {waited:.1f} s)",
            "hint": "Run `unisandbox run -- true` and look at its error.",
        }
    return dict(answer)


def _cache_file(program: RuntimeProgram) -> str:
    """A verdict holds for this program, this kernel and this boot."""
    status = os.stat(program.path)
    key = f"{program.path} {status.st_size} {status.st_mtime_ns} {os.uname().release} {sys.executable}"
    key += standing.read("/proc/sys/kernel/random/boot_id")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "unisandbox", f"probe-runc-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")


def _remembered(path: str) -> dict[str, object] | None:
    try:
        if os.stat(path).st_uid != os.geteuid():
            return None
        with open(path, "rb") as file:
            answer = json.load(file)
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and answer.get("ok") is True else None


def _remember(path: str, verdict: dict[str, object]) -> None:
    if not os.path.isabs(path):
        return  # this user has no home
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(verdict, file)
        os.rename(temporary, path)
    except OSError:
        return  # without a cache the next cheap answer rests on facts alone
