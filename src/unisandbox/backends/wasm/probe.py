"""Whether Wasm sandboxes can run on this host."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from typing import Final

import anyio
import anyio.lowlevel

from unisandbox.api import Probe, UnavailableError
from unisandbox.backends.wasm.capabilities import NAME
from unisandbox.host.power import obstacles, remedies, standing
from unisandbox.host.power.remedies import Obstacle

TESTED: Final = ((50, 0), (51, 0))
"""Versions of wasmtime, from the first to before the second: its C API is used below what it promises."""

_HINT: Final = "Install it: pip install 'unisandbox[wasm]'."
# openat2(2), by which what guests name is looked up, mounted or not.
_OLDEST_LOOKUPS: Final = (5, 6)
# mount_setattr(2) came with 5.12, overlays from descriptors need nothing newer.
_OLDEST_KERNEL: Final = (5, 12)
_DEEP_SECONDS: Final = 30.0
# A module that ends with 7, compiled and run where it can do no harm to this process.
_TRIAL: Final = """
import os, sys
import wasmtime
from unisandbox.backends.wasm.config import configuration
engine = wasmtime.Engine(configuration())
text = '(module (func (export "seven") (result i32) i32.const 7))'
store = wasmtime.Store(engine)
store.set_epoch_deadline(1)
instance = wasmtime.Instance(store, wasmtime.Module(engine, text), [])
os._exit(instance.exports(store)["seven"](store))
"""


def require_wasmtime() -> str:
    """The version of wasmtime.

    Raises:
        UnavailableError: it is missing, or one that was not tested.
    """
    try:
        version = _version("wasmtime")
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError("Wasm sandboxes need the package wasmtime, which is not installed", hint=_HINT) from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1]:
        wanted = f"at least {TESTED[0][0]}.{TESTED[0][1]} and below {TESTED[1][0]}.{TESTED[1][1]}"
        raise UnavailableError(f"wasmtime {version} is installed, and {wanted} was tested", hint=_HINT)
    return version


def _version(package: str) -> str:
    """As `importlib.metadata.version`, which from Python 3.13 on first imports a whole parser of mail for it (9 ms)."""
    text = importlib.metadata.distribution(package).read_text("METADATA") or ""
    found = re.search(r"^Version: *(\S+)$", text, re.MULTILINE)
    return found.group(1) if found else importlib.metadata.version(package)


async def probe(*, deep: bool = False) -> Probe:
    """See `Backend.probe`. `deep` compiles and runs a module in a process of its own."""
    await anyio.lowlevel.checkpoint()
    facts = {"kernel": os.uname().release, "machine": os.uname().machine}
    try:
        facts["wasmtime"] = require_wasmtime()
    except UnavailableError as error:
        return Probe(NAME, available=False, reason=error.message, hint=error.hint, facts=facts)
    for reason, hint in _obstacles():
        return Probe(NAME, available=False, reason=reason, hint=hint, facts=facts)
    if deep:
        failure = await _try()
        if failure:
            hint = "Is this processor one that wasmtime compiles for?"
            return Probe(NAME, available=False, reason=failure, hint=hint, facts=facts, deep=True)
        ran = "a module was compiled and run"
        return Probe(NAME, available=True, reason=ran, facts=facts, deep=True, warnings=_warnings())
    found = f"wasmtime {facts['wasmtime']} found, nothing forbids it"
    return Probe(NAME, available=True, reason=found, facts=facts, warnings=_warnings())


@functools.cache
def unmountable() -> Obstacle | None:
    """Why this process may mount nothing, and what gives it that; None where it may. Looked at once."""
    if os.geteuid() != 0:
        return Obstacle("this process is not root", "Run as root.")
    if not standing.may_mount():
        return Obstacle("this process is root without CAP_SYS_ADMIN", remedies.remedy(["sys_admin"]))
    if forbidden := remedies.of_all(obstacles.of_mounts()):
        return forbidden
    if standing.kernel() < _OLDEST_KERNEL:
        return Obstacle(f"this kernel is {os.uname().release}, older than 5.12", remedies.NEWER_KERNEL)
    return None


def _obstacles() -> Iterator[tuple[str, str]]:
    """What forbids it, and what to do about that."""
    if os.uname().machine not in {"x86_64", "aarch64"}:
        yield f"wasmtime compiles for x86_64 and aarch64, this is {os.uname().machine}", "Use another machine."
    if standing.kernel() < _OLDEST_LOOKUPS:
        yield f"it needs Linux 5.6, this is {os.uname().release}", remedies.NEWER_KERNEL
    elif forbidden := remedies.of_all(obstacles.of_lookups()):
        yield forbidden


def _warnings() -> tuple[str, ...]:
    obstacle = unmountable()
    if obstacle is None:
        return ()
    return (
        f"Nothing may be mounted ({obstacle.reason}): a sandbox has a copy of its root directory, and no mounts of"
        f" single files or of a tmpfs. To have them: {remedies.within(obstacle.remedy)}",
    )


async def _try() -> str:
    """Why it failed; empty when it has not."""
    argv = [sys.executable, "-c", _TRIAL]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    code: int | None = None
    with anyio.move_on_after(_DEEP_SECONDS), contextlib.suppress(OSError):
        code = (await anyio.run_process(argv, env=env, check=False)).returncode
    if code == 7:
        return ""
    return f"running a module in a process of its own ended with {'nothing in time' if code is None else code}"
