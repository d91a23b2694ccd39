"""How an attack is tried: lines of Python in a sandbox, which may lack some of its protections, or on the host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import attrs

from unisandbox import Engine, Sandbox, Security
from unisandbox.sandbox import SandboxOptions

PRELUDE: Final = """
import ctypes, errno, os, socket, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    got = getattr(libc, name)(*args)
    if got == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got
def syscall(number, *args):
    return call("syscall", ctypes.c_long(number), *args)
def attempt():
    {body}
try:
    attempt()
except (OSError, ValueError, AssertionError) as error:
    print("held:", repr(error))
else:
    print("escaped")
"""


_USUAL: Final = Security()
ALL_DEVICES: Final = Security(devices="all")
WITH_OLD_RIGHTS: Final = Security(no_new_privileges=False)


def unfiltered(*names: str, of: Security = _USUAL) -> SandboxOptions:
    """Everything as usual (or as in `of`), but for the filter and these capabilities."""
    more = frozenset(f"CAP_{name}" for name in names)
    return {"security": attrs.evolve(of, capabilities=of.capabilities | more, seccomp="unconfined")}


def privileged(*names: str, of: Security = _USUAL, **more: object) -> SandboxOptions:
    """Root of the host with these capabilities on top, no filter."""
    return {**unfiltered(*names, of=of), "userns": "host", **more}  # type: ignore[typeddict-item]


def without_mount_flags(path: str, body: str) -> str:
    """The attack, after a mount has lost what it was mounted with (MS_REMOUNT | MS_BIND); needs SYS_ADMIN."""
    return f'call("mount", None, b"{path}", None, 32 | 4096, None)\n    {body}'


async def attack(engine: Engine, body: str, **options: object) -> str:
    """Try it in a sandbox with those options: "escaped", or what has held it."""
    async with engine.create(**{"isolation": "runc", "rootfs": "host", **options}) as sandbox:  # type: ignore[arg-type]
        return await try_it(sandbox, body)


async def try_it(sandbox: Sandbox, body: str, *, user: str | None = None, by: Sequence[str] = ()) -> str:
    """The same in this one, as this user, started by this command."""
    done = await sandbox.run([*by, "python3", "-c", PRELUDE.replace("{body}", body)], user=user, timeout=60)
    if done.exit.reason == "oom":
        return "held: killed for its memory"
    assert done.stdout, done.stderr
    return done.text.strip()


def attack_from_the_host(body: str) -> str:
    """Try it as root of this machine, in namespaces where it harms nobody."""
    done = subprocess.run(
        ["unshare", "--mount", "--uts", "--ipc", sys.executable, "-c", PRELUDE.replace("{body}", body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.stdout.strip()
