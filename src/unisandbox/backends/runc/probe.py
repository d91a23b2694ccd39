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
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import anyio
import anyio.lowlevel

from unisandbox.api import Probe, SandboxError
from unisandbox.backends.runc import users
from unisandbox.host import confinement, subordinate
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.confinement import Confined
from unisandbox.host.pidfd import has_ended
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
# What a filter forbids in a user namespace is only seen there, and who goes there does not come back.
_FILTER_TRIAL: Final = """
import sys
sys.path[:0] = sys.argv[1:]
from unisandbox.host.confinement import forbidden_inside
sys.stdout.write(forbidden_inside())
"""


class _Obstacle(NamedTuple):
    reason: str
    hint: str


async def probe(*, deep: bool = False, runtime: str | None = None) -> Probe:
    """See `Backend.probe`."""
    await anyio.lowlevel.checkpoint()
    facts: dict[str, str] = {"kernel": os.uname().release}
    warnings: list[str] = []
    obstacles = [obstacle async for obstacle in _obstacles(facts, warnings, runtime)]
    if obstacles:
        first = obstacles[0]
        return Probe(
            backend="runc", available=False, reason=first.reason, hint=first.hint, facts=facts, warnings=tuple(warnings)
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


async def _obstacles(facts: dict[str, str], warnings: list[str], runtime: str | None) -> AsyncIterator[_Obstacle]:
    if sys.platform != "linux":
        yield _Obstacle(f"it needs Linux, this is {sys.platform}", "Run it on Linux.")
        return
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if version < _OLDEST_KERNEL:
        yield _Obstacle(f"it needs Linux 5.12, this is {os.uname().release}", "Use a newer kernel.")
    forbidden = await _forbidden()
    if subordinate.is_needed():
        reason, remedy = users.obstacle(forbidden)
        if reason:
            yield _Obstacle(f"as {_who()}: {reason}", remedy)
        else:
            facts["without root"] = "; ".join(users.capabilities().notes)
            scarcity, remedy = subordinate.scarcity()
            if scarcity:
                facts["user ids"] = "1: this user's own"
                warnings.append(
                    f"one user id only, so no users but root inside, who keeps this user's groups: {scarcity}."
                    f" Remedy: {remedy}"
                )
            else:
                uids, _ = subordinate.maps()
                facts["user ids"] = f"{subordinate.count(uids)}: this user's own and subordinate ones"
    elif forbidden:
        yield _Obstacle("; ".join(one.reason for one in forbidden), confinement.remedy(one.what for one in forbidden))
    elif hidden := confinement.masked():
        remedy = confinement.remedy(one.what for one in hidden)
        warnings.append(f"only userns='host' works: {hidden[0].reason}. Remedy: {remedy}")
    try:
        program = await pick_runtime(runtime)
        facts["runtime"] = f"{program.name} {program.version_text} ({program.path})"
        warnings.extend(
            f"not with {program.name} {program.version_text}: {loss}. Remedy: apt install crun"
            for loss in losses(program)
        )
    except SandboxError as error:
        yield _Obstacle(error.message, error.hint)
    limit = _read("/proc/sys/user/max_user_namespaces")
    facts["user namespaces"] = f"max {limit}" if limit else "not in this kernel"
    if limit in {"", "0"}:
        warnings.append(
            "user namespaces are off: only userns='host' works. Remedy: sysctl -w user.max_user_namespaces=15000"
        )
    why, remedy = pasta.obstacle()
    facts["network 'user'"] = f"not here: {why}. {remedy}" if why else f"by pasta ({pasta.program()})"
    try:
        cgroups = Cgroups.detect("unisandbox-probe")
    except SandboxError as error:
        yield _Obstacle(error.message, error.hint)
        return
    facts["cgroups"] = f"{cgroups.version}, controllers {', '.join(sorted(cgroups.controllers)) or 'none'}"
    warnings.extend(cgroups.reasons())


def _who() -> str:
    lacking = subordinate.lacking()
    return lacking if os.geteuid() == 0 else f"user id {os.geteuid()}"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


async def _forbidden() -> list[Confined]:
    """What of namespaces is forbidden; what can only be tried in them is not tried where nothing is filtered."""
    found = confinement.of_namespaces()
    if confinement.is_filtered() and all(one.what != "seccomp" for one in found) and (call := await _forbidden_call()):
        why = f"a filter of system calls (seccomp) forbids {call}, also to root of a user namespace"
        return [Confined("seccomp", why), *found]
    return found


async def _forbidden_call() -> str:
    """See `confinement.forbidden_inside`. Without an answer nothing is known."""
    argv = [sys.executable, "-P", "-S", "-c", _FILTER_TRIAL, *(path for path in sys.path if path)]
    with anyio.move_on_after(DEEP_SECONDS), contextlib.suppress(OSError):
        done = await anyio.run_process(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
    return ""


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
    key += _read("/proc/sys/kernel/random/boot_id")
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
