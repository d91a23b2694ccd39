"""What can only be seen where nobody comes back from: tried in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Final

import anyio

from unisandbox.host.power import obstacles, standing
from unisandbox.host.power.remedies import Confined

_SECONDS: Final = 30.0
_TRIAL: Final = """
import sys
sys.path[:0] = sys.argv[1:]
from unisandbox.host.power.obstacles import forbidden_inside
sys.stdout.write(forbidden_inside())
"""


async def of_namespaces() -> list[Confined]:
    """See `obstacles.of_namespaces`; what can only be tried in them is not tried where nothing is filtered."""
    found = obstacles.of_namespaces()
    if standing.is_filtered() and all(one.what != "seccomp" for one in found) and (call := await _forbidden_call()):
        why = f"a filter of system calls (seccomp) forbids {call}, also to root of a user namespace"
        return [Confined("seccomp", why), *found]
    return found


async def _forbidden_call() -> str:
    """See `obstacles.forbidden_inside`. Without an answer nothing is known."""
    argv = [sys.executable, "-P", "-S", "-c", _TRIAL, *(path for path in sys.path if path)]
    with anyio.move_on_after(_SECONDS), contextlib.suppress(OSError):
        done = await anyio.run_process(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
    return ""
